//! What finding a place on the disk costs, at different depths of the chain.
//!
//! For each depth: a chain of our own overlays over a raw base, with writes scattered over all layers; then the time to open it, the first
//! look into every page of the chain map, the mean of many random looks when it is warm, and the memory that all of it takes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::chain::{self, AllowedDirectories, ChainOptions, Format, Unprotected};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment, UringFile};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfence_image_format::units::{GuestOffset, GuestRange};

const DISK_BYTES: u64 = 1 << 30;
const BLOCK_BYTES: u64 = 4096;
const WRITES_PER_LAYER: u64 = 64;
const LOOKUPS: u32 = 300_000;
const DEPTHS: [usize; 4] = [1, 10, 100, 1000];

/// What was measured of one chain.
struct Figures {
    open: Duration,
    fill: Duration,
    lookup: Duration,
    resident_bytes: i64,
}

fn main() -> Result<()> {
    println!("{:>6} {:>12} {:>14} {:>16} {:>12}", "layers", "open", "first looks", "look when warm", "memory");
    for depth in DEPTHS {
        let directory = tempfile::tempdir()?;
        let path = directory.path().to_owned();
        let figures = Reactor::new(64)?.block_on(async move { measure(&path, depth).await })??;
        println!(
            "{depth:>6} {:>9.1} ms {:>11.1} ms {:>13} ns {:>8.1} MiB",
            figures.open.as_secs_f64() * 1e3,
            figures.fill.as_secs_f64() * 1e3,
            figures.lookup.as_nanos(),
            figures.resident_bytes as f64 / f64::from(1 << 20),
        );
    }
    Ok(())
}

async fn measure(directory: &Path, depth: usize) -> Result<Figures> {
    make_chain(directory, depth).await?;
    let resident_before = resident_bytes()?;
    let began = Instant::now();
    let stack = open_chain(directory, depth).await?;
    let open = began.elapsed();
    let view = stack.view();
    let began = Instant::now();
    for range in GuestRange::new(GuestOffset::ZERO, DISK_BYTES).split_at_multiples(32 << 20) {
        view.map(GuestRange::new(range.start, BLOCK_BYTES)).await?;
    }
    let fill = began.elapsed();
    let mut positions = Positions(1);
    let began = Instant::now();
    for _ in 0..LOOKUPS {
        view.map(GuestRange::new(positions.next_block(), BLOCK_BYTES)).await?;
    }
    let lookup = began.elapsed() / LOOKUPS;
    Ok(Figures { open, fill, lookup, resident_bytes: resident_bytes()? - resident_before })
}

fn layer_path(directory: &Path, number: usize) -> PathBuf {
    directory.join(if number == 0 { "base.raw".to_owned() } else { format!("{number}.qcow2") })
}

async fn open_file(path: &Path, access: Access) -> Result<UringFile> {
    let opened = UringEnvironment.open(&Location::Trusted(path.to_owned()), access, CacheMode::Buffered).await;
    opened.with_context(|| path.display().to_string())
}

/// Makes a chain with some blocks written in each layer.
async fn make_chain(directory: &Path, depth: usize) -> Result<()> {
    std::fs::File::create(layer_path(directory, 0))?.set_len(DISK_BYTES)?;
    let domain = FenceDomain::new(|| UringEnvironment.now());
    let mut positions = Positions(7);
    for number in 1..depth {
        let path = layer_path(directory, number);
        let backing = layer_path(directory, number - 1);
        let format = if number == 1 { "raw" } else { "qcow2" };
        let name = backing.file_name().unwrap_or_default();
        let file = open_file(&path, Access::CreateNew).await?;
        Qcow2::<UringEnvironment>::create(&file, &CreateOptions::overlay(DISK_BYTES, name, format)).await?;
        let layer = Layer::Qcow2(Qcow2::open(file, OpenOptions::writing()).await?);
        // What lies beneath does not matter for whole blocks.
        let stack = Stack::new(UringEnvironment, &domain, vec![Arc::new(layer)], false);
        for _ in 0..WRITES_PER_LAYER {
            let block = AlignedBuffer::zeroed(usize::try_from(BLOCK_BYTES)?);
            stack.view().write(positions.next_block(), block.into()).await.0?;
        }
        stack.close().await?;
    }
    Ok(())
}

async fn open_chain(directory: &Path, depth: usize) -> Result<Arc<Stack<UringEnvironment>>> {
    let top = layer_path(directory, depth - 1);
    let format = if depth == 1 { Format::Raw } else { Format::Qcow2 };
    let allowed = AllowedDirectories::default().with_directory_of(&top);
    let options = ChainOptions {
        allowed: &allowed,
        data_files: &[],
        cache: CacheMode::Direct,
        writable: false,
        protected: &Unprotected,
        keeper: None,
    };
    let chain = chain::open_chain(&UringEnvironment, &Location::Trusted(top), format, options).await?;
    let domain = FenceDomain::new(|| UringEnvironment.now());
    Ok(Stack::new(UringEnvironment, &domain, chain.into_iter().map(|layer| layer.layer).collect(), true))
}

/// Memory of this process, in bytes.
fn resident_bytes() -> Result<i64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<i64>()? * 1024)
}

/// Repeatable positions of blocks, all over the disk (xorshift).
struct Positions(u64);

impl Positions {
    fn next_block(&mut self) -> GuestOffset {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        GuestOffset::new(self.0 % (DISK_BYTES / BLOCK_BYTES) * BLOCK_BYTES)
    }
}
