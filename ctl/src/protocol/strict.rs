//! Reading JSON from strangers: nothing twice, nothing unknown, no list for an object, and errors that name the place.

use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use super::Failure;

/// The one object that a line holds. No key may be there twice, and nothing may follow; nesting is bounded (by the JSON reader, at 128).
///
/// # Errors
///
/// What is wrong, and where in the line.
pub fn object(line: &[u8]) -> Result<Map<String, Value>, Failure> {
    let mut reader = serde_json::Deserializer::from_slice(line);
    let value = Unique.deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    match value {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Failure::generic("QMP input must be a JSON object")),
        Err(error) => Err(Failure::generic(format_args!("JSON parse error, {error}"))),
    }
}

/// The arguments as the type of a command.
///
/// # Errors
///
/// What is wrong, and at which key.
pub fn typed<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, Failure> {
    serde_path_to_error::deserialize(Exact(Value::Object(arguments))).map_err(|error| {
        let path = error.path().to_string();
        // The path of an error at the top is ".", which says nothing.
        let place = if path == "." { "arguments".to_owned() } else { format!("argument '{path}'") };
        let what = without_type_names(error.inner().to_string());
        match what.strip_prefix("unknown field ").and_then(|rest| rest.split_once(", ")) {
            Some((_, expected)) => Failure::generic(format_args!("{place} is unexpected: {}", expected.replace('`', "'"))),
            None => Failure::generic(format_args!("{place}: {}", what.replace('`', "'"))),
        }
    })
}

/// What was expected in the words of JSON, where the library names a type of ours.
fn without_type_names(what: String) -> String {
    match what.split_once(", expected struct ") {
        Some((found, _)) => format!("{found}, expected an object"),
        None => what,
    }
}

/// A JSON value as what it is. Left to itself, the library takes a list for an object whose members it has in order.
struct Exact(Value);

impl<'de> Deserializer<'de> for Exact {
    type Error = serde_json::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.0 {
            Value::Array(items) => {
                let mut items = SeqDeserializer::new(items.into_iter().map(Exact));
                let value = visitor.visit_seq(&mut items)?;
                items.end()?;
                Ok(value)
            }
            Value::Object(members) => {
                let mut members = MapDeserializer::new(members.into_iter().map(|(key, value)| (key, Exact(value))));
                let value = visitor.visit_map(&mut members)?;
                members.end()?;
                Ok(value)
            }
            plain => plain.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        match self.0 {
            Value::Array(_) => Err(Self::Error::invalid_type(Unexpected::Seq, &visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        identifier ignored_any
    }
}

impl IntoDeserializer<'_, serde_json::Error> for Exact {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Any JSON value whose objects have each key once.
#[derive(Clone, Copy)]
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key '{key}' is there twice")));
            }
            let value = entries.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}
