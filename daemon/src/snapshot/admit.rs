//! Whether a snapshot may be taken, decided from plain data.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snapfence_image_format::chain::MAX_DEPTH;

use crate::name;

/// Most devices of one group.
pub const MAX_GROUP: usize = 1024;
/// Longest time that completions may be held back, in milliseconds: well below what guests take for a dead disk (30 s on Linux).
pub const MAX_DEADLINE_MS: u64 = 10_000;
/// The time that applies unless another is asked for, in milliseconds.
pub const DEFAULT_DEADLINE_MS: u64 = 1_000;

/// A snapshot as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What it shall be called.
    pub name: String,
    /// The group.
    pub members: Vec<Member>,
    /// How long completions may be held back, in milliseconds.
    pub deadline_ms: Option<u64>,
}

/// One device of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which device.
    pub device: String,
    /// Where its writes shall go.
    pub overlay: Overlay,
}

/// The new top layer of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// A file that is there.
    Existing(PathBuf),
    /// A file to be made at this path.
    CreateAt(PathBuf),
    /// A file to be made beside the present top, named after the snapshot.
    Create,
}

impl Overlay {
    /// The path, where it is given.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Existing(path) | Self::CreateAt(path) => Some(path),
            Self::Create => None,
        }
    }
}

/// What matters of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The guest only reads it.
    pub read_only: bool,
    /// It is being removed.
    pub leaving: bool,
    /// Number of layers, those of snapshots in line before this one counted.
    pub depth: usize,
    /// The file of the lowest layer of which a flush had failed before it was opened.
    pub doubtful: Option<PathBuf>,
}

/// Why a snapshot is refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The daemon is about to end.
    #[error("the daemon is stopping")]
    Stopping,
    /// The name breaks the rule for names.
    #[error("'{0}' cannot be a snapshot's name: a name has {rule}", rule = name::RULE)]
    Name(String),
    /// The name is taken.
    #[error("there already is a snapshot '{0}'; choose another name")]
    NameTaken(String),
    /// Nothing to do.
    #[error("a snapshot needs at least one device")]
    NoDevice,
    /// Too much to do.
    #[error("a snapshot of {0} devices is not possible: {MAX_GROUP} at most")]
    TooMany(usize),
    /// No such device.
    #[error("there is no device '{0}'; device-list names those there are")]
    UnknownDevice(String),
    /// A device cannot be cut twice at one time.
    #[error("device '{0}' is named twice")]
    DeviceTwice(String),
    /// An overlay serves one device.
    #[error("the overlay {0} is named twice")]
    OverlayTwice(PathBuf),
    /// There is nothing to cut.
    #[error("device '{0}' is read-only: it does not change")]
    ReadOnly(String),
    /// It is going.
    #[error("device '{0}' is being removed")]
    Leaving(String),
    /// The stack is as deep as stacks can be.
    #[error("device '{device}' has {depth} layers, and {MAX_DEPTH} is the limit")]
    TooDeep {
        /// Which device.
        device: String,
        /// Its layers.
        depth: usize,
    },
    /// It could be taken, and would not be durable.
    #[error(
        "no snapshot of device '{device}' would be durable: a flush of {layer} has failed, and a power cut may take away what had \
         been written to it until then; copy the disk to a new image, or restart the host"
    )]
    Doubtful {
        /// Which device.
        device: String,
        /// The file of its layer.
        layer: PathBuf,
    },
    /// Waiting that long is as bad as a pause.
    #[error("a deadline of {0} ms is not possible: 1 to {MAX_DEADLINE_MS}")]
    Deadline(u64),
}

/// Says whether `asked` may enter the line, and with which deadline in milliseconds. What depends on files is checked later, when it is its turn.
///
/// # Errors
/// Why not.
pub fn admit(asked: &Asked, stopping: bool, name_taken: bool, device: impl Fn(&str) -> Option<DeviceFacts>) -> Result<u64, Refusal> {
    if stopping {
        return Err(Refusal::Stopping);
    }
    if name::check(&asked.name).is_err() {
        return Err(Refusal::Name(asked.name.clone()));
    }
    if name_taken {
        return Err(Refusal::NameTaken(asked.name.clone()));
    }
    match asked.members.len() {
        0 => return Err(Refusal::NoDevice),
        count if count > MAX_GROUP => return Err(Refusal::TooMany(count)),
        _ => {}
    }
    let mut devices = BTreeSet::new();
    let mut overlays = BTreeSet::new();
    for member in &asked.members {
        let name = &member.device;
        let facts = device(name).ok_or_else(|| Refusal::UnknownDevice(name.clone()))?;
        if !devices.insert(name) {
            return Err(Refusal::DeviceTwice(name.clone()));
        }
        if let Some(path) = member.overlay.path()
            && !overlays.insert(path)
        {
            return Err(Refusal::OverlayTwice(path.to_owned()));
        }
        if facts.read_only {
            return Err(Refusal::ReadOnly(name.clone()));
        }
        if facts.leaving {
            return Err(Refusal::Leaving(name.clone()));
        }
        if facts.depth >= MAX_DEPTH {
            return Err(Refusal::TooDeep { device: name.clone(), depth: facts.depth });
        }
        if let Some(layer) = facts.doubtful {
            return Err(Refusal::Doubtful { device: name.clone(), layer });
        }
    }
    match asked.deadline_ms.unwrap_or(DEFAULT_DEADLINE_MS) {
        deadline @ 1..=MAX_DEADLINE_MS => Ok(deadline),
        other => Err(Refusal::Deadline(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: DeviceFacts = DeviceFacts { read_only: false, leaving: false, depth: 1, doubtful: None };

    fn devices(name: &str) -> Option<DeviceFacts> {
        match name {
            "vda" | "vdb" => Some(PLAIN),
            "ro" => Some(DeviceFacts { read_only: true, ..PLAIN }),
            "going" => Some(DeviceFacts { leaving: true, ..PLAIN }),
            "deep" => Some(DeviceFacts { depth: MAX_DEPTH, ..PLAIN }),
            "doubtful" => Some(DeviceFacts { doubtful: Some("/base".into()), ..PLAIN }),
            "almost" => Some(DeviceFacts { depth: MAX_DEPTH - 1, ..PLAIN }),
            _ => None,
        }
    }

    fn asked(name: &str, members: &[(&str, Overlay)], deadline_ms: Option<u64>) -> Asked {
        let members = members.iter().map(|(device, overlay)| Member { device: (*device).to_owned(), overlay: overlay.clone() }).collect();
        Asked { name: name.to_owned(), members, deadline_ms }
    }

    #[test]
    fn every_case_has_its_answer() {
        use Overlay::{Create, CreateAt, Existing};
        let x = || Existing("/x".into());
        let table = [
            (asked("s", &[("vda", Create)], None), Ok(DEFAULT_DEADLINE_MS)),
            (asked("s", &[("vda", Create), ("vdb", x())], Some(1)), Ok(1)),
            (asked("s", &[("almost", Create)], Some(MAX_DEADLINE_MS)), Ok(MAX_DEADLINE_MS)),
            (asked("../s", &[("vda", Create)], None), Err(Refusal::Name("../s".into()))),
            (asked("taken", &[("vda", Create)], None), Err(Refusal::NameTaken("taken".into()))),
            (asked("s", &[], None), Err(Refusal::NoDevice)),
            (asked("s", &vec![("vda", Create); MAX_GROUP + 1], None), Err(Refusal::TooMany(MAX_GROUP + 1))),
            (asked("s", &[("vdc", Create)], None), Err(Refusal::UnknownDevice("vdc".into()))),
            (asked("s", &[("vda", Create), ("vda", x())], None), Err(Refusal::DeviceTwice("vda".into()))),
            (asked("s", &[("vda", x()), ("vdb", CreateAt("/x".into()))], None), Err(Refusal::OverlayTwice("/x".into()))),
            (asked("s", &[("vda", Create), ("ro", Create)], None), Err(Refusal::ReadOnly("ro".into()))),
            (asked("s", &[("going", Create)], None), Err(Refusal::Leaving("going".into()))),
            (asked("s", &[("deep", Create)], None), Err(Refusal::TooDeep { device: "deep".into(), depth: MAX_DEPTH })),
            (asked("s", &[("doubtful", Create)], None), Err(Refusal::Doubtful { device: "doubtful".into(), layer: "/base".into() })),
            (asked("s", &[("vda", Create)], Some(0)), Err(Refusal::Deadline(0))),
            (asked("s", &[("vda", Create)], Some(MAX_DEADLINE_MS + 1)), Err(Refusal::Deadline(MAX_DEADLINE_MS + 1))),
        ];
        for (asked, expected) in table {
            assert_eq!(admit(&asked, false, asked.name == "taken", devices), expected, "{asked:?}");
            assert_eq!(admit(&asked, true, false, devices), Err(Refusal::Stopping));
        }
    }
}
