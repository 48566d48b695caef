//! The command line and the configuration file.
//!
//! Both say the same things; what the command line says of the daemon itself (`--control`, `--state-dir`) wins, lists of devices and
//! directories are joined. Whatever is wrong is told in one line.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use serde::Deserialize;
use snapfence::protocol::{self, DeviceAdd, DeviceOptionError, ImageFormat, NoSpacePolicy};
use snapfence_image_format::chain::Format;
use snapfence_image_format::storage::CacheMode;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::name;
use crate::socket::{GROUP_MODE, Group, SOCKET_MODE, SocketAccess};

/// Virtqueues of a device unless it says otherwise.
pub const DEFAULT_QUEUES: u16 = 1;
/// Most virtqueues of one device.
pub const MAX_QUEUES: u16 = 64;
/// Entries of a virtqueue unless the device says otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Most entries of a virtqueue: what front-ends take.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Longest wait that a busy queue thread spends looking for work: the time that a fast disk takes for a request.
pub const DEFAULT_POLLING: Duration = Duration::from_micros(100);
/// Bytes of the serial that a guest can read (VIRTIO 1.3, 5.2.6, VIRTIO_BLK_T_GET_ID).
pub const MAX_SERIAL_BYTES: usize = 20;

/// Everything that the daemon is told at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The control socket.
    pub control: PathBuf,
    /// Where the catalogue lives.
    pub state_dir: PathBuf,
    /// Devices to serve from the start.
    pub devices: Vec<DeviceOptions>,
    /// Directories in which files named by images or by the control socket may lie.
    pub allowed_directories: Vec<PathBuf>,
    /// Directories in which the control socket may put sockets of devices, beside those of sockets named here.
    pub socket_directories: Vec<PathBuf>,
    /// External data files of qcow2 images that may be read.
    pub data_files: Vec<PathBuf>,
    /// Devices whose records are dropped before anything else happens.
    pub forget: Vec<String>,
    /// Longest wait that queue threads spend looking for work.
    pub polling: Duration,
}

/// One device as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// What it is called everywhere.
    pub name: String,
    /// The image: any layer of the recorded stack, or the top of a new one.
    pub image: PathBuf,
    /// Its format; never guessed.
    pub format: Format,
    /// Where the front-end connects.
    pub socket: PathBuf,
    /// Number of virtqueues.
    pub queues: u16,
    /// Entries of each, a power of two.
    pub queue_size: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest reads as the disk's serial.
    pub serial: String,
    /// Whether transfers pass the page cache.
    pub cache: CacheMode,
    /// What becomes of requests for which there is no space.
    pub on_no_space: NoSpacePolicy,
    /// Who may connect.
    pub socket_access: SocketAccess,
}

/// Why the daemon was not started.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not an error: text to print, and exit status 0.
    #[error("{0}")]
    Help(String),
    /// The command line makes no sense to the parser.
    #[error("{0}; see `snapfenced --help`")]
    Usage(String),
    /// A device specification is wrong.
    #[error("device {device}: {source}")]
    Device {
        /// Its name, or the whole specification if it has none.
        device: String,
        /// What is wrong with it.
        #[source]
        source: DeviceProblem,
    },
    /// Two devices cannot share something.
    #[error("two devices have the {what} `{value}`")]
    Duplicate {
        /// "name" or "socket".
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// Something without which there is no daemon.
    #[error("{0} is missing; see `snapfenced --help`")]
    Missing(&'static str),
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration file makes no sense.
    #[error("configuration file {path}: {detail}")]
    Config {
        /// Which file.
        path: PathBuf,
        /// Line and cause.
        detail: String,
    },
}

/// What is wrong with one device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceProblem {
    /// Its specification cannot be read.
    #[error(transparent)]
    Form(#[from] DeviceOptionError),
    /// A value that is not possible.
    #[error("'{key}={value}': expected {expected}")]
    Value {
        /// Which key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is possible.
        expected: &'static str,
    },
}

/// Serves disks of virtual machines from stacks of copy-on-write images, over vhost-user-blk.
#[derive(Debug, Parser)]
#[command(name = "snapfenced", version)]
struct Arguments {
    /// Path of the control socket (QMP's wire rules)
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Directory of the catalogue, made if need be; one daemon at a time
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    // Help texts with brackets are no documentation comments: those would take them for links.
    #[arg(
        long,
        value_name = "FILE",
        help = "Configuration file (TOML): control, state-dir, allow-dir, socket-dir, allow-data-file = [...], poll-max-us, and a [[device]] table per device with the keys of --device"
    )]
    config: Option<PathBuf>,

    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        help = "A disk to serve (repeatable): name=vda,image=PATH,format=raw|qcow2,socket=PATH[,queues=N][,queue-size=N][,readonly=on|off]\
                [,serial=TEXT][,cache=direct|buffered][,on-no-space=hold|report][,socket-mode=OCTAL][,socket-group=NAME|NUMBER]. A comma inside a value is written twice"
    )]
    device: Vec<String>,

    /// Directory (repeatable) in which backing files may lie, beside the directory of the image itself
    #[arg(long, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,

    /// Directory (repeatable) for sockets of disks added over the control socket, beside those of the sockets given here
    #[arg(long, value_name = "DIR")]
    socket_dir: Vec<PathBuf>,

    /// External data file (repeatable) that a qcow2 image may name; such images are only read
    #[arg(long, value_name = "FILE")]
    allow_data_file: Vec<PathBuf>,

    /// Longest wait, in microseconds, that a busy queue thread spends looking for requests and completions instead of sleeping; 0: it always sleeps
    /// [default: 100]
    #[arg(long, value_name = "MICROSECONDS")]
    poll_max_us: Option<u32>,

    /// Drop what the catalogue has recorded of device NAME and its snapshots before starting (repeatable)
    #[arg(long, value_name = "NAME")]
    forget: Vec<String>,
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Config {
    control: Option<ConfigPath>,
    state_dir: Option<ConfigPath>,
    #[serde(default)]
    allow_dir: Vec<ConfigPath>,
    #[serde(default)]
    socket_dir: Vec<ConfigPath>,
    #[serde(default)]
    allow_data_file: Vec<ConfigPath>,
    poll_max_us: Option<u32>,
    #[serde(default)]
    device: Vec<Spanned<DeviceAdd>>,
}

/// A path in the configuration file. An empty one would be taken for the working directory, or for nothing.
#[derive(Debug, Deserialize)]
#[serde(try_from = "PathBuf")]
struct ConfigPath(PathBuf);

impl TryFrom<PathBuf> for ConfigPath {
    type Error = &'static str;

    fn try_from(path: PathBuf) -> Result<Self, Self::Error> {
        if path.as_os_str().is_empty() { Err("an empty text is no path") } else { Ok(Self(path)) }
    }
}

impl From<ConfigPath> for PathBuf {
    fn from(path: ConfigPath) -> Self {
        path.0
    }
}

/// The configuration file's text, to tell where in it something is wrong.
#[derive(Debug)]
struct ConfigText<'a> {
    path: &'a Path,
    text: String,
}

impl ConfigText<'_> {
    fn error(&self, at: Option<Range<usize>>, what: &str) -> OptionsError {
        let line = at.map(|at| 1 + self.text.bytes().take(at.start).filter(|byte| *byte == b'\n').count());
        let what = one_line(what);
        let detail = line.map_or_else(|| what.clone(), |line| format!("line {line}: {what}"));
        OptionsError::Config { path: self.path.to_owned(), detail }
    }

    fn parse(&self) -> Result<Config, OptionsError> {
        let read = || {
            let mut document = DeTable::parse(&self.text)?;
            if let Some(DeValue::Array(devices)) = document.get_mut().get_mut("device").map(Spanned::get_mut) {
                devices.iter_mut().for_each(|device| switch_as_boolean(device.get_mut()));
            }
            Config::deserialize(toml::Deserializer::from(document))
        };
        read().map_err(|error| self.error(error.span(), error.message()))
    }

    /// The devices in it.
    fn devices(&self, tables: Vec<Spanned<DeviceAdd>>) -> Result<Vec<DeviceOptions>, OptionsError> {
        let device = |table: Spanned<DeviceAdd>| {
            let (at, asked) = (table.span(), table.into_inner());
            let name = asked.name.clone();
            DeviceOptions::try_from(asked).map_err(|problem| self.error(Some(at), &format!("device {name}: {problem}")))
        };
        tables.into_iter().map(device).collect()
    }
}

/// Lets `readonly` be what it is on the command line, too.
fn switch_as_boolean(device: &mut DeValue<'_>) {
    let DeValue::Table(device) = device else { return };
    let Some(readonly) = device.get_mut("readonly").map(Spanned::get_mut) else { return };
    let boolean = match readonly.as_str() {
        Some("on") => true,
        Some("off") => false,
        _ => return,
    };
    *readonly = DeValue::Boolean(boolean);
}

impl Options {
    /// Reads the command line (with the program's name) and the configuration file that it names.
    ///
    /// # Errors
    /// If anything is unknown, missing or contradictory. [`OptionsError::Help`] is for standard output.
    pub fn from_arguments(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, OptionsError> {
        let arguments = Arguments::try_parse_from(arguments).map_err(|error| usage_error(&error))?;
        let text = arguments.config.as_deref().map(read_config).transpose()?;
        let config = text.as_ref().map(ConfigText::parse).transpose()?.unwrap_or_default();
        let mut devices = Vec::new();
        for specification in &arguments.device {
            devices.push(DeviceOptions::parse(specification)?);
        }
        if let Some(text) = &text {
            devices.extend(text.devices(config.device)?);
        }
        let joined = |here: Vec<PathBuf>, there: Vec<ConfigPath>| here.into_iter().chain(there.into_iter().map(PathBuf::from)).collect();
        let one = |here: Option<PathBuf>, there: Option<ConfigPath>| here.or(there.map(PathBuf::from));
        let options = Self {
            control: one(arguments.control, config.control).ok_or(OptionsError::Missing("--control PATH"))?,
            state_dir: one(arguments.state_dir, config.state_dir).ok_or(OptionsError::Missing("--state-dir DIR"))?,
            devices,
            allowed_directories: joined(arguments.allow_dir, config.allow_dir),
            socket_directories: joined(arguments.socket_dir, config.socket_dir),
            data_files: joined(arguments.allow_data_file, config.allow_data_file),
            forget: arguments.forget,
            polling: arguments.poll_max_us.or(config.poll_max_us).map_or(DEFAULT_POLLING, |micros| Duration::from_micros(micros.into())),
        };
        options.check_duplicates()?;
        Ok(options)
    }

    fn check_duplicates(&self) -> Result<(), OptionsError> {
        let mut names = BTreeSet::new();
        let mut sockets = BTreeSet::from([self.control.as_path()]);
        for device in &self.devices {
            if !names.insert(device.name.as_str()) {
                return Err(OptionsError::Duplicate { what: "name", value: device.name.clone() });
            }
            if !sockets.insert(device.socket.as_path()) {
                return Err(OptionsError::Duplicate { what: "socket", value: device.socket.display().to_string() });
            }
        }
        Ok(())
    }
}

impl DeviceOptions {
    /// Reads `name=..,image=..,format=..,socket=..` and the optional keys. A comma inside a value is written twice.
    ///
    /// # Errors
    /// If a key is unknown, missing or given twice, or a value is not possible.
    pub fn parse(specification: &str) -> Result<Self, OptionsError> {
        let read = || Self::try_from(specification.parse::<DeviceAdd>()?);
        read().map_err(|source| {
            let named = specification.split(',').find_map(|pair| pair.strip_prefix("name="));
            OptionsError::Device { device: named.unwrap_or(specification).to_owned(), source }
        })
    }
}

impl TryFrom<DeviceAdd> for DeviceOptions {
    type Error = DeviceProblem;

    fn try_from(asked: DeviceAdd) -> Result<Self, DeviceProblem> {
        let refused = |key, value: &dyn ToString, expected| Err(DeviceProblem::Value { key, value: value.to_string(), expected });
        if name::check(&asked.name).is_err() {
            return refused("name", &asked.name, name::RULE);
        }
        for (key, path) in [("image", &asked.image), ("socket", &asked.socket)] {
            if path.as_os_str().is_empty() || path.as_os_str().as_encoded_bytes().contains(&0) {
                return refused(key, &path.display(), "a path");
            }
        }
        let queues = asked.queues.unwrap_or(DEFAULT_QUEUES);
        if !(1..=MAX_QUEUES).contains(&queues) {
            return refused("queues", &queues, "a number from 1 to 64");
        }
        let queue_size = asked.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE);
        if !queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return refused("queue-size", &queue_size, "a power of two from 2 to 1024");
        }
        let serial = asked.serial.unwrap_or_else(|| asked.name.chars().take(MAX_SERIAL_BYTES).collect());
        if serial.len() > MAX_SERIAL_BYTES || !serial.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            let start: String = serial.chars().take(2 * MAX_SERIAL_BYTES).collect();
            return refused("serial", &start, "at most 20 printable ASCII characters");
        }
        let mode = match &asked.socket_mode {
            None => None,
            Some(text) => match octal(text) {
                Some(mode) => Some(mode),
                None => return refused("socket-mode", text, "permissions in octal, such as 0660"),
            },
        };
        let group = match asked.socket_group {
            Some(text) if text.is_empty() || text.contains('\0') => return refused("socket-group", &text, "a group's name or number"),
            other => other.map(|text| text.parse().map_or(Group::Name(text), Group::Id)),
        };
        Ok(Self {
            socket_access: SocketAccess { mode: mode.unwrap_or(if group.is_some() { GROUP_MODE } else { SOCKET_MODE }), group },
            name: asked.name,
            image: asked.image,
            format: format_of(asked.format),
            socket: asked.socket,
            queues,
            queue_size,
            read_only: asked.readonly,
            serial,
            on_no_space: asked.on_no_space,
            cache: match asked.cache {
                protocol::CacheMode::Direct => CacheMode::Direct,
                protocol::CacheMode::Buffered => CacheMode::Buffered,
            },
        })
    }
}

/// Permissions as `chmod` takes them, without the bits that mean nothing for a socket.
fn octal(text: &str) -> Option<u32> {
    let is_octal = (1..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    u32::from_str_radix(text, 8).ok().filter(|mode| is_octal && *mode <= 0o777)
}

/// The library's word for a format of the protocol.
pub fn format_of(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

/// The protocol's word for a format of the library.
pub fn image_format(format: Format) -> ImageFormat {
    match format {
        Format::Raw => ImageFormat::Raw,
        Format::Qcow2 => ImageFormat::Qcow2,
    }
}

fn read_config(path: &Path) -> Result<ConfigText<'_>, OptionsError> {
    let text = std::fs::read_to_string(path).map_err(|source| OptionsError::Read { path: path.to_owned(), source })?;
    Ok(ConfigText { path, text })
}

/// What the parser says, without its colours, advice and line breaks.
fn usage_error(error: &clap::Error) -> OptionsError {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return OptionsError::Help(error.to_string());
    }
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    OptionsError::Usage(one_line(first.strip_prefix("error: ").unwrap_or(first)))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, OptionsError> {
        Options::from_arguments(std::iter::once("snapfenced").chain(arguments.iter().copied()).map(OsString::from))
    }

    const BASE: [&str; 4] = ["--control", "/run/c", "--state-dir", "/var/s"];

    fn with_base(arguments: &[&str]) -> Result<Options, OptionsError> {
        parse(&[&BASE, arguments].concat())
    }

    #[test]
    fn polling_is_limited_as_told() {
        let polling = |arguments: &[&str]| with_base(arguments).expect("valid").polling;
        assert_eq!(polling(&[]), DEFAULT_POLLING);
        assert_eq!(polling(&["--poll-max-us", "0"]), Duration::ZERO);
        assert_eq!(polling(&["--poll-max-us", "250"]), Duration::from_micros(250));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config.toml");
        std::fs::write(&path, "poll-max-us = 30").expect("a file");
        let path = path.to_str().expect("a path");
        assert_eq!(polling(&["--config", path]), Duration::from_micros(30));
        assert_eq!(polling(&["--config", path, "--poll-max-us", "40"]), Duration::from_micros(40));
    }

    #[test]
    fn a_device_has_all_keys_or_their_defaults() {
        let options = with_base(&[
            "--device",
            "name=vda,image=/i,,1.qcow2,format=qcow2,socket=/s,queues=4,queue-size=128,readonly=on,serial=A b,cache=buffered,on-no-space=report,\
             socket-mode=666,socket-group=36",
            "--device",
            "name=vdb,image=b,format=raw,socket=t",
            "--allow-dir",
            "/images",
        ])
        .expect("valid");
        assert_eq!(options.control, Path::new("/run/c"));
        assert_eq!(options.state_dir, Path::new("/var/s"));
        assert_eq!(options.allowed_directories, [PathBuf::from("/images")]);
        let first = DeviceOptions {
            name: "vda".into(),
            image: "/i,1.qcow2".into(),
            format: Format::Qcow2,
            socket: "/s".into(),
            queues: 4,
            queue_size: 128,
            read_only: true,
            serial: "A b".into(),
            cache: CacheMode::Buffered,
            on_no_space: NoSpacePolicy::Report,
            socket_access: SocketAccess { mode: 0o666, group: Some(Group::Id(36)) },
        };
        let second = DeviceOptions {
            name: "vdb".into(),
            image: "b".into(),
            format: Format::Raw,
            socket: "t".into(),
            queues: DEFAULT_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            read_only: false,
            serial: "vdb".into(),
            cache: CacheMode::Direct,
            on_no_space: NoSpacePolicy::Hold,
            socket_access: SocketAccess { mode: SOCKET_MODE, group: None },
        };
        assert_eq!(options.devices, [first, second]);
    }

    #[test]
    fn whatever_is_wrong_is_told_in_one_line() {
        let good = "name=a,image=i,format=raw,socket=s";
        let with = |more| format!("{good},{more}");
        let table: &[(&[&str], &str)] = &[
            (&["--device", "name=a,image=i,socket=s"], "device a: 'format=' is missing"),
            (&["--device", "name=a,image=i,format=raw"], "device a: 'socket=' is missing"),
            (&["--device", "name=a,format=raw,socket=s"], "device a: 'image=' is missing"),
            (&["--device", "image=i,format=raw,socket=s"], "device image=i,format=raw,socket=s: 'name=' is missing"),
            (&["--device", "name=a,image=i,format=vmdk,socket=s"], "device a: 'format=vmdk': expected raw or qcow2"),
            (
                &["--device", "name=a,nmae=b"],
                "device a: there is no option 'nmae'; there are name, image, format, socket, queues, queue-size, readonly, serial, cache, on-no-space, socket-mode and socket-group",
            ),
            (&["--device", "name=a,name=b"], "device a: 'name' is given twice"),
            (&["--device", "name=a,readonly"], "device a: 'readonly' is not of the form KEY=VALUE"),
            (&["--device", "name=a,image=i,format=raw,socket=s,queues=0"], "device a: 'queues=0': expected a number from 1 to 64"),
            (&["--device", "name=a,image=i,format=raw,socket=s,queues=65"], "device a: 'queues=65': expected a number from 1 to 64"),
            (
                &["--device", "name=a,image=i,format=raw,socket=s,queue-size=100"],
                "device a: 'queue-size=100': expected a power of two from 2 to 1024",
            ),
            (&["--device", "name=a,image=i,format=raw,socket=s,readonly=yes"], "device a: 'readonly=yes': expected on or off"),
            (
                &["--device", "name=a,image=i,format=raw,socket=s,serial=123456789012345678901"],
                "device a: 'serial=123456789012345678901': expected at most 20 printable ASCII characters",
            ),
            (&["--device", "name=a,image=i,format=raw,socket=s,cache=none"], "device a: 'cache=none': expected direct or buffered"),
            (&["--device", &with("socket-mode=0880")], "device a: 'socket-mode=0880': expected permissions in octal, such as 0660"),
            (&["--device", &with("socket-mode=+660")], "device a: 'socket-mode=+660': expected permissions in octal, such as 0660"),
            (&["--device", &with("socket-mode=2660")], "device a: 'socket-mode=2660': expected permissions in octal, such as 0660"),
            (&["--device", &with("socket-group=")], "device a: 'socket-group=': expected a group's name or number"),
            (&["--device", good, "--device", "name=a,image=j,format=raw,socket=t"], "two devices have the name `a`"),
            (&["--device", good, "--device", "name=b,image=j,format=raw,socket=s"], "two devices have the socket `s`"),
            (&["--devise", good], "unexpected argument '--devise' found; see `snapfenced --help`"),
            (
                &["--config", "/nowhere/c.toml"],
                "cannot read the configuration file /nowhere/c.toml: No such file or directory (os error 2)",
            ),
        ];
        for (arguments, expected) in table {
            let error = with_base(arguments).expect_err(expected);
            assert_eq!(error.to_string(), *expected);
        }
        assert_eq!(
            parse(&["--control", "/c"]).expect_err("no state directory").to_string(),
            "--state-dir DIR is missing; see `snapfenced --help`"
        );
        assert_eq!(parse(&[]).expect_err("no control").to_string(), "--control PATH is missing; see `snapfenced --help`");
        assert!(with_base(&["--device", "name=../x,image=i,format=raw,socket=s"]).is_err());
        assert!(with_base(&["--device", "name=a,image=i\0,format=raw,socket=s"]).is_err());
    }

    #[test]
    fn help_is_not_an_error_of_use() {
        assert!(matches!(parse(&["--help"]), Err(OptionsError::Help(text)) if text.contains("--device")));
        assert!(matches!(parse(&["--version"]), Err(OptionsError::Help(_))));
    }

    fn config(text: &str) -> Result<Options, OptionsError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("c.toml");
        std::fs::write(&file, text).expect("writable");
        parse(&["--config", file.to_str().expect("UTF-8")])
    }

    #[test]
    fn the_file_says_what_the_command_line_says() {
        let text = r#"
            control = "/run/c"
            state-dir = "/var/s"
            allow-dir = ["/images"]
            socket-dir = ["/run/vms"]
            [[device]]
            name = "vda"
            image = "/i.raw"
            format = "raw"
            socket = "/s"
            queues = 2
            readonly = true
            on-no-space = "report"
            socket-group = "kvm"
        "#;
        let options = config(text).expect("valid");
        assert_eq!(
            options.devices,
            [DeviceOptions::parse(
                "name=vda,image=/i.raw,format=raw,socket=/s,queues=2,readonly=on,on-no-space=report,socket-mode=0660,socket-group=kvm"
            )
            .expect("valid")]
        );
        assert_eq!(options.allowed_directories, [PathBuf::from("/images")]);
        assert_eq!(options.socket_directories, [PathBuf::from("/run/vms")]);
    }

    #[test]
    fn mistakes_in_the_file_name_the_file_and_the_line() {
        let unknown = config("control = \"/c\"\nstate_dir = \"/s\"\n").expect_err("unknown key").to_string();
        assert!(unknown.contains("c.toml: line 2: unknown field `state_dir`"), "{unknown}");
        let broken = config("control = \n").expect_err("no value").to_string();
        assert!(broken.contains("c.toml: line 1: ") && !broken.contains('\n'), "{broken}");
        let base = "control='c'\nstate-dir='s'\n[[device]]\nimage='i'\nname='a'\nformat='raw'\nsocket='s'\n";
        let table = [
            ("queus=3", "line 8: unknown field `queus`"),
            ("queues='many'", "line 8: invalid type: string \"many\""),
            ("queues=65", "line 3: device a: 'queues=65': expected a number from 1 to 64"),
            ("readonly='yes'", "line 8: invalid type: string \"yes\", expected a boolean"),
            ("[[device]]\nname='b'\nimage='i'\nsocket='t'", "line 8: missing field `format`"),
            ("[[device]]\nname='b'\nimage=''\nsocket='t'\nformat='raw'", "line 8: device b: 'image=': expected a path"),
        ];
        for (more, expected) in table {
            let error = config(&format!("{base}{more}\n")).expect_err(more).to_string();
            assert!(error.starts_with("configuration file /") && error.contains(&format!("/c.toml: {expected}")), "{error}");
        }
        assert!(config(base).is_ok());
    }

    #[test]
    fn empty_paths_are_no_paths() {
        for (line, text) in [
            (1, "control=''\nstate-dir='s'"),
            (2, "control='c'\nstate-dir=''"),
            (3, "control='c'\nstate-dir='s'\nallow-dir=['']"),
            (3, "control='c'\nstate-dir='s'\nsocket-dir=['']"),
            (3, "control='c'\nstate-dir='s'\nallow-data-file=['/d', '']"),
        ] {
            let error = config(text).expect_err(text).to_string();
            assert!(error.contains(&format!("c.toml: line {line}: an empty text is no path")), "{error}");
        }
        for arguments in [["--control", "", "--state-dir", "s"], ["--control", "c", "--state-dir", ""]] {
            assert!(parse(&arguments).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn the_file_says_on_and_off_as_the_command_line_does() {
        for (text, expected) in [("'on'", true), ("'off'", false), ("true", true), ("false", false)] {
            let base = "control='c'\nstate-dir='s'\n[[device]]\nimage='i'\nname='a'\nformat='raw'\nsocket='s'\n";
            let options = config(&format!("{base}readonly = {text}\n")).expect("valid");
            assert_eq!(options.devices[0].read_only, expected, "{text}");
        }
    }
}
