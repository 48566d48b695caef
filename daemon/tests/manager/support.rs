//! A manager in a simulation, and the hands that drive it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redb::StorageBackend;
use serde_json::{Value, json};
use snapfence::protocol::{Command, DeviceAdd, Event, Failure};
use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::chain::{self, AllowedDirectories, ChainOptions, Format};
use snapfence_image_format::qcow2::{CreateOptions, Qcow2};
use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::stack::{Attachment, FenceDomain, Participant, Stack};
use snapfence_image_format::storage::kept::TestKeeper;
use snapfence_image_format::storage::simulated::{Moment, SimulatedEnvironment, reach};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Storage};
use snapfence_image_format::units::{GuestOffset, SECTOR_BYTES};
use snapfenced::catalogue::{Catalogue, Store};
use snapfenced::control::Reply;
use snapfenced::jobs::EventSink;
use snapfenced::manager::{DeviceOpenError, Export, ExportError, GivenBy, Host, Manager, Parts, PathKind, Places, TopNode};
use snapfenced::options::DeviceOptions;

/// Size of the disks.
pub(crate) const DISK: u64 = 1 << 20;
/// Size of what guests write at a time.
pub(crate) const BLOCK: u64 = 4096;
/// How many milliseconds ahead the clock has something to wake.
const TICKS: u64 = 50;
/// Where the images are.
pub(crate) const FOLDER: &str = "/vm";

pub(crate) type Daemon = Rc<Manager<SimulatedEnvironment, FakeHost>>;

/// Told of every device that is served, to run rings of it.
pub(crate) type OnServe = Rc<dyn Fn(&DeviceOptions, &Arc<Stack<SimulatedEnvironment>>, &Arc<FenceDomain>)>;

/// Front-ends: each device has a queue thread that is parked, so that it delays no fence, until a test lets it run.
pub(crate) struct FakeHost {
    environment: SimulatedEnvironment,
    queues: Rc<RefCell<BTreeMap<String, Queue>>>,
    on_serve: Option<OnServe>,
}

impl std::fmt::Debug for FakeHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeHost").field("queues", &self.queues).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Queue {
    participant: Participant,
    connected: Rc<Cell<bool>>,
    _attachment: Attachment,
}

/// A device that front-ends could reach.
#[derive(Debug)]
pub(crate) struct FakeExport {
    name: String,
    connected: Rc<Cell<bool>>,
    queues: Rc<RefCell<BTreeMap<String, Queue>>>,
}

impl Host<SimulatedEnvironment> for FakeHost {
    type Export = FakeExport;

    fn start(
        &self,
        options: &DeviceOptions,
        stack: &Arc<Stack<SimulatedEnvironment>>,
        domain: &Arc<FenceDomain>,
        _top: &TopNode,
        _events: &EventSink,
    ) -> Result<FakeExport, ExportError> {
        if options.socket == Path::new("/run/refused") {
            return Err(ExportError::new("as the test wants it"));
        }
        let participant = domain.join();
        let attachment = stack.attach(&participant);
        if let Some(on_serve) = &self.on_serve {
            on_serve(options, stack, domain);
        }
        let connected = Rc::new(Cell::new(false));
        let queue = Queue { participant, connected: Rc::clone(&connected), _attachment: attachment };
        assert!(self.queues.borrow_mut().insert(options.name.clone(), queue).is_none(), "a device is served once");
        Ok(FakeExport { name: options.name.clone(), connected, queues: Rc::clone(&self.queues) })
    }

    async fn real_directory(&self, directory: &Path) -> io::Result<PathBuf> {
        if directory == Path::new("/nowhere") { Err(io::ErrorKind::NotFound.into()) } else { Ok(directory.to_owned()) }
    }

    async fn real_file(&self, path: &Path) -> io::Result<PathBuf> {
        self.real_directory(path.parent().expect("an absolute path")).await?;
        let real = self.environment.real_path(path)?;
        Ok(if real.starts_with("/dev") { path.to_owned() } else { real })
    }

    async fn path_kinds(&self, paths: Vec<PathBuf>) -> io::Result<Vec<PathKind>> {
        let kind = |path: &PathBuf| match self.environment.real_path(path) {
            Ok(real) if !real.starts_with("/dev") => PathKind::Neighbour,
            Ok(real) if real != *path => PathKind::AloneByLink,
            _ => PathKind::Alone,
        };
        Ok(paths.iter().map(kind).collect())
    }

    async fn is_for_devices(&self, directory: &Path) -> io::Result<bool> {
        Ok(directory.starts_with("/dev"))
    }

    /// Images that no record knows are seen in one directory only: elsewhere tests leave overlays about and forget them.
    async fn files_in(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let mut files = self.environment.files();
        files.retain(|file| directory == Path::new("/strange") && file.parent() == Some(directory));
        Ok(files)
    }
}

impl Export for FakeExport {
    fn is_connected(&self) -> bool {
        self.connected.get()
    }

    fn waits_for_space(&self) -> bool {
        false
    }

    fn resume(&self) {}

    async fn stop(self) {
        self.queues.borrow_mut().remove(&self.name);
    }
}

/// The catalogue's file: what is written, and what a power cut leaves of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct CatalogueFile(Arc<Mutex<Bytes>>);

#[derive(Debug, Default)]
struct Bytes {
    now: Vec<u8>,
    durable: Vec<u8>,
    broken: bool,
    /// After so many syncs one fails that has made everything durable, and from then on nothing can be written.
    breaks_after_syncs: Option<u64>,
    syncs: u64,
    kill: Option<Kill>,
    /// What was there when the daemon ended, and what of it durable: it may go on without knowing.
    at_end: Option<(Vec<u8>, Vec<u8>)>,
}

/// The daemon is killed while it makes a change of its catalogue durable.
#[derive(Debug)]
struct Kill {
    /// So many halves of syncs have been done: the changes written, and made durable.
    after: u64,
    environment: SimulatedEnvironment,
}

impl Bytes {
    /// Half of a sync has been done.
    fn half_sync(&mut self) {
        self.syncs += 1;
        if let Some(kill) = self.kill.as_ref().filter(|kill| kill.after == self.syncs) {
            drop(kill.environment.killed());
            self.end();
        }
    }

    fn end(&mut self) {
        self.at_end = Some((self.now.clone(), self.durable.clone()));
    }

    /// What was there in the end, and what of it durable.
    fn found(&mut self) -> (Vec<u8>, Vec<u8>) {
        self.at_end.take().unwrap_or_else(|| (self.now.clone(), self.durable.clone()))
    }
}

impl CatalogueFile {
    fn change<T>(&self, change: impl FnOnce(&mut Bytes) -> T) -> T {
        change(&mut self.0.lock().expect("no panics"))
    }

    /// What is there after a power cut.
    pub(crate) fn after_power_cut(&self) -> Self {
        let (_, durable) = self.change(Bytes::found);
        Self(Arc::new(Mutex::new(Bytes { now: durable.clone(), durable, ..Bytes::default() })))
    }

    /// What is there after the daemon was killed: everything, and what was not durable is so no more than before.
    pub(crate) fn after_kill(&self) -> Self {
        let (now, durable) = self.change(Bytes::found);
        Self(Arc::new(Mutex::new(Bytes { now, durable, ..Bytes::default() })))
    }

    /// Kills the daemon after `halves` halves of syncs, counted from the beginning.
    pub(crate) fn kill_after(&self, halves: u64, environment: &SimulatedEnvironment) {
        self.change(|bytes| bytes.kill = Some(Kill { after: halves, environment: environment.clone() }));
    }

    /// The daemon ends here, whatever it goes on to write.
    #[allow(dead_code, reason = "the simulation uses it")]
    pub(crate) fn end(&self) {
        self.change(Bytes::end);
    }

    /// How many halves of syncs have been done.
    pub(crate) fn half_syncs(&self) -> u64 {
        self.change(|bytes| bytes.syncs)
    }

    /// From here on nothing can be written.
    pub(crate) fn break_down(&self) {
        self.change(|bytes| bytes.broken = true);
    }

    /// From the sync after `syncs` others on nothing can be written; that one fails too, although it makes everything durable.
    pub(crate) fn break_down_after(&self, syncs: u64) {
        self.change(|bytes| bytes.breaks_after_syncs = Some(syncs));
    }

    /// Everything can be written again.
    pub(crate) fn heal(&self) {
        self.change(|bytes| (bytes.broken, bytes.breaks_after_syncs) = (false, None));
    }

    fn writable(&self) -> io::Result<()> {
        if self.change(|bytes| bytes.broken) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("catalogues of tests are small")
}

impl StorageBackend for CatalogueFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.change(|bytes| bytes.now.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.change(|bytes| out.copy_from_slice(&bytes.now[at(offset)..at(offset) + out.len()]));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.writable()?;
        self.change(|bytes| bytes.now.resize(at(len), 0));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.writable()?;
        self.change(Bytes::half_sync);
        reach(Moment::Elsewhere);
        self.change(|bytes| {
            bytes.durable = bytes.now.clone();
            bytes.half_sync();
            match &mut bytes.breaks_after_syncs {
                Some(0) => bytes.broken = true,
                Some(syncs) => *syncs -= 1,
                None => {}
            }
        });
        reach(Moment::Elsewhere);
        self.writable()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writable()?;
        self.change(|bytes| bytes.now[at(offset)..at(offset) + data.len()].copy_from_slice(data));
        Ok(())
    }
}

/// A daemon without its process. Clones are the same one.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) environment: SimulatedEnvironment,
    pub(crate) manager: Daemon,
    pub(crate) catalogue: CatalogueFile,
    queues: Rc<RefCell<BTreeMap<String, Queue>>>,
    events: Arc<Mutex<Vec<Event>>>,
    pub(crate) quits: Rc<Cell<u32>>,
    ticking: Rc<Cell<bool>>,
}

impl World {
    /// A daemon over these files that has not been told of any device. `allowed` are its `--allow-dir`s; its sockets are in /run.
    pub(crate) fn start(environment: SimulatedEnvironment, catalogue: CatalogueFile, allowed: &[&str]) -> Self {
        Self::start_with(environment, catalogue, allowed, Arc::default(), None)
    }

    /// As [`start`](Self::start), with kept memory that may be there already, and somebody who runs rings.
    pub(crate) fn start_with(
        environment: SimulatedEnvironment,
        catalogue: CatalogueFile,
        allowed: &[&str],
        keeper: Arc<TestKeeper>,
        on_serve: Option<OnServe>,
    ) -> Self {
        keeper.begin_process(&environment);
        let host = FakeHost { environment: environment.clone(), queues: Rc::default(), on_serve };
        let queues = Rc::clone(&host.queues);
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let sink: EventSink = Arc::new(move |event| heard.lock().expect("no panics").push(event));
        let quits = Rc::new(Cell::new(0));
        let asked = Rc::clone(&quits);
        let parts = Parts {
            environment: environment.clone(),
            host,
            catalogue: Catalogue::in_place(Store::with_backend(catalogue.clone()).expect("a catalogue")),
            keeper,
            working_directory: PathBuf::from(FOLDER),
            places: Places::new(allowed.iter().map(PathBuf::from)).with_socket_directories(vec!["/run".into()], false),
        };
        let manager = Manager::new(parts, sink, move || asked.set(asked.get() + 1));
        Self { environment, manager, catalogue, queues, events, quits, ticking: Rc::default() }
    }

    /// A new daemon on a new disk.
    pub(crate) fn new(environment: &SimulatedEnvironment) -> Self {
        Self::start(environment.clone(), CatalogueFile::default(), &[])
    }

    /// Stops the daemon, and starts it again on the same files with the same catalogue.
    pub(crate) async fn restart(self) -> Self {
        self.manager.stop().await.expect("everything is durable");
        let Self { environment, catalogue, .. } = self;
        let next = Self::start(environment, catalogue.after_power_cut(), &[]);
        next.manager.recover().await.expect("a catalogue");
        next
    }

    /// Serves a device as the command line asks for it.
    pub(crate) async fn serve(&self, specification: &str) -> Result<(), DeviceOpenError> {
        let added: DeviceAdd = specification.parse().expect("a specification");
        let options = DeviceOptions::try_from(added).expect("options");
        self.manager.add_device(options, GivenBy::Operator).await.map(drop)
    }

    /// Makes an empty qcow2 disk and serves it.
    pub(crate) async fn serve_new(&self, name: &str) {
        let image = format!("{FOLDER}/{name}.qcow2");
        self.create(&image, &CreateOptions::standalone(DISK)).await;
        self.serve(&format!("name={name},image={image},format=qcow2,socket=/run/{name}")).await.expect("served");
    }

    /// Makes an image and makes it durable.
    pub(crate) async fn create(&self, path: &str, options: &CreateOptions) {
        let location = Location::Trusted(path.into());
        let file = self.environment.open(&location, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
        Qcow2::<SimulatedEnvironment>::create(&file, options).await.expect("an image");
        file.flush().await.expect("durable");
        let folder = Path::new(path).parent().expect("an absolute path");
        self.environment.flush_directory(folder).await.expect("durable");
    }

    /// Has a command carried out as the control socket would.
    pub(crate) async fn ask(&self, name: &str, arguments: Value) -> Result<Value, Failure> {
        self.begin(name, arguments).wait().await
    }

    /// As [`ask`](Self::ask), without waiting.
    pub(crate) fn begin(&self, name: &str, arguments: Value) -> Answer {
        let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
        let answer = Answer(Arc::new((Mutex::new(None), WaitQueue::new())));
        let given = answer.clone();
        let reply = Reply::new(move |result| {
            *given.0.0.lock().expect("no panics") = Some(result);
            given.0.1.notify_all();
        });
        match Command::parse(name, arguments) {
            Ok(command) => self.manager.execute(command, reply),
            Err(failure) => reply.fail(failure),
        }
        answer
    }

    /// What must be answered well.
    pub(crate) async fn done(&self, name: &str, arguments: Value) -> Value {
        self.ask(name, arguments).await.unwrap_or_else(|failure| panic!("{name}: {}", failure.desc))
    }

    /// Takes a snapshot with overlays of the daemon's making and waits until it is frozen.
    pub(crate) async fn snapshot(&self, name: &str, devices: &[&str]) -> Value {
        let members: Vec<_> = devices.iter().map(|device| json!({ "device": device })).collect();
        self.done("snapshot-create", json!({ "name": name, "devices": members })).await;
        self.settled(name).await
    }

    /// Waits until nothing happens to a snapshot any more.
    pub(crate) async fn settled(&self, name: &str) -> Value {
        loop {
            let info = self.done("snapshot-show", json!({ "name": name })).await;
            if info["state"] == "frozen" || info["state"] == "failed" {
                return info;
            }
            self.pause().await;
        }
    }

    /// Lets everything else go on for a while.
    pub(crate) async fn pause(&self) {
        let until = self.environment.now() + Duration::from_millis(10);
        self.environment.sleep_until(until).await;
    }

    /// Waits until something is so.
    pub(crate) async fn until(&self, what: &str, is_so: impl AsyncFn() -> bool) {
        let limit = self.environment.now() + Duration::from_secs(600);
        while !is_so().await {
            assert!(self.environment.now() < limit, "it does not come about that {what}");
            self.pause().await;
        }
    }

    /// Waits until a snapshot of the device is recorded and the device switches.
    pub(crate) async fn switching(&self, device: &str) {
        self.until("the device switches", async || {
            let devices = self.done("device-list", json!({})).await;
            devices.as_array().expect("a list").iter().any(|info| info["name"] == device && info["state"] == "snapshot")
        })
        .await;
    }

    /// Waits until a job has concluded.
    pub(crate) async fn concluded(&self, job: &str) {
        self.until("the job concludes", async || {
            let jobs = self.done("query-jobs", json!({})).await;
            jobs.as_array().expect("a list").iter().any(|info| info["id"] == job && info["status"] == "concluded")
        })
        .await;
    }

    /// The events since this was last asked.
    pub(crate) fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().expect("no panics"))
    }

    /// The names of the events since this was last asked, jobs with their status.
    pub(crate) fn event_names(&self) -> Vec<String> {
        let describe = |event| match event {
            Event::JobStatusChange(change) => format!("{} {}", change.id, change.status.as_str()),
            Event::SnapshotSwitched(info) | Event::SnapshotFrozen(info) | Event::SnapshotFailed(info) => {
                format!("{} {}", info.name, info.state.as_str())
            }
            other => other.name().to_owned(),
        };
        self.events().into_iter().map(describe).collect()
    }

    /// Lets the queue thread of a device run without looking at anything: fences of the device wait for it.
    pub(crate) fn occupy(&self, device: &str) {
        self.queues.borrow_mut().get_mut(device).expect("a device").participant.begin_turn(|| {});
        if self.ticking.replace(true) {
            return;
        }
        // The simulated clock jumps to the next event, at times before every task had its turn. With many events it goes in small steps, and no
        // deadline passes unawares.
        for offset in 0..TICKS {
            let (environment, ticking) = (self.environment.clone(), Rc::clone(&self.ticking));
            self.environment.spawn(async move {
                let mut next = environment.now() + Duration::from_millis(offset);
                while ticking.get() {
                    environment.sleep_until(next).await;
                    next = environment.now() + Duration::from_millis(TICKS);
                }
            });
        }
    }

    /// The queue thread of a device sleeps again.
    pub(crate) fn park(&self, device: &str) {
        self.queues.borrow_mut().get_mut(device).expect("a device").participant.park();
        self.ticking.set(false);
    }

    /// A front-end comes or goes.
    pub(crate) fn connect(&self, device: &str, connected: bool) {
        self.queues.borrow().get(device).expect("a device").connected.set(connected);
    }

    /// A guest writes a block of one value. It is complete when this ends, and not durable.
    pub(crate) async fn write(&self, device: &str, block: u64, value: u8) {
        let view = self.manager.device(device).expect("a device").stack.view();
        let bytes = AlignedBuffer::copy_of(&vec![value; at(BLOCK)]);
        let (result, _) = view.write(GuestOffset::new(block * BLOCK), Buffer::Owned(bytes)).await;
        result.expect("written");
        view.completions_released().await;
    }

    /// A guest makes what it has written durable.
    pub(crate) async fn flush(&self, device: &str) {
        let view = self.manager.device(device).expect("a device").stack.view();
        view.flush().await.expect("durable");
        view.completions_released().await;
    }

    /// What a guest reads in the first `blocks` blocks of its disk, a value each.
    pub(crate) async fn read(&self, device: &str, blocks: u64) -> Vec<u8> {
        let view = self.manager.device(device).expect("a device").stack.view();
        let (result, buffer) = view.read(GuestOffset::ZERO, Buffer::Owned(AlignedBuffer::zeroed(at(blocks * BLOCK)))).await;
        result.expect("readable");
        values(&buffer.into_owned(), BLOCK)
    }

    /// As [`read`](Self::read), a value for each sector: a power cut may tear what no flush has covered.
    pub(crate) async fn read_sectors(&self, device: &str, blocks: u64) -> Vec<u8> {
        let view = self.manager.device(device).expect("a device").stack.view();
        let (result, buffer) = view.read(GuestOffset::ZERO, Buffer::Owned(AlignedBuffer::zeroed(at(blocks * BLOCK)))).await;
        result.expect("readable");
        values(&buffer.into_owned(), SECTOR_BYTES)
    }

    /// What is in the first blocks of a chain of files that is opened beside the daemon, read-only.
    pub(crate) async fn read_file(&self, path: &str, format: Format, blocks: u64) -> Vec<u8> {
        values(&self.read_file_bytes(path, format, blocks * BLOCK).await, BLOCK)
    }

    /// As [`read_file`](Self::read_file), whatever is in the first `len` bytes.
    pub(crate) async fn read_file_bytes(&self, path: &str, format: Format, len: u64) -> Vec<u8> {
        let allowed = AllowedDirectories::new([PathBuf::from("/")]);
        let options = ChainOptions::reading(&allowed);
        let top = Location::Trusted(path.into());
        let layers = chain::open_chain(&self.environment, &top, format, options).await.unwrap_or_else(|error| panic!("{error}"));
        let domain = FenceDomain::new(|| Duration::ZERO);
        let layers = layers.into_iter().map(|layer| layer.layer).collect();
        let stack = Stack::new(self.environment.clone(), &domain, layers, true);
        let (result, buffer) = stack.view().read(GuestOffset::ZERO, Buffer::Owned(AlignedBuffer::zeroed(at(len)))).await;
        result.expect("readable");
        buffer.into_owned().to_vec()
    }

    /// The files of a device's stack, the top first.
    pub(crate) async fn layers(&self, device: &str) -> Vec<String> {
        let stack = self.done("stack-show", json!({ "device": device })).await;
        let layers = stack["layers"].as_array().expect("a list");
        layers.iter().map(|layer| layer["file"].as_str().expect("a path").to_owned()).collect()
    }

    /// The names of all files.
    pub(crate) fn files(&self) -> Vec<String> {
        self.environment.files().iter().map(|path| path.display().to_string()).collect()
    }
}

/// The one value of each piece of `unit` bytes.
fn values(bytes: &[u8], unit: u64) -> Vec<u8> {
    let value = |piece: &[u8]| {
        assert!(piece.iter().all(|byte| *byte == piece[0]), "a piece of {unit} bytes is torn");
        piece[0]
    };
    bytes.chunks(at(unit)).map(value).collect()
}

/// The answer to a command that may not be there yet.
#[derive(Clone)]
pub(crate) struct Answer(Arc<Slot>);

type Slot = (Mutex<Option<Result<Value, Failure>>>, WaitQueue);

impl Answer {
    /// Waits for it.
    pub(crate) async fn wait(&self) -> Result<Value, Failure> {
        self.0.1.wait_until(|| self.0.0.lock().expect("no panics").take()).await
    }

    /// Whether it is there.
    pub(crate) fn is_there(&self) -> bool {
        self.0.0.lock().expect("no panics").is_some()
    }
}
