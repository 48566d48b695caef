//! Finds the JSON objects in a stream of bytes.
//!
//! Clients differ: some end each object with a line feed, some end it with nothing (the stock Python client), and people paste examples that span
//! lines. So an object ends with its last brace, however long that takes: no part of it is ever read as another one. Only a byte that can be in no
//! JSON text, a string that runs over its line, or the size limit end it before, as in QEMU; reading goes on with the next line: one error, and the
//! connection lives.

use snapfence::protocol::Failure;

use super::quotes::in_double_quotes;

/// The longest object, in bytes.
pub(super) const OBJECT_LIMIT: usize = 1 << 20;

/// What the stream holds next.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    /// The bytes of one object, its braces balanced and its strings in double quotes; otherwise it can be anything.
    Object(Vec<u8>),
    /// Something else, now skipped.
    Bad(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between objects.
    Between,
    /// In an object that begins at the start of the buffer.
    Object {
        depth: usize,
        text: Text,
        /// Some string is in single quotes.
        single: bool,
    },
    /// In something that is no object, up to the end of the line.
    Other,
    /// In the rest of something too long, up to the end of the line.
    Skipping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    Outside,
    /// Up to this quote.
    Inside(u8),
    Escaped(u8),
}

/// Cuts a stream into [`Frame`]s.
#[derive(Debug)]
pub(super) struct Framer {
    /// Bytes that belong to no frame yet.
    buffer: Vec<u8>,
    /// How many of them have been looked at.
    seen: usize,
    state: State,
}

/// Whether this byte can be in no JSON text: QMP's way to bring a reader back to a known state.
fn resets(byte: u8) -> bool {
    byte == 0xff || (byte < b' ' && !matches!(byte, b'\t' | b'\r' | b'\n'))
}

fn parse_error(what: &str) -> Frame {
    Frame::Bad(Failure::generic(format_args!("JSON parse error, {what}")))
}

impl Framer {
    pub(super) fn new() -> Self {
        Self { buffer: Vec::new(), seen: 0, state: State::Between }
    }

    /// Adds bytes from the stream.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that are held.
    pub(super) fn held(&self) -> usize {
        self.buffer.len()
    }

    /// Whether something has begun that will only end if the client sends more.
    pub(super) fn waits(&self) -> bool {
        self.state != State::Between
    }

    /// The next frame, if it is complete.
    pub(super) fn next(&mut self) -> Option<Frame> {
        while let Some(&byte) = self.buffer.get(self.seen) {
            self.seen += 1;
            if resets(byte) {
                self.drop_seen();
                return Some(parse_error("a byte that JSON does not have"));
            }
            match &mut self.state {
                State::Between => match byte {
                    b' ' | b'\t' | b'\r' | b'\n' => {}
                    b'{' => {
                        self.buffer.drain(..self.seen - 1);
                        self.seen = 1;
                        self.state = State::Object { depth: 1, text: Text::Outside, single: false };
                    }
                    _ => self.state = State::Other,
                },
                State::Object { depth, text, single } => match (*text, byte) {
                    (Text::Outside, b'"' | b'\'') => {
                        *text = Text::Inside(byte);
                        *single |= byte == b'\'';
                    }
                    (Text::Outside, b'{' | b'[') => *depth += 1,
                    (Text::Outside, b'}' | b']') => {
                        *depth -= 1;
                        if *depth == 0 {
                            let rest = self.buffer.split_off(self.seen);
                            let object = std::mem::replace(&mut self.buffer, rest);
                            self.seen = 0;
                            let single = *single;
                            self.state = State::Between;
                            return Some(Frame::Object(if single { in_double_quotes(object) } else { object }));
                        }
                    }
                    (Text::Outside, _) => {}
                    (Text::Inside(_) | Text::Escaped(_), b'\n') => {
                        self.drop_seen();
                        return Some(parse_error("a string does not end with its line"));
                    }
                    (Text::Inside(quote), _) if byte == quote => *text = Text::Outside,
                    (Text::Inside(quote), b'\\') => *text = Text::Escaped(quote),
                    (Text::Inside(_), _) => {}
                    (Text::Escaped(quote), _) => *text = Text::Inside(quote),
                },
                State::Other => {
                    if byte == b'\n' {
                        self.drop_seen();
                        return Some(parse_error("expected an object"));
                    }
                }
                State::Skipping => {
                    if byte == b'\n' {
                        self.drop_seen();
                    }
                }
            }
            if self.state != State::Skipping && self.seen > OBJECT_LIMIT {
                self.drop_seen();
                self.state = State::Skipping;
                return Some(parse_error("longer than 1 MiB"));
            }
        }
        if matches!(self.state, State::Between | State::Skipping) {
            self.buffer.clear();
            self.seen = 0;
        }
        None
    }

    /// Gives up all that is held: nothing more will come.
    pub(super) fn finish(&mut self) -> Option<Frame> {
        let state = self.state;
        self.seen = self.buffer.len();
        self.drop_seen();
        match state {
            State::Between | State::Skipping => None,
            State::Object { .. } | State::Other => Some(parse_error("the input ends within an object")),
        }
    }

    fn drop_seen(&mut self) {
        self.buffer.drain(..self.seen);
        self.seen = 0;
        self.state = State::Between;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framer: &mut Framer) -> Vec<String> {
        std::iter::from_fn(|| framer.next())
            .map(|frame| match frame {
                Frame::Object(bytes) => String::from_utf8(bytes).unwrap(),
                Frame::Bad(failure) => format!("! {}", failure.desc.trim_start_matches("JSON parse error, ")),
            })
            .collect()
    }

    fn all(input: &[u8]) -> Vec<String> {
        let mut framer = Framer::new();
        framer.push(input);
        let whole = frames(&mut framer);
        let mut single = Framer::new();
        let mut found = Vec::new();
        for byte in input {
            single.push(&[*byte]);
            found.extend(frames(&mut single));
        }
        assert_eq!(whole, found, "all at once, and byte by byte");
        whole
    }

    #[test]
    fn objects_end_with_their_last_brace() {
        assert_eq!(all(b"{}"), ["{}"]);
        assert_eq!(all(b"{}{}\r\n\r\n {\"a\":1}\n"), ["{}", "{}", "{\"a\":1}"]);
        assert_eq!(all(b"{\"a\":\"}\\\"}\"}{}"), ["{\"a\":\"}\\\"}\"}", "{}"]);
        assert_eq!(all(b"{'}\"':'\\'}'}{\"it's\":'{'}"), ["{\"}\\\"\":\"'}\"}", "{\"it's\":\"{\"}"]);
        assert_eq!(all(b"{\n  \"a\": [\n    {}\n  ]\n}\n"), ["{\n  \"a\": [\n    {}\n  ]\n}"]);
        assert_eq!(all(b"{\"a\":[{\"b\":"), [""; 0]);
    }

    #[test]
    fn what_is_no_object_costs_one_error_and_its_line() {
        assert_eq!(all(b"hello {}\n{}"), ["! expected an object", "{}"]);
        assert_eq!(all(b"[1]\r\n42\n}\n{}"), ["! expected an object", "! expected an object", "! expected an object", "{}"]);
        assert_eq!(all(b"{\"a\n{}"), ["! a string does not end with its line", "{}"]);
        assert_eq!(all(b"{\"a\\\n{}"), ["! a string does not end with its line", "{}"]);
        assert_eq!(all(b"{'a\n{}"), ["! a string does not end with its line", "{}"]);
        assert_eq!(all(b"{\"a\xff{}"), ["! a byte that JSON does not have", "{}"]);
        assert_eq!(all(b"{[\x1b{}"), ["! a byte that JSON does not have", "{}"]);
    }

    #[test]
    fn what_does_not_end_is_waited_for_and_never_cut_up() {
        let mut framer = Framer::new();
        framer.push(b"{\"execute\":\n{\"execute\":\"quit\"}\n");
        assert_eq!(frames(&mut framer), [""; 0]);
        assert!(framer.waits());
        framer.push(b"}\n");
        assert_eq!(frames(&mut framer), ["{\"execute\":\n{\"execute\":\"quit\"}\n}"]);
        assert!(!framer.waits());

        framer.push(b"{\n{\n{\n");
        assert_eq!(frames(&mut framer), [""; 0]);
        assert_eq!(framer.finish(), Some(parse_error("the input ends within an object")));
        assert_eq!((framer.held(), framer.finish()), (0, None));
    }

    #[test]
    fn a_long_line_is_refused_once_and_not_kept() {
        let mut framer = Framer::new();
        let mut found = Vec::new();
        let part = [b'['; 1 << 16];
        framer.push(b"{\"a\":");
        for _ in 0..(100 << 20) / part.len() {
            framer.push(&part);
            found.extend(frames(&mut framer));
            assert!(framer.held() <= OBJECT_LIMIT + part.len());
        }
        assert_eq!(found, ["! longer than 1 MiB"]);
        framer.push(b"\n{}");
        assert_eq!(frames(&mut framer), ["{}"]);

        framer.push(&vec![b' '; 2 * OBJECT_LIMIT]);
        framer.push(b"{}");
        assert_eq!(frames(&mut framer), ["! longer than 1 MiB"], "so many spaces are nothing that a client sends");
    }
}
