//! A thousand fences that expire: a queue thread stands still past the deadline, with a request in flight that hangs. Each time the snapshot has
//! failed, everybody who was held is released, no guest sees an error, and the next snapshot of the same devices is taken.

use std::cell::Cell;
use std::rc::Rc;

use serde_json::json;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, Simulation};

use super::support::World;

/// Daemons, one after the other: stacks grow by two layers with each fence that expires.
const DAEMONS: u64 = 10;
const FENCES: u8 = 100;

fn seed() -> u64 {
    let seed = std::env::var("SNAPFENCE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(6_001);
    println!("SNAPFENCE_SEED={seed}");
    seed
}

/// Begins a write of a guest, and says when it has been given back.
fn begin_write(world: &World, device: &'static str, block: u64, value: u8) -> Rc<Cell<bool>> {
    let done = Rc::new(Cell::new(false));
    let (guest, told) = (world.clone(), Rc::clone(&done));
    world.environment.spawn(async move {
        guest.write(device, block, value).await;
        told.set(true);
    });
    done
}

async fn expire(world: &World, number: u8) {
    let environment = &world.environment;
    let struck = environment.faults_struck();
    environment.inject(Fault::once(OperationKind::Write, 0).with(FaultEffect::Hang));
    let stuck = begin_write(world, "vda", 1, number);
    world.until("the request is stuck", async || environment.faults_struck() > struck).await;
    world.occupy("vda");
    let devices = json!([{ "device": "vda" }, { "device": "vdb" }]);
    let deadline = 1 + u64::from(number) % 20;
    let asked = world.begin("snapshot-create", json!({ "name": format!("late{number}"), "devices": devices, "deadline-ms": deadline }));
    world.switching("vda").await;
    // Past the cut: held until it is known what becomes of it.
    let held = begin_write(world, "vdb", 0, number);
    let refused = asked.wait().await.expect_err("nobody looks").desc;
    assert!(refused.contains(&format!("not every queue switched within {deadline} ms")), "{refused}");
    world.until("what was held is released", async || held.get()).await;
    assert!(!stuck.get(), "it hangs still");
    world.write("vda", 0, number).await;
    environment.release_hung();
    world.until("what was stuck ends well", async || stuck.get()).await;
    world.park("vda");
    for device in ["vda", "vdb"] {
        world.flush(device).await;
    }
    assert_eq!(world.snapshot(&format!("next{number}"), &["vda", "vdb"]).await["state"], "frozen");
    assert_eq!(world.settled(&format!("late{number}")).await["state"], "failed", "no late success");
    assert_eq!((world.read("vda", 2).await, world.read("vdb", 1).await), (vec![number, number], vec![number]));
}

#[test]
fn a_thousand_expired_fences_release_everything() {
    let seed = seed();
    for run in 0..DAEMONS {
        let mut simulation = Simulation::new(seed + run);
        let environment = simulation.environment().clone();
        simulation.block_on(async move {
            let world = World::new(&environment);
            for device in ["vda", "vdb"] {
                world.serve_new(device).await;
            }
            for number in 1..=FENCES {
                expire(&world, number).await;
            }
            world.manager.stop().await.expect("everything is durable");
        });
    }
    println!("{} fences have expired", DAEMONS * u64::from(FENCES));
}
