//! The commands of the control socket.

use std::path::Path;
use std::rc::Rc;

use serde_json::Value;
use snapfence::protocol::{
    BlockNode, BlockdevAdd, BlockdevSnapshot, BlockdevSnapshotSync, Command, DeviceInfo, Empty, Failure, ImageFormat, NewImageMode,
    SnapshotCreate, SnapshotInfo, StackInfo, TransactionAction,
};
use snapfence_image_format::storage::Environment;

use super::Manager;
use super::host::Host;
use super::lifecycle::RemoveError;
use super::open::GivenBy;
use crate::catalogue::{CatalogueError, microseconds};
use crate::control::Reply;
use crate::options::DeviceOptions;
use crate::snapshot::{Asked, Member, Overlay, Refusal, StartError, info_of};

/// Nodes that `blockdev-add` may have named and nobody has used yet.
const MAX_NODES: usize = 1024;
/// How often a name is made up before the catalogue is taken to be at fault.
const NAME_ATTEMPTS: u32 = 100;

impl From<CatalogueError> for Failure {
    fn from(error: CatalogueError) -> Self {
        Self::generic(error)
    }
}

impl From<RemoveError> for Failure {
    fn from(error: RemoveError) -> Self {
        match error {
            RemoveError::Unknown(name) => Self::no_device(&name),
            other => Self::generic(other),
        }
    }
}

/// An overlay under the name that QEMU's commands have for it.
struct NamedMember {
    member: Member,
    node_name: Option<String>,
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Carries out a command as a task of its own, so that it delays no other, and answers.
    pub fn execute(self: &Rc<Self>, command: Command, reply: Reply) {
        let manager = Rc::clone(self);
        self.environment.spawn(async move {
            let name = command.name();
            let result = manager.carry_out(command).await;
            if let Err(failure) = &result {
                tracing::info!(event = "command_refused", command = name, cause = %failure.desc, "a command was answered with an error");
            }
            reply.send(result);
        });
    }

    async fn carry_out(self: &Rc<Self>, command: Command) -> Result<Value, Failure> {
        match command {
            Command::DeviceList(_) => answer(self.devices().iter().map(|device| device.info()).collect::<Vec<DeviceInfo>>()),
            Command::DeviceAdd(asked) => {
                let options = DeviceOptions::try_from(asked).map_err(Failure::generic)?;
                let device = self.add_device(options, GivenBy::Socket).await?;
                answer(device.info())
            }
            Command::DeviceRemove(asked) => {
                self.remove_device(&asked.name, asked.force).await?;
                answer(Empty {})
            }
            Command::DeviceResume(asked) => {
                self.device(&asked.name).ok_or_else(|| Failure::no_device(&asked.name))?.resume();
                answer(Empty {})
            }
            Command::SnapshotCreate(asked) => answer(self.snapshot_create(asked).await?),
            Command::SnapshotList(_) => answer(self.snapshot_list().await?),
            Command::SnapshotShow(asked) => answer(self.snapshot_show(&asked.name).await?),
            Command::StackShow(asked) => {
                let device = self.device(&asked.device).ok_or_else(|| Failure::no_device(&asked.device))?;
                self.measure(std::slice::from_ref(&device)).await;
                answer::<StackInfo>(device.stack_info())
            }
            Command::QueryJobs(_) => answer(self.jobs.list()),
            Command::JobCancel(asked) => {
                self.jobs.cancel(&asked.id).map_err(Failure::generic)?;
                answer(Empty {})
            }
            Command::QueryNamedBlockNodes(_) => {
                self.measure(&self.devices()).await;
                answer::<Vec<BlockNode>>(self.block_nodes())
            }
            Command::Transaction(transaction) => {
                let members = transaction.actions.into_iter().map(|action| self.member_of_action(action)).collect::<Result<Vec<_>, _>>()?;
                self.cut_as_qemu_does(members).await?;
                answer(Empty {})
            }
            Command::BlockdevSnapshot(asked) => {
                let member = self.member_of_node(asked)?;
                self.cut_as_qemu_does(vec![member]).await?;
                answer(Empty {})
            }
            Command::BlockdevSnapshotSync(asked) => {
                let member = self.member_of_sync(asked)?;
                self.cut_as_qemu_does(vec![member]).await?;
                answer(Empty {})
            }
            Command::BlockdevAdd(node) => {
                self.add_node(node)?;
                answer(Empty {})
            }
            Command::BlockdevDel(asked) => {
                if self.is_promised(&asked.node_name) && self.nodes.borrow().contains_key(&asked.node_name) {
                    return Err(Failure::generic(format_args!("a snapshot is about to use node '{}'", asked.node_name)));
                }
                let removed = self.nodes.borrow_mut().remove(&asked.node_name);
                removed.ok_or_else(|| Failure::no_device(&asked.node_name))?;
                answer(Empty {})
            }
            Command::Quit(_) => {
                (self.quit)();
                answer(Empty {})
            }
        }
    }

    async fn snapshot_create(self: &Rc<Self>, asked: SnapshotCreate) -> Result<SnapshotInfo, Failure> {
        let mut members = Vec::new();
        for member in asked.devices {
            qcow2_only(member.format)?;
            if let Some(path) = &member.overlay {
                not_empty("overlay", path)?;
            }
            let overlay = match member.overlay {
                None => Overlay::Create,
                Some(path) if asked.create => Overlay::CreateAt(path),
                Some(path) => Overlay::Existing(path),
            };
            members.push(Member { device: member.device, overlay });
        }
        let asked_for = Asked { name: asked.name, members, deadline_ms: asked.deadline_ms };
        self.start_snapshot(asked_for, asked.job_id).await?.switched().await
    }

    async fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        let recorded = self.catalogue.run(|store| store.snapshots()).await?;
        let mut under_way: Vec<_> = self.snapshots.borrow().values().map(|progress| progress.info()).collect();
        let mut all: Vec<_> = recorded
            .iter()
            .map(|record| match under_way.iter().position(|info| info.name == record.name) {
                Some(at) => under_way.swap_remove(at),
                None => info_of(record, None),
            })
            .collect();
        all.append(&mut under_way);
        all.sort_by(|one, other| (one.created, &one.name).cmp(&(other.created, &other.name)));
        Ok(all)
    }

    async fn snapshot_show(&self, name: &str) -> Result<SnapshotInfo, Failure> {
        if let Some(progress) = self.snapshots.borrow().get(name) {
            return Ok(progress.info());
        }
        let key = name.to_owned();
        let record = self.catalogue.run(move |store| store.snapshot(&key)).await?;
        let record =
            record.ok_or_else(|| Failure::generic(format_args!("there is no snapshot '{name}'; snapshot-list names those there are")))?;
        Ok(info_of(&record, None))
    }

    fn member_of_action(&self, action: TransactionAction) -> Result<NamedMember, Failure> {
        match action {
            TransactionAction::BlockdevSnapshot(asked) => self.member_of_node(asked),
            TransactionAction::BlockdevSnapshotSync(asked) => self.member_of_sync(asked),
        }
    }

    fn member_of_node(&self, asked: BlockdevSnapshot) -> Result<NamedMember, Failure> {
        let device = self.device_or_node(&asked.node)?.name().to_owned();
        let nodes = self.nodes.borrow();
        let node = nodes.get(&asked.overlay).ok_or_else(|| Failure::no_device(&asked.overlay))?;
        let member = Member { device, overlay: Overlay::Existing(node.file.filename.clone()) };
        Ok(NamedMember { member, node_name: Some(asked.overlay) })
    }

    fn member_of_sync(&self, asked: BlockdevSnapshotSync) -> Result<NamedMember, Failure> {
        qcow2_only(asked.format)?;
        not_empty("snapshot-file", &asked.snapshot_file)?;
        let device = match (&asked.device, &asked.node_name) {
            (Some(name), None) => self.device_or_node(name)?.name().to_owned(),
            (None, Some(node)) => {
                let device = self.device_under_node(node)?.name().to_owned();
                if asked.snapshot_node_name.is_none() {
                    return Err(Failure::generic("New overlay node-name missing: with 'node-name' give 'snapshot-node-name'"));
                }
                device
            }
            _ => return Err(Failure::generic("either 'device' or 'node-name' is needed, and not both")),
        };
        if let Some(node) = &asked.snapshot_node_name {
            self.check_new_node(node)?;
        }
        let overlay = match asked.mode.unwrap_or_default() {
            NewImageMode::Existing => Overlay::Existing(asked.snapshot_file),
            NewImageMode::AbsolutePaths => Overlay::CreateAt(asked.snapshot_file),
        };
        Ok(NamedMember { member: Member { device, overlay }, node_name: asked.snapshot_node_name })
    }

    /// A group snapshot under a name of our making; answered when it is frozen, as QEMU's commands are.
    async fn cut_as_qemu_does(self: &Rc<Self>, named: Vec<NamedMember>) -> Result<(), Failure> {
        if named.is_empty() {
            return Ok(());
        }
        let (members, node_names): (Vec<_>, Vec<_>) =
            named.into_iter().map(|named| ((named.member.clone()), (named.member.device, named.node_name))).unzip();
        let promise = self.promise_nodes(node_names.iter().filter_map(|(_, node)| node.as_deref()))?;
        let mut number = microseconds(self.environment.wall_clock());
        for _ in 0..NAME_ATTEMPTS {
            let name = format!("qmp-{number}");
            let asked = Asked { name: name.clone(), members: members.clone(), deadline_ms: None };
            let progress = match self.start_snapshot(asked, None).await {
                Err(StartError::Refused(Refusal::NameTaken(_))) => {
                    number += 1;
                    continue;
                }
                other => other?,
            };
            progress.switched().await?;
            for (device, node_name) in node_names {
                let (Some(device), Some(node_name)) = (self.device(&device), node_name) else { continue };
                self.nodes.borrow_mut().remove(&node_name);
                device.name_node(&name, &node_name);
            }
            drop(promise);
            return progress.frozen().await.map(drop);
        }
        Err(Failure::generic("no free name was found for the snapshot"))
    }

    fn add_node(&self, node: BlockdevAdd) -> Result<(), Failure> {
        qcow2_only(Some(node.driver))?;
        if node.read_only == Some(true) {
            return Err(Failure::generic("an overlay is written to: 'read-only' cannot be true"));
        }
        not_empty("file.filename", &node.file.filename)?;
        self.check_new_node(&node.node_name)?;
        let mut nodes = self.nodes.borrow_mut();
        if nodes.len() >= MAX_NODES {
            return Err(Failure::generic(format_args!("{MAX_NODES} nodes have been added and not used; remove some with blockdev-del")));
        }
        nodes.insert(node.node_name.clone(), node);
        Ok(())
    }
}

/// An empty path would be taken for the daemon's working directory.
fn not_empty(argument: &str, path: &Path) -> Result<(), Failure> {
    if path.as_os_str().is_empty() { Err(Failure::generic(format_args!("argument '{argument}' is empty"))) } else { Ok(()) }
}

/// Overlays have a backing file, which raw images cannot name.
fn qcow2_only(format: Option<ImageFormat>) -> Result<(), Failure> {
    match format {
        None | Some(ImageFormat::Qcow2) => Ok(()),
        Some(other) => Err(Failure::generic(format_args!("an overlay cannot be {other}: only qcow2 images name a backing file"))),
    }
}

fn answer<T: serde::Serialize>(value: T) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|error| Failure::generic(format_args!("the answer cannot be written as JSON: {error}")))
}
