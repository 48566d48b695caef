//! Images in the making.

use std::sync::Arc;

use crate::error::LayerError;
use crate::storage::Environment;
use crate::storage::kept::MemoryKeeper;

use super::{CreateError, CreateOptions, Header, OpenError, OpenOptions, Qcow2};

/// When an image is flushed while it is made or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushes {
    /// Wherever the order matters.
    AsNeeded,
    /// Once, when it is complete: it is a draft.
    AtTheEnd,
}

/// A new image that nobody refers to yet, ready for quick first writes.
///
/// What is in its file needs no order, so nothing is flushed before [`finish`](Self::finish), which makes all of it durable with one flush; the
/// file gets its name after that. A power cut before may leave anything in the file.
#[derive(Debug)]
pub struct Draft<E: Environment> {
    image: Qcow2<E>,
    keeper: Arc<dyn MemoryKeeper>,
}

/// Why a draft cannot be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it all")]
pub enum DraftError {
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Layer(#[from] LayerError),
}

impl<E: Environment> Draft<E> {
    /// Makes an image in `file`, which is empty and locked by the caller, and gets it ready to be written to as
    /// [`Layer::keep`](crate::layer::Layer::keep) and [`Layer::warm`](crate::layer::Layer::warm) do. Whoever gives up a draft removes what `keeper`
    /// has of its file.
    ///
    /// # Errors
    /// If the options contradict one another or the format, or the file cannot be written or read.
    pub async fn make(file: E::File, options: &CreateOptions, keeper: &Arc<dyn MemoryKeeper>) -> Result<Self, DraftError> {
        Qcow2::<E>::write_new(&file, options, Flushes::AtTheEnd).await?;
        let header = Header::read(&file).await.map_err(OpenError::from)?;
        let image = Qcow2::open_as(file, header, OpenOptions::writing(), Flushes::AtTheEnd).await?;
        image.keep_unremembered(keeper).await?;
        image.warm().await?;
        Ok(Self { image, keeper: Arc::clone(keeper) })
    }

    /// What its header says.
    pub fn header(&self) -> Header {
        self.image.inner.header().clone()
    }

    /// Makes it durable. Flushes that fail are remembered from then on; this one is not, since nobody refers to the file.
    ///
    /// # Errors
    /// If it cannot be; then it is of no use.
    pub async fn finish(self) -> Result<Qcow2<E>, LayerError> {
        let inner = &self.image.inner;
        inner.rounds.end_draft(&inner.file).await?;
        inner.remember_failures(&self.keeper);
        // If an older file with this number had failed: nothing of this one is lost.
        inner.note_rewritten();
        Ok(self.image)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::qcow2::testing::{SIMULATED_IMAGE, SimulatedImage, flushes_so_far, write};
    use crate::qcow2::{CheckOptions, check};
    use crate::storage::kept::{Incarnation, TestKeeper};
    use crate::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
    use crate::storage::{Access, CacheMode, Location};

    const SIZE: u64 = 64 << 20;

    async fn draft(disk: &SimulatedEnvironment) -> Draft<SimulatedEnvironment> {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        let file = disk.open(&at, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let options = CreateOptions { mark: Some(7), ..CreateOptions::overlay(SIZE, "base", "raw") };
        Draft::make(file, &options, &keeper).await.expect("made")
    }

    #[test]
    fn a_draft_is_flushed_once_and_then_no_power_cut_changes_it() {
        let disk = SimulatedEnvironment::new(31);
        let inner = disk.clone();
        let states = Simulation::on(disk).block_on(async move {
            let draft = draft(&inner).await;
            assert_eq!((draft.header().mark(), draft.header().virtual_size()), (Some(7), SIZE));
            assert_eq!(flushes_so_far(&inner), 0);
            let keeper = Arc::clone(&draft.keeper);
            let image = draft.finish().await.expect("a sound disk");
            assert_eq!(flushes_so_far(&inner), 1);
            inner.flush_directory(Path::new("/")).await.expect("a sound disk");
            let states: Vec<_> = inner.crash_states(100).collect();
            // It flushes as any other from now on.
            write(&image, 0, 4096).await;
            image.flush().await.expect("a sound disk");
            assert_eq!(flushes_so_far(&inner), 3);
            inner.inject(Fault::lasting(OperationKind::Flush, 0));
            image.flush().await.expect_err("a failed flush");
            assert!(keeper.failure(Incarnation::of(&image.inner.file)).is_some(), "as any other");
            states
        });
        assert_eq!(states.len(), 1, "nothing is left to chance");
        let found = states[0].clone();
        Simulation::on(found.clone()).block_on(async move {
            let at = Location::Trusted(SIMULATED_IMAGE.into());
            let file = found.open(&at, Access::Write, CacheMode::Direct).await.expect("there");
            let report = check(&file, &CheckOptions::default()).await.expect("an image");
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
            SimulatedImage::open(file, OpenOptions::writing()).await.expect("sound");
        });
    }

    #[test]
    fn a_draft_that_is_not_durable_is_of_no_use() {
        let disk = SimulatedEnvironment::new(32);
        Simulation::on(disk.clone()).block_on(async move {
            let draft = draft(&disk).await;
            let (keeper, file) = (Arc::clone(&draft.keeper), Incarnation::of(&draft.image.inner.file));
            disk.inject(Fault::lasting(OperationKind::Flush, 0));
            draft.finish().await.expect_err("a failed flush");
            assert_eq!(keeper.failure(file), None, "the file is thrown away, and the next one may have its number");
        });
    }
}
