//! The fence as guests see it: what is taken after the cut is not seen to complete while any queue thread may still take something from before it.
//!
//! The slow queue thread is the test itself: it joins the daemon's threads, takes its view, and then does not look again.

mod common;

use std::sync::Arc;

use common::machine::{Data, FLUSH, IN, Machine, NO_STATUS, OUT};
use common::{Host, Served, block_on, options};
use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::stack::{Fence, FenceOutcome, View};
use snapfence_image_format::storage::uring::UringEnvironment;
use snapfence_image_format::units::GuestOffset;

const DISK_BYTES: u64 = 1 << 20;

/// Switches the device to a new overlay. Returns the view before.
fn switch(host: &Host, served: &Served) -> (Arc<Fence>, Arc<View<UringEnvironment>>) {
    let stack = served.device.stack();
    let fence = host.domain.fence();
    let view = stack.prepare_overlay(host.overlay("overlay", &served.image, "raw", DISK_BYTES), &fence);
    let before = stack.publish(view);
    fence.switch();
    (fence, before)
}

fn submit_all(machine: &mut Machine) {
    let queue = &mut machine.queues[0];
    queue.submit(0, OUT, 0, Data::Out(&[2; 4096]));
    queue.submit(1, IN, 8, Data::In(4096));
    queue.submit(2, FLUSH, 0, Data::None);
    queue.submit(3, 99, 0, Data::None);
    queue.kick();
}

fn assert_held(machine: &mut Machine) {
    std::thread::sleep(std::time::Duration::from_millis(50));
    let queue = &mut machine.queues[0];
    assert!(queue.completed().is_empty(), "a completion is seen before all threads have switched");
    for slot in 0..4 {
        assert_eq!(queue.status(slot), NO_STATUS, "and so is a status");
    }
}

fn read(view: &Arc<View<UringEnvironment>>, at: u64) -> Vec<u8> {
    let view = Arc::clone(view);
    block_on(async move {
        let (result, buffer) = view.read(GuestOffset::new(at), AlignedBuffer::zeroed(4096).into()).await;
        result.expect("a disk that can be read");
        let Buffer::Owned(bytes) = buffer else { panic!("the buffer that was given") };
        bytes.to_vec()
    })
}

#[test]
fn completions_wait_for_the_last_thread_and_the_cut_is_between_them() {
    let host = Host::new(1);
    let served = host.serve_raw(options(1), DISK_BYTES);
    let mut machine = Machine::new(1);
    let _link = machine.connect(&served.socket);
    assert_eq!(machine.queues[0].request(OUT, 0, Data::Out(&[1; 4096])).status, 0);
    let mut slow = host.domain.join();
    let _attachment = served.device.stack().attach(&slow);
    slow.begin_turn(|| {});
    let old = served.device.stack().view();
    let (fence, before) = switch(&host, &served);
    assert!(Arc::ptr_eq(&old, &before));
    submit_all(&mut machine);
    assert_held(&mut machine);
    assert_eq!(fence.outcome(), None);
    // The slow thread takes one more request from before the cut; it completes at once.
    let view = Arc::clone(&old);
    block_on(async move {
        view.write(GuestOffset::new(8192), AlignedBuffer::copy_of(&[3; 4096]).into()).await.0.expect("a layer that is not frozen");
        view.completions_released().await;
    });
    slow.begin_turn(|| {});
    assert_eq!(fence.outcome(), Some(FenceOutcome::Released));
    let done = machine.queues[0].wait(4);
    assert!(done.iter().all(|done| done.status == if done.slot == 3 { 2 } else { 0 }), "{done:?}");
    assert_eq!((read(&old, 0), read(&old, 8192)), (vec![1; 4096], vec![3; 4096]), "what is before the cut");
    let present = served.device.stack().view();
    assert_eq!((read(&present, 0), read(&present, 8192)), (vec![2; 4096], vec![3; 4096]), "what is after it");
    drop((old, slow, present));
    let stack = Arc::clone(served.device.stack());
    block_on(async move { stack.freeze_below(before).await }).expect("a layer that is brought to rest");
}

#[test]
fn a_fence_that_expires_lets_completions_go() {
    let host = Host::new(1);
    let served = host.serve_raw(options(1), DISK_BYTES);
    let mut machine = Machine::new(1);
    let mut link = machine.connect(&served.socket);
    let mut slow = host.domain.join();
    let _attachment = served.device.stack().attach(&slow);
    slow.begin_turn(|| {});
    let (fence, _before) = switch(&host, &served);
    submit_all(&mut machine);
    assert_held(&mut machine);
    // A pause that comes meanwhile waits for what is held.
    std::thread::scope(|scope| {
        let pause = scope.spawn(|| link.set_enabled(1, false));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!pause.is_finished(), "not at rest while completions are held");
        assert_eq!(fence.expire(), FenceOutcome::Expired);
        pause.join().expect("an answer");
    });
    assert_eq!(machine.queues[0].completed().len(), 4);
}
