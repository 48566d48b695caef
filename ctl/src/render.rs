//! How things look to people.

use std::fmt::Write as _;
use std::path::Path;

use snapfence::protocol::{DeviceInfo, JobInfo, LayerInfo, SnapshotDevice, SnapshotInfo, StackInfo};

/// Which edge a column keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edge {
    Left,
    Right,
}

/// Rows with their columns lined up, two spaces between them.
#[derive(Debug)]
pub(crate) struct Table {
    edges: Vec<Edge>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table whose first row is the columns' titles.
    pub(crate) fn new(columns: &[(&str, Edge)]) -> Self {
        let mut table = Self::untitled(columns.iter().map(|(_, edge)| *edge));
        table.rows.push(columns.iter().map(|(title, _)| (*title).to_owned()).collect());
        table
    }

    /// A table without titles.
    pub(crate) fn untitled(edges: impl IntoIterator<Item = Edge>) -> Self {
        Self { edges: edges.into_iter().collect(), rows: Vec::new() }
    }

    /// Adds a row with as many cells as there are columns.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<_> = cells.into_iter().collect();
        debug_assert_eq!(cells.len(), self.edges.len());
        self.rows.push(cells);
    }

    /// The lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..self.edges.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let mut line = String::new();
            for ((cell, width), edge) in row.iter().zip(&widths).zip(&self.edges) {
                match edge {
                    Edge::Left => line += &format!("{cell:<width$}  "),
                    Edge::Right => line += &format!("{cell:>width$}  "),
                }
            }
            line.truncate(line.trim_end().len());
            line
        };
        self.rows.iter().map(line).collect()
    }

    /// The lines as one text.
    pub(crate) fn text(&self) -> String {
        self.lines().into_iter().map(|line| line + "\n").collect()
    }
}

/// Bytes in binary units, exact where that is short: `512 B`, `4 KiB`, `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut unit = 0;
    while unit + 1 < UNITS.len() && count >> (10 * (unit + 2)) != 0 {
        unit += 1;
    }
    let scale = 1_u64 << (10 * (unit + 1));
    let tenths = count / scale * 10 + count % scale * 10 / scale;
    let name = UNITS[unit];
    if tenths.is_multiple_of(10) { format!("{} {name}", tenths / 10) } else { format!("{}.{} {name}", tenths / 10, tenths % 10) }
}

/// A time as people read it: `350 µs`, `12.35 ms`, `1.20 s`, or a dash where it is not known.
pub(crate) fn microseconds(time: Option<u64>) -> String {
    match time {
        None => "-".to_owned(),
        Some(time) if time < 10_000 => format!("{time} µs"),
        Some(time) if time < 1_000_000 => format!("{}.{:02} ms", time / 1000, time % 1000 / 10),
        Some(time) => format!("{}.{:02} s", time / 1_000_000, time % 1_000_000 / 10_000),
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

/// The disks.
pub(crate) fn devices(devices: &[DeviceInfo]) -> String {
    if devices.is_empty() {
        return "no devices; `snapfence device add` adds one\n".to_owned();
    }
    let columns = [
        ("NAME", Edge::Left),
        ("STATE", Edge::Left),
        ("I/O", Edge::Left),
        ("FRONT-END", Edge::Left),
        ("SIZE", Edge::Right),
        ("LAYERS", Edge::Right),
        ("QUEUES", Edge::Right),
        ("ACCESS", Edge::Left),
        ("CACHE", Edge::Left),
        ("FORMAT", Edge::Left),
        ("IMAGE", Edge::Left),
        ("SOCKET", Edge::Left),
    ];
    let mut table = Table::new(&columns);
    for device in devices {
        table.row([
            device.name.clone(),
            device.state.as_str().to_owned(),
            device.io_status.as_str().to_owned(),
            if device.connected { "connected" } else { "-" }.to_owned(),
            bytes(device.virtual_size),
            device.depth.to_string(),
            format!("{}x{}", device.queues, device.queue_size),
            if device.readonly { "read-only" } else { "read-write" }.to_owned(),
            device.cache.as_str().to_owned(),
            device.format.to_string(),
            path(&device.image),
            path(&device.socket),
        ]);
    }
    table.text()
}

/// The snapshots.
pub(crate) fn snapshots(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return "no snapshots; `snapfence snapshot create` takes one\n".to_owned();
    }
    let columns = [
        ("NAME", Edge::Left),
        ("STATE", Edge::Left),
        ("CREATED", Edge::Left),
        ("SWITCH", Edge::Right),
        ("HOLD", Edge::Right),
        ("FREEZE", Edge::Right),
        ("DEVICES", Edge::Left),
    ];
    let mut table = Table::new(&columns);
    for snapshot in snapshots {
        let devices: Vec<_> = snapshot.devices.iter().map(|device| device.device.as_str()).collect();
        table.row([
            snapshot.name.clone(),
            snapshot.state.as_str().to_owned(),
            snapshot.created.to_string(),
            microseconds(snapshot.switch_us),
            microseconds(snapshot.hold_us),
            microseconds(snapshot.freeze_us),
            devices.join(" "),
        ]);
    }
    table.text()
}

/// The times of a snapshot that are known: how long completions were held is, when no more are.
pub(crate) fn times(snapshot: &SnapshotInfo) -> String {
    let times = [
        ("first to last queue switched", snapshot.switch_us),
        ("longest held completion", snapshot.hold_us),
        ("frozen after", snapshot.freeze_us),
    ];
    let known: Vec<_> = times.iter().filter_map(|(what, time)| Some(format!("{what} {}", microseconds(Some((*time)?))))).collect();
    known.join(", ")
}

/// One snapshot with its devices.
pub(crate) fn snapshot(snapshot: &SnapshotInfo) -> String {
    let mut text = format!("{}: {}, created {}\n", snapshot.name, snapshot.state.as_str(), snapshot.created);
    if let Some(error) = &snapshot.error {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "error: {error}");
    }
    let times = times(snapshot);
    if !times.is_empty() {
        let _ = writeln!(text, "{times}");
    }
    text.push('\n');
    let columns = [
        ("DEVICE", Edge::Left),
        ("SWITCH", Edge::Right),
        ("HOLD", Edge::Right),
        ("FREEZE", Edge::Right),
        ("SNAPSHOT IS IN", Edge::Left),
        ("WRITES GO TO", Edge::Left),
    ];
    let mut table = Table::new(&columns);
    for SnapshotDevice { device, overlay, frozen_layer, switch_us, hold_us, freeze_us } in &snapshot.devices {
        table.row([
            device.clone(),
            microseconds(*switch_us),
            microseconds(*hold_us),
            microseconds(*freeze_us),
            path(frozen_layer),
            path(overlay),
        ]);
    }
    text + &table.text()
}

/// The layers of a disk as a tree that hangs from the disk, the top first. Layers in the top's folder are named without it.
pub(crate) fn stack(stack: &StackInfo) -> String {
    let folder = stack.layers.first().and_then(|layer| layer.file.parent());
    let mut table = Table::untitled([Edge::Left, Edge::Left, Edge::Right, Edge::Right, Edge::Left]);
    for (index, layer) in stack.layers.iter().enumerate() {
        let LayerInfo { file, format, virtual_size, allocated_bytes, snapshot, state } = layer;
        let name = match file.file_name() {
            Some(name) if file.parent() == folder => Path::new(name),
            _ => file.as_path(),
        };
        let branch = if index + 1 == stack.layers.len() { "└─" } else { "├─" };
        let state = match snapshot {
            Some(snapshot) => format!("{}: {snapshot}", state.as_str()),
            None => state.as_str().to_owned(),
        };
        table.row([
            format!("{branch} {}", name.display()),
            format.to_string(),
            bytes(*virtual_size),
            allocated_bytes.map_or_else(|| "size unknown".to_owned(), |allocated| format!("{} allocated", bytes(allocated))),
            state,
        ]);
    }
    let place = folder.map(|folder| format!(" in {}", folder.display())).unwrap_or_default();
    format!("{}{place}\n{}", stack.device, table.text())
}

/// The jobs.
pub(crate) fn jobs(jobs: &[JobInfo]) -> String {
    if jobs.is_empty() {
        return "no jobs\n".to_owned();
    }
    let columns = [("ID", Edge::Left), ("TYPE", Edge::Left), ("STATUS", Edge::Left), ("PROGRESS", Edge::Right), ("ERROR", Edge::Left)];
    let mut table = Table::new(&columns);
    for job in jobs {
        let progress = (u128::from(job.current_progress) * 100).checked_div(job.total_progress.into());
        table.row([
            job.id.clone(),
            job.kind.clone(),
            job.status.as_str().to_owned(),
            progress.map_or_else(|| "-".to_owned(), |percent| format!("{percent} %")),
            job.error.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use snapfence::protocol::{ImageFormat, JobStatus, LayerState};

    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        let sizes = [0, 1023, 1024, 1536, 4096, (1 << 20) - 1, 1 << 20, 5 << 30, (3 << 40) + (1 << 39), u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "4 KiB", "1023.9 KiB", "1 MiB", "5 GiB", "3.5 TiB", "15.9 EiB"]);
        let times = [None, Some(0), Some(57), Some(999_999), Some(61_234_567)].map(microseconds);
        assert_eq!(times, ["-", "0 µs", "57 µs", "999.99 ms", "61.23 s"]);
    }

    #[test]
    fn a_stack_is_a_tree_with_its_columns_lined_up() {
        let layer = |file: &str, format, allocated_bytes, snapshot: Option<&str>, state| LayerInfo {
            file: file.into(),
            format,
            virtual_size: 1 << 30,
            allocated_bytes: Some(allocated_bytes),
            snapshot: snapshot.map(str::to_owned),
            state,
        };
        let shown = stack(&StackInfo {
            device: "vda".to_owned(),
            layers: vec![
                layer("/disks/vda.s2.qcow2", ImageFormat::Qcow2, 200 << 10, None, LayerState::Active),
                layer("/disks/\u{e4}.qcow2", ImageFormat::Qcow2, 12 << 20, Some("s2"), LayerState::Freezing),
                layer("/base/b.raw", ImageFormat::Raw, 1 << 30, Some("s1"), LayerState::Frozen),
            ],
        });
        let expected = "\
vda in /disks
├─ vda.s2.qcow2  qcow2  1 GiB  200 KiB allocated  active
├─ \u{e4}.qcow2       qcow2  1 GiB   12 MiB allocated  freezing: s2
└─ /base/b.raw   raw    1 GiB    1 GiB allocated  frozen: s1
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn jobs_show_how_far_they_are() {
        let job = |id: &str, status, current_progress, total_progress, error: Option<&str>| JobInfo {
            id: id.to_owned(),
            kind: JobInfo::SNAPSHOT.to_owned(),
            status,
            current_progress,
            total_progress,
            error: error.map(str::to_owned),
        };
        let shown = jobs(&[
            job("snapshot-1", JobStatus::Running, u64::MAX / 2, u64::MAX, None),
            job("j", JobStatus::Created, 0, 0, None),
            job("k", JobStatus::Concluded, 4, 4, Some("no space")),
        ]);
        let expected = "\
ID          TYPE      STATUS     PROGRESS  ERROR
snapshot-1  snapshot  running        49 %  -
j           snapshot  created           -  -
k           snapshot  concluded     100 %  no space
";
        assert_eq!(shown, expected);
    }
}
