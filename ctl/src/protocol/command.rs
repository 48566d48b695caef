//! The list of commands.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    BlockdevAdd, BlockdevDel, BlockdevSnapshot, BlockdevSnapshotSync, CommandInfo, DeviceAdd, DeviceList, DeviceRemove, DeviceResume,
    ErrorClass, Failure, JobCancel, QueryJobs, QueryNamedBlockNodes, SnapshotCreate, SnapshotList, SnapshotShow, StackShow, Transaction,
    VersionInfo, typed,
};

/// The command that ends the negotiation; the only one allowed before.
pub const NEGOTIATION: &str = "qmp_capabilities";

/// A command's arguments, which know the command's name and what it answers.
pub trait Call: Serialize + DeserializeOwned {
    /// The name on the wire.
    const NAME: &'static str;
    /// What it returns.
    type Answer: Serialize + DeserializeOwned;
}

/// An answer with nothing in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Which version is this? Answered by the control server itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryVersion {}

impl Call for QueryVersion {
    const NAME: &'static str = "query-version";
    type Answer = VersionInfo;
}

/// Which commands are there? Answered by the control server itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryCommands {}

impl Call for QueryCommands {
    const NAME: &'static str = "query-commands";
    type Answer = Vec<CommandInfo>;
}

/// Stop the daemon in good order, as SIGTERM does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quit {}

impl Call for Quit {
    const NAME: &'static str = "quit";
    type Answer = Empty;
}

/// Makes [`Command`] from the list of its arguments' types.
macro_rules! commands {
    ($($kind:ident),+ $(,)?) => {
        /// Any command that the daemon carries out, its arguments checked for shape and not yet for sense.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Command {
            $(
                #[doc = concat!("See [`", stringify!($kind), "`].")]
                $kind($kind),
            )+
        }

        impl Command {
            /// The names of all, in the order of their declaration.
            pub const NAMES: &'static [&'static str] = &[$(<$kind as Call>::NAME),+];

            /// The command of that name with these arguments.
            ///
            /// # Errors
            ///
            /// `CommandNotFound` for an unknown name; `GenericError`, naming the key, for arguments that do not fit.
            pub fn parse(name: &str, arguments: Map<String, Value>) -> Result<Self, Failure> {
                $(
                    if name == <$kind as Call>::NAME {
                        return typed::<$kind>(arguments).map(Self::$kind);
                    }
                )+
                Err(Failure::new(ErrorClass::CommandNotFound, format_args!("the command {name} has not been found; query-commands names those there are")))
            }

            /// Its name on the wire.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$kind(_) => <$kind as Call>::NAME,)+
                }
            }
        }

        $(
            impl From<$kind> for Command {
                fn from(arguments: $kind) -> Self {
                    Self::$kind(arguments)
                }
            }
        )+
    };
}

commands!(
    DeviceList,
    DeviceAdd,
    DeviceRemove,
    DeviceResume,
    SnapshotCreate,
    SnapshotList,
    SnapshotShow,
    StackShow,
    QueryJobs,
    JobCancel,
    QueryNamedBlockNodes,
    Transaction,
    BlockdevSnapshot,
    BlockdevSnapshotSync,
    BlockdevAdd,
    BlockdevDel,
    Quit,
);

/// The names of everything that may be executed, those the control server answers itself among them.
pub fn all_commands() -> impl Iterator<Item = &'static str> {
    [NEGOTIATION, QueryVersion::NAME, QueryCommands::NAME].into_iter().chain(Command::NAMES.iter().copied())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::json;

    use super::*;
    use crate::protocol::{CacheMode, ImageFormat};

    /// One call of each command, as it goes over the wire.
    fn examples() -> Vec<(&'static str, Value)> {
        let sync = json!({
            "node-name": "vda", "snapshot-node-name": "n", "snapshot-file": "/o", "format": "qcow2", "mode": "existing",
        });
        vec![
            ("device-list", json!({})),
            (
                "device-add",
                json!({
                    "name": "vda", "image": "/i", "format": "raw", "socket": "/s", "queues": 4, "queue-size": 128, "readonly": true,
                    "serial": "x", "cache": "buffered", "on-no-space": "report", "socket-mode": "0660", "socket-group": "kvm",
                }),
            ),
            ("device-remove", json!({ "name": "vda", "force": true })),
            ("device-resume", json!({ "name": "vda" })),
            (
                "snapshot-create",
                json!({
                    "name": "s", "devices": [{ "device": "vda" }, { "device": "vdb", "overlay": "/o", "format": "qcow2" }], "create": true,
                    "deadline-ms": 50, "job-id": "j",
                }),
            ),
            ("snapshot-list", json!({})),
            ("snapshot-show", json!({ "name": "s" })),
            ("stack-show", json!({ "device": "vda" })),
            ("query-jobs", json!({})),
            ("job-cancel", json!({ "id": "j" })),
            ("query-named-block-nodes", json!({ "flat": true })),
            (
                "transaction",
                json!({
                    "actions": [
                        { "type": "blockdev-snapshot-sync", "data": sync },
                        { "type": "blockdev-snapshot", "data": { "node": "a", "overlay": "b" } },
                    ],
                    "properties": { "completion-mode": "grouped" },
                }),
            ),
            ("blockdev-snapshot", json!({ "node": "a", "overlay": "b" })),
            ("blockdev-snapshot-sync", sync),
            (
                "blockdev-add",
                json!({ "driver": "qcow2", "node-name": "b", "file": { "driver": "host_device", "filename": "/o" }, "read-only": false }),
            ),
            ("blockdev-del", json!({ "node-name": "b" })),
            ("quit", json!({})),
        ]
    }

    fn parse(name: &str, arguments: &Value) -> Result<Command, Failure> {
        Command::parse(name, arguments.as_object().expect("the arguments are an object").clone())
    }

    fn arguments(command: &Command) -> Value {
        macro_rules! each {
            ($($kind:ident),+) => {
                match command {
                    $(Command::$kind(arguments) => serde_json::to_value(arguments),)+
                }
            };
        }
        let value = each!(
            DeviceList,
            DeviceAdd,
            DeviceRemove,
            DeviceResume,
            SnapshotCreate,
            SnapshotList,
            SnapshotShow,
            StackShow,
            QueryJobs,
            JobCancel,
            QueryNamedBlockNodes,
            Transaction,
            BlockdevSnapshot,
            BlockdevSnapshotSync,
            BlockdevAdd,
            BlockdevDel,
            Quit
        );
        value.expect("the arguments can be written as JSON")
    }

    #[test]
    fn every_command_is_read_and_written_the_same() {
        let examples = examples();
        for (name, value) in &examples {
            let command = parse(name, value).unwrap_or_else(|failure| panic!("{name}: {failure}"));
            assert_eq!(command.name(), *name);
            assert_eq!(arguments(&command), *value, "{name}");
        }
        let names: HashSet<_> = examples.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, Command::NAMES.iter().copied().collect());
        assert_eq!(all_commands().count(), Command::NAMES.len() + 3);
    }

    #[test]
    fn every_key_is_needed_or_optional_and_no_other_is_known() {
        for (name, value) in examples() {
            let mut more = value.clone();
            more["unheard-of"] = json!(1);
            let failure = parse(name, &more).unwrap_err();
            assert!(failure.desc.contains("'unheard-of' is unexpected"), "{name}: {failure}");
            for key in value.as_object().into_iter().flat_map(Map::keys) {
                let mut wrong = value.clone();
                wrong[key] = json!([[1]]);
                let failure = parse(name, &wrong).unwrap_err();
                assert!(failure.desc.contains(&format!("'{key}")), "{name} with a wrong {key}: {failure}");
                let mut less = value.clone();
                less.as_object_mut().expect("the arguments are an object").remove(key);
                if let Err(failure) = parse(name, &less) {
                    assert!(failure.desc.contains(&format!("missing field '{key}'")), "{name} without {key}: {failure}");
                }
            }
        }
    }

    #[test]
    fn lists_are_not_taken_for_objects() {
        for (name, value, place) in [
            ("snapshot-create", json!({ "name": "s", "devices": [["vda"]] }), "devices[0]"),
            ("blockdev-add", json!({ "driver": "qcow2", "node-name": "b", "file": ["file", "/o"] }), "file"),
            ("transaction", json!({ "actions": [["blockdev-snapshot", { "node": "a", "overlay": "b" }]] }), "actions[0]"),
            ("transaction", json!({ "actions": [], "properties": ["grouped"] }), "properties"),
        ] {
            let failure = parse(name, &value).unwrap_err();
            assert!(failure.desc.starts_with(&format!("argument '{place}': invalid type: sequence, expected ")), "{name}: {failure}");
        }
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let add = json!({ "name": "vda", "image": "/i", "format": "qcow2", "socket": "/s" });
        let Command::DeviceAdd(from_json) = parse("device-add", &add).unwrap() else { panic!("another command") };
        assert_eq!("name=vda,image=/i,format=qcow2,socket=/s".parse(), Ok(from_json.clone()));
        let DeviceAdd { format, queues, queue_size, readonly, serial, cache, .. } = from_json;
        assert_eq!((format, queues, queue_size, readonly, serial, cache), (ImageFormat::Qcow2, None, None, false, None, CacheMode::Direct));
        let backing = json!({ "driver": "qcow2", "node-name": "b", "file": { "driver": "file", "filename": "/o" }, "backing": null });
        assert!(parse("blockdev-add", &backing).is_ok());
    }
}
