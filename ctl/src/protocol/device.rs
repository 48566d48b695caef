//! Devices, and how they are described on the command line, in the configuration file and on the control socket alike.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use snapfence_image_format::chain::Format;

use super::{Call, Empty};

/// The devices there are, in the order of their names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceList {}

impl Call for DeviceList {
    const NAME: &'static str = "device-list";
    type Answer = Vec<DeviceInfo>;
}

/// Serve another disk. The same keys as `--device` of `snapfenced` and a `[[device]]` of its configuration file.
///
/// From a string: `name=vda,image=/disks/a.qcow2,format=qcow2,socket=/run/a.sock,queues=4,readonly=on`; a comma inside a value is written twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DeviceAdd {
    /// Its name in this daemon.
    pub name: String,
    /// The image, of which the recorded stack decides what is on top.
    pub image: PathBuf,
    /// The image's format, never guessed.
    pub format: ImageFormat,
    /// Where the front-end connects.
    pub socket: PathBuf,
    /// Number of virtqueues: 1 to 64, 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Largest size of a virtqueue: a power of two from 2 to 1024, 256 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// Refuse writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// What GET_ID answers, at most 20 bytes. The name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How the image is opened.
    #[serde(default)]
    pub cache: CacheMode,
    /// What becomes of requests for which there is no space.
    #[serde(default)]
    pub on_no_space: NoSpacePolicy,
    /// Permissions of the socket, in octal as for `chmod`: 0600 if absent, 0660 with `socket_group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<String>,
    /// Group of the socket, by name or number. The daemon's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
}

impl Call for DeviceAdd {
    const NAME: &'static str = "device-add";
    type Answer = DeviceInfo;
}

/// Stop serving a disk. Its images are flushed; its snapshots stay in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRemove {
    /// The device.
    pub name: String,
    /// Even if a front-end is connected.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

impl Call for DeviceRemove {
    const NAME: &'static str = "device-remove";
    type Answer = Empty;
}

/// Try requests again at once that wait for space. They are tried every second without it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceResume {
    /// The device.
    pub name: String,
}

impl Call for DeviceResume {
    const NAME: &'static str = "device-resume";
    type Answer = Empty;
}

/// A device as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// The top layer.
    pub image: PathBuf,
    /// The top layer's format.
    pub format: ImageFormat,
    /// Where the front-end connects.
    pub socket: PathBuf,
    /// Number of virtqueues.
    pub queues: u16,
    /// Largest size of a virtqueue.
    pub queue_size: u16,
    /// Whether writes are refused.
    pub readonly: bool,
    /// What GET_ID answers.
    pub serial: String,
    /// How the layers are opened.
    pub cache: CacheMode,
    /// What becomes of requests for which there is no space.
    pub on_no_space: NoSpacePolicy,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Number of layers.
    pub depth: u32,
    /// What it is doing.
    pub state: DeviceState,
    /// Whether requests can be served.
    pub io_status: BlockDeviceIoStatus,
}

/// Whether a device can serve its requests, in QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockDeviceIoStatus {
    /// As far as anybody knows.
    Ok,
    /// Writes fail until it is opened again.
    Failed,
    /// Some wait for space.
    Nospace,
}

impl BlockDeviceIoStatus {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Nospace => "nospace",
        }
    }
}

/// What a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Serving, or ready to.
    Ready,
    /// Being cut, or a layer of it being frozen; it serves all the same.
    Snapshot,
    /// A layer refuses writes since a flush or a metadata write has failed.
    Failed,
}

impl DeviceState {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Snapshot => "snapshot",
            Self::Failed => "failed",
        }
    }
}

/// Formats that a layer can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl ImageFormat {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.as_str())
    }
}

impl FromStr for ImageFormat {
    type Err = DeviceOptionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(DeviceOptionError::Value { key: "format".to_owned(), value: text.to_owned(), expected: "raw or qcow2" }),
        }
    }
}

/// How images are opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// Around the host's page cache (`O_DIRECT`).
    #[default]
    Direct,
    /// Through the host's page cache.
    Buffered,
}

impl CacheMode {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
        }
    }
}

impl From<CacheMode> for snapfence_image_format::storage::CacheMode {
    fn from(mode: CacheMode) -> Self {
        match mode {
            CacheMode::Direct => Self::Direct,
            CacheMode::Buffered => Self::Buffered,
        }
    }
}

/// What becomes of a request for which the medium has no space left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoSpacePolicy {
    /// It waits, and is tried again every second and after `device-resume`.
    #[default]
    Hold,
    /// The guest gets an I/O error.
    Report,
}

impl NoSpacePolicy {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Report => "report",
        }
    }
}

/// Why a `--device` text was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceOptionError {
    /// No such key.
    #[error(
        "there is no option '{key}'; there are name, image, format, socket, queues, queue-size, readonly, serial, cache, on-no-space, socket-mode and socket-group"
    )]
    Unknown {
        /// The key.
        key: String,
    },
    /// A part without `=`.
    #[error("'{part}' is not of the form KEY=VALUE")]
    Form {
        /// The part.
        part: String,
    },
    /// A key given twice.
    #[error("'{key}' is given twice")]
    Twice {
        /// The key.
        key: String,
    },
    /// A key that has to be there.
    #[error("'{key}=' is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value that does not fit.
    #[error("'{key}={value}': expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What fits.
        expected: &'static str,
    },
}

/// Splits at single commas; two commas stand for one in a value.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != ',' {
            parts.last_mut().expect("there is always one").push(letter);
        } else if letters.next_if_eq(&',').is_some() {
            parts.last_mut().expect("there is always one").push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

impl FromStr for DeviceAdd {
    type Err = DeviceOptionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut given: Vec<(String, String)> = Vec::new();
        for part in split(text) {
            let Some((key, value)) = part.split_once('=') else { return Err(DeviceOptionError::Form { part }) };
            if given.iter().any(|(known, _)| known == key) {
                return Err(DeviceOptionError::Twice { key: key.to_owned() });
            }
            given.push((key.to_owned(), value.to_owned()));
        }
        let mut take = |key: &str| given.iter().position(|(known, _)| known == key).map(|at| given.swap_remove(at).1);
        let mut need = |key: &'static str| match take(key) {
            Some(value) if value.is_empty() => Err(DeviceOptionError::Value { key: key.to_owned(), value, expected: "something" }),
            other => other.ok_or(DeviceOptionError::Missing { key }),
        };
        let (name, image, format, socket) = (need("name"), need("image"), need("format"), need("socket"));
        let number = |key: &'static str, value: Option<String>| {
            value
                .map(|value| {
                    value.parse().map_err(|_| DeviceOptionError::Value { key: key.to_owned(), value, expected: "a number below 65536" })
                })
                .transpose()
        };
        let (queues, queue_size) = (number("queues", take("queues")), number("queue-size", take("queue-size")));
        let readonly = match take("readonly").as_deref() {
            None | Some("off") => Ok(false),
            Some("on") => Ok(true),
            Some(other) => Err(DeviceOptionError::Value { key: "readonly".to_owned(), value: other.to_owned(), expected: "on or off" }),
        };
        let serial = take("serial");
        let cache = match take("cache").as_deref() {
            None | Some("direct") => Ok(CacheMode::Direct),
            Some("buffered") => Ok(CacheMode::Buffered),
            Some(other) => {
                Err(DeviceOptionError::Value { key: "cache".to_owned(), value: other.to_owned(), expected: "direct or buffered" })
            }
        };
        let on_no_space = match take("on-no-space").as_deref() {
            None | Some("hold") => Ok(NoSpacePolicy::Hold),
            Some("report") => Ok(NoSpacePolicy::Report),
            Some(other) => {
                Err(DeviceOptionError::Value { key: "on-no-space".to_owned(), value: other.to_owned(), expected: "hold or report" })
            }
        };
        let (socket_mode, socket_group) = (take("socket-mode"), take("socket-group"));
        // A key that is wrong is likelier the cause of one that is missing than the other way round.
        if let Some((key, _)) = given.into_iter().next() {
            return Err(DeviceOptionError::Unknown { key });
        }
        Ok(Self {
            name: name?,
            image: image?.into(),
            format: format?.parse()?,
            socket: socket?.into(),
            queues: queues?,
            queue_size: queue_size?,
            readonly: readonly?,
            serial,
            cache: cache?,
            on_no_space: on_no_space?,
            socket_mode,
            socket_group,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_described_in_one_text() {
        let text = "socket=/run/a,,b.sock,name=vda,image=/disks/x=y.qcow2,format=raw,queues=4,queue-size=128,readonly=on,serial=,cache=buffered,on-no-space=report,socket-mode=0660,socket-group=kvm";
        let expected = DeviceAdd {
            name: "vda".to_owned(),
            image: "/disks/x=y.qcow2".into(),
            format: ImageFormat::Raw,
            socket: "/run/a,b.sock".into(),
            queues: Some(4),
            queue_size: Some(128),
            readonly: true,
            serial: Some(String::new()),
            cache: CacheMode::Buffered,
            on_no_space: NoSpacePolicy::Report,
            socket_mode: Some("0660".to_owned()),
            socket_group: Some("kvm".to_owned()),
        };
        assert_eq!(text.parse(), Ok(expected));
    }

    #[test]
    fn a_wrong_text_names_what_is_wrong() {
        let good = "name=vda,image=/i,format=raw,socket=/s";
        let table = [
            (String::new(), "'' is not of the form KEY=VALUE"),
            (format!("{good},"), "'' is not of the form KEY=VALUE"),
            (format!("{good},readonly"), "'readonly' is not of the form KEY=VALUE"),
            (format!("{good},name=vdb"), "'name' is given twice"),
            (format!("{good},colour=red"), "there is no option 'colour'"),
            ("nam=vda,image=/i,format=raw,socket=/s".to_owned(), "there is no option 'nam'"),
            ("name=vda,image=/i,socket=/s".to_owned(), "'format=' is missing"),
            ("name=,image=/i,format=raw,socket=/s".to_owned(), "'name=': expected something"),
            ("name=vda,image=/i,format=vmdk,socket=/s".to_owned(), "'format=vmdk': expected raw or qcow2"),
            (format!("{good},queues=-1"), "'queues=-1': expected a number"),
            (format!("{good},queue-size=65536"), "'queue-size=65536': expected a number"),
            (format!("{good},readonly=yes"), "'readonly=yes': expected on or off"),
            (format!("{good},on-no-space=stop"), "'on-no-space=stop': expected hold or report"),
            (format!("{good},cache=none"), "'cache=none': expected direct or buffered"),
        ];
        for (text, expected) in table {
            let error = text.parse::<DeviceAdd>().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
