//! The bytes of a file in memory, holes included.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rangemap::RangeSet;

use crate::buffer::Buffer;

/// What space is given out in.
const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// The longest file, as Linux has it.
const MAX_LEN: u64 = i64::MAX as u64;

/// The most space to be had at once, as on a disk of some size.
const MAX_ALLOCATION: u64 = 64 << 30;

/// Bytes with holes. Cloning shares the pages until one side writes, so that copies of a whole disk are cheap.
#[derive(Clone, Debug, Default)]
pub(super) struct SparseBytes {
    /// Pages that have been written to, by number. All others read as zeros, and so do bytes past `len`.
    pages: BTreeMap<u64, Arc<[u8; PAGE_LEN]>>,
    /// Pages that have space, by number: those that have been written to among them.
    space: RangeSet<u64>,
    len: u64,
}

/// The same bytes, wherever there is space.
impl PartialEq for SparseBytes {
    fn eq(&self, other: &Self) -> bool {
        const ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];
        let is_same = |number: &u64| match (self.pages.get(number), other.pages.get(number)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one == other,
            (Some(page), None) | (None, Some(page)) => **page == ZEROS,
            (None, None) => true,
        };
        self.len == other.len && self.pages.keys().chain(other.pages.keys()).all(is_same)
    }
}

impl Eq for SparseBytes {}

impl SparseBytes {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that have space.
    pub(super) fn allocated(&self) -> u64 {
        self.space.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE
    }

    /// Fills the whole buffer from `at` on, with zeros past the end.
    pub(super) fn read(&self, at: u64, into: &mut Buffer) -> io::Result<()> {
        let range = checked_range(at, into.len())?;
        for (number, within, done) in pieces(range) {
            match self.pages.get(&number) {
                Some(page) => into.copy_in(done, &page[within]),
                None => into.fill_zero(done..done + within.len()),
            }
        }
        Ok(())
    }

    /// Writes the whole buffer at `at`.
    pub(super) fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        let range = checked_range(at, from.len())?;
        for (number, within, done) in pieces(range.clone()) {
            from.copy_out(done, &mut self.page_mut(number)[within]);
        }
        self.occupy(range);
        Ok(())
    }

    /// Writes `bytes` at `at`.
    pub(super) fn write_bytes(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let range = checked_range(at, bytes.len())?;
        for (number, within, done) in pieces(range.clone()) {
            let len = within.len();
            self.page_mut(number)[within].copy_from_slice(&bytes[done..done + len]);
        }
        self.occupy(range);
        Ok(())
    }

    /// Whether a file can have bytes there at all.
    pub(super) fn admit(at: u64, len: u64) -> io::Result<()> {
        at.checked_add(len).filter(|end| *end <= MAX_LEN).map(|_| ()).ok_or_else(too_big)
    }

    /// Whether so much space can be had there.
    pub(super) fn admit_space(at: u64, len: u64) -> io::Result<()> {
        Self::admit(at, len)?;
        match len {
            0 => Err(io::ErrorKind::InvalidInput.into()),
            1..=MAX_ALLOCATION => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    /// Space that has to be found before the range has it everywhere.
    pub(super) fn missing_space(&self, at: u64, len: u64) -> u64 {
        let numbers = page_numbers(at..at.saturating_add(len));
        if numbers.is_empty() {
            return 0;
        }
        self.space.gaps(&numbers).map(|gap| gap.end - gap.start).sum::<u64>() * PAGE
    }

    /// Gives space to every page of the range that has none, growing the file to its end.
    pub(super) fn allocate(&mut self, at: u64, len: u64) -> io::Result<()> {
        Self::admit_space(at, len)?;
        self.occupy(at..at + len);
        Ok(())
    }

    /// Zeros the range and takes the space of its whole pages away. The length stays.
    pub(super) fn punch(&mut self, at: u64, len: u64) -> io::Result<()> {
        Self::admit(at, len)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.zero(at, at + len);
        Ok(())
    }

    /// Cuts off or grows with a hole.
    pub(super) fn set_len(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(too_big());
        }
        if len < self.len {
            self.zero(len, self.len.next_multiple_of(PAGE));
        }
        self.len = len;
        Ok(())
    }

    /// The runs of bytes before the end that have space, in order: all others are zero.
    pub(super) fn allocated_ranges(&self) -> Vec<Range<u64>> {
        self.space.iter().map(|run| run.start * PAGE..(run.end * PAGE).min(self.len)).filter(|range| !range.is_empty()).collect()
    }

    /// All bytes of `range` as a vector.
    pub(super) fn to_vec(&self, range: Range<u64>) -> Vec<u8> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).expect("what is in memory fits in it");
        let mut bytes = vec![0; len];
        for (number, within, done) in pieces(range) {
            if let Some(page) = self.pages.get(&number) {
                let into = done..done + within.len();
                bytes[into].copy_from_slice(&page[within]);
            }
        }
        bytes
    }

    /// The pages that hold anything but zeros: where each begins, and its bytes.
    pub(super) fn filled_pages(&self) -> impl Iterator<Item = (u64, &[u8; PAGE_LEN])> {
        self.pages.iter().filter(|(_, page)| ***page != [0; PAGE_LEN]).map(|(number, page)| (number * PAGE, &**page))
    }

    fn zero(&mut self, start: u64, end: u64) {
        let whole = start.div_ceil(PAGE)..end / PAGE;
        if !whole.is_empty() {
            self.space.remove(whole.clone());
        }
        let touched: Vec<u64> = self.pages.range(page_numbers(start..end)).map(|(number, _)| *number).collect();
        for number in touched {
            if whole.contains(&number) {
                self.pages.remove(&number);
                continue;
            }
            let from = start.saturating_sub(number * PAGE).min(PAGE) as usize;
            let to = (end - number * PAGE).min(PAGE) as usize;
            self.page_mut(number)[from..to].fill(0);
        }
    }

    /// The range has space, and the file reaches to its end.
    fn occupy(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let numbers = page_numbers(range.clone());
        if self.space.gaps(&numbers).next().is_some() {
            self.space.insert(numbers);
        }
        self.len = self.len.max(range.end);
    }

    /// A page that is written to: whoever does that sees to its space.
    fn page_mut(&mut self, number: u64) -> &mut [u8; PAGE_LEN] {
        Arc::make_mut(self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE_LEN])))
    }
}

/// The pages that a range touches.
fn page_numbers(range: Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

/// The parts of `range` on each page: page number, bytes within it, position of the part in the range.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>, usize)> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let (number, done) = (next / PAGE, (next - range.start) as usize);
        let end = ((number + 1) * PAGE).min(range.end);
        let within = (next - number * PAGE) as usize..(end - number * PAGE) as usize;
        next = end;
        Some((number, within, done))
    })
}

fn checked_range(at: u64, len: usize) -> io::Result<Range<u64>> {
    let end = at.checked_add(len as u64).filter(|end| *end <= MAX_LEN).ok_or_else(too_big)?;
    Ok(at..end)
}

fn too_big() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::AlignedBuffer;

    #[test]
    fn what_is_the_same_is_told_by_bytes_and_not_by_holes() {
        let mut bytes = SparseBytes::default();
        bytes.write_bytes(5000, &[7; 5000]).unwrap();
        let (copy, mut other) = (bytes.clone(), SparseBytes::default());
        other.write_bytes(0, &[0; 5000]).unwrap();
        other.write_bytes(5000, &[7; 5000]).unwrap();
        assert_eq!(bytes, copy);
        assert_eq!(bytes, other);
        assert_eq!(other, bytes);
        for (at, byte) in [(0, 1), (6000, 8)] {
            let mut changed = other.clone();
            changed.write_bytes(at, &[byte]).unwrap();
            assert_ne!(bytes, changed, "byte {at}");
            assert_ne!(changed, bytes, "byte {at}");
        }
        other.set_len(20_000).unwrap();
        assert_ne!(bytes, other, "one is longer");
    }

    #[test]
    fn cutting_off_and_growing_again_gives_zeros() {
        let mut bytes = SparseBytes::default();
        bytes.write_bytes(100, &[7; 10_000]).unwrap();
        bytes.set_len(5000).unwrap();
        bytes.set_len(20_000).unwrap();
        let all = bytes.to_vec(0..20_000);
        assert!(all[100..5000].iter().all(|byte| *byte == 7));
        assert!(all[5000..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn punching_frees_whole_pages_and_zeros_the_rest() {
        let mut bytes = SparseBytes::default();
        bytes.write_bytes(0, &[7; 4 * PAGE_LEN]).unwrap();
        bytes.punch(PAGE / 2, 2 * PAGE).unwrap();
        assert_eq!(bytes.allocated(), 3 * PAGE);
        let all = bytes.to_vec(0..4 * PAGE);
        assert_eq!(all.iter().filter(|byte| **byte == 0).count(), 2 * PAGE_LEN);
        assert_eq!((all[PAGE_LEN / 2 - 1], all[PAGE_LEN / 2], all[5 * PAGE_LEN / 2]), (7, 0, 7));
        bytes.punch(0, 1 << 40).unwrap();
        assert_eq!((bytes.allocated(), bytes.len()), (0, 4 * PAGE));
    }

    #[test]
    fn space_is_counted_once_whether_it_has_bytes_or_not() {
        let mut bytes = SparseBytes::default();
        assert_eq!(bytes.missing_space(0, 0), 0);
        bytes.allocate(PAGE / 2, 2 * PAGE).unwrap();
        bytes.write_bytes(4 * PAGE - 1, &[7; 2]).unwrap();
        assert_eq!((bytes.allocated(), bytes.len()), (5 * PAGE, 4 * PAGE + 1));
        assert!(bytes.allocated_ranges().into_iter().eq(std::iter::once(0..4 * PAGE + 1)), "up to the end");
        bytes.punch(2 * PAGE, PAGE).unwrap();
        assert_eq!((bytes.missing_space(0, 6 * PAGE), bytes.missing_space(2 * PAGE + 1, 1)), (2 * PAGE, PAGE));
        assert_eq!(bytes.allocated_ranges(), [0..2 * PAGE, 3 * PAGE..4 * PAGE + 1]);
        assert_eq!(bytes.filled_pages().map(|(at, _)| at).collect::<Vec<_>>(), [3 * PAGE, 4 * PAGE]);
    }

    #[test]
    fn a_clone_keeps_what_it_had() {
        let mut bytes = SparseBytes::default();
        bytes.write_bytes(0, &[1; 512]).unwrap();
        let before = bytes.clone();
        bytes.write_bytes(0, &[2; 512]).unwrap();
        assert_eq!(before.to_vec(0..1), [1]);
    }

    #[test]
    fn positions_past_the_longest_file_are_refused() {
        let mut bytes = SparseBytes::default();
        let mut buffer = Buffer::Owned(AlignedBuffer::zeroed(512));
        assert_eq!(bytes.write(MAX_LEN - 10, &buffer).unwrap_err().raw_os_error(), Some(libc::EFBIG));
        assert!(bytes.read(u64::MAX - 10, &mut buffer).is_err());
        assert!(bytes.allocate(u64::MAX, 2).is_err());
        assert_eq!(bytes.len(), 0);
    }
}
