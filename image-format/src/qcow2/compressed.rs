//! Compressed clusters, for reading. What is decompressed never exceeds one cluster.

use std::io;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use crate::buffer::AlignedBuffer;
use crate::error::{LayerError, Structure};
use crate::storage::{Environment, StorageExt};
use crate::units::{GuestOffset, GuestRange};

use super::Inner;
use super::entry::Entry;
use super::header::Compression;

/// Largest window that a zstd frame may ask for, as a power of two: bounds the memory that a hostile image can make us take. Writers need no
/// more than a cluster (2^21), and the usual level has 2^21.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

impl<E: Environment> Inner<E> {
    /// `None` if the cluster is not compressed, or not any more.
    pub(super) async fn read_compressed(&self, at: GuestOffset) -> Result<Option<(GuestRange, AlignedBuffer)>, LayerError> {
        let geometry = &self.format.geometry;
        let range = GuestRange::new(at.align_down(geometry.cluster_bytes()), geometry.cluster_bytes());
        if at.get() >= self.virtual_size() {
            return Err(LayerError::OutOfRange { range, size: self.virtual_size() });
        }
        let (key, index) = geometry.locate(at);
        let Some(slice) = self.slice(key).await? else { return Ok(None) };
        let entry = slice.lock().entry(index, &self.format).map_err(|detail| self.corrupt_entry(key, index, detail))?;
        let Entry::Compressed(extent) = entry else { return Ok(None) };
        let len = usize::try_from(extent.len).expect("at most two clusters");
        let what = Structure::CompressedCluster;
        let bytes = self.file.read_bytes(extent.at, len).await.map_err(|error| LayerError::io("read", what, extent.at, error))?;
        let mut cluster = AlignedBuffer::zeroed(geometry.cluster_len());
        let done = match self.compression {
            Compression::Deflate => inflate(&bytes, &mut cluster),
            Compression::Zstd => decompress_zstd(&bytes, &mut cluster),
        };
        // Somebody may have written the cluster anew meanwhile, and the freed bytes may be gone from the file already, or be others that can be
        // decompressed as well.
        let now = slice.lock().entry(index, &self.format).map_err(|detail| self.corrupt_entry(key, index, detail))?;
        if now != entry {
            return Ok(None);
        }
        let detail = match done {
            Ok(true) => return Ok(Some((range, cluster))),
            Ok(false) => "the compressed bytes end before the cluster is full",
            Err(_) => "the bytes cannot be decompressed",
        };
        Err(LayerError::Corrupt { what, at: extent.at, detail })
    }
}

/// Whether `out` has been filled. Bytes after the stream, up to the end of its last sector, belong to others.
fn inflate(bytes: &[u8], out: &mut [u8]) -> io::Result<bool> {
    let mut stream = Decompress::new(false);
    loop {
        let (read, written) = (position(stream.total_in()), position(stream.total_out()));
        let status = stream.decompress(&bytes[read..], &mut out[written..], FlushDecompress::None).map_err(io::Error::other)?;
        let full = position(stream.total_out()) == out.len();
        let stuck = position(stream.total_in()) == read && position(stream.total_out()) == written;
        if full || stuck || status == Status::StreamEnd {
            return Ok(full);
        }
    }
}

/// As [`inflate`]. A cluster may be several frames.
fn decompress_zstd(bytes: &[u8], out: &mut [u8]) -> io::Result<bool> {
    let mut stream = Decoder::new()?;
    stream.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
    let len = out.len();
    let mut input = InBuffer::around(bytes);
    let mut output = OutBuffer::around(out);
    while output.pos() < len {
        let before = (input.pos(), output.pos());
        stream.run(&mut input, &mut output)?;
        if (input.pos(), output.pos()) == before {
            return Ok(false);
        }
    }
    Ok(true)
}

fn position(total: u64) -> usize {
    usize::try_from(total).expect("at most two clusters")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).expect("writing to memory");
        encoder.finish().expect("writing to memory")
    }

    #[test]
    fn streams_followed_by_other_bytes_decompress() {
        let cluster: Vec<u8> = (0..65_536_u32).map(|i| (i / 7) as u8).collect();
        let mut out = vec![0; cluster.len()];
        let mut bytes = deflated(&cluster);
        bytes.extend([0xa5; 300]);
        assert!(inflate(&bytes, &mut out).expect("valid"));
        assert_eq!(out, cluster);

        out.fill(0);
        let mut bytes = zstd::bulk::compress(&cluster, 3).expect("compresses");
        bytes.extend([0xa5; 300]);
        assert!(decompress_zstd(&bytes, &mut out).expect("valid"));
        assert_eq!(out, cluster);
    }

    #[test]
    fn more_than_a_cluster_is_cut_and_less_is_an_error() {
        let mut out = vec![0; 512];
        assert!(inflate(&deflated(&[7; 100_000]), &mut out).expect("valid"));
        assert_eq!(out, [7; 512]);
        assert!(!inflate(&deflated(&[7; 511]), &mut out).expect("valid but short"));
        assert!(inflate(&[0xff; 40], &mut out).is_err());
        assert!(!decompress_zstd(&zstd::bulk::compress(&[7; 511], 3).expect("compresses"), &mut out).unwrap_or(false));
        assert!(decompress_zstd(&[0xff; 40], &mut out).is_err());
    }
}
