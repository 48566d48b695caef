//! What lies beneath a stack when it is opened may be in the cache only: it is flushed, once, before a flush of the stack ends.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{OpenOptions, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::Access;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment, Simulation};

use crate::disk::open_file;
use crate::tools::Scratch;

const TOP: &str = "/top.raw";
const IMAGE: &str = "/a.qcow2";
const DATA: &str = "/a.data";

/// A raw image over a qcow2 image whose data lies in a file of its own.
fn environment() -> SimulatedEnvironment {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=a.data", "a.qcow2", "1M"]);
    let environment = SimulatedEnvironment::new(1);
    environment.import(scratch.path("a.qcow2"), IMAGE).expect("imported");
    environment.import(scratch.path("a.data"), DATA).expect("imported");
    environment.put(TOP, &vec![0; 1 << 20]);
    environment
}

async fn open(environment: &SimulatedEnvironment) -> Arc<Stack<SimulatedEnvironment>> {
    let image = open_file(environment, Path::new(IMAGE), Access::Read).await;
    let data_file = Some(open_file(environment, Path::new(DATA), Access::Read).await);
    let base = Qcow2::open(image, OpenOptions { data_file, ..OpenOptions::reading() }).await.expect("opens");
    let top = Raw::open(open_file(environment, Path::new(TOP), Access::Write).await, true).await.expect("whole sectors");
    let layers = vec![Arc::new(Layer::Qcow2(base)), Arc::new(Layer::Raw(top))];
    Stack::new(environment.clone(), &FenceDomain::new(|| Duration::ZERO), layers, false)
}

fn with_stack<F: Future<Output = ()>>(test: impl FnOnce(SimulatedEnvironment, Arc<Stack<SimulatedEnvironment>>) -> F + 'static) {
    let environment = environment();
    let inner = environment.clone();
    Simulation::on(environment).block_on(async move {
        let stack = open(&inner).await;
        test(inner, stack).await;
    });
}

/// The files that were flushed so far.
fn flushed(environment: &SimulatedEnvironment) -> Vec<String> {
    let flushes = environment.log().into_iter().filter(|operation| operation.kind == OperationKind::Flush);
    let mut paths: Vec<_> = flushes.map(|operation| operation.path.display().to_string()).collect();
    paths.sort_unstable();
    paths
}

#[test]
fn every_file_beneath_is_flushed_once() {
    with_stack(async |environment, stack| {
        assert!(flushed(&environment).is_empty());
        stack.view().flush().await.expect("flushed");
        assert_eq!(flushed(&environment), [DATA, IMAGE, TOP]);
        stack.settle().await.expect("done before");
        stack.view().flush().await.expect("flushed");
        assert_eq!(flushed(&environment), [DATA, IMAGE, TOP, TOP]);
        stack.close().await.expect("closed");
        assert!(stack.failure().is_none());
    });
}

#[test]
fn a_failure_beneath_is_never_made_good() {
    // The second is what a file system says that has given up after an error.
    for (path, errno) in [(IMAGE, libc::EIO), (DATA, libc::EIO), (IMAGE, libc::EROFS)] {
        with_stack(async move |environment, stack| {
            environment.inject(Fault::once(OperationKind::Flush, 0).on(path).with(FaultEffect::Error(errno)));
            let first = stack.view().flush().await;
            assert!(matches!(first, Err(LayerError::Io { .. })), "{path}: {first:?}");
            assert!(stack.failure().is_some(), "{path}");
            let flushes = flushed(&environment);
            for again in [stack.settle().await, stack.view().flush().await, stack.close().await] {
                assert!(matches!(again, Err(LayerError::Io { .. })), "{path}: {again:?}");
            }
            let later: Vec<_> = flushed(&environment).into_iter().filter(|path| path != TOP).collect();
            assert_eq!(later, flushes, "the layers beneath are not flushed again");
        });
    }
}

#[test]
fn a_medium_that_knows_no_flush_needs_none() {
    for errno in [libc::EINVAL, libc::EOPNOTSUPP] {
        with_stack(async move |environment, stack| {
            environment.inject(Fault::lasting(OperationKind::Flush, 0).on(IMAGE).with(FaultEffect::Error(errno)));
            stack.view().flush().await.unwrap_or_else(|error| panic!("errno {errno}: {error}"));
            assert!(stack.failure().is_none());
        });
    }
}

#[test]
fn who_gives_up_leaves_the_work_to_the_next() {
    with_stack(async |environment, stack| {
        environment.inject(Fault::once(OperationKind::Flush, 0).on(IMAGE).with(FaultEffect::Hang));
        {
            let mut given_up = pin!(stack.settle());
            assert!(given_up.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        stack.settle().await.expect("settled");
        assert!(flushed(&environment).contains(&IMAGE.to_owned()));
        environment.release_hung();
    });
}
