//! What a descriptor chain asks of the disk (VIRTIO 1.3, 5.2.6), and the answer.

use std::sync::Arc;

use smallvec::SmallVec;
use snapfence_image_format::buffer::{Buffer, SharedVectors};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::stack::View;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::units::{GuestOffset, GuestRange, SECTOR_BYTES};

use super::ring::{Chain, ChainFault, MAX_SEGMENTS};
use crate::device::WriteCache;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard or write-zeroes request: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;
/// Bytes of the answer to `GET_ID`.
pub const ID_BYTES: usize = 20;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// The only flag of a range: the space may be given up.
const RANGE_UNMAP: u32 = 1;

/// Most sectors in one range of a discard or write-zeroes request, as the configuration space says: 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Most ranges in one discard or write-zeroes request, as the configuration space says.
pub const MAX_RANGES: u32 = 32;

/// The last byte of every answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// It failed, or made no sense.
    IoError = 1,
    /// No such request.
    Unsupported = 2,
}

impl From<&LayerError> for Status {
    /// Which status a failure of the stack becomes. The guest can do nothing about any of them, so all become the same.
    fn from(_: &LayerError) -> Self {
        Self::IoError
    }
}

/// What of a device decides whether a request makes sense.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub bytes: u64,
    /// Whether nothing may be changed.
    pub read_only: bool,
}

/// Ranges of a discard or write-zeroes request; nearly always one.
pub type Ranges = SmallVec<[GuestRange; 1]>;

/// A request that makes sense. Ranges are whole sectors within the disk.
#[derive(Debug)]
pub enum Request {
    /// Read into guest memory.
    Read {
        /// From here on.
        at: GuestOffset,
        /// Whole sectors, possibly none.
        into: SharedVectors,
    },
    /// Write from guest memory.
    Write {
        /// From here on.
        at: GuestOffset,
        /// Whole sectors, possibly none.
        from: SharedVectors,
    },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial number.
    GetId {
        /// Where to.
        into: SharedVectors,
    },
    /// Give up space.
    Discard(Ranges),
    /// Make ranges read as zeros; those with `true` may give up their space.
    WriteZeroes(SmallVec<[(GuestRange, bool); 1]>),
}

/// Why a chain is answered without asking the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The chain itself is malformed.
    #[error("malformed chain: {0}")]
    Chain(#[from] ChainFault),
    /// Nothing for the device to write, so nobody would learn what became of it.
    #[error("no device-writable byte for the status")]
    NoStatus,
    /// Less than a header to read.
    #[error("header of {0} bytes, needs {HEADER_BYTES}")]
    Header(usize),
    /// A type that nobody has defined or we do not offer.
    #[error("request type {0}")]
    Type(u32),
    /// A change to a disk that is read-only.
    #[error("request type {0} on a read-only disk")]
    ReadOnly(u32),
    /// Data that are not whole sectors, or not whole ranges.
    #[error("{0} bytes of data")]
    DataLength(usize),
    /// More buffers than one system call takes.
    #[error("{0} data buffers, at most {MAX_SEGMENTS}")]
    Segments(usize),
    /// Outside the disk.
    #[error("sector {sector} and the {count} from there on are not within the disk")]
    Range {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        count: u64,
    },
    /// More sectors in a range than offered.
    #[error("range of {0} sectors, at most {MAX_RANGE_SECTORS}")]
    RangeLength(u32),
    /// Flags that are not defined for the request.
    #[error("range flags {0:#x}")]
    RangeFlags(u32),
}

impl Refusal {
    /// How the chain is answered.
    pub fn status(self) -> Status {
        match self {
            // 5.2.6.2: unknown flags are unsupported, like unknown types.
            Self::Type(_) | Self::RangeFlags(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

/// A chain, taken apart: what it asks for, and where the answer goes.
#[derive(Debug)]
pub struct Parsed {
    /// Names the chain.
    pub head: u16,
    /// What to do.
    pub request: Result<Request, Refusal>,
    /// Where the status byte goes; `None` if the chain has no place for it.
    pub status: Option<SharedVectors>,
    /// Bytes of the writable part before the status byte.
    data_bytes: usize,
}

impl Parsed {
    /// Takes `chain` apart.
    pub fn new(chain: Chain, limits: Limits) -> Self {
        let Chain { head, readable, mut writable, fault } = chain;
        let data_bytes = writable.len().saturating_sub(1);
        let status = (!writable.is_empty()).then(|| writable.split_off(data_bytes));
        let request = match fault {
            Some(fault) => Err(Refusal::Chain(fault)),
            None if status.is_none() => Err(Refusal::NoStatus),
            None => parse(readable, writable, limits),
        };
        Self { head, request, status, data_bytes }
    }

    /// Length for the used ring: what is certainly written from the start of the writable part on. The status byte alone counts only where
    /// everything before it has been written too.
    pub fn written(data_bytes: usize, filled: usize) -> u32 {
        let all = if filled >= data_bytes { data_bytes + 1 } else { filled };
        u32::try_from(all).unwrap_or(u32::MAX)
    }

    /// Bytes of the writable part before the status byte.
    pub fn data_bytes(&self) -> usize {
        self.data_bytes
    }
}

/// `writable` is without the status byte.
fn parse(mut readable: SharedVectors, writable: SharedVectors, limits: Limits) -> Result<Request, Refusal> {
    if readable.len() < HEADER_BYTES {
        return Err(Refusal::Header(readable.len()));
    }
    let mut header = [0; HEADER_BYTES];
    readable.copy_out(0, &mut header);
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    if limits.read_only && matches!(kind, TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES) {
        return Err(Refusal::ReadOnly(kind));
    }
    match kind {
        TYPE_IN => Ok(Request::Read { at: admit_data(sector, &writable, limits)?, into: writable }),
        TYPE_OUT => {
            let from = readable.split_off(HEADER_BYTES);
            Ok(Request::Write { at: admit_data(sector, &from, limits)?, from })
        }
        TYPE_FLUSH => Ok(Request::Flush),
        TYPE_GET_ID => Ok(Request::GetId { into: writable }),
        TYPE_DISCARD => {
            let ranges = parse_ranges(&readable.split_off(HEADER_BYTES), 0, limits)?;
            Ok(Request::Discard(ranges.into_iter().map(|(range, _)| range).collect()))
        }
        TYPE_WRITE_ZEROES => Ok(Request::WriteZeroes(parse_ranges(&readable.split_off(HEADER_BYTES), RANGE_UNMAP, limits)?)),
        other => Err(Refusal::Type(other)),
    }
}

/// Where `data` are on the disk: checks that they are whole sectors within it, and not too many pieces.
fn admit_data(sector: u64, data: &SharedVectors, limits: Limits) -> Result<GuestOffset, Refusal> {
    let len = data.len();
    if !(len as u64).is_multiple_of(SECTOR_BYTES) {
        return Err(Refusal::DataLength(len));
    }
    if data.vectors().len() > MAX_SEGMENTS {
        return Err(Refusal::Segments(data.vectors().len()));
    }
    admit_range(sector, len as u64 / SECTOR_BYTES, limits).map(|range| range.start)
}

fn admit_range(sector: u64, count: u64, limits: Limits) -> Result<GuestRange, Refusal> {
    // In sectors first, where nothing can overflow; the disk's bytes fit in 64 bits, so whatever lies within it does too.
    match sector.checked_add(count) {
        Some(end) if end <= limits.bytes / SECTOR_BYTES => {
            Ok(GuestRange::new(GuestOffset::new(sector * SECTOR_BYTES), count * SECTOR_BYTES))
        }
        _ => Err(Refusal::Range { sector, count }),
    }
}

fn parse_ranges(payload: &SharedVectors, allowed_flags: u32, limits: Limits) -> Result<SmallVec<[(GuestRange, bool); 1]>, Refusal> {
    let len = payload.len();
    if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len > RANGE_BYTES * MAX_RANGES as usize {
        return Err(Refusal::DataLength(len));
    }
    let mut ranges = SmallVec::new();
    for at in (0..len).step_by(RANGE_BYTES) {
        let mut bytes = [0; RANGE_BYTES];
        payload.copy_out(at, &mut bytes);
        let (sector, count, flags) = (u64_at(&bytes, 0), u32_at(&bytes, 8), u32_at(&bytes, 12));
        if flags & !allowed_flags != 0 {
            return Err(Refusal::RangeFlags(flags));
        }
        if count > MAX_RANGE_SECTORS {
            return Err(Refusal::RangeLength(count));
        }
        ranges.push((admit_range(sector, u64::from(count), limits)?, flags & RANGE_UNMAP != 0));
    }
    Ok(ranges)
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Request {
    /// Whether it may need space, and take effect once there is some.
    pub fn needs_space(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard(_) | Self::WriteZeroes(_))
    }

    /// Serves the request from `view`; it may be served again if that fails. Where the `cache` is write-through, what it wrote is durable afterwards. Returns the bytes of the data
    /// part that it has filled.
    ///
    /// # Errors
    /// Whatever the stack says.
    pub async fn serve<E: Environment>(
        &self,
        view: &Arc<View<E>>,
        serial: &[u8; ID_BYTES],
        cache: &WriteCache,
    ) -> Result<usize, LayerError> {
        // Asked before the write: a driver that goes over to write-back meanwhile flushes what completes after that (5.2.6.2).
        let write_through = cache.is_write_through();
        match self {
            Self::Read { at, into } => {
                let len = into.len();
                if len > 0 {
                    view.read(*at, Buffer::Shared(into.clone())).await.0?;
                }
                Ok(len)
            }
            Self::Write { at, from } => {
                if !from.is_empty() {
                    view.write(*at, Buffer::Shared(from.clone())).await.0?;
                    if write_through {
                        Box::pin(view.flush()).await?;
                    }
                }
                Ok(0)
            }
            Self::GetId { into } => {
                let len = into.len().min(ID_BYTES);
                into.copy_in(0, &serial[..len]);
                Ok(len)
            }
            // Seldom, and the task of every read and write would be larger for them.
            Self::Flush | Self::Discard(_) | Self::WriteZeroes(_) => {
                Box::pin(self.serve_without_data(view, write_through)).await.map(|()| 0)
            }
        }
    }

    /// What reads and writes no bytes of the guest's.
    async fn serve_without_data<E: Environment>(&self, view: &Arc<View<E>>, write_through: bool) -> Result<(), LayerError> {
        match self {
            Self::Read { .. } | Self::Write { .. } | Self::GetId { .. } => {}
            Self::Flush => view.flush().await?,
            Self::Discard(ranges) => {
                for range in ranges.iter().filter(|range| !range.is_empty()) {
                    view.discard(*range).await?;
                }
            }
            Self::WriteZeroes(ranges) => {
                for (range, unmap) in ranges.iter().filter(|(range, _)| !range.is_empty()) {
                    view.write_zeroes(*range, *unmap).await?;
                }
                if write_through {
                    view.flush().await?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vring::RingFeatures;
    use crate::vring::driver::{DATA, Driver, Piece, readable, writable};

    const LIMITS: Limits = Limits { bytes: 1 << 20, read_only: false };
    const SECTORS: u64 = LIMITS.bytes / SECTOR_BYTES;
    const PAYLOAD: u64 = DATA + 0x1000;
    const ANSWER: u64 = DATA + 0x8000;

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0xff; 4], &sector.to_le_bytes()].concat()
    }

    fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    /// Parses the chain of `pieces` over `out` at [`DATA`] and `payload` at [`PAYLOAD`].
    fn parsed(out: &[u8], payload: &[u8], pieces: &[Piece], limits: Limits) -> Parsed {
        let mut driver = Driver::new(64, 0);
        driver.write(DATA, out);
        driver.write(PAYLOAD, payload);
        let mut ring = driver.ring(RingFeatures::default());
        driver.add(pieces);
        ring.waiting().expect("not broken");
        Parsed::new(ring.take().expect("not broken").expect("just added"), limits)
    }

    /// The usual three buffers for a request with `payload`.
    fn with_payload(kind: u32, sector: u64, payload: &[u8]) -> Parsed {
        let mut pieces = vec![readable(DATA, 16)];
        pieces.extend((!payload.is_empty()).then(|| readable(PAYLOAD, payload.len() as u32)));
        pieces.push(writable(ANSWER, 1));
        parsed(&header(kind, sector), payload, &pieces, LIMITS)
    }

    fn refusal(parsed: Parsed) -> Refusal {
        assert!(parsed.status.is_some(), "all of these can be answered");
        parsed.request.expect_err("it makes no sense")
    }

    #[test]
    fn a_header_may_be_spread_over_any_buffers() {
        let out = [header(TYPE_OUT, 7), vec![1; 512]].concat();
        let whole = parsed(&out, &[], &[readable(DATA, 528), writable(ANSWER, 1)], LIMITS);
        let bytewise: Vec<Piece> = (0..16).map(|index| readable(DATA + index, 1)).collect();
        let spread = parsed(&out, &[], &[&bytewise[..], &[readable(DATA + 16, 512), writable(ANSWER, 1)]].concat(), LIMITS);
        for parsed in [whole, spread] {
            let Ok(Request::Write { at, from }) = parsed.request else { panic!("a write") };
            assert_eq!(at, GuestOffset::new(7 * 512));
            assert_eq!(from.len(), 512);
            assert_eq!(from.vectors().len(), 1);
        }
    }

    #[test]
    fn the_status_is_the_last_writable_byte_wherever_buffers_end() {
        let read = parsed(&header(TYPE_IN, 0), &[], &[readable(DATA, 16), writable(ANSWER, 1025)], LIMITS);
        assert_eq!(read.data_bytes(), 1024);
        let Ok(Request::Read { into, .. }) = read.request else { panic!("a read") };
        assert_eq!(into.len(), 1024);
        assert_eq!(read.status.expect("answerable").len(), 1);
    }

    #[test]
    fn requests_outside_the_disk_are_refused_without_overflow() {
        for (sector, count) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 1), (1 << 55, 1), (u64::MAX / 512, 4)] {
            let bytes = vec![0; count * 512];
            let expected = Refusal::Range { sector, count: count as u64 };
            assert_eq!(refusal(with_payload(TYPE_OUT, sector, &bytes)), expected);
            let pieces = [readable(DATA, 16), writable(ANSWER, bytes.len() as u32 + 1)];
            assert_eq!(refusal(parsed(&header(TYPE_IN, sector), &[], &pieces, LIMITS)), expected);
            for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
                assert_eq!(refusal(with_payload(kind, 0, &range(sector, count as u32, 0))), expected);
            }
        }
        assert!(with_payload(TYPE_OUT, SECTORS - 1, &[0; 512]).request.is_ok());
        assert!(with_payload(TYPE_OUT, SECTORS, &[]).request.is_ok(), "nothing at the end");
    }

    #[test]
    fn refusals_have_the_status_that_the_specification_wants() {
        let io_error = |refusal: Refusal| assert_eq!(refusal.status(), Status::IoError, "{refusal}");
        let unsupported = |refusal: Refusal| assert_eq!(refusal.status(), Status::Unsupported, "{refusal}");
        io_error(refusal(parsed(&header(TYPE_IN, 0), &[], &[readable(DATA, 15), writable(ANSWER, 513)], LIMITS)));
        io_error(refusal(parsed(&[], &[], &[writable(ANSWER, 513)], LIMITS)));
        io_error(refusal(with_payload(TYPE_OUT, 0, &[0; 511])));
        io_error(refusal(with_payload(TYPE_DISCARD, 0, &[])));
        io_error(refusal(with_payload(TYPE_DISCARD, 0, &[0; 24])));
        io_error(refusal(with_payload(TYPE_DISCARD, 0, &[0; RANGE_BYTES * (MAX_RANGES as usize + 1)])));
        io_error(refusal(with_payload(TYPE_WRITE_ZEROES, 0, &range(0, MAX_RANGE_SECTORS + 1, 0))));
        unsupported(refusal(with_payload(TYPE_DISCARD, 0, &range(0, 1, 1))));
        unsupported(refusal(with_payload(TYPE_WRITE_ZEROES, 0, &range(0, 1, 2))));
        for kind in [2, 3, 5, 10, 14, 16, 0x8000_0000, u32::MAX] {
            unsupported(refusal(with_payload(kind, 0, &[])));
        }
        let read_only = Limits { read_only: true, ..LIMITS };
        for kind in [TYPE_OUT, TYPE_DISCARD, TYPE_WRITE_ZEROES] {
            io_error(refusal(parsed(&header(kind, 0), &[], &[readable(DATA, 16), writable(ANSWER, 1)], read_only)));
        }
        let many = (0..MAX_SEGMENTS as u64 + 1).map(|index| writable(ANSWER + index * 512, 512));
        let pieces: Vec<Piece> = [readable(DATA, 16)].into_iter().chain(many).chain([writable(ANSWER, 1)]).collect();
        let mut driver = Driver::new(2048, 0);
        driver.write(DATA, &header(TYPE_IN, 0));
        let mut ring = driver.ring(RingFeatures::default());
        driver.add(&pieces);
        ring.waiting().expect("not broken");
        let limits = Limits { bytes: 1 << 30, ..LIMITS };
        let parsed = Parsed::new(ring.take().expect("not broken").expect("just added"), limits);
        assert_eq!(refusal(parsed), Refusal::Segments(MAX_SEGMENTS + 1));
    }

    #[test]
    fn ranges_are_taken_apart() {
        let payload = [range(8, 16, 1), range(0, 8, 0)].concat();
        let Ok(Request::WriteZeroes(ranges)) = with_payload(TYPE_WRITE_ZEROES, 0, &payload).request else { panic!("zeroes") };
        let expected = [(GuestRange::new(GuestOffset::new(4096), 8192), true), (GuestRange::new(GuestOffset::ZERO, 4096), false)];
        assert_eq!(ranges[..], expected);
        let Ok(Request::Discard(ranges)) = with_payload(TYPE_DISCARD, 0, &range(SECTORS - 1, 1, 0)).request else { panic!("a discard") };
        assert_eq!(ranges[..], [GuestRange::new(GuestOffset::new(LIMITS.bytes - 512), 512)]);
    }

    #[test]
    fn chains_without_a_place_for_the_status_are_refused() {
        let parsed = parsed(&header(TYPE_OUT, 0), &[1; 512], &[readable(DATA, 16), readable(PAYLOAD, 512)], LIMITS);
        assert!(parsed.status.is_none());
        assert_eq!(parsed.request.expect_err("nobody would learn of it"), Refusal::NoStatus);
    }

    #[test]
    fn used_lengths_never_claim_what_was_not_written() {
        assert_eq!(Parsed::written(0, 0), 1);
        assert_eq!(Parsed::written(512, 512), 513);
        assert_eq!(Parsed::written(512, 0), 0);
        assert_eq!(Parsed::written(32, 20), 20);
    }
}
