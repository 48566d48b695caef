//! An image that a stranger has written, and what a guest then does with it.
//!
//! An input chooses a sound image (module `images`), damages it, and goes on with operations. Whatever the damage, nothing panics. If our check finds no
//! corruption in the image, it is as good as one of our own: what is written is read again, what is not keeps what it had, and the check finds no
//! corruption and no more leaks afterwards.

mod disk;
mod images;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, open_chain};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CheckOptions, CheckReport, Repair, check};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, MemoryEnvironment};

use crate::source::Source;
use disk::Disk;
use images::Image;

/// Where the image under test lies.
const PATH: &str = "/images/image.qcow2";
/// Most places that are damaged.
const MAX_DAMAGES: usize = 8;
/// Most operations of a run.
const MAX_OPERATIONS: usize = 64;
/// Most memory for the counts of a check: more than any sound image here needs.
const CHECK_MEMORY: u64 = 4 << 20;

fn templates() -> &'static [Image] {
    static TEMPLATES: OnceLock<Vec<Image>> = OnceLock::new();
    TEMPLATES.get_or_init(images::all)
}

/// One run.
///
/// # Panics
/// If a promise is broken.
pub fn run(input: &[u8]) {
    let mut source = Source::new(input);
    let templates = templates();
    let template = &templates[source.below(templates.len())];
    let mut image = template.clone();
    let damages = source.below(MAX_DAMAGES + 1);
    for _ in 0..damages {
        image.damage(&mut source);
    }
    let environment = MemoryEnvironment::new();
    environment.put(PATH, &image.bytes);
    environment.put("/images/base.raw", &[0xba; 8192]);
    let rest: Vec<u8> = std::iter::from_fn(|| (!source.is_empty()).then(|| source.u8())).collect();
    let (inner, has_bitmaps) = (environment.clone(), image.has_valid_bitmaps());
    environment.block_on(async move { endure(&inner, &image.bytes, &rest, damages > 0, has_bitmaps).await });
}

async fn endure(environment: &MemoryEnvironment, image: &[u8], operations: &[u8], is_damaged: bool, has_bitmaps: bool) {
    let before = checked(environment, PATH, Repair::None).await;
    let stack = open(environment, false).await;
    // A check does not look at the backing file.
    let is_sound = before.as_ref().is_some_and(|report| !report.is_corrupt() && !report.marked_corrupt) && stack.is_ok();
    let mut disk = Disk::new(is_sound);
    if let Ok(stack) = stack {
        disk.explore(&stack).await;
    }
    settle(environment).await;
    let mut source = Source::new(operations);
    let mut left = MAX_OPERATIONS;
    loop {
        let stack = match open(environment, true).await {
            Ok(stack) => stack,
            // A check passes over what only writing needs.
            Err(error) => {
                assert!(is_damaged, "a sound image: {error}");
                break;
            }
        };
        disk.read_all(&stack).await;
        // Ends with the operations, or to open the image again.
        while left > 0 && !source.is_empty() {
            left -= 1;
            if disk.operate(&stack, &mut source).await {
                break;
            }
        }
        let is_over = left == 0 || source.is_empty();
        disk.read_all(&stack).await;
        disk.note_close(stack.close().await);
        drop(stack);
        settle(environment).await;
        if is_over {
            break;
        }
    }
    let after = checked(environment, PATH, Repair::None).await;
    if let (true, Some(before)) = (is_sound, before) {
        let after = after.expect("an image that could be checked still can");
        assert!(!after.is_corrupt(), "{before:?} has become {after:?}");
        // Writing makes persistent bitmaps invalid, and what they take up a leak, as qemu-img check sees it too.
        if after.leaks > before.leaks && !has_bitmaps && !disk.has_failed() {
            assert!(after.leaks <= leaks_when_grown(environment, image).await, "{before:?} has become {after:?}");
        }
    }
    // What a repair makes of it must be sound again, or fail.
    let _ = checked(environment, PATH, Repair::Leaks).await;
    if is_sound {
        let stack = open(environment, false).await.unwrap_or_else(|error| panic!("a sound image: {error}"));
        disk.read_all(&stack).await;
    }
}

/// Lets tasks end that still hold what was dropped: whoever writes is alone with an image.
async fn settle(environment: &MemoryEnvironment) {
    environment.sleep_until(environment.now() + Duration::from_secs(1)).await;
}

/// What leaks in the image as it was, had its file been as long as it is now: what is counted behind the end of a file nobody sees, qemu-img check
/// neither.
async fn leaks_when_grown(environment: &MemoryEnvironment, image: &[u8]) -> u64 {
    const GROWN: &str = "/images/grown.qcow2";
    let mut grown = image.to_vec();
    grown.resize(grown.len().max(environment.bytes(PATH).expect("the file is there").len()), 0);
    environment.put(GROWN, &grown);
    checked(environment, GROWN, Repair::None).await.map_or(0, |report| report.leaks)
}

async fn checked(environment: &MemoryEnvironment, path: &str, repair: Repair) -> Option<CheckReport> {
    let access = if repair == Repair::None { Access::Read } else { Access::Write };
    let file = environment.open(&Location::Trusted(path.into()), access, CacheMode::Direct).await.expect("the file is there");
    check(&file, &CheckOptions { repair, max_findings: 10, memory_limit: CHECK_MEMORY }).await.ok()
}

async fn open(environment: &MemoryEnvironment, writable: bool) -> Result<Arc<Stack<MemoryEnvironment>>, String> {
    let location = Location::Trusted(PATH.into());
    let allowed = AllowedDirectories::default().with_directory_of(&location.path());
    let options = ChainOptions { writable, ..ChainOptions::reading(&allowed) };
    let layers = open_chain(environment, &location, Format::Qcow2, options).await.map_err(|error| error.to_string())?;
    let layers: Vec<Arc<Layer<_>>> = layers.into_iter().map(|open| open.layer).collect();
    Ok(Stack::new(environment.clone(), &FenceDomain::new(|| Duration::ZERO), layers, !writable))
}
