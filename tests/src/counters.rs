//! Decides whether the disks of a snapshot are one cut through time, from the ordered counters on them.
//!
//! The order the counters were written in, and so what must hold in every cut, is in [`snapfence_guest_agent::record`].

pub use snapfence_guest_agent::record::{Identity, Layout, Slot};
use snapfence_guest_agent::record::{RECORD_BYTES, Record};

/// Something that no cut through time can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A later device has a counter the device before it has not.
    #[error("chain {chain}: device {device} is at {here}, ahead of the device before it at {before}")]
    Ahead {
        /// The chain.
        chain: u32,
        /// The device that is ahead.
        device: u32,
        /// Its newest counter.
        here: u64,
        /// The newest counter of the device before it.
        before: u64,
    },
    /// A device misses a counter that was on all devices before the next one was begun.
    #[error("chain {chain}: device {device} is at {here}, more than one behind the first device at {first}")]
    Behind {
        /// The chain.
        chain: u32,
        /// The device that is behind.
        device: u32,
        /// Its newest counter.
        here: u64,
        /// The newest counter of the first device.
        first: u64,
    },
    /// A slot holds something else than the writes up to the newest counter left there.
    #[error("chain {chain}: device {device} slot {slot} holds {found:?} instead of {expected:?} (newest counter {newest})")]
    Wrong {
        /// The chain.
        chain: u32,
        /// The device.
        device: u32,
        /// The slot.
        slot: u32,
        /// What it holds.
        found: Slot,
        /// What it must hold.
        expected: Slot,
        /// The newest counter on that device.
        newest: u64,
    },
    /// A counter completed before the snapshot was asked for is not in it.
    #[error("chain {chain} is at {here}, but {acknowledged} was complete on all devices before the snapshot began")]
    Lost {
        /// The chain.
        chain: u32,
        /// Its counter that is on all devices in the snapshot.
        here: u64,
        /// Its counter that was complete before.
        acknowledged: u64,
    },
    /// A counter begun after the snapshot was done is in it.
    #[error("chain {chain} is at {here}, but only {complete} was complete after the snapshot was done")]
    Future {
        /// The chain.
        chain: u32,
        /// Its newest counter in the snapshot.
        here: u64,
        /// Its counter that was complete afterwards.
        complete: u64,
    },
}

/// The newest counters found: per chain, per device in the chain's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut(Vec<Vec<u64>>);

impl Cut {
    /// Per chain, the newest counter that is on all devices.
    #[must_use]
    pub fn complete(&self) -> Vec<u64> {
        self.0.iter().map(|chain| chain.iter().copied().min().unwrap_or(0)).collect()
    }

    /// How many chains the cut caught between two devices. If it is never more than none, the snapshots prove little.
    #[must_use]
    pub fn caught_between(&self) -> usize {
        self.0.iter().filter(|chain| chain.iter().any(|counter| *counter != chain[0])).count()
    }

    /// Compares with what the writer had complete before the snapshot was asked for and after it was done.
    #[must_use]
    pub fn outside(&self, before: &[u64], after: &[u64]) -> Vec<Violation> {
        let mut found = Vec::new();
        for (chain, counters) in (0..).zip(&self.0) {
            let here = counters.iter().copied().min().unwrap_or(0);
            let newest = counters.iter().copied().max().unwrap_or(0);
            let (acknowledged, complete) = (before[chain as usize], after[chain as usize]);
            if here < acknowledged {
                found.push(Violation::Lost { chain, here, acknowledged });
            }
            // The one after the last complete counter may have been begun before the snapshot.
            if newest > complete + 1 {
                found.push(Violation::Future { chain, here: newest, complete });
            }
        }
        found
    }
}

/// Reads the counter regions of all devices of a snapshot, in the chains' order, and checks them against one another.
///
/// # Errors
///
/// Everything that contradicts the writing order, or was lost.
///
/// # Panics
///
/// If a region is not as long as the layout says.
pub fn verify(layout: Layout, regions: &[Vec<u8>]) -> Result<Cut, Vec<Violation>> {
    for region in regions {
        assert_eq!(region.len() as u64, layout.region_bytes(), "a region is as long as its layout");
    }
    let mut violations = Vec::new();
    let mut newest = Vec::new();
    for chain in 0..layout.chains {
        let counters: Vec<u64> =
            (0..).zip(regions).map(|(device, region)| newest_on(layout, chain, device, region, &mut violations)).collect();
        for (device, pair) in (1..).zip(counters.windows(2)) {
            if pair[1] > pair[0] {
                violations.push(Violation::Ahead { chain, device, here: pair[1], before: pair[0] });
            }
        }
        for (device, &here) in (1..).zip(counters.iter().skip(1)) {
            if here + 1 < counters[0] {
                violations.push(Violation::Behind { chain, device, here, first: counters[0] });
            }
        }
        newest.push(counters);
    }
    if violations.is_empty() { Ok(Cut(newest)) } else { Err(violations) }
}

/// The newest counter of a chain on a device. What the other slots hold must follow from it.
fn newest_on(layout: Layout, chain: u32, device: u32, region: &[u8], violations: &mut Vec<Violation>) -> u64 {
    let slots: Vec<Slot> = (0..layout.slots)
        .map(|slot| {
            let at = usize::try_from(layout.slot_offset(chain, slot)).expect("the region is in memory");
            Record::decode(&region[at..at + RECORD_BYTES])
        })
        .collect();
    let ours = |slot: &Slot| match slot {
        Slot::Written(identity) if identity.chain == chain && identity.device == device => Some(identity.counter),
        _ => None,
    };
    let newest = slots.iter().filter_map(ours).max().unwrap_or(0);
    for (slot, &found) in (0..).zip(&slots) {
        let expected = match layout.expected_in_slot(newest, slot) {
            Some(counter) => Slot::Written(Identity { chain, device, counter }),
            None => Slot::Empty,
        };
        if found != expected {
            violations.push(Violation::Wrong { chain, device, slot, found, expected, newest });
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { chains: 1, slots: 8 };

    /// Regions after the writes of counters 1.. in order, cut after `writes` of them over `devices` devices.
    fn cut_after(writes: u64, devices: usize) -> Vec<Vec<u8>> {
        let mut regions = vec![vec![0; usize::try_from(LAYOUT.region_bytes()).unwrap()]; devices];
        for write in 0..writes {
            let device = usize::try_from(write).unwrap() % devices;
            put(&mut regions, device, 1 + write / devices as u64);
        }
        regions
    }

    fn put(regions: &mut [Vec<u8>], device: usize, counter: u64) {
        let identity = Identity { chain: 0, device: u32::try_from(device).unwrap(), counter };
        let at = usize::try_from(LAYOUT.slot_offset(0, LAYOUT.slot_of(counter))).unwrap();
        regions[device][at..at + RECORD_BYTES].copy_from_slice(&Record::encode(identity).0);
    }

    #[test]
    fn every_cut_through_time_is_accepted() {
        for writes in 0..60 {
            let cut = verify(LAYOUT, &cut_after(writes, 3)).unwrap();
            assert_eq!(cut.complete(), [writes / 3]);
            assert_eq!(cut.caught_between(), usize::from(writes % 3 != 0));
        }
    }

    #[test]
    fn disks_cut_at_different_times_are_refused() {
        // One write of one device apart is the smallest difference there is: it is wrong whenever another device was written in between.
        for (early, late) in [(9, 12), (12, 18), (0, 3), (10, 16)] {
            for device in 0..3 {
                let mut regions = cut_after(early, 3);
                regions[device] = cut_after(late, 3).swap_remove(device);
                let legal = device == 0 && late == early + 3 && early % 3 == 0;
                assert_eq!(verify(LAYOUT, &regions).is_ok(), legal, "device {device} cut after {late}, the others after {early}");
            }
        }
    }

    #[test]
    fn lost_and_torn_older_records_are_found() {
        let mut regions = cut_after(30, 3);
        let at = usize::try_from(LAYOUT.slot_offset(0, LAYOUT.slot_of(7))).unwrap();
        regions[1][at + 2000] ^= 1;
        assert!(matches!(verify(LAYOUT, &regions).unwrap_err()[..], [Violation::Wrong { device: 1, found: Slot::Torn(Some(7)), .. }]));
        regions[1][at..at + RECORD_BYTES].fill(0);
        assert!(matches!(verify(LAYOUT, &regions).unwrap_err()[..], [Violation::Wrong { device: 1, found: Slot::Empty, .. }]));
    }

    #[test]
    fn snapshot_outside_the_time_it_was_taken_in_is_found() {
        let cut = verify(LAYOUT, &cut_after(31, 3)).unwrap();
        assert_eq!(cut.outside(&[10], &[10]), []);
        assert_eq!(cut.outside(&[11], &[12]), [Violation::Lost { chain: 0, here: 10, acknowledged: 11 }]);
        assert_eq!(cut.outside(&[9], &[9]), [Violation::Future { chain: 0, here: 11, complete: 9 }]);
    }
}
