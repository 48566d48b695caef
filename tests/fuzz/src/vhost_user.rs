//! Messages of a front-end, with descriptors.
//!
//! The server, its relay, the crate behind it and a queue thread are the real ones, over a socket and a file. An input is a script of messages, sound
//! and unsound, with descriptors of many kinds. Nothing panics, and when the connection has ended, descriptors and mappings are as they were.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfenced::connection::listen::SOCKET_MODE;
use snapfenced::connection::{ConnectionEvent, Listening, Server};
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::worker::WorkerThread;
use tempfile::TempDir;

use crate::source::Source;

const DISK_BYTES: u64 = 64 << 10;
/// The guest's memory, where the front-end says that it has it, and what its files are called.
const MEMORY_BYTES: u64 = 0x8000;
const USER: u64 = 0x7000_0000_0000;
const MEMORY_NAME: &str = "guest of the fuzzer";
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 16;
/// Where the ring of each queue is, and its parts.
const RING_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const MAX_MESSAGES: usize = 40;
/// When something that must happen has not happened.
const PATIENCE: Duration = Duration::from_secs(20);

/// Version 1, and that an answer is wanted.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// A device that can be connected to, for all runs of a thread.
struct Served {
    path: std::path::PathBuf,
    events: Receiver<ConnectionEvent>,
    _server: Server,
    _thread: WorkerThread<UringEnvironment>,
    _folder: TempDir,
}

impl Served {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("disk");
        std::fs::File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        let location = Location::Trusted(image);
        let opening = async move {
            let file = UringEnvironment.open(&location, Access::Write, CacheMode::Buffered).await.expect("a file");
            Raw::open(file, true).await.expect("an image")
        };
        let image = Reactor::new(8).expect("io_uring").block_on(opening).expect("a ring that works");
        let domain = FenceDomain::new(|| UringEnvironment.now());
        let thread = WorkerThread::spawn("queue".into(), 32, Duration::ZERO, &domain).expect("a thread");
        let layers = vec![std::sync::Arc::new(Layer::Raw(image))];
        let stack = Stack::new(UringEnvironment, &domain, layers, false);
        let options = DeviceOptions {
            name: "vda".into(),
            serial: String::new(),
            read_only: false,
            queues: QUEUES,
            queue_size: QUEUE_SIZE,
            on_no_space: NoSpacePolicy::Report,
        };
        let device = Device::new(options, stack).expect("good options");
        let path = folder.path().join("socket");
        let listening = Listening::bind(&path, SOCKET_MODE).expect("a socket");
        let (sender, events) = channel();
        let report = move |event| {
            // Nobody listens at the end.
            let _ = sender.send(event);
        };
        let server = Server::start(device, listening, vec![thread.handle().clone()], report).expect("a server");
        Self { path, events, _server: server, _thread: thread, _folder: folder }
    }

    fn await_event(&self, expected: ConnectionEvent) {
        let event = self.events.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("the server does not get to {expected:?}"));
        assert_eq!(event, expected);
    }
}

thread_local! {
    static SERVED: Served = Served::new();
}

/// One run.
///
/// # Panics
/// If a promise is broken.
pub fn run(input: &[u8]) {
    SERVED.with(|served| {
        // The first connection leaves what is made once.
        if input.is_empty() {
            return connect(served, &mut Source::new(input));
        }
        let before = held();
        connect(served, &mut Source::new(input));
        let since = Instant::now();
        loop {
            let after = held();
            if after.0 <= before.0 && after.1 == 0 {
                break;
            }
            assert!(since.elapsed() < PATIENCE, "descriptors and mappings of guests were {before:?} and are {after:?}");
            std::thread::sleep(Duration::from_micros(200));
        }
    });
}

/// How many descriptors this process has, and mappings of a guest's memory.
fn held() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("/proc").count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
    (descriptors, maps.matches(MEMORY_NAME).count() + maps.matches("memfd:inflight").count())
}

fn connect(served: &Served, source: &mut Source<'_>) {
    let mut front_end = FrontEnd::new(&served.path);
    served.await_event(ConnectionEvent::Connected);
    if source.u8() & 3 != 0 {
        front_end.set_up();
    }
    for _ in 0..MAX_MESSAGES {
        if source.is_empty() || !front_end.act(source) {
            break;
        }
    }
    drop(front_end);
    served.await_event(ConnectionEvent::Disconnected);
}

struct FrontEnd {
    socket: UnixStream,
    memory: OwnedFd,
    record: OwnedFd,
    kick: OwnedFd,
}

fn memory(name: &str, len: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&file, len).expect("a length");
    file
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

impl FrontEnd {
    fn new(path: &std::path::Path) -> Self {
        let socket = UnixStream::connect(path).expect("a server that listens");
        socket.set_nonblocking(true).expect("a socket");
        let front_end = Self { socket, memory: memory(MEMORY_NAME, MEMORY_BYTES), record: memory("inflight", 0x1000), kick: event() };
        for queue in 0..u64::from(QUEUES) {
            // A flush: header, status.
            let ring = queue * RING_BYTES;
            let descriptor = |address: u64, len: u64, flags: u64, next: u64| words(&[address, len | flags << 32 | next << 48]);
            let chain = [descriptor(0x4000, 16, 1, 1), descriptor(0x4010, 1, 2, 0)].concat();
            front_end.store(ring, &chain);
            front_end.store(ring + AVAILABLE, &[0, 0, 1, 0, 0, 0]);
        }
        front_end.store(0x4000, &halves(&[4, 0, 0, 0]));
        front_end
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        rustix::io::pwrite(&self.memory, bytes, at).expect("memory");
    }

    /// Features, memory and rings, as a sound front-end does. Protocol features: MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS.
    fn set_up(&mut self) {
        self.send(3, 0, &[], &[]);
        self.send(16, 0, &words(&[1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15]), &[]);
        self.send(2, 0, &words(&[1 << 30 | 1 << 32 | 1 << 28 | 1 << 9]), &[]);
        let table = [halves(&[1, 0]), words(&[0, MEMORY_BYTES, USER, 0])].concat();
        let file = self.memory.try_clone().expect("a descriptor");
        self.send(5, 0, &table, &[file.as_fd()]);
    }

    /// One message, or something else. `false`: the server has had enough.
    fn act(&mut self, source: &mut Source<'_>) -> bool {
        let (kind, choice) = (source.u8(), source.u8());
        let queue = u32::from(choice & 3);
        let odd = choice & 0x80 != 0;
        let ring = u64::from(queue) * RING_BYTES;
        let mut body = match kind % 24 {
            0 => return self.send(1, 0, &[], &[]),
            1 => return self.send(2, 0, &words(&[u64::from_le_bytes(source.bytes())]), &[]),
            2 => return self.send(16, 0, &words(&[u64::from(source.u16())]), &[]),
            3 | 4 => {
                // Regions, perhaps more than one, perhaps odd.
                let count = u32::from(choice & 7);
                let mut body = halves(&[count, 0]);
                for index in 0..u64::from(count) {
                    let (start, len, skip) = (index * MEMORY_BYTES, MEMORY_BYTES, u64::from(source.u8() & 3) << 12);
                    let len = if odd { u64::from_le_bytes(source.bytes()) } else { len - skip };
                    body.extend(words(&[start, len, USER + start, skip]));
                }
                (5, body)
            }
            5 => (8, halves(&[queue, if odd { u32::from(source.u16()) } else { 16 >> (source.u8() & 3) }])),
            6 | 7 => {
                let mut parts = [USER + ring, USER + ring + USED, USER + ring + AVAILABLE, 0];
                if odd {
                    parts[source.below(4)] = u64::from_le_bytes(source.bytes());
                }
                (9, [halves(&[queue, 0]), words(&parts)].concat())
            }
            8 => (10, halves(&[queue, if odd { source.u16().into() } else { 0 }])),
            9 => (11, halves(&[queue, 0])),
            10 | 11 => (12, words(&[u64::from(queue) | u64::from(choice & 0x40) << 2])),
            12 => (13, words(&[u64::from(queue) | u64::from(choice & 0x40) << 2])),
            13 => (14, words(&[u64::from(queue) | u64::from(choice & 0x40) << 2])),
            14 | 15 => (18, halves(&[queue, u32::from(choice >> 6 & 1)])),
            16 => (24, [halves(&[source.u8().into(), source.u8().into(), 1]), source.bytes::<16>().to_vec()].concat()),
            17 => (25, [halves(&[source.u8().into(), 1, 0]), vec![source.u8()]].concat()),
            18 => {
                let queues = if odd { source.u16() } else { QUEUES };
                let sizes = u32::from(queues) | u32::from(QUEUE_SIZE) << 16;
                let bytes = if odd { u64::from_le_bytes(source.bytes()) } else { 0x1000 };
                (if choice & 0x40 != 0 { 31 } else { 32 }, [words(&[bytes, 0]), halves(&[sizes, 0])].concat())
            }
            19 => {
                // ADD_MEM_REG, REM_MEM_REG.
                let start = MEMORY_BYTES * u64::from(choice & 3);
                let len = if odd { u64::from_le_bytes(source.bytes()) } else { MEMORY_BYTES };
                (if choice & 0x40 != 0 { 37 } else { 38 }, words(&[0, start, len, USER + start, 0]))
            }
            20 => {
                // The driver kicks, or changes its ring.
                match choice & 3 {
                    0 => drop(rustix::io::write(&self.kick, &1_u64.to_ne_bytes())),
                    1 => self.store(u64::from(source.u16() & 0x7fff), &[source.u8()]),
                    2 if odd => drop(rustix::fs::ftruncate(&self.memory, u64::from(source.u8() & 7) << 12)),
                    _ => std::thread::yield_now(),
                }
                return true;
            }
            21 => (u32::from(source.u8() % 48), source.bytes::<40>()[..usize::from(choice % 41)].to_vec()),
            22 => return self.send_bytes(&source.bytes::<16>()[..usize::from(choice % 17)], &[]),
            _ => (17, Vec::new()),
        };
        if odd && kind & 0x80 != 0 {
            let len = source.below(body.1.len() + 9);
            body.1.resize(len, 0x55);
        }
        let wanted = match kind % 24 {
            3 | 4 => usize::from(choice & 7),
            10..=13 | 18 | 19 => 1,
            _ => 0,
        };
        let count = if odd && source.u8() & 1 != 0 { source.below(10) } else { wanted };
        let files: Vec<OwnedFd> = (0..count.min(16)).map(|_| self.file(kind % 24, if odd { source.u8() } else { 0 })).collect();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.send(body.0, if choice & 0x20 != 0 { NEED_REPLY } else { 0 }, &body.1, &files)
    }

    /// A descriptor that suits the message, or another one.
    fn file(&self, kind: u8, choice: u8) -> OwnedFd {
        match (choice % 7, kind) {
            (0 | 1, 3 | 4 | 19) => self.memory.try_clone(),
            (0 | 1, 18) => self.record.try_clone(),
            (0 | 1, _) => self.kick.try_clone(),
            (2, _) => Ok(memory(MEMORY_NAME, u64::from(choice) << 8)),
            (3, _) => Ok(event()),
            (4, _) => Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("/dev/null")),
            (5, _) => Ok(rustix::fs::open("/proc/self", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("/proc")),
            _ => Ok(UnixStream::pair().expect("sockets").0.into()),
        }
        .expect("a descriptor")
    }

    fn send(&mut self, request: u32, flags: u32, body: &[u8], files: &[rustix::fd::BorrowedFd<'_>]) -> bool {
        self.send_bytes(&[&halves(&[request, VERSION | flags, body.len() as u32]), body].concat(), files)
    }

    fn send_bytes(&mut self, bytes: &[u8], files: &[rustix::fd::BorrowedFd<'_>]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)), "room for all");
        }
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).is_ok()
    }
}
