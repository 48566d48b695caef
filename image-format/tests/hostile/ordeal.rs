//! Everything that is done with an image, in the hope that it only ever refuses.

use std::sync::Arc;
use std::time::Duration;

use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, open_chain};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CheckOptions, Repair, check};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, MemoryEnvironment};
use snapfence_image_format::units::{GuestOffset, GuestRange};

/// What went wrong at each step; `None` where nothing did, or the step was not reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) open: Option<String>,
    pub(crate) read: Option<String>,
    pub(crate) open_for_writing: Option<String>,
    pub(crate) write: Option<String>,
    pub(crate) unmap: Option<String>,
    pub(crate) close: Option<String>,
    /// An error of the check itself, or all that it found.
    pub(crate) check: Option<String>,
}

impl Outcome {
    pub(crate) fn all(&self) -> [&Option<String>; 7] {
        [&self.open, &self.read, &self.open_for_writing, &self.write, &self.unmap, &self.close, &self.check]
    }
}

/// Most bytes at the start of the disk, and as many at its end, that are read and written.
const REACH: u64 = 2 << 20;
/// Bytes at a time.
const PIECE: u64 = 256 << 10;

type MemoryStack = Stack<MemoryEnvironment>;

/// Puts the image at `path` through everything.
pub(crate) fn endure(environment: &MemoryEnvironment, path: &str) -> Outcome {
    let mut outcome = Outcome::default();
    let place = Location::Trusted(path.into());
    let run = {
        let (environment, place) = (environment.clone(), place.clone());
        move |writable: bool, steps: Steps| {
            let (inner, place) = (environment.clone(), place.clone());
            environment.block_on(async move {
                let stack = open(&inner, &place, writable).await?;
                Ok::<_, String>(steps.take(&stack).await)
            })
        }
    };
    match run(false, Steps::Read) {
        Ok(failures) => outcome.read = failures.first().cloned().flatten(),
        Err(error) => outcome.open = Some(error),
    }
    let (inner, at) = (environment.clone(), place.clone());
    outcome.check = environment.block_on(async move { checked(&inner, &at, Repair::None).await });
    match run(true, Steps::Change) {
        Ok(failures) => {
            let mut failures = failures.into_iter();
            outcome.write = failures.next().flatten();
            outcome.unmap = failures.next().flatten();
            outcome.close = failures.next().flatten();
        }
        Err(error) => outcome.open_for_writing = Some(error),
    }
    // Whatever has become of it now.
    let inner = environment.clone();
    let _ = environment.block_on(async move { checked(&inner, &place, Repair::Leaks).await });
    outcome
}

async fn open(environment: &MemoryEnvironment, place: &Location, writable: bool) -> Result<Arc<MemoryStack>, String> {
    let allowed = AllowedDirectories::default().with_directory_of(&place.path());
    let options = ChainOptions { writable, ..ChainOptions::reading(&allowed) };
    let layers = open_chain(environment, place, Format::Qcow2, options).await.map_err(|error| error.to_string())?;
    let layers: Vec<Arc<Layer<_>>> = layers.into_iter().map(|open| open.layer).collect();
    Ok(Stack::new(environment.clone(), &FenceDomain::new(|| Duration::ZERO), layers, !writable))
}

/// Opens once more, and takes the check's words.
async fn checked(environment: &MemoryEnvironment, place: &Location, repair: Repair) -> Option<String> {
    let access = if repair == Repair::None { Access::Read } else { Access::Write };
    let file = environment.open(place, access, CacheMode::Direct).await.expect("the file is there");
    let options = CheckOptions { repair, max_findings: 100, ..CheckOptions::default() };
    match check(&file, &options).await {
        Ok(report) if report.is_clean() => None,
        Ok(report) => Some(report.findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
        Err(error) => Some(error.to_string()),
    }
}

enum Steps {
    Read,
    Change,
}

impl Steps {
    async fn take(self, stack: &Arc<MemoryStack>) -> Vec<Option<String>> {
        let size = stack.virtual_size();
        let mut parts: Vec<_> = ranges(0, REACH.min(size)).collect();
        parts.extend(ranges(size.saturating_sub(REACH).max(REACH.min(size)), size));
        let mut failures = Vec::new();
        match self {
            Self::Read => {
                let mut first = None;
                for range in parts {
                    let (result, _) = stack.view().read(range.start, AlignedBuffer::zeroed(range.len as usize).into()).await;
                    first = first.or(result.err().map(|error| error.to_string()));
                }
                failures.push(first);
            }
            Self::Change => {
                let mut first = None;
                for range in &parts {
                    // A part of the first unit, so that the rest has to be filled from what is there.
                    let at = range.start + 512;
                    let (result, _) = stack.view().write(at, AlignedBuffer::copy_of(&[9; 1024]).into()).await;
                    first = first.or(result.err().map(|error| error.to_string()));
                }
                failures.push(first);
                let mut first = None;
                for range in parts {
                    let zeroed = stack.view().write_zeroes(range, true).await;
                    let discarded = stack.view().discard(range).await;
                    let flushed = stack.view().flush().await;
                    let error = zeroed.and(discarded).and(flushed).err();
                    first = first.or(error.map(|error| error.to_string()));
                }
                failures.push(first);
                failures.push(stack.close().await.err().map(|error| error.to_string()));
            }
        }
        failures
    }
}

fn ranges(start: u64, end: u64) -> impl Iterator<Item = GuestRange> {
    (start..end).step_by(PIECE as usize).filter_map(move |at| {
        let len = PIECE.min(end - at) & !511;
        (len >= 2048).then(|| GuestRange::new(GuestOffset::new(at), len))
    })
}
