//! Lines as the server sends them.

use std::io;
use std::sync::Arc;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};
use serde_json::{Value, json};
use snapfence::protocol::{Failure, Timestamp};

/// One line with its end, shared by all connections that it goes to.
pub(super) type Line = Arc<[u8]>;

/// Compact JSON in ASCII, as QMP promises its clients.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|letter: char| !letter.is_ascii()) {
            let (plain, beyond) = rest.split_at(at);
            CompactFormatter.write_string_fragment(writer, plain)?;
            let mut letters = beyond.chars();
            for unit in letters.next().expect("find has found it").encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = letters.as_str();
        }
        CompactFormatter.write_string_fragment(writer, rest)
    }
}

/// A value as a line.
fn line(value: &Value) -> Line {
    let mut bytes = Vec::with_capacity(128);
    value.serialize(&mut Serializer::with_formatter(&mut bytes, Ascii)).expect("a JSON value can be written to memory");
    bytes.extend_from_slice(b"\r\n");
    bytes.into()
}

pub(super) fn greeting() -> Line {
    line(&snapfence::protocol::greeting())
}

/// The answer to a request with this `id`.
pub(super) fn answer(result: Result<Value, Failure>, id: Option<Value>) -> Line {
    let mut object = match result {
        Ok(value) => json!({ "return": value }),
        Err(failure) => json!({ "error": failure }),
    };
    if let Some(id) = id {
        object["id"] = id;
    }
    line(&object)
}

/// An event that happens now. `event` has the members `event` and `data`.
pub(super) fn event(mut event: Value) -> Line {
    event["timestamp"] = json!(Timestamp::now());
    line(&event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_ascii_and_mean_the_same() {
        let text = "a\u{e4}\u{1f980}\"\\\n\u{7f}b";
        let line = answer(Ok(json!(text)), Some(json!({ "\u{e4}": 1 })));
        assert!(line.is_ascii());
        assert!(line.ends_with(b"}\r\n"));
        let read: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(read, json!({ "return": text, "id": { "\u{e4}": 1 } }));
    }
}
