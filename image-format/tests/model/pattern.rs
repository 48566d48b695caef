//! What tests write: every sector says which operation wrote it and where, so that a sector found anywhere tells its story.

use snapfence_image_format::storage::Chance;

/// Bytes in a sector.
pub(crate) const SECTOR: usize = 512;

/// Which operation wrote a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Value(pub(crate) u64);

impl Value {
    /// Zeros, whoever wrote them.
    pub(crate) const ZERO: Self = Self(0);
}

/// The content that `value` gives to sector number `sector`.
pub(crate) fn fill(value: Value, sector: u64, bytes: &mut [u8]) {
    assert_eq!(bytes.len(), SECTOR);
    if value == Value::ZERO {
        bytes.fill(0);
        return;
    }
    let mut chance = Chance::new(value.0.rotate_left(32) ^ sector);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&chance.number().to_le_bytes());
    }
    bytes[..8].copy_from_slice(&value.0.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
}

/// Whose content a sector has; `None` if nobody ever wrote such bytes there.
pub(crate) fn identify(sector: u64, bytes: &[u8]) -> Option<Value> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(Value::ZERO);
    }
    let value = Value(u64::from_le_bytes(bytes[..8].try_into().ok()?));
    let mut expected = [0; SECTOR];
    fill(value, sector, &mut expected);
    (value != Value::ZERO && bytes == expected).then_some(value)
}

/// What can be said of bytes that [`identify`] does not know.
pub(crate) fn describe(sector: u64, bytes: &[u8]) -> String {
    if let Some(value) = identify(sector, bytes) {
        return format!("{value:?}");
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    if identify(word(8), bytes).is_some() {
        format!("{:?} of sector {}", Value(word(0)), word(8))
    } else {
        format!("foreign bytes {:02x?}", &bytes[..16])
    }
}

#[test]
fn sectors_tell_who_wrote_them_and_where() {
    let mut bytes = [0; SECTOR];
    assert_eq!(identify(5, &bytes), Some(Value::ZERO));
    fill(Value(7), 5, &mut bytes);
    assert_eq!(identify(5, &bytes), Some(Value(7)));
    assert_eq!(identify(6, &bytes), None);
    assert_eq!(describe(6, &bytes), "Value(7) of sector 5");
    bytes[511] ^= 1;
    assert_eq!(identify(5, &bytes), None);
}
