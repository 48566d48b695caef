//! Strings in single quotes, which QEMU reads as JSON strings (`qobject/json-lexer.c`) and people paste from its documents.

/// The same object with its strings in double quotes. What it means for other readers of JSON does not change, right or wrong.
pub(super) fn in_double_quotes(object: Vec<u8>) -> Vec<u8> {
    let mut rewritten = Vec::with_capacity(object.len() + 16);
    let mut quote = None;
    let mut bytes = object.into_iter();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (None, b'\'' | b'"') => {
                quote = Some(byte);
                rewritten.push(b'"');
            }
            (Some(open), _) if byte == open => {
                quote = None;
                rewritten.push(b'"');
            }
            (Some(_), b'"') => rewritten.extend(b"\\\""),
            (Some(_), b'\\') => match bytes.next() {
                // Any quote may be escaped, and a single one needs no escape now.
                Some(b'\'') => rewritten.push(b'\''),
                next => {
                    rewritten.push(b'\\');
                    rewritten.extend(next);
                }
            },
            _ => rewritten.push(byte),
        }
    }
    rewritten
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_mean_the_same_in_either_quotes() {
        let table = [
            (r#"{'a': 'b', "c": 1}"#, r#"{"a": "b", "c": 1}"#),
            (r#"{'say "so"': "it's"}"#, r#"{"say \"so\"": "it's"}"#),
            (r#"{'it\'s': "it\'s \"\\"}"#, r#"{"it's": "it's \"\\"}"#),
            (r#"{'\"\\': '\u00e4\n'}"#, r#"{"\"\\": "\u00e4\n"}"#),
            (r"{'\", r#"{"\"#),
        ];
        for (from, to) in table {
            assert_eq!(String::from_utf8(in_double_quotes(from.into())).unwrap(), to);
        }
    }
}
