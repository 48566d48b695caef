//! What finding a place on the disk costs, at different depths of the chain.
//!
//! For each depth: a chain of our own overlays over a raw base, with writes scattered over all layers; then the time to open it, the first
//! look into every page of the chain map, the mean of many random looks when it is warm, and the memory that all of it takes.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use snapfence_benches::chain::{self, BLOCK_BYTES, Positions, layer_path};
use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, open_chain as open_layers};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Environment, Location};
use snapfence_image_format::units::{GuestOffset, GuestRange};

const DISK_BYTES: u64 = 1 << 30;
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
    chain::make(directory, 0..depth, DISK_BYTES, DISK_BYTES).await?;
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
    let mut positions = Positions::new(1, DISK_BYTES);
    let began = Instant::now();
    for _ in 0..LOOKUPS {
        view.map(GuestRange::new(positions.next_block(), BLOCK_BYTES)).await?;
    }
    let lookup = began.elapsed() / LOOKUPS;
    Ok(Figures { open, fill, lookup, resident_bytes: resident_bytes()? - resident_before })
}

async fn open_chain(directory: &Path, depth: usize) -> Result<Arc<Stack<UringEnvironment>>> {
    let top = layer_path(directory, depth - 1);
    let format = if depth == 1 { Format::Raw } else { Format::Qcow2 };
    let allowed = AllowedDirectories::default().with_directory_of(&top);
    let options = ChainOptions::reading(&allowed);
    let chain = open_layers(&UringEnvironment, &Location::Trusted(top), format, options).await?;
    let domain = FenceDomain::new(|| UringEnvironment.now());
    Ok(Stack::new(UringEnvironment, &domain, chain.into_iter().map(|layer| layer.layer).collect(), true))
}

/// Memory of this process, in bytes.
fn resident_bytes() -> Result<i64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<i64>()? * 1024)
}
