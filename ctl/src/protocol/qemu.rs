//! Commands about block nodes, in QEMU's names and shapes (`qapi/block-core.json`, `qapi/transaction.json`).
//!
//! Each layer of a device is a node. The top that a device begins with has the device's name, and keeps it when it is covered; an overlay has the
//! name that the command gives it (`snapshot-node-name`), or one made up.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Call, Empty, Failure, ImageFormat, typed};

/// QEMU's `query-named-block-nodes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryNamedBlockNodes {
    /// Leave out what is nested in `image`. It never is nested here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flat: Option<bool>,
}

impl Call for QueryNamedBlockNodes {
    const NAME: &'static str = "query-named-block-nodes";
    type Answer = Vec<BlockNode>;
}

/// QEMU's `BlockDeviceInfo`. The keys with an underscore are QEMU's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockNode {
    /// The image's path.
    pub file: String,
    /// The node.
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// Whether it is open for reading only.
    pub ro: bool,
    /// True: the daemon has it open and may use it.
    #[serde(default)]
    pub active: bool,
    /// The format's name.
    pub drv: String,
    /// The layer below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// Number of layers below.
    pub backing_file_depth: u32,
    /// False.
    pub encrypted: bool,
    /// Whether writes of zeros become unmapped.
    pub detect_zeroes: DetectZeroes,
    /// 0: no limit.
    pub bps: u64,
    /// 0: no limit.
    pub bps_rd: u64,
    /// 0: no limit.
    pub bps_wr: u64,
    /// 0: no limit.
    pub iops: u64,
    /// 0: no limit.
    pub iops_rd: u64,
    /// 0: no limit.
    pub iops_wr: u64,
    /// More about the image.
    pub image: BlockNodeImage,
    /// How it is cached.
    pub cache: BlockNodeCache,
    /// 0: no threshold.
    pub write_threshold: u64,
}

/// The needed part of QEMU's `ImageInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNodeImage {
    /// The image's path.
    pub filename: String,
    /// The format's name.
    pub format: String,
    /// Size of the disk in bytes; 0 of a node that [`BlockdevAdd`] has named and nobody uses, as its image is not open.
    pub virtual_size: u64,
    /// Whether its reference counts may be out of date.
    #[serde(default)]
    pub dirty_flag: bool,
    /// Space that the file takes on its own medium, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Size of a cluster in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The layer below as its header names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The layer below, resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The format of the layer below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
}

/// QEMU's `BlockdevCacheInfo`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNodeCache {
    /// Whether completed writes need a flush to be durable.
    pub writeback: bool,
    /// Whether the host's page cache is avoided.
    pub direct: bool,
    /// Whether flushes are ignored: never.
    pub no_flush: bool,
}

/// QEMU's `BlockdevDetectZeroesOptions`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroes {
    /// No.
    #[default]
    Off,
    /// As write-zeroes.
    On,
    /// As discard.
    Unmap,
}

/// Where the image of `blockdev-snapshot-sync` comes from; QEMU's `NewImageMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made.
    #[default]
    AbsolutePaths,
}

/// QEMU's `blockdev-snapshot-sync`: put a new overlay on a device. Answered when the layer below is frozen: that is what QEMU promises.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevSnapshotSync {
    /// The device, whatever is on top of it. This or `node-name` has to be there, and not both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The node on top of the device. The overlay's then has to be given as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The overlay.
    pub snapshot_file: PathBuf,
    /// Its node's name. One is made up if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_node_name: Option<String>,
    /// Its format: qcow2 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// Whether it is there already: `absolute-paths`, which makes it, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<NewImageMode>,
}

impl Call for BlockdevSnapshotSync {
    const NAME: &'static str = "blockdev-snapshot-sync";
    type Answer = Empty;
}

/// QEMU's `blockdev-snapshot`: put an overlay that `blockdev-add` has named on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockdevSnapshot {
    /// The device, or the node on top of it.
    pub node: String,
    /// The overlay's node.
    pub overlay: String,
}

impl Call for BlockdevSnapshot {
    const NAME: &'static str = "blockdev-snapshot";
    type Answer = Empty;
}

/// The part of QEMU's `blockdev-add` that names an overlay for [`BlockdevSnapshot`]. The image is opened when the snapshot is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevAdd {
    /// The overlay's format.
    pub driver: ImageFormat,
    /// The node's name.
    pub node_name: String,
    /// Its file.
    pub file: BlockdevFile,
    /// Null or absent: the layer below is the device's top.
    #[serde(default, skip_serializing)]
    pub backing: (),
    /// False or absent: an overlay is written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
}

impl Call for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Answer = Empty;
}

/// A node's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    deny_unknown_fields,
    expecting = "an object with 'driver' and 'filename' (a file has no node of its own here that could be named)"
)]
pub struct BlockdevFile {
    /// What kind of file.
    pub driver: FileDriver,
    /// Its path.
    pub filename: PathBuf,
}

/// What kind of file an image is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileDriver {
    /// A regular file.
    File,
    /// A block device.
    HostDevice,
}

/// QEMU's `blockdev-del`: forget a node that [`BlockdevAdd`] has named and no device uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevDel {
    /// The node.
    pub node_name: String,
}

impl Call for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    type Answer = Empty;
}

/// QEMU's `transaction`: all actions as one group snapshot, or none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transaction {
    /// What to do.
    pub actions: Vec<TransactionAction>,
    /// How.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<TransactionProperties>,
}

impl Call for Transaction {
    const NAME: &'static str = "transaction";
    type Answer = Empty;
}

/// One action of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case", try_from = "UncheckedAction")]
pub enum TransactionAction {
    /// See [`BlockdevSnapshot`].
    BlockdevSnapshot(BlockdevSnapshot),
    /// See [`BlockdevSnapshotSync`].
    BlockdevSnapshotSync(BlockdevSnapshotSync),
}

/// An action of any type. Read in two steps, so that an error can name the key inside `data`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UncheckedAction {
    #[serde(rename = "type")]
    kind: String,
    data: Map<String, Value>,
}

impl TryFrom<UncheckedAction> for TransactionAction {
    type Error = Failure;

    fn try_from(action: UncheckedAction) -> Result<Self, Failure> {
        match action.kind.as_str() {
            BlockdevSnapshot::NAME => typed(action.data).map(Self::BlockdevSnapshot),
            BlockdevSnapshotSync::NAME => typed(action.data).map(Self::BlockdevSnapshotSync),
            other => Err(Failure::generic(format_args!(
                "a transaction has no action '{other}' here; there are {} and {}",
                BlockdevSnapshot::NAME,
                BlockdevSnapshotSync::NAME
            ))),
        }
    }
}

/// How a transaction's jobs complete. There are none that outlive it, so both ways are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TransactionProperties {
    /// QEMU's `ActionCompletionMode`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_mode: Option<CompletionMode>,
}

/// QEMU's `ActionCompletionMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompletionMode {
    /// Each job for itself.
    #[default]
    Individual,
    /// All or none.
    Grouped,
}
