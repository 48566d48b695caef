//! Making durable what other processes have left beneath.
//!
//! A daemon that is killed while it freezes a layer leaves writes in the kernel's cache. Whoever opens the layer next sees them, and a power cut
//! takes them away. The stack that is opened over it never writes to that layer, so no flush of its own would cover it: acknowledged flushes
//! would be lost, and snapshots above would be called durable with a base that is not. So the layers that lay beneath at opening, and
//! all of them if nothing is written, are flushed once before the first flush or freeze of the stack ends. A flush needs no leave to write, and
//! covers what was written through other descriptors. Requests other than flushes need not wait for it.

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::stream::{self, StreamExt};

use super::Stack;
use crate::error::{LayerError, Structure};
use crate::layer::Layer;
use crate::runtime::WaitQueue;
use crate::storage::{Environment, Storage};
use crate::units::HostOffset;

/// Flushes under way at a time: the devices beneath merge them, and a chain of a thousand files takes a few rounds.
const AT_ONCE: usize = 64;

/// How far the layers beneath are known to be durable.
#[derive(Debug)]
pub(super) struct Settling {
    /// How many layers, from the base on.
    layers: usize,
    /// How it ended, once and for all: a flush that failed is never made good by another.
    outcome: OnceLock<Result<(), LayerError>>,
    /// Somebody is at it.
    busy: AtomicBool,
    changed: WaitQueue,
}

/// The turn of whoever does the work. If it is given up in the middle, the next one begins anew.
struct Turn<'a>(&'a Settling);

impl Settling {
    pub(super) fn new(layers: usize) -> Self {
        Self { layers, outcome: OnceLock::new(), busy: AtomicBool::new(false), changed: WaitQueue::new() }
    }

    /// How many layers lay beneath at opening, or all if nothing is written.
    pub(super) fn layers(&self) -> usize {
        self.layers
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
        self.0.changed.notify_all();
    }
}

impl<E: Environment> Stack<E> {
    /// Makes the layers durable that lay beneath at opening, unless that has been done. Flushes and freezing do it by themselves; whoever opens
    /// a stack begins with it at once so that they need not wait.
    ///
    /// # Errors
    /// If one of them cannot be made durable, now and ever after.
    pub async fn settle(&self) -> Result<(), LayerError> {
        let settling = &self.settling;
        let turn = settling
            .changed
            .wait_until(|| match settling.outcome.get() {
                Some(outcome) => Some(Err(outcome.clone())),
                None => (!settling.busy.swap(true, Ordering::AcqRel)).then(|| Ok(Turn(settling))),
            })
            .await;
        let _turn = match turn {
            Ok(turn) => turn,
            Err(outcome) => return outcome,
        };
        // The view is let go of: it may have to retire meanwhile.
        let layers: Vec<_> = self.view().layers()[..settling.layers].to_vec();
        let began = self.environment.now();
        let flushes = stream::iter(layers).enumerate().map(|(number, layer)| async move { flush_files(number, &layer).await });
        let flushes = flushes.buffer_unordered(AT_ONCE);
        let outcome = flushes.fold(Ok(()), async |outcome: Result<(), LayerError>, flushed| outcome.and(flushed)).await;
        let took_us = self.environment.now().saturating_sub(began).as_micros();
        tracing::debug!(
            event = "base_flushed",
            layers = settling.layers,
            took_us,
            failed = outcome.is_err(),
            "what lay beneath at opening"
        );
        settling.outcome.get_or_init(|| outcome).clone()
    }

    /// Why the layers beneath cannot be made durable, if that is so.
    pub(super) fn settling_failure(&self) -> Option<&LayerError> {
        self.settling.outcome.get().and_then(|outcome| outcome.as_ref().err())
    }
}

/// Makes the files of a layer durable to which nobody writes.
async fn flush_files<E: Environment>(number: usize, layer: &Arc<Layer<E>>) -> Result<(), LayerError> {
    /// Whoever gives up does not see whether the flush fails, and who comes next sees it succeed.
    struct Watch<'a, E: Environment>(Option<&'a Layer<E>>);
    impl<E: Environment> Drop for Watch<'_, E> {
        fn drop(&mut self) {
            if let Some(layer) = self.0 {
                layer.note_failure();
            }
        }
    }
    let mut watch = Watch(Some(layer));
    flush_file(layer.file()).await?;
    if layer.data_file().identity() != layer.file().identity() {
        flush_file(layer.data_file()).await?;
    }
    watch.0 = None;
    // Another stack over the same file may have been the one that was told.
    if layer.earlier_failure().is_none() && layer.present_failure().is_some() {
        Err(LayerError::Doubtful { layer: number })
    } else {
        Ok(())
    }
}

async fn flush_file(file: &impl Storage) -> Result<(), LayerError> {
    match file.flush().await {
        // File systems that never write anything know no flush (squashfs, ISO 9660). EROFS is what ext4 says that has given up after an error.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL)) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        result => result.map_err(|error| LayerError::io("flush", Structure::File, HostOffset::ZERO, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::qcow2::{CreateOptions, OpenOptions, Qcow2};
    use crate::raw::Raw;
    use crate::stack::FenceDomain;
    use crate::storage::kept::{Failure, Incarnation, MemoryKeeper, TestKeeper};
    use crate::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
    use crate::storage::{Access, CacheMode, Location};

    /// Whoever opens it next would make it durable, as far as the kernel says.
    #[test]
    fn a_base_that_could_not_be_made_durable_is_doubtful_from_then_on() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let disk = SimulatedEnvironment::new(2);
        disk.put("/base", &[7; 65_536]);
        for failure in [None, Some(Failure::default())] {
            let (environment, keeper) = (disk.clone(), Arc::clone(&keeper));
            Simulation::on(disk.clone()).block_on(async move {
                let open = async |access| {
                    let at = Location::Trusted(Path::new("/base").to_owned());
                    let file = environment.open(&at, access, CacheMode::Direct).await.expect("a file");
                    let layer = Layer::Raw(Raw::open(file, access == Access::Write).await.expect("raw"));
                    layer.remember_failures(&keeper);
                    Arc::new(layer)
                };
                let domain = FenceDomain::new(|| std::time::Duration::ZERO);
                let stack = Stack::new(environment.clone(), &domain, vec![open(Access::Read).await], true);
                assert_eq!(stack.doubtful_layer(), failure.map(|_| 0));
                if failure.is_some() {
                    stack.settle().await.expect("now it can be flushed");
                    return;
                }
                environment.inject(Fault::once(OperationKind::Flush, 0));
                stack.settle().await.expect_err("a failed flush");
            });
        }
    }

    /// It comes to rest, so that what is opened above it need not be without it.
    #[test]
    fn a_doubtful_layer_is_frozen_and_not_called_durable() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let disk = SimulatedEnvironment::new(3);
        let environment = disk.clone();
        Simulation::on(disk.clone()).block_on(async move {
            let image = async |name: &str| {
                let at = Location::Trusted(Path::new(name).to_owned());
                let file = environment.open(&at, Access::CreateNew, CacheMode::Direct).await.expect("a file");
                Qcow2::<SimulatedEnvironment>::create(&file, &CreateOptions::standalone(65_536)).await.expect("created");
                if name == "/top" {
                    keeper.note_failure(Incarnation::of(&file));
                }
                let options = OpenOptions { keeper: Some(Arc::clone(&keeper)), ..OpenOptions::writing() };
                Arc::new(Layer::Qcow2(Qcow2::open(file, options).await.expect("an image")))
            };
            let top = image("/top").await;
            let domain = FenceDomain::new(|| std::time::Duration::ZERO);
            let stack = Stack::new(environment.clone(), &domain, vec![Arc::clone(&top)], false);
            assert_eq!(stack.doubtful_layer(), Some(0));
            let fence = domain.fence();
            let view = stack.prepare_overlay(image("/overlay").await, &fence);
            let before = stack.publish(view);
            let refused = stack.freeze_below(before).await.expect_err("it would not be durable");
            assert!(matches!(refused, LayerError::Doubtful { layer: 0 }), "{refused}");
            assert!(matches!(top.admit_write(), Err(LayerError::ReadOnly)));
            assert!(stack.failure().is_none(), "flushes go on");
        });
    }

    #[test]
    fn every_file_beneath_is_flushed_once() {
        let disk = SimulatedEnvironment::new(1);
        let environment = disk.clone();
        Simulation::on(disk.clone()).block_on(async move {
            let open = async |name: &str, access| {
                environment.open(&Location::Trusted(Path::new(name).to_owned()), access, CacheMode::Direct).await.expect("a file")
            };
            environment.put("/base", &[7; 65_536]);
            let overlay = open("/overlay", Access::CreateNew).await;
            let options = CreateOptions::overlay(65_536, "base", "raw");
            Qcow2::<SimulatedEnvironment>::create(&overlay, &options).await.expect("created");
            let base = Layer::Raw(Raw::open(open("/base", Access::Read).await, false).await.expect("raw"));
            let overlay = Layer::Qcow2(Qcow2::open(overlay, OpenOptions::writing()).await.expect("an image"));
            let domain = FenceDomain::new(|| std::time::Duration::ZERO);
            let stack = Stack::new(environment.clone(), &domain, vec![Arc::new(base), Arc::new(overlay)], false);
            let flushes = || environment.counts().get(&OperationKind::Flush).copied().unwrap_or(0);
            let before = flushes();
            let both = futures_util::future::join(stack.settle(), stack.settle()).await;
            assert!(both.0.is_ok() && both.1.is_ok());
            stack.settle().await.expect("as before");
            assert_eq!(flushes() - before, 1);
        });
    }
}
