//! Images that strangers have written: corrupt and hostile headers, tables and names. Each is refused with an error of its own that says what
//! is wrong, at the step where it shows; nothing panics, and memory stays within bounds that do not depend on what the image claims.

mod chains;
mod headers;
mod holes;
mod image;
mod memory;
mod names;
mod ordeal;
mod tables;

use snapfence_image_format::storage::{Chance, MemoryEnvironment};

use image::Image;
use memory::peak_of;
use ordeal::{Outcome, endure};

/// Most memory that anything may take: caches, a few tables, and our little disks themselves.
const MEMORY_LIMIT: u64 = 160 << 20;
/// Where the image under test lies.
const PATH: &str = "/images/hostile.qcow2";
/// Images with random damage in a run.
const FUZZED: u64 = 2000;

/// The step that must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Opening, for reading and for writing.
    Open,
    /// Only opening for writing.
    OpenForWriting,
    Read,
    Write,
    /// Freezing the layer when the stack is closed.
    Close,
    /// Only our check finds it.
    Check,
    /// None: it is odd, but sound.
    Nothing,
}

/// One kind of damage: what it is called, what is done to the image, what fails, and a part of the message.
type Damage = (&'static str, fn(&mut Image) -> &mut Image, Step, &'static str);

/// An environment with nothing but the image, and a base that nothing names.
fn environment(image: &Image) -> MemoryEnvironment {
    let environment = MemoryEnvironment::new();
    environment.put(PATH, &image.0);
    environment.put("/images/base.raw", &vec![5; 1 << 20]);
    environment.put("/secret", &[6; 4096]);
    environment
}

fn outcome(image: &Image) -> Outcome {
    let environment = environment(image);
    let (outcome, peak) = peak_of(|| endure(&environment, PATH));
    assert!(peak < MEMORY_LIMIT, "{peak} bytes of memory: {outcome:?}");
    outcome
}

/// Damages the image in every way of a table, one at a time.
fn refuse(sound: fn() -> Image, damages: &[Damage]) {
    for (name, damage, step, expected) in damages {
        let mut image = sound();
        damage(&mut image);
        let outcome = outcome(&image);
        let place = match step {
            Step::Open => {
                assert_eq!(outcome.open_for_writing, outcome.open, "{name}");
                &outcome.open
            }
            Step::OpenForWriting => {
                assert_eq!(outcome.open, None, "{name}");
                &outcome.open_for_writing
            }
            Step::Read => {
                assert_eq!(outcome.open, None, "{name}");
                &outcome.read
            }
            Step::Write => &outcome.write,
            Step::Close => &outcome.close,
            Step::Check => {
                assert!(outcome.all()[..6].iter().all(|failure| failure.is_none()), "{name}: {outcome:?}");
                &outcome.check
            }
            Step::Nothing => {
                assert_eq!(outcome, Outcome::default(), "{name}");
                continue;
            }
        };
        let message = place.as_deref().unwrap_or_default();
        assert!(message.contains(expected), "{name}: {expected:?} at {step:?}: {outcome:#?}");
        assert!(!message.contains(char::is_control) || *step == Step::Check, "{name}: {message:?}");
    }
}

#[test]
fn the_images_to_be_damaged_are_sound() {
    for sound in [Image::sound, Image::extended, Image::version_2] {
        assert_eq!(outcome(&sound()), Outcome::default());
    }
}

#[test]
fn random_damage_is_survived() {
    let number = |variable| std::env::var(variable).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match number("SNAPFENCE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SNAPFENCE_SEEDS").unwrap_or(FUZZED),
    };
    let mut refused = 0;
    for seed in seeds.clone() {
        let mut chance = Chance::new(seed);
        let mut image = [Image::sound, Image::extended, Image::version_2][chance.index(3)]();
        for _ in 0..=chance.below(3) {
            let (start, len) = [
                (0, 104),
                (104, 64),
                (image::REFCOUNT_TABLE, 64),
                (image::REFCOUNT_BLOCK, 32),
                (image::L1, 16),
                (image::L2, 64),
                (image::SNAPSHOTS, 64),
                (image::SNAPSHOT_L1, 16),
                (image::COMPRESSED_DATA, 32),
            ][chance.index(9)];
            let at = start + chance.index(len);
            image.0[at] = match chance.below(4) {
                0 => 0xff,
                1 => 0,
                2 => image.0[at] ^ 1 << chance.below(8),
                _ => chance.below(256) as u8,
            };
        }
        if chance.happens(1, 10) {
            let len = chance.index(image.0.len());
            image.truncate(len);
        }
        // The seed comes out with a panic only.
        let outcome = std::panic::catch_unwind(|| outcome(&image));
        let outcome = outcome.unwrap_or_else(|_| panic!("SNAPFENCE_SEED={seed}"));
        refused += u32::from(outcome.all().iter().any(|failure| failure.is_some()));
    }
    println!("SNAPFENCE_SEED={seeds:?}: {refused} refused at some step");
}
