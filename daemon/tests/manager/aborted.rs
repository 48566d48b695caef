//! A group snapshot is aborted at every operation of the disk that it needs, beneath every device of the group, in every way. Then
//!
//! - all devices have the new layer, or none has;
//! - the snapshot counts and is one cut, or it has failed, and that does not change any more, whatever ends late and whatever a start finds;
//! - the guests write and read on, and what they flushed is there after a kill;
//! - nothing is left of overlays that no device has, neither files nor memory that was kept for them.
//!
//! The operations are counted by doing: the N-th is struck, for every N until a run has none left that is.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Value, json};
use snapfence_image_format::chain::Format;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::kept::TestKeeper;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, SimulatedEnvironment, Simulation};

use super::support::{CatalogueFile, DISK, World};

const DEVICES: [&str; 3] = ["vda", "vdb", "vdc"];
/// More operations than a snapshot of one device takes.
const MAX_OPERATIONS: u64 = 500;

/// What strikes.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// This error, once or from then on.
    Error { errno: i32, lasting: bool },
    /// It does not end before every limit has passed.
    Hang,
}

const BLOWS: [Blow; 9] = [
    Blow::Error { errno: libc::EIO, lasting: false },
    Blow::Error { errno: libc::EIO, lasting: true },
    Blow::Error { errno: libc::ENOSPC, lasting: false },
    Blow::Error { errno: libc::ENOSPC, lasting: true },
    Blow::Error { errno: libc::EDQUOT, lasting: false },
    Blow::Error { errno: libc::EDQUOT, lasting: true },
    Blow::Error { errno: libc::EMFILE, lasting: false },
    Blow::Error { errno: libc::EROFS, lasting: true },
    Blow::Hang,
];

fn seed() -> u64 {
    let seed = std::env::var("SNAPFENCE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7301);
    println!("SNAPFENCE_SEED={seed}");
    seed
}

fn folder(device: &str) -> String {
    format!("/{device}")
}

fn image(device: &str) -> String {
    format!("/{device}/disk.qcow2")
}

async fn serve(world: &World, device: &str) {
    let specification = format!("name={device},image={},format=qcow2,socket=/run/{device}", image(device));
    world.serve(&specification).await.unwrap_or_else(|error| panic!("{error}"));
}

/// A daemon with the three devices, each with its directory, whose guests have written and flushed.
async fn begin(environment: &SimulatedEnvironment, catalogue: &CatalogueFile, keeper: &Arc<TestKeeper>) -> World {
    let world = World::start_with(environment.clone(), catalogue.clone(), &[], Arc::clone(keeper), None);
    for device in DEVICES {
        world.create(&image(device), &CreateOptions::standalone(DISK)).await;
        serve(&world, device).await;
        world.write(device, 0, 1).await;
        world.flush(device).await;
    }
    world
}

fn asked(name: &str) -> Value {
    json!({ "name": name, "devices": DEVICES.map(|device| json!({ "device": device })) })
}

/// Whether the overlays are on top, of all devices or of none.
async fn has_switched(world: &World, what: &str) -> bool {
    let mut switched = Vec::new();
    for device in DEVICES {
        switched.push(world.layers(device).await.contains(&format!("/{device}/disk.s.qcow2")));
    }
    assert!(switched.iter().all(|one| *one == switched[0]), "{what}: some have the new layer and some have not: {switched:?}");
    switched[0]
}

/// The state of the snapshot that has come to rest, `None` if it is not known.
async fn state(world: &World, what: &str) -> Option<String> {
    let info = world.ask("snapshot-show", json!({ "name": "s" })).await.ok()?;
    let state = info["state"].as_str().expect("a word").to_owned();
    match state.as_str() {
        "failed" => assert!(info["error"].is_string(), "{what}: {info}"),
        "frozen" => {
            for member in info["devices"].as_array().expect("a list") {
                let layer = member["frozen_layer"].as_str().expect("a path");
                assert_eq!(world.read_file(layer, Format::Qcow2, 2).await, [1, 0], "{what}: the cut has what was before and nothing after");
            }
        }
        other => panic!("{what}: at rest and {other}"),
    }
    Some(state)
}

/// What was seen before the kill.
#[derive(Clone, Default)]
struct Seen {
    /// Devices whose guest was told that its second write is durable.
    flushed: Vec<&'static str>,
    /// Whether the devices had switched, and the state of the snapshot; `None` if it had not come to rest.
    at_rest: Option<(bool, Option<String>)>,
}

/// The daemon is killed and another one begins. Of the `failed` devices flushes may have failed.
fn examine(
    environment: &SimulatedEnvironment,
    catalogue: &CatalogueFile,
    keeper: Arc<TestKeeper>,
    (seen, failed): (Seen, Vec<&'static str>),
    what: &str,
) -> Option<String> {
    let environment = environment.killed();
    let mut simulation = Simulation::on(environment.clone());
    let (catalogue, what) = (catalogue.after_kill(), format!("{what}, then killed"));
    simulation.block_on(async move {
        let world = World::start_with(environment.clone(), catalogue, &[], Arc::clone(&keeper), None);
        world.manager.recover().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        for device in DEVICES {
            serve(&world, device).await;
            let values = world.read(device, 2).await;
            assert_eq!(values[0], 1, "{what}: {device} has lost what was flushed");
            let second = if seen.flushed.contains(&device) { vec![2] } else { vec![0, 2] };
            assert!(second.contains(&values[1]), "{what}: {device} has {values:?}");
        }
        let mut layers = Vec::new();
        for device in DEVICES {
            layers.extend(world.layers(device).await);
        }
        let left: Vec<_> = world.files().into_iter().filter(|file| !layers.contains(file)).collect();
        assert!(left.is_empty(), "{what}: {left:?} are left, and no device has them");
        let making = world.manager.catalogue().run(|store| store.making()).await.expect("a catalogue");
        assert_eq!(making, [], "{what}: nothing is being made");
        let at_rest = (has_switched(&world, &what).await, state(&world, &what).await);
        assert_eq!(at_rest.0, at_rest.1.is_some(), "{what}: a layer has a snapshot, valid or failed");
        // Beneath a layer that was put on top, the one before may still be read with what it has there.
        let most = if at_rest.0 { 2 * DEVICES.len() } else { DEVICES.len() };
        assert!((DEVICES.len()..=most).contains(&keeper.count()), "{what}: memory is kept for {} layers", keeper.count());
        if let Some(before) = seen.at_rest {
            assert_eq!(at_rest, before, "{what}: a start has changed what was at rest");
        }
        let is_doubtful = |device: &&str| world.manager.device(device).expect("a device").stack.doubtful_layer().is_some();
        let (doubtful, sound): (Vec<_>, Vec<_>) = DEVICES.into_iter().partition(is_doubtful);
        for device in &doubtful {
            let view = world.manager.device(device).expect("a device").stack.view();
            // It fails if the guest may not know yet.
            let _ = view.flush().await;
        }
        for _ in 0..20 {
            world.pause().await;
        }
        for device in DEVICES {
            world.write(device, 1, 3).await;
            world.flush(device).await;
        }
        assert!(doubtful.iter().all(|device| failed.contains(device)), "{what}: {doubtful:?} are doubted");
        if !doubtful.is_empty() {
            let refused = world.ask("snapshot-create", asked("all")).await.expect_err("it would not be durable").desc;
            assert!(refused.starts_with(&format!("no snapshot of device '{}' would be durable", doubtful[0])), "{what}: {refused}");
        }
        assert_eq!(world.snapshot("later", &sound).await["state"], "frozen", "{what}");
        for device in DEVICES {
            assert_eq!(world.read(device, 2).await, [1, 3], "{what}");
        }
        world.manager.stop().await.unwrap_or_else(|devices| panic!("{what}: {devices:?}"));
        at_rest.1
    })
}

/// One blow at one operation beneath one device. Answers how the snapshot ended, or `None` if there was no such operation any more.
fn strike(seed: u64, struck: &'static str, blow: Blow, after: u64) -> Option<String> {
    let what = format!("seed {seed}, {blow:?} beneath {struck} after {after} operations");
    let mut simulation = Simulation::new(seed);
    let environment = simulation.environment().clone();
    let catalogue = CatalogueFile::default();
    let keeper = Arc::new(TestKeeper::default());
    let (inside, kept, memory, told) = (environment.clone(), catalogue.clone(), Arc::clone(&keeper), what.clone());
    let seen = simulation.block_on(async move {
        let (environment, what) = (inside, told);
        let world = begin(&environment, &kept, &memory).await;
        let (effect, lasting) = match blow {
            Blow::Error { errno, lasting } => (FaultEffect::Error(errno), lasting),
            Blow::Hang => (FaultEffect::Hang, false),
        };
        let fault = Fault { kind: None, path: None, directory: None, after, lasting, effect };
        environment.inject(fault.beneath(folder(struck)));
        let answer = world.ask("snapshot-create", asked("s")).await;
        if answer.is_ok() {
            world.settled("s").await;
        }
        world.concluded("job1").await;
        if environment.faults_struck() == 0 {
            return None;
        }
        if let (Blow::Hang, Err(refused)) = (blow, &answer) {
            assert!(refused.desc.contains(&format!("device '{struck}'")), "{what}: {}", refused.desc);
        }
        // The others go on while that disk is as bad as it is.
        for device in DEVICES.into_iter().filter(|device| *device != struck) {
            world.write(device, 1, 2).await;
            world.flush(device).await;
            assert_eq!(world.snapshot(&format!("other-{device}"), &[device]).await["state"], "frozen", "{what}: {device} is held up");
        }
        let before = state(&world, &what).await;
        environment.clear_faults();
        environment.release_hung();
        let mut flushed = Vec::new();
        for device in DEVICES {
            world.write(device, 1, 2).await;
            let view = world.manager.device(device).expect("a device").stack.view();
            match view.flush().await {
                Ok(()) => flushed.push(device),
                // What lies beneath has not become durable: that is said, and no later flush says otherwise.
                Err(error) => {
                    assert!(device == struck && answer.is_ok() && before.as_deref() == Some("failed"), "{what}: {device}: {error}")
                }
            }
            assert_eq!(world.read(device, 2).await, [1, 2], "{what}");
        }
        for _ in 0..20 {
            world.pause().await;
        }
        let switched = has_switched(&world, &what).await;
        let state = state(&world, &what).await;
        assert_eq!(state, before, "{what}: it was at rest");
        assert_eq!((switched, state.is_some()), (answer.is_ok(), answer.is_ok()), "{what}: refused, and something has changed");
        Some(Seen { flushed, at_rest: Some((switched, state)) })
    })?;
    let end = match &seen.at_rest {
        Some((false, _)) => "failed before the switch".to_owned(),
        Some((true, state)) => format!("{} after the switch", state.as_deref().unwrap_or_default()),
        None => unreachable!("it has come to rest"),
    };
    let failed = DEVICES.into_iter().filter(|device| !seen.flushed.contains(device)).collect();
    examine(&environment, &catalogue, keeper, (seen, failed), &what);
    Some(end)
}

#[test]
fn whatever_fails_wherever_all_devices_have_the_new_layer_or_none() {
    let seed = seed();
    let mut ends: BTreeMap<(String, String), u64> = BTreeMap::new();
    for struck in DEVICES {
        for blow in BLOWS {
            let cells = (0..MAX_OPERATIONS).map_while(|after| strike(seed, struck, blow, after));
            let mut count = 0;
            for end in cells {
                count += 1;
                *ends.entry((format!("{blow:?}"), end)).or_default() += 1;
            }
            assert!((20..MAX_OPERATIONS).contains(&count), "{blow:?} beneath {struck}: {count} operations");
        }
    }
    for ((blow, end), count) in &ends {
        println!("{count:5} cells: {blow}: {end}");
    }
    println!("{} cells", ends.values().sum::<u64>());
}

/// When the daemon is killed.
#[derive(Clone, Copy, Debug)]
enum Kill {
    Never,
    /// After so many changes of the medium.
    Changes(u64),
    /// After so many halves of syncs of the catalogue.
    Syncs(u64),
}

/// A run to its end or its kill: what is there, what was seen, and the counts of changes and halves of syncs when the snapshot began.
struct Run {
    environment: SimulatedEnvironment,
    catalogue: CatalogueFile,
    keeper: Arc<TestKeeper>,
    seen: Seen,
    began: (u64, u64),
}

fn run(seed: u64, kill: Kill) -> Run {
    let mut simulation = Simulation::new(seed);
    let environment = simulation.environment().clone();
    let catalogue = CatalogueFile::default();
    match kill {
        Kill::Never => {}
        Kill::Changes(changes) => environment.stop_after(changes),
        Kill::Syncs(halves) => catalogue.kill_after(halves, &environment),
    }
    let began = Rc::new(Cell::new((0, 0)));
    let seen = Rc::new(RefCell::new(Seen::default()));
    let keeper = Arc::new(TestKeeper::default());
    let memory = Arc::clone(&keeper);
    let (inside, kept, told, noted) = (environment.clone(), catalogue.clone(), Rc::clone(&began), Rc::clone(&seen));
    simulation.run(async move {
        let note = |change: &dyn Fn(&mut Seen)| {
            // The dead see nothing.
            if !inside.is_stopped() {
                change(&mut noted.borrow_mut());
            }
        };
        let world = begin(&inside, &kept, &memory).await;
        told.set((inside.effects(), kept.half_syncs()));
        world.done("snapshot-create", asked("s")).await;
        for device in DEVICES {
            world.write(device, 1, 2).await;
            world.flush(device).await;
            note(&|seen| seen.flushed.push(device));
        }
        assert_eq!(world.settled("s").await["state"], "frozen");
        note(&|seen| seen.at_rest = Some((true, Some("frozen".to_owned()))));
        // Of the end nothing is told.
        let _ = world.manager.stop().await;
    });
    Run { environment, catalogue, keeper, seen: seen.take(), began: began.get() }
}

#[test]
fn killed_at_every_change_all_devices_have_the_new_layer_or_none() {
    let seed = seed();
    let whole = run(seed, Kill::Never);
    let changes = (whole.began.0..whole.environment.effects()).map(Kill::Changes);
    let syncs = (whole.began.1 + 1..=whole.catalogue.half_syncs()).map(Kill::Syncs);
    let mut ends: BTreeMap<(&str, Option<String>), u64> = BTreeMap::new();
    for kill in changes.chain(syncs) {
        let Run { environment, catalogue, keeper, seen, .. } = run(seed, kill);
        let end = examine(&environment, &catalogue, keeper, (seen, Vec::new()), &format!("seed {seed}, {kill:?}"));
        let what = if matches!(kill, Kill::Changes(_)) { "changes of the medium" } else { "syncs of the catalogue" };
        *ends.entry((what, end)).or_default() += 1;
    }
    println!("{} cells: {ends:?}", ends.values().sum::<u64>());
    assert!(ends.len() >= 5, "nothing, failed and frozen by changes, failed and frozen by syncs: {ends:?}");
}
