//! The daemon as a process: from its options to its end.
//!
//! The control thread runs the [`Manager`] and everything that is not a request of a guest: one reactor, on the process's first thread. Beside it
//! there are the queue threads (`workers`), an accepting and a message thread per device, the control socket's threads, the catalogue's, and one
//! that lets fences expire in time whatever holds up the control thread. Those for which guests wait go first (`priority`).

mod host;
mod inbox;
mod priority;
mod stop;
mod workers;

use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, bail};
use futures_util::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use snapfence_image_format::runtime::offload_apart;
use snapfence_image_format::storage::kept::MemoryKeeper;
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};

use self::inbox::Inbox;
use self::priority::Foreground;
use self::stop::StopRequest;
use crate::catalogue::Catalogue;
use crate::control::{self, Events, ServerOptions};
use crate::jobs::EventSink;
use crate::manager::{GivenBy, Manager, Parts, Places};
use crate::options::Options;

pub use self::host::{VhostExport, VhostHost};

/// Submissions that the ring of the control thread takes at a time.
const RING_ENTRIES: u32 = 64;

type Daemon = Rc<Manager<UringEnvironment, VhostHost>>;

/// Serves until it is asked to end, and leaves everything in good order.
///
/// # Errors
/// Whatever stands in the way of serving what was asked for; nothing is served then. Or what was not durable at the end.
pub fn run(options: Options) -> anyhow::Result<()> {
    let stop = StopRequest::new();
    stop.follow_signals().context("cannot handle signals")?;
    let foreground = Rc::new(Foreground::new().context("cannot start a thread that makes queue threads")?);
    priority::step_back();
    raise_file_limit();
    let working_directory = std::env::current_dir().context("the working directory cannot be used")?;
    let places =
        Places::new(options.allowed_directories.iter().map(|path| real_directory("allowed", path)).collect::<anyhow::Result<Vec<_>>>()?);
    let data_files = options.data_files.iter().map(|path| real_file(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let places =
        places.with_data_files(data_files).with_socket_directories(socket_directories(&options)?, !options.socket_directories.is_empty());
    let (catalogue, keeper) = Catalogue::start(&options.state_dir)?;
    let reactor = Reactor::new(RING_ENTRIES).context("no io_uring for the control thread")?;
    tracing::info!(event = "io_uring", tier = %reactor.tier(), "what this kernel offers");
    let events = Events::new();
    let emitted = events.clone();
    let sink: EventSink = Arc::new(move |event| emitted.emit(event));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let quit = Arc::clone(&stop);
    let choices = options.state_dir.join("write-through");
    let host = VhostHost::new(Rc::clone(&foreground), threads, options.polling, choices)
        .context("the state directory cannot keep what guests choose")?;
    let keeper = Arc::new(keeper);
    let kept = Arc::clone(&keeper) as Arc<dyn MemoryKeeper>;
    let parts = Parts { environment: UringEnvironment, host, catalogue: catalogue.clone(), keeper: kept, working_directory, places };
    let served = reactor.block_on(async move {
        let manager = Manager::new(parts, sink, move || quit.ask("the control socket"));
        let fences = manager.fences();
        let watch = move || std::thread::Builder::new().name("fences".to_owned()).spawn(move || fences.expire_overdue());
        foreground.run(watch).flatten().context("cannot start a thread for deadlines")?;
        let outcome = match start(&manager, options, events).await {
            Ok((server, inbox)) => serve(&manager, server, &inbox, &stop).await,
            Err(error) => {
                // What is reported is why it did not start.
                let _ = manager.stop().await;
                Err(error)
            }
        };
        drop(manager);
        outcome
    });
    // What has not ended by now is dropped with the reactor.
    keeper.end();
    catalogue.close();
    served.context("the control thread's io_uring fails")?
}

/// Brings up everything that was asked for.
async fn start(manager: &Daemon, options: Options, events: Events) -> anyhow::Result<(control::Server, Arc<Inbox>)> {
    check_known(manager.catalogue(), &options.forget).await?;
    for name in options.forget {
        let forgotten = name.clone();
        manager.catalogue().run(move |store| store.forget_device(&forgotten)).await?;
        tracing::warn!(event = "device_forgotten", device = %name, "its record was dropped as asked");
    }
    manager.recover().await?;
    let added = join_all(options.devices.into_iter().map(|device| manager.add_device(device, GivenBy::Operator))).await;
    for device in added {
        device?;
    }
    let inbox = Inbox::new();
    let server = control::Server::start(ServerOptions::new(options.control.clone()), Arc::clone(&inbox) as _, events)?;
    let count = manager.devices().len();
    tracing::info!(event = "ready", control = %options.control.display(), devices = count, "ready");
    tell_systemd(&[sd_notify::NotifyState::Ready]);
    Ok((server, inbox))
}

/// Whether the catalogue knows all of these devices. A name that it does not know is a mistake, and the record that was meant is still there.
async fn check_known(catalogue: &Catalogue, names: &[String]) -> anyhow::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let recorded = catalogue
        .run(|store| {
            let mut recorded: BTreeSet<_> = store.devices()?.into_iter().map(|device| device.name).collect();
            // Also of a device that has nothing but snapshots.
            recorded.extend(store.snapshots()?.into_iter().flat_map(|snapshot| snapshot.devices).map(|member| member.device));
            Ok(recorded)
        })
        .await?;
    let Some(unknown) = names.iter().find(|name| !recorded.contains(*name)) else { return Ok(()) };
    if recorded.is_empty() {
        bail!("--forget {unknown}: no device is recorded in this state directory");
    }
    let recorded: Vec<_> = recorded.into_iter().collect();
    bail!("--forget {unknown}: no such device is recorded; those that are: {}", recorded.join(", "));
}

/// Obeys commands until asked to end, and then ends everything in good order.
async fn serve(manager: &Daemon, server: control::Server, inbox: &Inbox, stop: &StopRequest) -> anyhow::Result<()> {
    let obey = async || loop {
        for (command, reply) in inbox.take().await {
            manager.execute(command, reply);
        }
    };
    until(stop.asked(), obey()).await;
    tell_systemd(&[sd_notify::NotifyState::Stopping]);
    // Clients can still ask how far it is; what would begin something new is refused.
    let stopped = until(manager.stop(), obey()).await;
    offload_apart(move || server.stop()).await.context("cannot stop the control socket")?;
    match stopped {
        Ok(()) => Ok(()),
        Err(devices) => bail!("not everything is durable on: {}", devices.join(", ")),
    }
}

/// Runs both until `end` ends.
async fn until<T>(end: impl Future<Output = T>, other: impl Future<Output = std::convert::Infallible>) -> T {
    use futures_util::future::{Either, select};
    match select(std::pin::pin!(end), std::pin::pin!(other)).await {
        Either::Left((value, _)) => value,
        Either::Right((never, _)) => match never {},
    }
}

/// The directory without symbolic links: names are compared with what paths really are.
fn real_directory(what: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let real = path.canonicalize().with_context(|| format!("{what} directory {}", path.display()))?;
    if !real.is_dir() {
        bail!("{what} directory {} is not a directory", path.display());
    }
    Ok(real)
}

/// Where sockets of devices added on the control socket may be: where the operator has put sockets himself, and where he allows them.
fn socket_directories(options: &Options) -> anyhow::Result<Vec<PathBuf>> {
    let allowed = options.socket_directories.iter().map(|path| real_directory("socket", path));
    let mut directories = allowed.collect::<anyhow::Result<BTreeSet<_>>>()?;
    // One that is not there stands in the way of its socket, which then says so.
    let named = options.devices.iter().map(|device| &device.socket).chain([&options.control]);
    directories.extend(named.filter_map(|socket| directory_of(socket).canonicalize().ok()));
    Ok(directories.into_iter().collect())
}

/// The directory that a path leads to, "." for a bare name.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The absolute path of a file, its directory without symbolic links.
fn real_file(path: &Path) -> anyhow::Result<PathBuf> {
    let named = || format!("allowed data file {}", path.display());
    let name = path.file_name().ok_or_else(|| anyhow::anyhow!("the path does not end with a file name")).with_context(named)?;
    Ok(directory_of(path).canonicalize().with_context(named)?.join(name))
}

/// Deep chains need many descriptors.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(event = "file_limit", %error, "the limit of open files stays as it is");
    }
}

fn tell_systemd(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(event = "notify_failed", %error, "the service manager was not told");
    }
}
