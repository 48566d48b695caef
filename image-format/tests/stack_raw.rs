//! A stack whose only layer is a raw image behaves as a plain array of bytes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::MemoryEnvironment;
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfence_image_format::units::{GuestOffset, GuestRange};

const DISK_BYTES: usize = 1 << 20;

/// Runs `test` on a stack over one raw image of 1 MiB whose every byte is 7.
fn with_raw_stack<F: Future<Output = ()>>(read_only: bool, test: impl FnOnce(Arc<Stack<MemoryEnvironment>>) -> F + 'static) {
    let environment = MemoryEnvironment::new();
    environment.put("/disk.raw", &vec![7; DISK_BYTES]);
    let inner = environment.clone();
    environment.block_on(async move {
        let place = Location::Trusted(PathBuf::from("/disk.raw"));
        let access = if read_only { Access::Read } else { Access::Write };
        let file = inner.open(&place, access, CacheMode::Direct).await.expect("the file was put there");
        let layer = Layer::Raw(Raw::open(file, !read_only).await.expect("a whole number of sectors"));
        let domain = FenceDomain::new(|| Duration::ZERO);
        test(Stack::new(inner, &domain, vec![Arc::new(layer)], read_only)).await;
    });
}

async fn bytes(stack: &Stack<MemoryEnvironment>, at: usize, len: usize) -> Vec<u8> {
    let (result, buffer) = stack.view().read(GuestOffset::new(at as u64), AlignedBuffer::zeroed(len).into()).await;
    result.expect("reads within the disk succeed");
    buffer.into_owned().to_vec()
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), len)
}

#[test]
fn writes_are_read_back_and_their_neighbours_stay() {
    with_raw_stack(false, async |stack| {
        let view = stack.view();
        view.write(GuestOffset::new(512), AlignedBuffer::copy_of(&[1; 1024]).into()).await.0.expect("written");
        view.flush().await.expect("flushed");
        assert_eq!(bytes(&stack, 0, 2048).await, [vec![7; 512], vec![1; 1024], vec![7; 512]].concat());
    });
}

#[test]
fn zeroes_with_and_without_unmapping_are_zeros() {
    with_raw_stack(false, async |stack| {
        for (start, unmap) in [(4096, true), (8192, false)] {
            stack.view().write_zeroes(range(start, 1536), unmap).await.expect("zeroed");
        }
        let expected = [vec![0; 1536], vec![7; 4096 - 1536]].concat();
        assert_eq!(bytes(&stack, 4096, 8192).await, [&expected[..], &expected[..]].concat());
    });
}

#[test]
fn requests_outside_the_disk_or_off_its_sectors_are_refused() {
    with_raw_stack(false, async |stack| {
        let size = DISK_BYTES as u64;
        for (start, len) in [(size, 512), (size - 512, 1024), (1, 512), (0, 100), (u64::MAX - 511, 512)] {
            let (result, _) = stack.view().write(GuestOffset::new(start), AlignedBuffer::zeroed(len as usize).into()).await;
            assert!(matches!(result, Err(LayerError::OutOfRange { .. })), "{start}+{len}: {result:?}");
            let result = stack.view().discard(range(start, len)).await;
            assert!(matches!(result, Err(LayerError::OutOfRange { .. })), "{start}+{len}: {result:?}");
        }
    });
}

#[test]
fn a_read_only_stack_refuses_every_change_and_reads_on() {
    with_raw_stack(true, async |stack| {
        let (result, _) = stack.view().write(GuestOffset::ZERO, AlignedBuffer::zeroed(512).into()).await;
        assert!(matches!(result, Err(LayerError::ReadOnly)), "{result:?}");
        assert!(matches!(stack.view().write_zeroes(range(0, 512), true).await, Err(LayerError::ReadOnly)));
        assert!(matches!(stack.view().discard(range(0, 512)).await, Err(LayerError::ReadOnly)));
        assert_eq!(bytes(&stack, 0, 512).await, vec![7; 512]);
    });
}

#[test]
fn a_closed_stack_takes_no_more_writes() {
    with_raw_stack(false, async |stack| {
        stack.close().await.expect("closed");
        let (result, _) = stack.view().write(GuestOffset::ZERO, AlignedBuffer::zeroed(512).into()).await;
        assert!(matches!(result, Err(LayerError::ReadOnly)), "{result:?}");
    });
}
