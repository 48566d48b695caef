//! Images with the dirty bit: a program that updates refcounts late has not ended in an orderly way, so refcounts may be wrong in both
//! directions. The mapping is right, and the refcounts are made to agree with it.
//!
//! 1. Every refcount is set to the number of references. Flush.
//! 2. Entries whose cluster turns out to be theirs alone are marked so. Flush.
//! 3. The dirty bit is cleared. Flush.
//!
//! Wherever this is cut, the dirty bit is still set and the next opening for writing begins anew.

use crate::storage::Storage;
use crate::units::HostOffset;

use super::super::geometry::HostCluster;
use super::super::header::Header;
use super::compare::blocks;
use super::repair::{Direction, clear_dirty, correct_refcounts};
use super::report::Fault;
use super::walk::Walk;
use super::{CheckError, CheckOptions};

/// Makes the refcounts of a dirty image right and clears the bit, durably. If something else is wrong with the image, nothing is changed and
/// the first fault is returned. With `all` what looks right is written as well: a flush that failed may have lost it.
pub(in crate::qcow2) async fn repair_dirty<S: Storage>(file: &S, header: &mut Header, all: bool) -> Result<Option<Fault>, CheckError> {
    let mut walk = Walk::new(file, header, &CheckOptions { max_findings: 1, ..CheckOptions::default() }).await?;
    walk.count_all().await?;
    if let Some(finding) = walk.take_report().findings.pop() {
        return Ok(Some(finding.fault));
    }
    if let Some(fault) = irreparable(&walk) {
        return Ok(Some(fault));
    }
    correct_refcounts(&walk, Direction::Both, all).await?;
    drop(walk);
    clear_dirty(file, header).await?;
    Ok(None)
}

/// What wrong refcounts do not explain.
fn irreparable<S: Storage>(walk: &Walk<'_, S>) -> Option<Fault> {
    for (index, covered) in blocks(walk.census.end(), walk.geometry.refcounts_per_block()) {
        if walk.census.is_empty(covered.start, covered.end) {
            continue;
        }
        let block = HostOffset::new(walk.block_position(index));
        for cluster in covered {
            let count = walk.census.get(cluster);
            let (at, references) = (walk.geometry.host_offset(HostCluster(cluster)), count.references);
            if count.owners.count_ones() > 1 {
                return Some(Fault::Overlap { at, owners: count.owners().collect() });
            }
            if references > 1 && count.copied > 0 {
                return Some(Fault::WronglyCopied { at, refcount: references });
            }
            // Blocks are made durable before they are used, whatever else is late.
            if references > 0 && block == HostOffset::ZERO {
                return Some(Fault::RefcountLow { at, refcount: 0, references });
            }
        }
    }
    None
}
