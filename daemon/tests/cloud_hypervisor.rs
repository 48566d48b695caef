//! What Cloud Hypervisor does to a device, message by message, with crate `vhost` as the front-end: handshake, pause, resume, `GET_VRING_BASE`,
//! reconnecting, and memory that comes and goes.
//!
//! A drain is proved by comparing: once the answer is there, no byte of guest memory changes any more.

mod common;

use common::driver::{readable, writable};
use common::machine::{DISCARD, Data, FEATURES, FLUSH, GET_ID, IN, Link, Machine, NO_STATUS, OUT, SLOT_DATA, borrowed};
use common::{Host, SharedMemory, options};
use rustix::fs::MemfdFlags;
use snapfence_image_format::storage::Chance;
use snapfenced::connection::ConnectionEvent;
use snapfenced::device::DeviceOptions;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags};
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 64 << 20;
const DISK_SECTORS: u64 = DISK_BYTES / 512;
const QUEUES: usize = 4;
/// Requests of each queue at once.
const DEPTH: usize = 48;

/// A device, and a machine whose queues are full of large reads and writes.
fn submit_everywhere(machine: &mut Machine, chance: &mut Chance) {
    for queue in &mut machine.queues {
        for slot in 0..DEPTH {
            let sector = chance.below(DISK_SECTORS - SLOT_DATA as u64 / 512);
            match chance.below(5) {
                0 => queue.submit(slot, OUT, sector, Data::Out(&[slot as u8; SLOT_DATA])),
                1 => queue.submit(slot, FLUSH, 0, Data::None),
                _ => queue.submit(slot, IN, sector, Data::In(SLOT_DATA)),
            }
        }
        queue.kick();
    }
}

/// All of guest memory, taken twice with work in between that a device that is at rest does not touch. Fails if it changes.
fn assert_at_rest(machine: &Machine) -> Vec<u8> {
    let memory = |machine: &Machine| machine.queues[0].driver.read(0, machine.memory.len);
    let before = memory(machine);
    for queue in &machine.queues {
        queue.kick();
    }
    // Long enough for requests in flight, had there been any.
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(memory(machine) == before, "guest memory changes while the device should be at rest");
    before
}

fn finish(machine: &mut Machine) {
    for queue in &mut machine.queues {
        let done = queue.wait(queue.uncollected());
        assert_eq!(done.len(), DEPTH, "each request comes back once");
        assert!(done.iter().all(|done| done.status == 0), "{done:?}");
        assert_eq!(queue.driver.outstanding(), 0);
    }
}

#[test]
fn the_handshake_offers_what_is_honoured_and_the_configuration_in_any_length() {
    let host = Host::new(1);
    let served = host.serve_raw(options(4), DISK_BYTES);
    let mut link = Link::new(&served.socket, 4);
    served.await_event(ConnectionEvent::Connected);
    for bit in [33, 34, 35, 36, 38] {
        assert_eq!(link.offered & 1 << bit, 0, "virtio feature {bit} is not honoured");
    }
    let whole = link.config(60);
    assert_eq!(whole[..8], DISK_SECTORS.to_le_bytes());
    assert_eq!(whole[34..36], 4_u16.to_le_bytes());
    assert_eq!(whole[32], 1, "write-back at first");
    for len in [1, 8, 24, 33, 36, 59] {
        assert_eq!(link.config(len), whole[..len], "QEMU reads a prefix");
    }
    let longer = link.config(96);
    assert_eq!((&longer[..60], &longer[60..]), (&whole[..], &[0; 36][..]));
}

#[test]
fn the_driver_chooses_the_cache() {
    let host = Host::new(1);
    let served = host.serve_raw(options(1), DISK_BYTES);
    let machine = Machine::new(1);
    let mut link = machine.connect(&served.socket);
    assert!(!served.device.cache().is_write_through());
    for (byte, write_through) in [(0, true), (7, true), (1, false), (0, true)] {
        link.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[byte]).expect("an answer");
        assert_eq!(served.device.cache().is_write_through(), write_through, "after {byte}");
        assert_eq!(link.config(60)[32], u8::from(!write_through));
    }
    // Writes elsewhere change nothing and cost nothing.
    link.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[9; 32]).expect("an answer");
    assert_eq!(link.config(8), DISK_SECTORS.to_le_bytes());
    drop(link);
    // A front-end that does not look again keeps what its driver has chosen; one that does gets the default.
    let link = machine.connect(&served.socket);
    assert!(served.device.cache().is_write_through());
    drop(link);
    let mut link = Link::new(&served.socket, 1);
    assert_eq!(link.config(60)[32], 1);
    link.activate(&machine, FEATURES);
    assert!(!served.device.cache().is_write_through());
}

#[test]
fn read_only_devices_say_so_and_refuse_changes() {
    let host = Host::new(1);
    let served = host.serve_raw(options(1), DISK_BYTES);
    let image = served.close();
    std::fs::write(&image, vec![7; 1 << 20]).expect("an image");
    let read_only = DeviceOptions { read_only: true, name: "vdb".into(), ..options(1) };
    let served = host.serve(read_only, image, snapfence_image_format::chain::Format::Raw);
    let mut machine = Machine::new(1);
    let link = machine.connect(&served.socket);
    assert_ne!(link.offered & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(link.offered & (1 << 11 | 1 << 13 | 1 << 14), 0, "nothing to choose, discard or zero");
    let queue = &mut machine.queues[0];
    assert_eq!(queue.request(OUT, 0, Data::Out(&[1; 512])).status, 1);
    assert_eq!(queue.request(DISCARD, 0, Data::Out(&common::machine::range(0, 8, 0))).status, 1);
    assert_eq!(queue.request(IN, 0, Data::In(512)).status, 0);
    assert_eq!(queue.data(0, 512), [7; 512]);
    assert_eq!(queue.request(FLUSH, 0, Data::None).status, 0);
    assert_eq!(queue.request(GET_ID, 0, Data::In(20)).written, 21);
    assert_eq!(queue.data(0, 20), *b"serial-of-vda\0\0\0\0\0\0\0");
}

#[test]
fn pausing_drains_and_resuming_goes_on() {
    let host = Host::new(2);
    let served = host.serve_qcow2(options(QUEUES as u16), DISK_BYTES);
    let mut machine = Machine::new(QUEUES);
    let mut link = machine.connect(&served.socket);
    let mut chance = Chance::new(common::seed());
    let mut left_behind = 0;
    for _ in 0..20 {
        submit_everywhere(&mut machine, &mut chance);
        link.set_enabled(QUEUES, false);
        assert_at_rest(&machine);
        left_behind += machine.queues.iter().map(|queue| usize::from(queue.driver.outstanding())).sum::<usize>();
        link.set_enabled(QUEUES, true);
        finish(&mut machine);
    }
    println!("{left_behind} requests were taken after resuming");
}

#[test]
fn a_queue_that_is_stopped_names_where_it_is_and_goes_on_from_there() {
    let host = Host::new(2);
    let served = host.serve_qcow2(options(QUEUES as u16), DISK_BYTES);
    let mut machine = Machine::new(QUEUES);
    let mut link = machine.connect(&served.socket);
    let mut chance = Chance::new(common::seed());
    for round in 0..20 {
        submit_everywhere(&mut machine, &mut chance);
        // Snapshots of machines: disabled first; migration: at once.
        if round % 2 == 0 {
            link.set_enabled(QUEUES, false);
        }
        let bases: Vec<u16> = (0..QUEUES).map(|index| link.frontend.get_vring_base(index).expect("a base") as u16).collect();
        for (queue, base) in machine.queues.iter().zip(&bases) {
            assert_eq!(queue.driver.used_index(), *base, "everything that was taken has been given back");
        }
        assert_at_rest(&machine);
        for (index, base) in bases.into_iter().enumerate() {
            link.start_queue(&machine, index, base);
        }
        link.set_enabled(QUEUES, true);
        finish(&mut machine);
    }
}

#[test]
fn the_device_state_is_empty_and_complete() {
    let host = Host::new(1);
    let served = host.serve_raw(options(1), DISK_BYTES);
    let machine = Machine::new(1);
    let mut link = machine.connect(&served.socket);
    link.set_enabled(1, false);
    link.frontend.get_vring_base(0).expect("a base");
    for direction in [VhostTransferStateDirection::SAVE, VhostTransferStateDirection::LOAD] {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let phase = VhostTransferStatePhase::STOPPED;
        match direction {
            VhostTransferStateDirection::SAVE => {
                let own = link.frontend.set_device_state_fd(direction, phase, writer.into()).expect("an answer");
                assert!(own.is_none());
                let mut state = Vec::new();
                std::io::Read::read_to_end(&mut reader, &mut state).expect("an end");
                assert!(state.is_empty());
            }
            VhostTransferStateDirection::LOAD => {
                link.frontend.set_device_state_fd(direction, phase, reader.into()).expect("an answer");
                let error = std::io::Write::write(&mut { writer }, b"state of another back-end").expect_err("nobody reads it");
                assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
            }
        }
        link.frontend.check_device_state().expect("nothing went wrong");
    }
}

#[test]
fn requests_survive_a_connection_that_is_lost() {
    let host = Host::new(2);
    let served = host.serve_qcow2(options(QUEUES as u16), DISK_BYTES);
    let mut machine = Machine::new(QUEUES);
    let mut chance = Chance::new(common::seed());
    let mut link = machine.connect(&served.socket);
    served.await_event(ConnectionEvent::Connected);
    for _ in 0..20 {
        submit_everywhere(&mut machine, &mut chance);
        drop(link);
        served.await_event(ConnectionEvent::Disconnected);
        assert_at_rest(&machine);
        // Where the driver is, not where the device was; and no kick.
        link = machine.connect(&served.socket);
        served.await_event(ConnectionEvent::Connected);
        finish(&mut machine);
    }
}

#[test]
fn an_interrupt_before_the_call_descriptor_came_is_made_up_for() {
    let host = Host::new(1);
    let served = host.serve_raw(options(1), DISK_BYTES);
    let mut machine = Machine::new(1);
    let mut link = machine.connect(&served.socket);
    link.frontend.get_vring_base(0).expect("a base");
    let other = rustix::fs::memfd_create("no eventfd", MemfdFlags::CLOEXEC).expect("a memfd");
    let call = std::mem::replace(&mut machine.queues[0].call, other);
    link.start_queue(&machine, 0, 0);
    machine.queues[0].submit(0, FLUSH, 0, Data::None);
    machine.queues[0].kick();
    while machine.queues[0].driver.outstanding() > 0 {
        std::thread::yield_now();
    }
    machine.queues[0].call = call;
    machine.queues[0].clear_call();
    link.frontend.set_vring_call(0, &borrowed(&machine.queues[0].call)).expect("an answer");
    let mut fds = [rustix::event::PollFd::new(&machine.queues[0].call, rustix::event::PollFlags::IN)];
    let patience = rustix::event::Timespec { tv_sec: common::PATIENCE.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&patience)), Ok(1), "no interrupt comes");
    assert_eq!(machine.queues[0].completed()[0].status, 0);
}

#[test]
fn memory_comes_and_goes_under_load() {
    let host = Host::new(1);
    let served = host.serve_qcow2(options(2), DISK_BYTES);
    let mut machine = Machine::new(2);
    let mut link = machine.connect(&served.socket);
    // Beside the machine's own memory, so that a request can reach over the border.
    let end = machine.memory.len as u64;
    let [first, second] = &mut machine.queues[..] else { panic!("two queues") };
    first.submit(0, OUT, 0, Data::Out(&[3; SLOT_DATA]));
    first.kick();
    first.wait(1);
    for round in 0..50 {
        for slot in 0..DEPTH {
            second.submit(slot, IN, slot as u64 * 128, Data::In(SLOT_DATA));
        }
        second.kick();
        let module = SharedMemory::at(end, 4 << 20);
        let contents = || {
            let mut bytes = vec![0; module.len];
            module.mmap.read_slice(&mut bytes, GuestAddress(end)).expect("inside");
            bytes
        };
        link.add_memory(&module);
        if round % 2 == 0 {
            first.submit_at(0, IN, 0, Some(writable(end, 4096)));
            first.submit_at(1, IN, 0, Some(writable(end + 8192 - 512, 1024)));
            first.submit_at(2, IN, 0, Some(writable(end - 512, 1024)));
            first.submit_at(3, OUT, 8192, Some(readable(end + 0x10000, 4096)));
            first.kick();
            assert!(first.wait(4).iter().all(|done| done.status == 0));
            assert_eq!(contents()[..4096], [3; 4096]);
        } else {
            // Taken away while it is being used, and before.
            for slot in 0..DEPTH {
                first.submit_at(slot, IN, 0, Some(writable(end + (slot * SLOT_DATA) as u64, SLOT_DATA as u32)));
            }
            first.kick();
            link.remove_memory(&module);
            let before = contents();
            for done in first.wait(DEPTH) {
                assert!(done.status <= 1, "either while it was there, or not: {done:?}");
            }
            assert!(before == contents(), "memory that was taken away is written to");
            link.add_memory(&module);
        }
        link.remove_memory(&module);
        first.submit_at(0, IN, 0, Some(writable(end, 4096)));
        first.kick();
        assert_eq!(first.wait(1)[0].status, 1, "there is no such memory");
        assert!(second.wait(DEPTH).iter().all(|done| done.status == 0));
    }
    assert_ne!(first.status(0), NO_STATUS);
}

#[test]
fn descriptors_that_are_no_eventfds_leave_the_ring_stopped_and_others_alone() {
    let host = Host::new(1);
    let hostile = host.serve_raw(options(1), DISK_BYTES);
    let other = host.serve_raw(DeviceOptions { name: "vdb".into(), ..options(1) }, DISK_BYTES);
    let mut machine = Machine::new(1);
    let mut neighbour = Machine::new(1);
    let _neighbours_link = neighbour.connect(&other.socket);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let file = rustix::fs::memfd_create("file", MemfdFlags::CLOEXEC).expect("a memfd");
    let good = machine.queues[0].kick.try_clone().expect("a descriptor");
    for kick in [reader.into(), writer.into(), file] {
        machine.queues[0].kick = kick;
        let link = machine.connect(&hostile.socket);
        machine.queues[0].submit(0, FLUSH, 0, Data::None);
        assert_eq!(neighbour.queues[0].request(FLUSH, 0, Data::None).status, 0);
        assert_eq!(machine.queues[0].status(0), NO_STATUS, "nothing is taken from a ring that could not be started");
        // The connection lives, and a descriptor that can be used is taken.
        link.frontend.set_vring_kick(0, &borrowed(&good)).expect("an answer");
        assert_eq!(machine.queues[0].wait(1)[0].status, 0);
    }
}
