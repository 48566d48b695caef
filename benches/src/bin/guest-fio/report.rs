//! What is reported, and how blocks become figures.

use serde::Serialize;
use snapfence_benches::statistics::median;

/// What one run shows of a disk, or medians of several runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Figures {
    /// Requests a second.
    pub(crate) iops: f64,
    pub(crate) mib_per_second: f64,
    /// Latencies of reads and writes in the guest, from the beginning of submission to completion, in microseconds: completion latency alone would
    /// leave out the kick that a daemon which polls saves.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) longest_us: f64,
    /// Of flushes, where there were any.
    pub(crate) flush_p50_us: Option<f64>,
}

/// The same quantity of both sides, block by block, ours divided by theirs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    /// The smallest and the largest of the blocks.
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

/// One disk in one job, or all disks together.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// `all`, or the disk's name.
    pub(crate) disk: String,
    pub(crate) snapfence: Figures,
    pub(crate) qemu_storage_daemon: Option<Figures>,
    /// More is better.
    pub(crate) iops_ratio: Option<Ratio>,
    /// Less is better.
    pub(crate) p50_ratio: Option<Ratio>,
    pub(crate) p99_ratio: Option<Ratio>,
}

/// One job file.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    pub(crate) job: String,
    pub(crate) what: String,
    /// Turns of both sides that count, and those dropped because the hypervisor took processors away.
    pub(crate) turns: usize,
    pub(crate) dropped: usize,
    /// All disks together come first.
    pub(crate) rows: Vec<Row>,
}

/// The same job with a group snapshot of all disks in its midst and without, in turns, snapfence alone.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshots {
    pub(crate) job: String,
    /// Medians of the turns, all disks together.
    pub(crate) with: Figures,
    pub(crate) without: Figures,
    /// The slowest request of each turn, in microseconds.
    pub(crate) longest_with_us: Vec<f64>,
    pub(crate) longest_without_us: Vec<f64>,
    /// The longest held completion of each snapshot as the daemon reports it, in microseconds.
    pub(crate) held_us: Vec<u64>,
}

/// A job that checks something, and where.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) job: String,
    pub(crate) side: String,
    /// What went wrong, if anything did.
    pub(crate) error: Option<String>,
}

/// What a reader has to know of where the figures come from.
#[derive(Debug, Serialize)]
pub(crate) struct Setup {
    /// What makes the guest's processors: `kvm`, or `tcg`, emulation.
    pub(crate) accelerator: &'static str,
    pub(crate) processors: usize,
    pub(crate) host_kernel: String,
    pub(crate) guest: String,
    pub(crate) qemu: String,
    pub(crate) snapfenced: String,
    pub(crate) qemu_storage_daemon: Option<String>,
    /// The file system with the images.
    pub(crate) file_system: String,
    pub(crate) disks: Vec<String>,
    pub(crate) disk_mib: u64,
    pub(crate) queues: u16,
    pub(crate) block_seconds: u32,
    pub(crate) blocks: usize,
}

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) setup: Setup,
    pub(crate) measured: Vec<Measured>,
    pub(crate) snapshots: Option<Snapshots>,
    pub(crate) checks: Vec<Check>,
}

/// One turn of all sides: of each, the figures of all disks together and of each disk.
pub(crate) type Turn = Vec<Vec<Figures>>;

/// Puts turns together, disk by disk. The first side is ours.
pub(crate) fn rows(turns: &[Turn], names: &[&str]) -> Vec<Row> {
    let row = |(index, disk): (usize, &str)| {
        let of = |side: usize| -> Vec<Figures> { turns.iter().filter_map(|turn| Some(*turn.get(side)?.get(index)?)).collect() };
        let (ours, theirs) = (of(0), of(1));
        let ratio = |value: fn(&Figures) -> f64| {
            let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| value(ours) / value(theirs)).collect();
            ratio(&ratios)
        };
        Row {
            disk: disk.to_owned(),
            snapfence: medians(&ours),
            qemu_storage_daemon: (!theirs.is_empty()).then(|| medians(&theirs)),
            iops_ratio: ratio(|figures| figures.iops),
            p50_ratio: ratio(|figures| figures.p50_us),
            p99_ratio: ratio(|figures| figures.p99_us),
        }
    };
    std::iter::once("all").chain(names.iter().copied()).enumerate().map(row).collect()
}

/// The median of each figure, 0 if there are no runs.
pub(crate) fn medians(runs: &[Figures]) -> Figures {
    if runs.is_empty() {
        return Figures::default();
    }
    let of = |value: fn(&Figures) -> f64| median(&runs.iter().map(value).collect::<Vec<_>>());
    let flushes: Vec<f64> = runs.iter().filter_map(|figures| figures.flush_p50_us).collect();
    Figures {
        iops: of(|figures| figures.iops),
        mib_per_second: of(|figures| figures.mib_per_second),
        p50_us: of(|figures| figures.p50_us),
        p99_us: of(|figures| figures.p99_us),
        longest_us: of(|figures| figures.longest_us),
        flush_p50_us: (!flushes.is_empty()).then(|| median(&flushes)),
    }
}

fn ratio(ratios: &[f64]) -> Option<Ratio> {
    let sound: Vec<f64> = ratios.iter().copied().filter(|ratio| ratio.is_finite()).collect();
    let (lowest, highest) = (sound.iter().copied().reduce(f64::min)?, sound.iter().copied().reduce(f64::max)?);
    Some(Ratio { median: median(&sound), lowest, highest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(iops: f64) -> Figures {
        Figures { iops, p50_us: 1e6 / iops, ..Figures::default() }
    }

    #[test]
    fn sides_are_compared_turn_by_turn() {
        let turn = |ours: f64, theirs: f64| vec![vec![figures(ours); 2], vec![figures(theirs); 2]];
        let rows = rows(&[turn(100.0, 50.0), turn(10.0, 10.0), turn(900.0, 300.0)], &["vda"]);
        assert_eq!(rows.iter().map(|row| row.disk.as_str()).collect::<Vec<_>>(), ["all", "vda"]);
        assert_eq!((rows[1].snapfence.iops, rows[1].qemu_storage_daemon.unwrap().iops), (100.0, 50.0));
        assert_eq!(rows[1].iops_ratio, Some(Ratio { median: 2.0, lowest: 1.0, highest: 3.0 }));
        assert_eq!(rows[1].p50_ratio.unwrap().median, 0.5);
        // 0 by 0.
        assert_eq!(rows[1].p99_ratio, None);
    }

    #[test]
    fn one_side_alone_has_no_ratio() {
        let rows = rows(&[vec![vec![figures(1.0)]], vec![vec![figures(3.0)]]], &[]);
        assert_eq!((rows.len(), rows[0].snapfence.iops, rows[0].qemu_storage_daemon, rows[0].iops_ratio), (1, 2.0, None, None));
    }
}
