//! What may be written on the command line.

mod image;

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use snapfence::protocol::{DeviceAdd, SnapshotMember};

pub(crate) use image::{Compat, CompressionType, CreateArguments, Image, ImageCommand, Preallocation, Repair, Size, Switch};

/// Where the daemon listens if nothing else is said.
const DEFAULT_CONTROL: &str = "/run/snapfence/control.sock";

/// Live group snapshots of virtual machines' disks: the command line of snapfenced.
#[derive(Debug, Parser)]
#[command(name = "snapfence", version, after_help = "Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub(crate) struct Arguments {
    /// The daemon's control socket.
    // Any text, also an empty one: it matters to those commands only that talk to a daemon.
    #[arg(long, global = true, value_name = "PATH", env = "SNAPFENCE_CONTROL", default_value = DEFAULT_CONTROL)]
    pub(crate) control: OsString,

    /// Print JSON for programs.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Disks that the daemon serves.
    #[command(subcommand)]
    Device(DeviceCommand),

    /// Snapshots of one or more disks, each taken at one point in time.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),

    /// The layers that a disk consists of.
    #[command(subcommand)]
    Stack(StackCommand),

    /// Work that the daemon does in the background.
    #[command(subcommand)]
    Job(JobCommand),

    /// Image files, without a daemon.
    #[command(subcommand)]
    Image(ImageCommand),

    /// Print what happens in the daemon until interrupted.
    Events,

    /// Print a script that completes snapfence's arguments in a shell.
    #[command(after_help = "Example: snapfence completions bash >/etc/bash_completion.d/snapfence")]
    Completions {
        /// The shell.
        shell: Shell,
    },

    /// Write the manual pages, one for each command.
    #[command(after_help = "Example: snapfence manual /usr/local/share/man/man1")]
    Manual {
        /// The folder to write them to.
        folder: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// List the disks.
    List,

    /// Serve another disk.
    #[command(after_help = "Example: snapfence device add name=vda,image=/disks/a.qcow2,format=qcow2,socket=/run/a.sock,queues=4")]
    Add {
        /// Keys: name, image, format (raw or qcow2), socket; and if wanted queues, queue-size, readonly (on or off), serial, cache (direct or
        /// buffered), on-no-space (hold or report), socket-mode (octal), socket-group (a name or number). A comma inside a value is written twice.
        #[arg(value_name = "name=NAME,image=PATH,format=FORMAT,socket=PATH[,...]")]
        device: DeviceAdd,
    },

    /// Try requests again at once that wait for space.
    #[command(after_help = "They are tried every second without it, too. `snapfence device list` shows I/O `nospace` while some wait.")]
    Resume {
        /// The disk's name.
        name: String,
    },

    /// Stop serving a disk. Its images and snapshots stay.
    Remove {
        /// The disk's name.
        name: String,

        /// Even if a virtual machine is connected.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Cut one or more disks at one point in time, without a pause.
    #[command(after_help = "Example: snapfence snapshot create nightly --device vda --device vdb=/disks/b.nightly.qcow2 --create")]
    Create(SnapshotCreateArguments),

    /// List the snapshots, oldest first.
    List,

    /// Show one snapshot.
    Show {
        /// The snapshot's name.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotCreateArguments {
    /// A name for the snapshot.
    #[arg(value_name = "SNAPNAME")]
    pub(crate) name: String,

    /// A disk of the group, and the image that its writes go to from now on. Without an image one is made beside the disk's present top,
    /// named after the snapshot. Repeatable.
    #[arg(long = "device", value_name = "NAME[=OVERLAY]", required = true)]
    pub(crate) devices: Vec<Member>,

    /// Make the images named with --device; without this they have to be there.
    #[arg(long)]
    pub(crate) create: bool,

    /// Return when all disks have switched to their new images, without waiting until the snapshot is frozen and durable.
    #[arg(long)]
    pub(crate) no_wait: bool,

    /// Give up, unharmed, if switching takes longer than so many milliseconds [default: 1000].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) deadline_ms: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StackCommand {
    /// Show the layers of a disk, the top first.
    Show {
        /// The disk's name.
        device: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// List the jobs under way and those that have ended lately.
    List,

    /// Wait until a job has ended; the exit status is 1 if it failed.
    Wait {
        /// The job.
        id: String,
    },

    /// End a job at the next opportunity.
    Cancel {
        /// The job.
        id: String,
    },
}

/// `NAME[=OVERLAY]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member(pub(crate) SnapshotMember);

impl FromStr for Member {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (device, overlay) = match text.split_once('=') {
            None => (text, None),
            Some((_, "")) => return Err("there is nothing after '='; leave it out to have the daemon choose a path"),
            Some((device, overlay)) => (device, Some(PathBuf::from(overlay))),
        };
        if device.is_empty() {
            return Err("the device's name is missing");
        }
        Ok(Self(SnapshotMember { device: device.to_owned(), overlay, format: None }))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::error::ErrorKind> {
        Arguments::try_parse_from(line.split(' ')).map_err(|error| error.kind())
    }

    #[test]
    fn the_parser_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_documented_form_is_understood() {
        let forms = [
            "device list",
            "device add name=vda,image=/i,format=qcow2,socket=/s",
            "device remove vda",
            "snapshot create s --device vda",
            "snapshot create s --device vda=/o --device vdb --create --no-wait --deadline-ms 5",
            "snapshot list",
            "snapshot show s",
            "stack show vda",
            "job list",
            "job wait j",
            "job cancel j",
            "image info a.qcow2",
            "image info a.qcow2 --backing-chain --allow-dir /a --allow-dir /b",
            "image create a.qcow2 1G",
            "image create b.qcow2 -b a.qcow2 -F qcow2",
            "image create b.qcow2 2T --backing-file a.qcow2 --backing-format raw --cluster-size 64k --extended-l2 on --refcount-bits 8",
            "image create b.qcow2 1M --compat 0.10 --compression-type zlib --lazy-refcounts off --preallocation metadata",
            "image create b.raw 1M -f raw",
            "image check a.qcow2",
            "image check a.qcow2 --repair leaks",
            "image map a.raw -f raw",
            "image map a.raw --format raw",
            "image map -U a.qcow2",
            "image check a.qcow2 --force-share",
            "image info -U a.qcow2",
            "events",
            "completions bash",
            "manual /tmp",
        ];
        for form in forms {
            for line in [
                format!("snapfence {form} --json"),
                format!("snapfence --control /c --json {form}"),
                format!("snapfence {form} --control /c"),
            ] {
                assert!(parse(&line).is_ok(), "{line}");
            }
        }
        let Command::Snapshot(SnapshotCommand::Create(create)) = parse("snapfence snapshot create s --device vda=a=b").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!(create.devices[0].0.overlay.as_deref(), Some("a=b".as_ref()));
    }

    #[test]
    fn other_forms_are_wrong_usage() {
        let forms = [
            "",
            "device",
            "device add name=vda",
            "device add name=vda,image=/i,format=vmdk,socket=/s",
            "snapshot create",
            "snapshot create s",
            "snapshot create s --device =/o",
            "snapshot create s --device vda=",
            "snapshot create s --device vda --deadline-ms 0",
            "stack show",
            "image info",
            "image info a -f vmdk",
            "image create a",
            "image create a 1X",
            "image create a 1G -b base",
            "image create a 1G -F raw",
            "image create a 1G --compat 4",
            "image check a --repair all",
            "image check a -U --repair leaks",
            "jobs",
        ];
        for form in forms {
            assert!(parse(format!("snapfence {form}").trim_end()).is_err(), "{form}");
        }
    }
}
