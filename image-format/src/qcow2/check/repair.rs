//! Repairing leaks.
//!
//! 1. Refcounts are lowered to the number of references. Flush. A cluster that has one reference left is still said to be shared: writes to
//!    it go elsewhere, which is sound.
//! 2. Such entries are marked as the only ones. Flush.
//!
//! Wherever this is cut, the image is sound and at worst still leaks or has entries that could say more.

use crate::buffer::AlignedBuffer;
use crate::error::Structure;
use crate::storage::{Storage, StorageExt};
use crate::units::HostOffset;

use super::super::entry::{COMPRESSED, COPIED, OFFSET_MASK};
use super::super::geometry::HostCluster;
use super::super::header::{Header, incompatible};
use super::super::l1::table_bytes;
use super::super::refcount::{read_refcount, write_refcount};
use super::CheckError;
use super::compare::blocks;
use super::walk::Walk;

/// Which refcounts are corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Those above the number of references.
    Down,
    /// Those below as well.
    Both,
}

/// Sets refcounts to the number of references. Nothing else is wrong with the image. With `all` blocks and tables are written that are right already.
pub(super) async fn correct_refcounts<S: Storage>(walk: &Walk<'_, S>, direction: Direction, all: bool) -> Result<(), CheckError> {
    let geometry = &walk.geometry;
    let clusters = geometry.clusters(walk.file_len).max(walk.census.end());
    let bits = geometry.refcount_bits();
    for (index, covered) in blocks(clusters, geometry.refcounts_per_block()) {
        let at = HostOffset::new(walk.block_position(index));
        if at == HostOffset::ZERO {
            continue;
        }
        let mut block = walk.read_block(at).await?;
        let mut changed = all;
        for cluster in covered {
            let entry = geometry.locate_refcount(HostCluster(cluster)).1;
            let references = walk.census.get(cluster).references;
            let refcount = read_refcount(&block, entry, bits);
            if refcount > references || (refcount < references && direction == Direction::Both) {
                write_refcount(&mut block, entry, bits, references);
                changed = true;
            }
        }
        if changed {
            write(walk.file, at, &block, Structure::RefcountBlock).await?;
        }
    }
    flush(walk.file).await?;
    mark_single(walk, all).await?;
    flush(walk.file).await
}

/// Marks the entries of the active disk that have become the only reference to their cluster.
async fn mark_single<S: Storage>(walk: &Walk<'_, S>, all: bool) -> Result<(), CheckError> {
    let is_single = |word: u64| {
        let at = HostOffset::new(word & OFFSET_MASK);
        let is_data = word & (COPIED | COMPRESSED) == 0 && at != HostOffset::ZERO;
        is_data && walk.census.get(walk.geometry.host_cluster(at).0).references == 1
    };
    let l1 = (walk.header.l1_offset, walk.header.l1_entries as usize * 8, 1, Structure::L1Table);
    let entry_words = walk.geometry.entry_words();
    let active = walk.tables.iter().filter(|(_, users)| users.active > 0);
    let l2 = active.map(|(&at, _)| (HostOffset::new(at), walk.geometry.cluster_len(), entry_words, Structure::L2Table));
    // With an external data file the clusters are not in this file, and every entry is marked already.
    let l2 = l2.filter(|_| !walk.header.has_data_file());
    for (at, len, step, what) in std::iter::once(l1).chain(l2) {
        let mut words = walk.read_words(at, len, what).await?;
        let mut changed = all;
        for word in words.iter_mut().step_by(step).filter(|word| is_single(**word)) {
            *word |= COPIED;
            changed = true;
        }
        if changed {
            let bytes: AlignedBuffer = table_bytes(&words, len);
            write(walk.file, at, &bytes, what).await?;
        }
    }
    Ok(())
}

/// Gives up what a killed process has left in memory for the image: it belongs to the image as it was.
pub(super) async fn clear_kept<S: Storage>(file: &S, header: &mut Header) -> Result<(), CheckError> {
    if header.kept_number() == 0 {
        return Ok(());
    }
    header.forget_kept_number();
    write(file, HostOffset::ZERO, &header.patched_sector(), Structure::Header).await?;
    flush(file).await
}

/// Clears the bit that says that refcounts may be out of date.
pub(super) async fn clear_dirty<S: Storage>(file: &S, header: &mut Header) -> Result<(), CheckError> {
    header.incompatible &= !incompatible::DIRTY;
    write(file, HostOffset::ZERO, &header.patched_sector(), Structure::Header).await?;
    flush(file).await
}

async fn write<S: Storage>(file: &S, at: HostOffset, bytes: &[u8], what: Structure) -> Result<(), CheckError> {
    file.write_bytes(at, bytes).await.map_err(|source| CheckError::io("write", what, at, source))
}

async fn flush<S: Storage>(file: &S) -> Result<(), CheckError> {
    file.flush().await.map_err(|source| CheckError::io("flush", Structure::File, HostOffset::ZERO, source))
}
