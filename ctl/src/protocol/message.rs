//! Lines on the wire, apart from what is in them.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Failure, strict};

/// A version as QEMU words it. The numbers are this program's; which commands are there is told by `query-commands`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// The numbers.
    pub qemu: VersionTriple,
    /// The program and its version.
    pub package: String,
}

/// Three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionTriple {
    /// The first.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

/// The version of this build.
#[must_use]
pub fn version() -> VersionInfo {
    let part = |text: &str| text.parse().unwrap_or(0);
    VersionInfo {
        qemu: VersionTriple {
            major: part(env!("CARGO_PKG_VERSION_MAJOR")),
            minor: part(env!("CARGO_PKG_VERSION_MINOR")),
            micro: part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        package: concat!("snapfence ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

/// One entry of `query-commands`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInfo {
    /// The command.
    pub name: String,
}

/// The first line, from the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// The version.
    pub version: VersionInfo,
    /// What may be enabled by `qmp_capabilities`: nothing yet.
    pub capabilities: Vec<String>,
}

/// The greeting of this build, as the object that goes over the wire.
#[must_use]
pub fn greeting() -> Value {
    serde_json::json!({ "QMP": Greeting { version: version(), capabilities: Vec::new() } })
}

/// A line from the client, its form checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The command.
    pub execute: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// What to give back with the answer, whatever it is.
    pub id: Option<Value>,
}

impl Request {
    /// Reads a line's object.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and its `id` if there is one: the answer has to carry it.
    pub fn parse(line: &[u8]) -> Result<Self, (Failure, Option<Value>)> {
        let mut object = strict::object(line).map_err(|failure| (failure, None))?;
        let id = object.remove("id");
        let fail = |what: String, id: &Option<Value>| Err((Failure::generic(what), id.clone()));
        let execute = match object.remove("execute") {
            Some(Value::String(name)) => name,
            Some(_) => return fail("QMP input member 'execute' must be a string".to_owned(), &id),
            None if object.contains_key("exec-oob") => {
                return fail("QMP input member 'exec-oob' is not supported here; use 'execute'".to_owned(), &id);
            }
            None => return fail("QMP input lacks member 'execute'".to_owned(), &id),
        };
        let arguments = match object.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return fail("QMP input member 'arguments' must be an object".to_owned(), &id),
        };
        if let Some(key) = object.keys().next() {
            return fail(format!("QMP input member '{key}' is unexpected"), &id);
        }
        Ok(Self { execute, arguments, id })
    }
}

/// When an event happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970, UTC.
    pub seconds: i64,
    /// And microseconds.
    pub microseconds: i64,
}

impl Timestamp {
    /// The present time by the system's clock.
    #[must_use]
    pub fn now() -> Self {
        // A clock before 1970 is as wrong as QMP's own "cannot say" value.
        let Ok(since) = SystemTime::now().duration_since(UNIX_EPOCH) else { return Self { seconds: -1, microseconds: -1 } };
        Self { seconds: i64::try_from(since.as_secs()).unwrap_or(-1), microseconds: since.subsec_micros().into() }
    }
}

/// A line from the daemon, after the greeting.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// A command was carried out.
    Return {
        /// What it returns.
        value: Value,
        /// The `id` it came with.
        id: Option<Value>,
    },
    /// A command was not carried out.
    Error {
        /// Why.
        failure: Failure,
        /// The `id` it came with.
        id: Option<Value>,
    },
    /// Something happened.
    Event {
        /// What, in QMP's capitals.
        name: String,
        /// More about it.
        data: Value,
        /// When.
        timestamp: Timestamp,
    },
}

impl Incoming {
    /// Reads a line's object. Members that we do not know are ignored: a newer daemon may say more.
    ///
    /// # Errors
    ///
    /// If it is none of the three.
    pub fn parse(line: &[u8]) -> Result<Self, Failure> {
        let mut object = strict::object(line)?;
        let id = object.remove("id");
        if let Some(value) = object.remove("return") {
            return Ok(Self::Return { value, id });
        }
        if let Some(error) = object.remove("error") {
            let failure =
                serde_json::from_value(error).map_err(|error| Failure::generic(format_args!("not an error as QMP has them: {error}")))?;
            return Ok(Self::Error { failure, id });
        }
        let (Some(Value::String(name)), Some(timestamp)) = (object.remove("event"), object.remove("timestamp")) else {
            return Err(Failure::generic("neither a return, an error nor an event"));
        };
        let timestamp = serde_json::from_value(timestamp).map_err(|error| Failure::generic(format_args!("not a timestamp: {error}")))?;
        Ok(Self::Event { name, data: object.remove("data").unwrap_or(Value::Object(Map::new())), timestamp })
    }
}
