//! Which host clusters hold metadata, so that no guest data is ever written over them, whatever a damaged or hostile image says.

use std::collections::BTreeSet;
use std::ops::Range;

/// Clusters with metadata: the header, the L1 table and its L2 tables, refcount table and blocks, what belongs to internal snapshots.
#[derive(Debug, Default)]
pub(super) struct MetadataMap {
    /// As found when the image was opened: sorted, neither touching nor overlapping.
    found: Vec<Range<u64>>,
    /// Made since.
    added: BTreeSet<u64>,
    /// Of `found`, freed since.
    removed: BTreeSet<u64>,
}

/// Two pieces of metadata share a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    pub(super) cluster: u64,
    pub(super) first: &'static str,
    pub(super) second: &'static str,
}

impl MetadataMap {
    /// A map of named runs of clusters.
    ///
    /// # Errors
    /// If two of them overlap.
    pub(super) fn new(mut parts: Vec<(Range<u64>, &'static str)>) -> Result<Self, Overlap> {
        parts.retain(|(range, _)| !range.is_empty());
        parts.sort_by_key(|(range, _)| range.start);
        for pair in parts.windows(2) {
            let [(first_range, first), (second_range, second)] = pair else { continue };
            if first_range.end > second_range.start {
                return Err(Overlap { cluster: second_range.start, first, second });
            }
        }
        let mut found: Vec<Range<u64>> = Vec::new();
        for (range, _) in parts {
            match found.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => found.push(range),
            }
        }
        Ok(Self { found, added: BTreeSet::new(), removed: BTreeSet::new() })
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.added.contains(&cluster) || (self.was_found(cluster) && !self.removed.contains(&cluster))
    }

    pub(super) fn add(&mut self, clusters: Range<u64>) {
        self.added.extend(clusters);
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        if !self.added.remove(&cluster) && self.was_found(cluster) {
            self.removed.insert(cluster);
        }
    }

    /// Runs of clusters, those found at opening, in order.
    pub(super) fn found(&self) -> &[Range<u64>] {
        &self.found
    }

    fn was_found(&self, cluster: u64) -> bool {
        let after = self.found.partition_point(|range| range.start <= cluster);
        after > 0 && self.found[after - 1].contains(&cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_found_until_it_is_freed() {
        let mut map = MetadataMap::new(vec![(5..8, "L1 table"), (0..1, "header"), (8..9, "L2 table")]).expect("no overlap");
        assert!([0, 5, 8].iter().all(|&cluster| map.contains(cluster)) && !map.contains(1) && !map.contains(9));
        map.add(20..22);
        map.remove(20);
        map.remove(8);
        assert!(map.contains(21) && !map.contains(20) && !map.contains(8));
        map.add(8..9);
        assert!(map.contains(8));
    }

    #[test]
    fn overlapping_metadata_is_named() {
        let error = MetadataMap::new(vec![(5..8, "L1 table"), (7..8, "L2 table")]).expect_err("overlap");
        assert_eq!(error, Overlap { cluster: 7, first: "L1 table", second: "L2 table" });
    }
}
