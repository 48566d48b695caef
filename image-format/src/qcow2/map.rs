//! Which bytes are where.

use crate::error::LayerError;
use crate::extent::{Extent, ExtentList, Mapping};
use crate::storage::Environment;
use crate::units::{GuestOffset, GuestRange};

use super::Inner;
use super::entry::Entry;
use super::l2::{Slice, SliceState};
use super::lifecycle::Phase;

/// Parts of the table that are read ahead at most: a page of the chain map takes one or two.
const PREFETCHED_SLICES: u64 = 2;

impl<E: Environment> Inner<E> {
    pub(super) async fn map(&self, range: GuestRange, extents: &mut ExtentList) -> Result<(), LayerError> {
        let disk_end = GuestOffset::new(self.virtual_size());
        let end = range.end().min(disk_end);
        let mut at = range.start;
        while at < end {
            let (key, _) = self.format.geometry.locate(at);
            let next = match self.slice(key).await? {
                None => {
                    let next = (at + 1).align_up(self.format.geometry.table_reach()).min(end);
                    extents.push(Extent { range: GuestRange::between(at, next), mapping: Mapping::Unallocated });
                    next
                }
                Some(slice) => {
                    let next = (at + 1).align_up(self.format.geometry.slice_reach()).min(end);
                    self.map_slice(&slice, GuestRange::between(at, next), extents)?;
                    next
                }
            };
            at = next;
        }
        extents.push(Extent { range: GuestRange::between(range.start.max(disk_end), range.end()), mapping: Mapping::Unallocated });
        Ok(())
    }

    /// Reads what [`map`](Self::map) will look at of the table, unless that is much. What cannot be read is left to it.
    pub(super) async fn prefetch(&self, range: GuestRange) {
        let reach = self.format.geometry.slice_reach();
        if range.len > PREFETCHED_SLICES * reach {
            return;
        }
        let disk = GuestRange::new(GuestOffset::ZERO, self.virtual_size());
        for part in range.intersection(disk).split_at_multiples(reach) {
            if self.slice(self.format.geometry.locate(part.start).0).await.is_err() {
                return;
            }
        }
    }

    /// Lets go of those parts of the table that map nothing outside `range`, if the file does not change any more.
    pub(super) fn forget(&self, range: GuestRange) {
        if self.phase.get() == Phase::ReadOnly {
            self.slices.forget(|key| {
                let mapped = self.format.geometry.mapped_by(key);
                mapped.start >= range.start && mapped.end() <= range.end()
            });
        }
    }

    /// Maps a range that lies within one slice.
    fn map_slice(&self, slice: &Slice, range: GuestRange, extents: &mut ExtentList) -> Result<(), LayerError> {
        let state = slice.lock();
        for piece in range.split_at_multiples(self.format.geometry.cluster_bytes()) {
            self.map_cluster(slice, &state, piece, extents)?;
        }
        Ok(())
    }

    /// Maps a range that lies within one cluster.
    fn map_cluster(&self, slice: &Slice, state: &SliceState, range: GuestRange, extents: &mut ExtentList) -> Result<(), LayerError> {
        let geometry = &self.format.geometry;
        let (key, index) = geometry.locate(range.start);
        let entry = state.entry(index, &self.format).map_err(|detail| self.corrupt_entry(slice.key, index, detail))?;
        debug_assert_eq!(key, slice.key);
        let standard = match entry {
            Entry::Compressed(_) => {
                extents.push(Extent { range, mapping: Mapping::Compressed });
                return Ok(());
            }
            Entry::Standard(standard) => standard,
        };
        let cluster_start = range.start.align_down(geometry.cluster_bytes());
        let writable = match standard.host {
            Some(host) if standard.allocated != 0 && (standard.copied || self.format.external_data) => {
                self.check_place(cluster_start, host).map_err(|detail| self.corrupt_entry(slice.key, index, detail))?
            }
            _ => false,
        };
        // Mostly all of it is the same.
        let mask = geometry.subcluster_mask(range);
        let uniform = match standard.host {
            Some(host) if standard.allocated & mask == mask => {
                Some(Mapping::Data { host: host + (range.start - cluster_start), in_place: standard.copied && writable })
            }
            _ if standard.allocated & mask != 0 => None,
            _ if standard.zero & mask == mask => Some(Mapping::Zero),
            _ if standard.zero & mask == 0 => Some(Mapping::Unallocated),
            _ => None,
        };
        if let Some(mapping) = uniform {
            extents.push(Extent { range, mapping });
            return Ok(());
        }
        for piece in range.split_at_multiples(geometry.subcluster_bytes()) {
            let subcluster = u32::try_from((piece.start - cluster_start) / geometry.subcluster_bytes()).expect("below 32");
            let mapping = match standard.mapping(subcluster, geometry.subcluster_bytes()) {
                Mapping::Data { host, in_place } => {
                    let within = (piece.start - cluster_start) % geometry.subcluster_bytes();
                    Mapping::Data { host: host + within, in_place: in_place && writable }
                }
                other => other,
            };
            extents.push(Extent { range: piece, mapping });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::extent::{ExtentList, Mapping};
    use crate::qcow2::testing::{MemoryOnly, Scratch, run};
    use crate::qcow2::{OpenOptions, Qcow2};
    use crate::storage::StorageExt;
    use crate::units::{GuestOffset, GuestRange};

    /// The whole disk as one image alone shows it, with a mark for each way in which bytes can be mapped.
    async fn read_all(image: &Qcow2<MemoryOnly>) -> (Vec<u8>, String) {
        let mut extents = ExtentList::new();
        let size = image.virtual_size();
        image.map(GuestRange::new(GuestOffset::ZERO, size), &mut extents).await.expect("maps");
        let mut disk = Vec::new();
        let mut kinds = String::new();
        for extent in extents.as_slice() {
            assert_eq!(extent.range.start.get(), disk.len() as u64);
            let len = usize::try_from(extent.range.len).expect("small");
            match extent.mapping {
                Mapping::Unallocated | Mapping::Zero => disk.resize(disk.len() + len, 0),
                Mapping::Data { host, .. } => disk.extend_from_slice(&image.data_file().read_bytes(host, len).await.expect("reads")),
                Mapping::Compressed => {
                    for piece in extent.range.split_at_multiples(image.geometry().cluster_bytes()) {
                        let (cluster, bytes) = image.read_compressed(piece.start).await.expect("decompresses").expect("is compressed");
                        let skip = usize::try_from(piece.start - cluster.start).expect("small");
                        disk.extend_from_slice(&bytes[skip..skip + usize::try_from(piece.len).expect("small")]);
                    }
                }
            }
            kinds.push(match extent.mapping {
                Mapping::Unallocated => 'u',
                Mapping::Zero => 'z',
                Mapping::Data { .. } => 'd',
                Mapping::Compressed => 'c',
            });
        }
        (disk, kinds)
    }

    #[test]
    fn images_made_by_qemu_read_as_qemu_reads_them() {
        for options in [
            "compat=0.10",
            "compat=1.1",
            "cluster_size=512",
            "cluster_size=4096,refcount_bits=1",
            "cluster_size=2M,refcount_bits=64",
            "extended_l2=on,cluster_size=16k",
            "extended_l2=on,cluster_size=128k",
            "preallocation=metadata",
            "lazy_refcounts=on",
        ] {
            let scratch = Scratch::new();
            scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "9M"]);
            let mut commands: Vec<String> =
                ["write -P 1 0 64k", "write -P 2 100k 1k", "write -P 3 3M 70000", "write -P 4 9436672 512", "write -P 5 5M 600k"]
                    .map(str::to_owned)
                    .to_vec();
            if !options.contains("0.10") {
                commands.extend(["write -z 5M 256k", "write -z 5500k 4k", "write -zu 3M 64k"].map(str::to_owned));
            }
            scratch.qemu_io("a.qcow2", "qcow2", &commands);
            scratch.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "a.raw"]);
            let file = scratch.load("a.qcow2");
            let (disk, kinds) = run(async move {
                let image = Qcow2::<MemoryOnly>::open(file, OpenOptions::reading()).await.expect("opens");
                read_all(&image).await
            });
            assert!(disk == std::fs::read(scratch.path("a.raw")).expect("written"), "{options}: {kinds}");
            assert!(kinds.contains('d'));
        }
    }

    #[test]
    fn compressed_images_made_by_qemu_read_as_qemu_reads_them() {
        for options in
            ["compression_type=zlib", "compression_type=zstd", "cluster_size=512", "cluster_size=2M,compression_type=zstd", "compat=0.10"]
        {
            let scratch = Scratch::new();
            let pattern: Vec<u8> = (0..5_000_000_u64).map(|i| ((i * i) >> 13) as u8).chain([0; 440]).collect();
            std::fs::write(scratch.path("a.raw"), &pattern).expect("writes");
            scratch.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2"]);
            let file = scratch.load("a.qcow2");
            let (disk, kinds) = run(async move {
                let image = Qcow2::<MemoryOnly>::open(file, OpenOptions::reading()).await.expect("opens");
                read_all(&image).await
            });
            assert!(disk[..pattern.len()] == pattern[..] && disk[pattern.len()..].iter().all(|&byte| byte == 0), "{options}: {kinds}");
            assert!(kinds.contains('c'), "{options}: {kinds}");
        }
    }

    #[test]
    fn an_external_data_file_is_read_where_the_caller_allows_it() {
        let scratch = Scratch::new();
        scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=a.data", "a.qcow2", "3M"]);
        scratch.qemu_io("a.qcow2", "qcow2", &["write -P 9 64k 128k".to_owned()]);
        let (file, data) = (scratch.load("a.qcow2"), scratch.load("a.data"));
        run(async move {
            let refused = Qcow2::<MemoryOnly>::open(file.clone(), OpenOptions::reading()).await.expect_err("no data file");
            assert!(refused.to_string().contains("a.data"), "{refused}");
            let options = OpenOptions { data_file: Some(data), ..OpenOptions::reading() };
            let image = Qcow2::<MemoryOnly>::open(file, options).await.expect("opens");
            let (disk, _) = read_all(&image).await;
            assert!(disk[65_536..196_608].iter().all(|&byte| byte == 9) && disk[0] == 0 && disk[196_608] == 0);
        });
    }
}
