//! A guest that breaks every rule of its queue: each chain is answered as VIRTIO wants it or, where nothing can be answered, the queue is declared
//! broken; the log says why; the daemon and another device on the same queue thread never notice.

mod common;

use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};

use common::driver::{DATA, INDIRECT, NEXT, Piece, WRITE, readable, writable};
use common::machine::{DISCARD, Data, FLUSH, GET_ID, IN, Machine, NO_STATUS, OUT, QUEUE_SIZE, Queue, WRITE_ZEROES, borrowed, range};
use common::{Host, Served, options};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use snapfence_image_format::storage::Chance;
use snapfenced::device::DeviceOptions;
use vhost::VhostBackend;

const DISK_BYTES: u64 = 1 << 20;
const SECTORS: u64 = DISK_BYTES / 512;

/// What the daemon has logged. One for all tests of this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn get() -> &'static Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Log::default();
            let writer = log.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_ansi(false)
                .with_max_level(tracing::Level::DEBUG)
                .with_writer(move || writer.clone())
                .finish();
            tracing::subscriber::set_global_default(subscriber).expect("set once");
            log
        })
    }

    /// Lines that name this device, since the last call with it.
    fn take(&self, device: &str) -> String {
        let mut bytes = self.0.lock().expect("no panic while logging");
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (ours, others): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.contains(device));
        *bytes = others.iter().flat_map(|line| [line, "\n"]).collect::<String>().into_bytes();
        ours.join("\n")
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic while logging").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What must become of a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    /// It comes back with this status.
    Status(u8),
    /// It comes back, but there is no place for a status.
    Returned,
    /// Nothing comes back any more.
    Broken,
}

use Expected::{Broken, Returned, Status};

const IOERR: Expected = Status(1);
const UNSUPP: Expected = Status(2);

/// A second table, for indirect descriptors.
fn table(queue: &Queue) -> u64 {
    queue.data_at(8)
}

fn header(queue: &Queue, kind: u32, sector: u64) -> Piece {
    queue.driver.write(queue.header_at(0), &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    readable(queue.header_at(0), 16)
}

fn status(queue: &Queue) -> Piece {
    writable(queue.status_at(0), 1)
}

/// Writes descriptors as they are, and offers the first.
fn raw(queue: &mut Queue, descriptors: &[(Piece, u16, u16)]) {
    for (index, &(piece, flags, next)) in (0..).zip(descriptors) {
        queue.driver.descriptor(queue.driver.layout.descriptors, index, piece, flags, next);
    }
    queue.driver.offer(0);
}

fn indirect(queue: &mut Queue, bytes: u32, flags: u16, entries: &[(Piece, u16, u16)]) {
    let table = table(queue);
    for (index, &(piece, flags, next)) in (0..).zip(entries) {
        queue.driver.descriptor(table, index, piece, flags, next);
    }
    raw(queue, &[(readable(table, bytes), INDIRECT | flags, 1), (status(queue), 0, 0)]);
}

type Case = (&'static str, Expected, &'static str, fn(&mut Queue));

/// Name, what must become of it, what the log must say, and the deed.
fn malformed_chains() -> Vec<Case> {
    vec![
        ("loop", Returned, "longer than 256 descriptors, or a loop", |q| {
            let header = header(q, IN, 0);
            raw(q, &[(header, NEXT, 1), (writable(DATA, 512), NEXT, 0)]);
        }),
        ("loop of one", Returned, "or a loop", |q| raw(q, &[(status(q), NEXT, 0)])),
        ("next outside", Returned, "next descriptor 256 is outside the table of 256", |q| {
            let header = header(q, IN, 0);
            raw(q, &[(header, NEXT, QUEUE_SIZE)]);
        }),
        ("head outside", Broken, "head 256 is outside the descriptor table of 256", |q| q.driver.offer(QUEUE_SIZE)),
        ("head far outside", Broken, "head 65535 is outside", |q| q.driver.offer(u16::MAX)),
        ("index runs ahead", Broken, "available index went from", |q| q.driver.jump(QUEUE_SIZE + 1)),
        ("index runs back", Broken, "available index went from", |q| q.driver.jump(u16::MAX)),
        ("data outside memory", IOERR, "is not guest memory", |q| q.submit_at(0, IN, 0, Some(writable(1 << 40, 512)))),
        ("data at the end of addresses", IOERR, "is not guest memory", |q| q.submit_at(0, IN, 0, Some(writable(u64::MAX - 100, 512)))),
        ("data reach over the end of memory", IOERR, "is not guest memory", |q| {
            q.submit_at(0, OUT, 0, Some(readable(q.data_at(0), 60 << 20)));
        }),
        ("all lengths huge", Returned, "more than 67112960 bytes in one direction", |q| {
            raw(q, &[(readable(0, u32::MAX), NEXT, 1), (writable(0, u32::MAX), NEXT, 2), (writable(0, u32::MAX), 0, 0)]);
        }),
        ("header outside memory", IOERR, "is not guest memory", |q| q.submit_pieces(0, &[readable(1 << 40, 16), status(q)])),
        ("status outside memory", Returned, "is not guest memory", |q| {
            let header = header(q, FLUSH, 0);
            q.submit_pieces(0, &[header, writable(1 << 40, 1)]);
        }),
        ("writable first", IOERR, "device-readable buffer after a device-writable one", |q| {
            let header = header(q, IN, 0);
            q.submit_pieces(0, &[writable(DATA, 512), header, status(q)]);
        }),
        ("readable last", IOERR, "device-readable buffer after a device-writable one", |q| {
            let header = header(q, FLUSH, 0);
            q.submit_pieces(0, &[header, status(q), readable(DATA, 512)]);
        }),
        ("zero length data", IOERR, "zero length", |q| q.submit_at(0, IN, 0, Some(writable(DATA, 0)))),
        ("zero length header", IOERR, "zero length", |q| q.submit_pieces(0, &[readable(DATA, 0), status(q)])),
        ("zero length status", Returned, "zero length", |q| {
            let header = header(q, FLUSH, 0);
            q.submit_pieces(0, &[header, writable(DATA, 0)]);
        }),
        ("header too short", IOERR, "header of 15 bytes, needs 16", |q| q.submit_pieces(0, &[readable(DATA, 15), status(q)])),
        ("no header", IOERR, "header of 0 bytes", |q| q.submit_pieces(0, &[status(q)])),
        ("no status", Returned, "no device-writable byte for the status", |q| {
            let header = header(q, OUT, 0);
            q.submit_pieces(0, &[header, readable(q.data_at(0), 512)]);
        }),
        ("status not writable", Returned, "no device-writable byte", |q| {
            let header = header(q, OUT, 0);
            q.submit_pieces(0, &[header, readable(q.data_at(0), 512), readable(q.status_at(0), 1)]);
        }),
        ("nested tables", Returned, "indirect descriptor inside an indirect table", |q| {
            let (header, status, table) = (header(q, FLUSH, 0), status(q), table(q));
            indirect(q, 48, 0, &[(header, NEXT, 1), (readable(table, 48), INDIRECT | NEXT, 2), (status, 0, 0)]);
        }),
        ("table with a next descriptor", Returned, "indirect descriptor with a next one", |q| {
            let (header, status) = (header(q, FLUSH, 0), status(q));
            indirect(q, 32, NEXT, &[(header, NEXT, 1), (status, 0, 0)]);
        }),
        ("table of half a descriptor", Returned, "indirect table of 40 bytes", |q| {
            let (header, status) = (header(q, FLUSH, 0), status(q));
            indirect(q, 40, 0, &[(header, NEXT, 1), (status, 0, 0)]);
        }),
        ("table of nothing", Returned, "indirect table of 0 bytes", |q| indirect(q, 0, 0, &[])),
        ("table too long", Returned, "indirect table of 4294967280 bytes", |q| indirect(q, u32::MAX - 15, 0, &[])),
        ("table outside memory", Returned, "indirect table at guest address", |q| {
            raw(q, &[(readable(1 << 40, 32), INDIRECT, 0)]);
        }),
        ("loop in a table", Returned, "or a loop", |q| {
            let header = header(q, FLUSH, 0);
            indirect(q, 32, 0, &[(header, NEXT, 1), (writable(DATA, 1), NEXT, 1)]);
        }),
        ("next outside a table", Returned, "next descriptor 2 is outside the table of 2", |q| {
            let header = header(q, FLUSH, 0);
            indirect(q, 32, 0, &[(header, NEXT, 1), (writable(DATA, 1), NEXT, 2)]);
        }),
        ("more bytes than fit", IOERR, "more than 67112960 bytes in one direction", |q| {
            let (header, status) = (header(q, IN, 0), status(q));
            let mut entries = vec![(header, NEXT, 1)];
            entries.extend((2..1024).map(|next| (writable(DATA, 4 << 20), NEXT, next)));
            entries.push((status, 0, 0));
            indirect(q, entries.len() as u32 * 16, 0, &entries);
        }),
    ]
}

fn senseless_requests() -> Vec<Case> {
    vec![
        ("half a sector", IOERR, "511 bytes of data", |q| q.submit(0, IN, 0, Data::In(511))),
        ("a sector and a byte", IOERR, "513 bytes of data", |q| q.submit(0, OUT, 0, Data::Out(&[1; 513]))),
        ("past the end", IOERR, "are not within the disk", |q| q.submit(0, IN, SECTORS, Data::In(512))),
        ("over the end", IOERR, "are not within the disk", |q| q.submit(0, OUT, SECTORS - 1, Data::Out(&[1; 1024]))),
        ("sector overflow", IOERR, "are not within the disk", |q| q.submit(0, IN, u64::MAX, Data::In(512))),
        ("byte overflow", IOERR, "are not within the disk", |q| q.submit(0, IN, 1 << 55, Data::In(512))),
        ("sum overflow", IOERR, "are not within the disk", |q| q.submit(0, OUT, u64::MAX - 1, Data::Out(&[1; 1024]))),
        ("type 2", UNSUPP, "request type 2", |q| q.submit(0, 2, 0, Data::None)),
        ("secure erase", UNSUPP, "request type 14", |q| q.submit(0, 14, 0, Data::Out(&range(0, 1, 0)))),
        ("zone report", UNSUPP, "request type 16", |q| q.submit(0, 16, 0, Data::In(512))),
        ("type of all ones", UNSUPP, "request type 4294967295", |q| q.submit(0, u32::MAX, 0, Data::None)),
        ("discard of nothing", IOERR, "0 bytes of data", |q| q.submit(0, DISCARD, 0, Data::None)),
        ("discard of half a range", IOERR, "24 bytes of data", |q| q.submit(0, DISCARD, 0, Data::Out(&[0; 24]))),
        ("discard of too many ranges", IOERR, "528 bytes of data", |q| q.submit(0, DISCARD, 0, Data::Out(&[0; 33 * 16]))),
        ("discard past the end", IOERR, "are not within the disk", |q| q.submit(0, DISCARD, 0, Data::Out(&range(SECTORS, 1, 0)))),
        ("discard overflow", IOERR, "are not within the disk", |q| q.submit(0, DISCARD, 0, Data::Out(&range(u64::MAX, 1 << 20, 0)))),
        ("discard too long", IOERR, "range of 4294967295 sectors", |q| q.submit(0, DISCARD, 0, Data::Out(&range(0, u32::MAX, 0)))),
        ("discard with unmap", UNSUPP, "range flags 0x1", |q| q.submit(0, DISCARD, 0, Data::Out(&range(0, 8, 1)))),
        ("second range bad", IOERR, "are not within the disk", |q| {
            q.submit(0, DISCARD, 0, Data::Out(&[range(0, 8, 0), range(SECTORS, 8, 0)].concat()));
        }),
        ("zeroes with other flags", UNSUPP, "range flags 0x2", |q| q.submit(0, WRITE_ZEROES, 0, Data::Out(&range(0, 8, 2)))),
        ("zeroes past the end", IOERR, "are not within the disk", |q| {
            q.submit(0, WRITE_ZEROES, 0, Data::Out(&range(SECTORS - 1, 2, 1)));
        }),
        ("zeroes of half a range", IOERR, "15 bytes of data", |q| q.submit(0, WRITE_ZEROES, 0, Data::Out(&[0; 15]))),
    ]
}

/// Odd, but allowed.
fn strange_requests() -> Vec<Case> {
    vec![
        ("read of nothing", Status(0), "", |q| q.submit(0, IN, 0, Data::None)),
        ("read of nothing at the end", Status(0), "", |q| q.submit(0, IN, SECTORS, Data::None)),
        ("short id", Status(0), "", |q| q.submit(0, GET_ID, 0, Data::In(4))),
        ("long id", Status(0), "", |q| q.submit(0, GET_ID, 0, Data::In(100))),
        ("flush with a sector", Status(0), "", |q| q.submit(0, FLUSH, u64::MAX, Data::None)),
        ("discard of no sectors", Status(0), "", |q| q.submit(0, DISCARD, 0, Data::Out(&range(0, 0, 0)))),
        ("indirect with the write flag", Status(0), "", |q| {
            let (header, status) = (header(q, FLUSH, 0), status(q));
            indirect(q, 32, WRITE, &[(header, NEXT, 1), (status, 0, 0)]);
        }),
    ]
}

/// A device for the hostile guest, and one for a good one, on the same queue thread.
struct Neighbours {
    hostile: Served,
    neighbour: Machine,
    _link: common::machine::Link,
    _served: Served,
    // Ends last.
    _host: Host,
}

impl Neighbours {
    fn new(name: &str) -> Self {
        Log::get();
        let host = Host::new(1);
        let hostile = host.serve_qcow2(DeviceOptions { name: name.into(), ..options(1) }, DISK_BYTES);
        let served = host.serve_raw(DeviceOptions { name: "good".into(), ..options(1) }, DISK_BYTES);
        let mut neighbour = Machine::new(1);
        let link = neighbour.connect(&served.socket);
        assert_eq!(neighbour.queues[0].request(OUT, 0, Data::Out(&[0x77; 4096])).status, 0);
        Self { hostile, neighbour, _link: link, _served: served, _host: host }
    }

    fn assert_undisturbed(&mut self, after: &str) {
        let queue = &mut self.neighbour.queues[0];
        assert_eq!(queue.request(IN, 0, Data::In(4096)).status, 0, "the neighbour after {after}");
        assert_eq!(queue.data(0, 4096), [0x77; 4096], "the neighbour after {after}");
    }
}

fn try_each(device: &str, cases: Vec<Case>) {
    let mut both = Neighbours::new(device);
    for (name, expected, logged, deed) in cases {
        let mut machine = Machine::new(1);
        let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let link = machine.connect(&both.hostile.socket);
        link.frontend.set_vring_err(0, &borrowed(&error)).expect("an answer");
        assert_eq!(machine.queues[0].request(OUT, 0, Data::Out(&[0x11; 4096])).status, 0, "before {name}");
        Log::get().take(device);
        let queue = &mut machine.queues[0];
        queue.driver.write(queue.status_at(0), &[NO_STATUS]);
        deed(queue);
        queue.kick();
        match expected {
            Broken => {
                let mut fds = [PollFd::new(&error, PollFlags::IN)];
                let patience = Timespec { tv_sec: common::PATIENCE.as_secs() as i64, tv_nsec: 0 };
                assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "{name}: the front-end is not told");
                assert!(queue.completed().is_empty(), "{name}");
            }
            Returned | Status(_) => {
                let done = queue.wait(1);
                assert_eq!((done.len(), done[0].slot), (1, 0), "{name}");
                let wanted = if let Status(status) = expected { status } else { NO_STATUS };
                assert_eq!(done[0].status, wanted, "{name}: status");
                if expected == Returned {
                    assert_eq!(done[0].written, 0, "{name}: nothing was written");
                }
                // The queue goes on.
                assert_eq!(queue.request(IN, 0, Data::In(4096)).status, 0, "after {name}");
                assert_eq!(queue.data(0, 4096), [0x11; 4096], "{name}: nothing was changed");
            }
        }
        both.assert_undisturbed(name);
        drop(link);
        let log = Log::get().take(device);
        let event = if expected == Broken { "ring_broken" } else { "request_refused" };
        if logged.is_empty() {
            assert!(!log.contains(event), "{name}: {log}");
        } else {
            assert!(log.lines().any(|line| line.contains(event) && line.contains(logged)), "{name}: no line says {logged:?}: {log}");
        }
    }
}

#[test]
fn malformed_chains_come_back_or_break_their_queue_alone() {
    try_each("malformed", malformed_chains());
}

#[test]
fn senseless_requests_are_refused() {
    try_each("senseless", senseless_requests());
}

#[test]
fn strange_requests_are_served() {
    try_each("strange", strange_requests());
}

#[test]
fn a_broken_queue_still_drains_and_starts_again() {
    let mut both = Neighbours::new("broken");
    let mut machine = Machine::new(1);
    let mut link = machine.connect(&both.hostile.socket);
    machine.queues[0].submit(1, FLUSH, 0, Data::None);
    machine.queues[0].driver.jump(1000);
    machine.queues[0].kick();
    // Whether the flush was taken before the jump was seen or not: pausing and stopping are answered.
    link.set_enabled(1, false);
    let base = link.frontend.get_vring_base(0).expect("a base") as u16;
    assert_eq!(base, machine.queues[0].driver.used_index());
    machine.queues[0].driver.jump(0);
    link.start_queue(&machine, 0, base);
    link.set_enabled(1, true);
    let outstanding = machine.queues[0].uncollected();
    assert_eq!(machine.queues[0].wait(outstanding).len(), 1);
    assert_eq!(machine.queues[0].request(FLUSH, 0, Data::None).status, 0);
    both.assert_undisturbed("the jump");
}

#[test]
fn one_chain_offered_many_times_comes_back_as_often() {
    let mut both = Neighbours::new("twice");
    let mut machine = Machine::new(1);
    let _link = machine.connect(&both.hostile.socket);
    let queue = &mut machine.queues[0];
    queue.submit(0, IN, 0, Data::In(4096));
    for _ in 1..QUEUE_SIZE {
        queue.driver.offer(0);
    }
    queue.kick();
    assert_eq!(queue.wait(QUEUE_SIZE.into()).len(), usize::from(QUEUE_SIZE));
    both.assert_undisturbed("many times the same");
}

/// A guest that writes whatever it likes wherever the device looks, also while the device looks.
#[test]
fn random_queues_never_reach_anything_else() {
    let mut both = Neighbours::new("random");
    let mut chance = Chance::new(common::seed());
    let mut broken = 0;
    for round in 0..100 {
        let mut machine = Machine::new(1);
        let link = machine.connect(&both.hostile.socket);
        let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        link.frontend.set_vring_err(0, &borrowed(&error)).expect("an answer");
        let queue = &mut machine.queues[0];
        let scribble = |chance: &mut Chance, queue: &Queue| {
            for _ in 0..1 + chance.below(8) {
                let index = chance.below(16) as u16;
                let address = match chance.below(8) {
                    0 => chance.below(1 << 48),
                    1 => table(queue),
                    2 => queue.driver.layout.descriptors,
                    3 => queue.header_at(0),
                    _ => DATA + chance.below(1 << 22),
                };
                let len = [0, 1, 16, 32, 511, 512, 4096, 65536, u32::MAX][chance.below(9) as usize];
                // Descriptors may be written over, the rings behind them not: what comes back would not be known.
                let len = if address == queue.driver.layout.descriptors { len.min(4096) } else { len };
                let flags = chance.below(8) as u16;
                let next = if chance.below(8) == 0 { chance.below(1 << 16) as u16 } else { chance.below(16) as u16 };
                let place = if chance.below(3) == 0 { table(queue) } else { queue.driver.layout.descriptors };
                queue.driver.descriptor(place, index, readable(address, len), flags, next);
                let kind = chance.below(16) as u8;
                let sector = if chance.below(4) == 0 { chance.below(1 << 60) } else { chance.below(SECTORS) };
                // Where it is taken for a descriptor, it leads nowhere: not to the rings.
                let header = [&[kind, 0, 0, 0, 0xff, 0xff, 0xff, 0xff][..], &sector.to_le_bytes()].concat();
                queue.driver.write(queue.header_at(0), &header);
                queue.driver.write(DATA + chance.below(1 << 22), &header);
            }
        };
        let mut offered = 0_u16;
        let is_broken = 'round: {
            for _ in 0..50 {
                for _ in 0..1 + chance.below(16) {
                    scribble(&mut chance, queue);
                    let head = if chance.below(500) == 0 { chance.below(1 << 16) } else { chance.below(16) };
                    queue.driver.offer(head as u16);
                    offered += 1;
                }
                queue.kick();
                scribble(&mut chance, queue);
                let deadline = std::time::Instant::now() + common::PATIENCE;
                while queue.driver.outstanding() != 0 {
                    // Such a queue may let the device write to the flag that suppresses interrupts: one that stays away is no fault.
                    let mut fds = [PollFd::new(&queue.call, PollFlags::IN), PollFd::new(&error, PollFlags::IN)];
                    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 })).expect("a poll");
                    if !fds[1].revents().is_empty() {
                        break 'round true;
                    }
                    // Nor is one that waits for an index which the device was made to write over.
                    let is_own_fault = queue.available_index() != offered;
                    if is_own_fault {
                        break 'round false;
                    }
                    assert!(std::time::Instant::now() < deadline, "round {round}: not all chains come back, and nobody says why");
                    queue.clear_call();
                }
            }
            false
        };
        broken += usize::from(is_broken);
        assert!(offered > 0);
        both.assert_undisturbed("a random queue");
    }
    println!("{broken} of 100 queues were broken");
}
