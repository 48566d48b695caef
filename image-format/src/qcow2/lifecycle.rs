//! The ends of an image's time as the top of a stack: getting ready for the first writes, and freezing.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{LayerError, Structure};
use crate::storage::{Environment, Storage};

use super::geometry::HostCluster;
use super::turn::TurnGuard;
use super::{Inner, Qcow2, READ_CACHE_BYTES};

/// L2 tables are made ahead of use if all of them together take no more than this.
const WARM_TABLE_BYTES: u64 = 16 << 20;

/// How far an image is on its way from the first write to the last. It only ever moves on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Writing,
    /// Takes no more writes; what was written is being made durable. A failed freezing stays here.
    Freezing,
    /// Opened so, or frozen: the file does not change.
    ReadOnly,
}

/// A phase that all threads see.
#[derive(Debug)]
pub(super) struct PhaseCell(AtomicU8);

impl PhaseCell {
    pub(super) fn new(phase: Phase) -> Self {
        Self(AtomicU8::new(phase as u8))
    }

    pub(super) fn get(&self) -> Phase {
        // Acquire pairs with the release in `set`: whoever sees that the file does not change sees all that was done before.
        match self.0.load(Ordering::Acquire) {
            phase if phase == Phase::Writing as u8 => Phase::Writing,
            phase if phase == Phase::Freezing as u8 => Phase::Freezing,
            _ => Phase::ReadOnly,
        }
    }

    fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Release);
    }
}

impl<E: Environment> Qcow2<E> {
    pub(crate) fn admit_write(&self) -> Result<(), LayerError> {
        self.inner.admit_write()
    }

    pub(crate) async fn flush(&self) -> Result<(), LayerError> {
        let inner = &self.inner;
        match inner.phase.get() {
            Phase::Writing | Phase::Freezing => inner.write_back().await,
            // Nothing has been written since it was opened or frozen, and freezing has flushed.
            Phase::ReadOnly => inner.admit_flush(),
        }
    }

    pub(crate) async fn warm(&self) -> Result<(), LayerError> {
        let inner = &self.inner;
        inner.admit_write()?;
        let geometry = &inner.format.geometry;
        let tables = geometry.l1_entries(inner.virtual_size());
        if tables.saturating_mul(geometry.cluster_bytes()) <= WARM_TABLE_BYTES {
            for l1_index in 0..u32::try_from(tables).expect("an L1 table has at most 32 MiB") {
                // A table that an internal snapshot shares is copied when it must be, not before.
                if inner.l1().table(l1_index).is_none() {
                    inner.make_table(l1_index).await?;
                }
            }
        }
        inner.fill_up().await?;
        inner.write_back().await
    }

    pub(crate) async fn freeze(&self, readers_gone: impl Future<Output = ()>) -> Result<(), LayerError> {
        let inner = &self.inner;
        // One at a time: every snapshot above freezes what is beneath it, and whoever comes second must find everything or nothing done. With the
        // refcounts gone all clusters would look free, and be cut off.
        let _turn = inner.freeze_turn.take().await;
        if inner.phase.get() == Phase::ReadOnly {
            return inner.admit_flush();
        }
        inner.phase.set(Phase::Freezing);
        // After a failure nothing in the file is changed any more.
        inner.admit_flush()?;
        if !inner.finish_unless_unmapped().await? {
            readers_gone.await;
            inner.lower_unmapped().await?;
            while !inner.finish_unless_unmapped().await? {
                inner.lower_unmapped().await?;
            }
        }
        inner.phase.set(Phase::ReadOnly);
        // Of a deep chain most layers are frozen, so that what each keeps in memory counts. Who reads has a map of his own.
        inner.slices.set_budget(READ_CACHE_BYTES);
        inner.slices.forget(|_| true);
        inner.allocator().refcounts.let_go();
        Ok(())
    }
}

impl<E: Environment> Inner<E> {
    /// Writes everything back, and finishes the file, unless there are clusters that nothing refers to any more and that still count as used: `false`.
    /// To be dropped half-way counts as a failed flush.
    async fn finish_unless_unmapped(&self) -> Result<bool, LayerError> {
        let mut outcome = Ok(false);
        let round = async {
            // To the end: who lowers counts meanwhile would do so after the file is finished.
            let turn = self.refcount_turn.take().await;
            // Whoever had the turn may have found that the image cannot be right.
            self.admit_flush()?;
            let end = self.give_back_reserves(&turn).await;
            // What was written is made durable whatever the counts are.
            self.write_back_once().await?;
            let end = match end {
                Ok(end) => end,
                Err(error) => {
                    outcome = Err(error);
                    return Ok(());
                }
            };
            // Nobody writes any more and no other round is under way, so nothing is unmapped after this look at it.
            if self.unmapped().has_any() {
                return Ok(());
            }
            self.trim(end).await?;
            let kept = self.leave_kept().await?;
            self.flush_device().await?;
            self.end_keeping(kept);
            outcome = Ok(true);
            Ok(())
        };
        self.rounds.alone(round).await?;
        outcome
    }

    /// Gives clusters back that nothing refers to any more. Whoever was reading there has ended.
    async fn lower_unmapped(&self) -> Result<(), LayerError> {
        let turn = self.refcount_turn.take().await;
        self.admit_flush()?;
        let unmapped = self.unmapped().take_all_unmapped();
        self.lower_all(unmapped, &turn).await
    }

    /// Gives the space of clusters back that were ready for use, and returns the first cluster after all that are in use.
    async fn give_back_reserves(&self, turn: &TurnGuard<'_>) -> Result<HostCluster, LayerError> {
        let geometry = &self.format.geometry;
        let (mut end, reserves) = {
            let mut allocator = self.allocator();
            (allocator.end.max(self.opened_clusters), allocator.clear_ready())
        };
        for run in reserves {
            let at = geometry.host_offset(HostCluster(run.start));
            // They hold nothing; a medium that cannot take their space back keeps it.
            let _ = self.file.punch(at, (run.end - run.start) * geometry.cluster_bytes()).await;
        }
        while end > self.opened_clusters {
            let block = geometry.locate_refcount(HostCluster(end - 1)).0;
            self.load_refcounts(block, turn).await?;
            let first = self.opened_clusters.max(block * geometry.refcounts_per_block());
            let Some(end_in_use) = self.allocator().refcounts.end_in_use(first..end) else { break };
            end = end_in_use;
            if end > first {
                break;
            }
        }
        Ok(HostCluster(end))
    }

    /// Cuts the file after the last cluster in use, which [`give_back_reserves`](Self::give_back_reserves) never puts before the length at
    /// opening: counts that were wrong then must not cost data.
    async fn trim(&self, end: HostCluster) -> Result<(), LayerError> {
        let len = self.format.geometry.host_offset(end);
        let error = |error| LayerError::io("trim", Structure::File, len, error);
        if self.file.length().await.map_err(error)? <= len.get() {
            return Ok(());
        }
        match self.file.set_len(len.get()).await {
            Ok(()) => Ok(()),
            // A block device.
            Err(refused) if refused.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            Err(refused) => Err(error(refused)),
        }
    }

    /// Remembers the first failure after which what is in the file is unknown. Returns it.
    pub(super) fn fail(&self, error: LayerError) -> LayerError {
        self.rounds.fail(error)
    }

    pub(super) fn admit_write(&self) -> Result<(), LayerError> {
        self.admit_flush()?;
        if self.phase.get() == Phase::Writing { Ok(()) } else { Err(LayerError::ReadOnly) }
    }

    pub(super) fn admit_flush(&self) -> Result<(), LayerError> {
        self.rounds.admit()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::Path;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::time::Duration;

    use futures_util::future::join;

    use super::*;
    use crate::qcow2::refcount::CACHE_BYTES;
    use crate::qcow2::testing::{SIMULATED_IMAGE, SimulatedImage, flushes_so_far, with_image, write};
    use crate::qcow2::{CheckOptions, CreateOptions, OpenOptions, check};
    use crate::storage::kept::{MemoryKeeper, TestKeeper};
    use crate::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment, Simulation};
    use crate::storage::{Access, CacheMode, Location, MemoryEnvironment, StorageExt};
    use crate::units::{GuestOffset, GuestRange, HostOffset};

    #[test]
    fn every_phase_is_seen_as_it_was_set() {
        for phase in [Phase::Writing, Phase::Freezing, Phase::ReadOnly] {
            let cell = PhaseCell::new(Phase::Writing);
            cell.set(phase);
            assert_eq!((cell.get(), PhaseCell::new(phase).get()), (phase, phase));
        }
    }

    /// Whether the first and the last table of a warm image of so many bytes are there before anything is written.
    fn warm_tables(virtual_size: u64) -> [bool; 2] {
        let environment = MemoryEnvironment::new();
        let inner = environment.clone();
        environment.block_on(async move {
            let at = Location::Trusted(Path::new("/a.qcow2").to_owned());
            let file = inner.open(&at, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
            Qcow2::<MemoryEnvironment>::create(&file, &CreateOptions::standalone(virtual_size)).await.expect("created");
            let image = Qcow2::<MemoryEnvironment>::open(file, OpenOptions::writing()).await.expect("opens");
            image.warm().await.expect("space");
            let last = u32::try_from(image.inner.format.geometry.l1_entries(virtual_size) - 1).expect("a small table");
            [0, last].map(|index| image.inner.l1().table(index).is_some())
        })
    }

    #[test]
    fn all_tables_of_a_warm_image_are_made_ahead_unless_they_take_too_much() {
        // A table of 64 KiB stands for 512 MiB of the disk.
        let limit = WARM_TABLE_BYTES / 65_536 * (512 << 20);
        assert_eq!(limit, 128 << 30);
        assert_eq!(warm_tables(limit), [true, true]);
        assert_eq!(warm_tables(limit + 65_536), [false, false]);
    }

    #[test]
    fn a_frozen_image_takes_no_writes_and_a_failed_one_nothing() {
        with_image(5, CreateOptions::standalone(64 << 20), async |_, image| {
            image.admit_write().expect("open for writing");
            write(&image, 0, 4096).await;
            image.freeze(async {}).await.expect("sound");
            assert!(matches!(image.admit_write(), Err(LayerError::ReadOnly)));
            image.flush().await.expect("everything is durable");
            image.inner.fail(LayerError::ReadOnly);
            assert!(image.admit_write().is_err() && image.flush().await.is_err());
        });
        with_image(6, CreateOptions::standalone(64 << 20), async |_, image| {
            image.inner.fail(LayerError::io("write", Structure::Data, HostOffset::ZERO, std::io::ErrorKind::Other.into()));
            assert!(image.admit_write().is_err() && !matches!(image.admit_write(), Err(LayerError::ReadOnly)));
        });
    }

    #[test]
    fn a_frozen_image_ends_with_the_last_cluster_in_use() {
        with_image(7, CreateOptions::standalone(64 << 20), async |disk, image| {
            let opened = image.inner.opened_clusters;
            for cluster in 0..3 {
                write(&image, cluster << 16, 4096).await;
            }
            let ahead = disk.bytes(SIMULATED_IMAGE).expect("there").len();
            image.freeze(async {}).await.expect("sound");
            let frozen = disk.bytes(SIMULATED_IMAGE).expect("there").len();
            // Three clusters of data and an L2 table.
            assert_eq!(frozen as u64, (opened + 4) << 16);
            assert!(frozen < ahead);
        });
    }

    #[test]
    fn freezing_takes_a_flush_for_what_entries_refer_to_one_for_the_entries_and_one_for_the_rest() {
        with_image(10, CreateOptions::standalone(64 << 20), async |disk, image| {
            let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
            image.keep(&keeper).await.expect("sound");
            image.warm().await.expect("space");
            write(&image, 0, 4096).await;
            let before = flushes_so_far(&disk);
            image.freeze(async {}).await.expect("sound");
            assert_eq!(flushes_so_far(&disk) - before, 3);
        });
    }

    #[test]
    fn a_frozen_image_has_no_leaks_whatever_was_about_to_be_freed() {
        let options = || CreateOptions { cluster_bits: 9, ..CreateOptions::standalone(64 << 20) };
        // The first refcount table has room for 16,384 clusters.
        for (clusters, discards, beside) in [(1_000, false, false), (100, true, false), (1_000, false, true), (100, true, true)] {
            with_image(11, options(), async move |disk, image| {
                for cluster in 0..clusters {
                    write(&image, cluster * 512, 512).await;
                }
                image.flush().await.expect("sound");
                let image = Rc::new(image);
                let table = || image.inner.header().refcount_table_offset;
                let before = table();
                if discards {
                    image.discard(GuestRange::new(GuestOffset::ZERO, 50 * 512), false, &|_| {}).await.expect("nothing beneath");
                } else {
                    for cluster in clusters..17_000 {
                        write(&image, cluster * 512, 512).await;
                    }
                }
                if beside {
                    // Its round has taken what is to be freed, and gives it back at its end.
                    disk.inject(Fault::once(OperationKind::Flush, 0).with(FaultEffect::Hang));
                    let guest = Rc::new(Cell::new(false));
                    let (flushing, ended) = (Rc::clone(&image), Rc::clone(&guest));
                    disk.spawn(async move {
                        flushing.flush().await.expect("sound");
                        ended.set(true);
                    });
                    let released = async {
                        disk.sleep_until(disk.now() + Duration::from_secs(1)).await;
                        assert!(!guest.get());
                        disk.release_hung();
                    };
                    join(image.freeze(async {}), released).await.0.expect("sound");
                    assert!(guest.get());
                } else {
                    image.freeze(async {}).await.expect("sound");
                }
                let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
                let file = disk.open(&at, Access::Read, CacheMode::Direct).await.expect("there");
                let report = check(&file, &CheckOptions::default()).await.expect("an image");
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
                assert_eq!(table() == before, discards, "the table has moved");
            });
        }
    }

    #[test]
    fn a_failed_image_is_not_changed_by_freezing() {
        with_image(12, CreateOptions::standalone(64 << 20), async |disk, image| {
            image.warm().await.expect("space");
            write(&image, 0, 4096).await;
            image.inner.fail(LayerError::ReadOnly);
            let before = disk.counts();
            image.freeze(async {}).await.expect_err("a failed image");
            assert_eq!(disk.counts(), before);
        });
    }

    #[test]
    fn what_was_written_is_durable_although_freezing_fails() {
        let environment = SimulatedEnvironment::new(13);
        let inner = environment.clone();
        let options = CreateOptions { cluster_bits: 9, ..CreateOptions::standalone(64 << 20) };
        let states = Simulation::on(environment).block_on(async move {
            let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
            let file = inner.open(&at, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
            SimulatedImage::create(&file, &options).await.expect("created");
            inner.flush_directory(Path::new("/")).await.expect("sound");
            let image = SimulatedImage::open(file, OpenOptions::writing()).await.expect("opens");
            write(&image, 0, 512).await;
            image.flush().await.expect("sound");
            // So many counts of others that those of the guest's cluster are not in memory any more.
            for block in 1..=CACHE_BYTES as u64 / 512 {
                image.inner.allocator().refcounts.insert(block, &[0; 512], |_| false);
            }
            let reservation = image.reserve(GuestRange::new(GuestOffset::ZERO, 512)).await.expect("in place");
            image.inner.file.write_bytes(reservation.host(), &[9; 512]).await.expect("sound");
            reservation.commit(|| {});
            inner.inject(Fault::lasting(OperationKind::Read, 0));
            image.freeze(async {}).await.expect_err("a count cannot be read");
            inner.crash_states(100).map(|found| found.bytes(SIMULATED_IMAGE).expect("there")).collect::<Vec<_>>()
        });
        let has_it = |bytes: &Vec<u8>| bytes.chunks(512).any(|cluster| cluster.iter().all(|byte| *byte == 9));
        assert!(states.iter().all(has_it), "the guest's cluster");
    }

    #[test]
    fn reserves_in_the_midst_of_a_frozen_image_are_holes() {
        with_image(8, CreateOptions::standalone(64 << 20), async |disk, image| {
            for cluster in 0..200 {
                write(&image, cluster << 16, 4096).await;
            }
            // All but the last are given up, and after that made ready to be used again.
            let range = GuestRange::new(GuestOffset::ZERO, 199 << 16);
            image.discard(range, false, &|_| {}).await.expect("nothing beneath");
            image.flush().await.expect("sound");
            image.release(image.take_unmapped()).await.expect("sound");
            image.inner.allocator().clear_ready();
            image.inner.fill_up().await.expect("space");
            let before = disk.allocated(SIMULATED_IMAGE).expect("there");
            image.freeze(async {}).await.expect("sound");
            let after = disk.allocated(SIMULATED_IMAGE).expect("there");
            assert!(before > 100 << 16 && after < 10 << 16, "{before} bytes before, {after} after");
        });
    }

    #[test]
    fn a_file_that_cannot_be_cut_is_frozen_only_if_it_never_could() {
        for (error, freezes) in [(libc::EOPNOTSUPP, true), (libc::EIO, false)] {
            with_image(9, CreateOptions::standalone(64 << 20), async move |disk, image| {
                write(&image, 0, 4096).await;
                disk.inject(Fault::lasting(OperationKind::SetLen, 0).with(FaultEffect::Error(error)));
                assert_eq!(image.freeze(async {}).await.is_ok(), freezes, "error {error}");
            });
        }
    }
}
