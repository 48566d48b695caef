//! Deep chains to be measured.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{UringEnvironment, UringFile};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfence_image_format::units::GuestOffset;

/// Bytes of the blocks that are written.
pub const BLOCK_BYTES: u64 = 4096;
const WRITES_PER_LAYER: u64 = 64;

/// Where the layer with this number is: the base, number 0, is raw, all others are qcow2.
pub fn layer_path(directory: &Path, number: usize) -> PathBuf {
    directory.join(if number == 0 { "base.raw".to_owned() } else { format!("{number}.qcow2") })
}

/// Makes the layers from `from` to `depth` of a chain of disks of `bytes` bytes, each with some blocks written within the first `within`. A base that
/// is to be made has no bytes of its own.
///
/// # Errors
/// If the layers cannot be made.
pub async fn make(directory: &Path, layers: std::ops::Range<usize>, bytes: u64, within: u64) -> Result<()> {
    let domain = FenceDomain::new(|| UringEnvironment.now());
    let mut positions = Positions::new(7 + layers.start as u64, within);
    for number in layers {
        let path = layer_path(directory, number);
        if number == 0 {
            std::fs::File::create(&path)?.set_len(bytes)?;
            continue;
        }
        let backing = layer_path(directory, number - 1);
        let format = if number == 1 { "raw" } else { "qcow2" };
        let name = backing.file_name().unwrap_or_default();
        let file = open_file(&path, Access::CreateNew).await?;
        Qcow2::<UringEnvironment>::create(&file, &CreateOptions::overlay(bytes, name, format)).await?;
        let layer = Layer::Qcow2(Qcow2::open(file, OpenOptions::writing()).await?);
        // What lies beneath does not matter for whole blocks.
        let stack = Stack::new(UringEnvironment, &domain, vec![Arc::new(layer)], false);
        for _ in 0..WRITES_PER_LAYER {
            let block = AlignedBuffer::copy_of(&[0x5a; BLOCK_BYTES as usize]);
            stack.view().write(positions.next_block(), block.into()).await.0?;
        }
        stack.close().await?;
    }
    Ok(())
}

async fn open_file(path: &Path, access: Access) -> Result<UringFile> {
    let opened = UringEnvironment.open(&Location::Trusted(path.to_owned()), access, CacheMode::Buffered).await;
    opened.with_context(|| path.display().to_string())
}

/// Repeatable positions of blocks, all over a disk (xorshift).
#[derive(Debug)]
pub struct Positions {
    state: u64,
    blocks: u64,
}

impl Positions {
    /// On a disk of so many bytes.
    ///
    /// # Panics
    /// If that is less than a block.
    pub fn new(seed: u64, bytes: u64) -> Self {
        assert!(bytes >= BLOCK_BYTES, "a disk has one block at least");
        Self { state: seed.max(1), blocks: bytes / BLOCK_BYTES }
    }

    /// The next.
    pub fn next_block(&mut self) -> GuestOffset {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        GuestOffset::new(self.state % self.blocks * BLOCK_BYTES)
    }
}
