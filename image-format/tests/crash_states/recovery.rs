//! Recovering a stack from what a power cut has left, with more power cuts meanwhile.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snapfence_image_format::qcow2::{CheckOptions, CheckReport, Header, Repair, check};
use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::simulated::{CrashSpace, CrashState, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location};

use crate::foreign;
use crate::layout::{Opened, image_path, read_all};
use crate::pattern::Value;
use crate::tally::Tally;

/// A power cut in recovery that leaves more disks than this is drawn from.
const ALL: u64 = 1 << 10;
/// How many are drawn then.
const DRAWN: u64 = 64;

/// What a disk comes to when it is recovered.
#[derive(Debug)]
pub(crate) struct Recovered {
    /// Of each layer what the stack has down from there.
    pub(crate) contents: Vec<Vec<Value>>,
}

/// All disks that have been recovered. Threads share them.
#[derive(Debug)]
pub(crate) struct Recoveries {
    known: Mutex<Known>,
    /// One disk in so many is shown to QEMU.
    foreign_every: u64,
}

#[derive(Debug, Default)]
struct Known {
    /// By fingerprint and number of the topmost image.
    recovered: HashMap<(u64, usize), Arc<Recovered>>,
    tally: Tally,
}

impl Recoveries {
    pub(crate) fn new(foreign_every: u64) -> Self {
        Self { known: Mutex::default(), foreign_every }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tally(&self) -> Tally {
        let known = self.known();
        Tally { distinct: known.recovered.len() as u64, ..known.tally }
    }

    /// What is found when a disk is recovered whose topmost image has this number, whatever power cuts there are meanwhile.
    ///
    /// # Panics
    /// If it cannot be recovered, is corrupt, keeps leaks, or another power cut changes what is found.
    pub(crate) fn recover(&self, space: &CrashSpace, state: &CrashState, top: usize) -> Arc<Recovered> {
        let key = (state.fingerprint, top);
        if let Some(recovered) = self.known().recovered.get(&key) {
            return Arc::clone(recovered);
        }
        let mut spaces = Vec::new();
        let disk = space.disk(state);
        let (recovered, leaks) = recover(&disk, top, |during| spaces.push(during.crash_space()));
        let recovered = Arc::new(recovered);
        match self.known().recovered.entry(key) {
            // Another thread was faster.
            Entry::Occupied(known) => return Arc::clone(known.get()),
            Entry::Vacant(place) => place.insert(Arc::clone(&recovered)),
        };
        let mut tally = Tally { leaky: u64::from(leaks > 0), leaks, ..Tally::default() };
        if state.fingerprint.is_multiple_of(self.foreign_every) {
            foreign::judge(&space.disk(state), &disk, top, &recovered);
            tally.foreign += 1;
        }
        let mut chance = Chance::new(state.fingerprint);
        for space in spaces {
            tally.second_points += 1;
            let mut look_at = |second: CrashState| {
                tally.second_states += 1;
                let again = self.recover(&space, &second, top);
                assert!(again.contents == recovered.contents, "after {second:?} in recovery it is {again:?}, without it is {recovered:?}");
            };
            if space.count() <= ALL {
                space.all().for_each(&mut look_at);
            } else {
                (0..DRAWN).map(|_| space.sample(&mut chance)).for_each(&mut look_at);
                tally.second_drawn_points += 1;
            }
        }
        self.known().tally += tally;
        recovered
    }
}

/// How many operations that change the medium have begun, and how many have taken effect: a crash may leave the same as before while both stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    begun: u64,
    ended: u64,
}

impl Changes {
    pub(crate) fn of(environment: &SimulatedEnvironment) -> Self {
        // What a flush covers is decided when it ends.
        let writes = |(kind, count): (&OperationKind, &u64)| {
            (kind.changes() && !matches!(kind, OperationKind::Flush | OperationKind::FlushDirectory)).then_some(*count)
        };
        Self { begun: environment.counts().iter().filter_map(writes).sum(), ended: environment.effects() }
    }
}

/// What is found when a disk is recovered, without power cuts meanwhile.
///
/// # Panics
/// If it cannot be recovered, is corrupt, or keeps leaks.
pub(crate) fn recover_once(disk: &SimulatedEnvironment, top: usize) -> Recovered {
    recover(disk, top, |_| {}).0
}

/// Repairs leaks, opens, reads everything, closes. Returns what was found and how many leaks there were. `meanwhile` is called whenever the
/// medium has changed.
fn recover(environment: &SimulatedEnvironment, top: usize, mut meanwhile: impl FnMut(&SimulatedEnvironment)) -> (Recovered, u64) {
    let mut simulation = Simulation::on(environment.clone());
    let result = Rc::new(RefCell::new(None));
    let (slot, inner) = (Rc::clone(&result), environment.clone());
    simulation.executor().spawn(async move {
        let found = look_and_repair(&inner, top).await;
        *slot.borrow_mut() = Some(found);
    });
    let mut changes = Changes::of(environment);
    while simulation.step() {
        let now = Changes::of(environment);
        if now != changes {
            changes = now;
            meanwhile(environment);
        }
    }
    let found = result.take().expect("recovering ends");
    found.unwrap_or_else(|error| panic!("a power cut has left a disk that {error}"))
}

/// Recovers a disk as a program does that starts after a crash. Returns what was found and how many leaks there were.
///
/// # Errors
/// What is wrong with it, or what fails.
pub(crate) async fn look_and_repair(environment: &SimulatedEnvironment, top: usize) -> Result<(Recovered, u64), String> {
    let mut leaks = 0;
    for number in 0..=top {
        let report = check_image(environment, number, Repair::None).await?;
        if report.leaks > 0 {
            leaks += report.leaks;
            let repaired = check_image(environment, number, Repair::Leaks).await?;
            if !repaired.is_clean() {
                return Err(format!("has leaks after a repair in {}: {:?}", image_path(number), repaired.findings));
            }
        }
    }
    let made = in_the_making(environment, top + 1).await?;
    let opened = Opened::open(environment, top).await.map_err(|error| format!("does not open: {error}"))?;
    let layers = opened.stack.view().layers().to_vec();
    let mut contents = Vec::new();
    for count in 1..layers.len() {
        let beneath = Stack::new(environment.clone(), &opened.domain, layers[..count].to_vec(), true);
        contents.push(read_all(&beneath).await?);
    }
    contents.push(read_all(&opened.stack).await?);
    if made.is_some_and(|made| made != contents[contents.len() - 1]) {
        return Err(format!("has something in image {}, to which nobody has written", top + 1));
    }
    opened.stack.close().await.map_err(|error| format!("does not close: {error}"))?;
    drop((opened, layers));
    for number in 0..=top {
        let report = check_image(environment, number, Repair::None).await?;
        if !report.is_clean() {
            return Err(format!("is not clean when it has been closed: {}: {:?}", image_path(number), report.findings));
        }
    }
    Ok((Recovered { contents }, leaks))
}

/// What the stack reads with an overlay on top that was being made, if there is one already: it is no image, or a whole one.
async fn in_the_making(environment: &SimulatedEnvironment, number: usize) -> Result<Option<Vec<Value>>, String> {
    let location = Location::Trusted(image_path(number).into());
    let Ok(file) = environment.open(&location, Access::Read, CacheMode::Direct).await else { return Ok(None) };
    if Header::read(&file).await.is_err() {
        return Ok(None);
    }
    drop(file);
    check_image(environment, number, Repair::None).await?;
    let opened = Opened::open_for(environment, number, false).await.map_err(|error| format!("does not open: {error}"))?;
    read_all(&opened.stack).await.map(Some)
}

/// What our own check says of an image that is not corrupt.
async fn check_image(environment: &SimulatedEnvironment, number: usize, repair: Repair) -> Result<CheckReport, String> {
    let access = if repair == Repair::None { Access::Read } else { Access::Write };
    let location = Location::Trusted(image_path(number).into());
    let file = environment.open(&location, access, CacheMode::Direct).await.map_err(|error| format!("has no image {number}: {error}"))?;
    let options = CheckOptions { repair, ..CheckOptions::default() };
    let report = check(&file, &options).await.map_err(|error| format!("cannot be checked: image {number}: {error}"))?;
    if report.is_corrupt() { Err(format!("is corrupt: image {number}: {:?}", report.findings)) } else { Ok(report) }
}
