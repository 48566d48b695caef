//! Counting what the header, the mapping tables and the snapshots refer to.

use std::collections::BTreeMap;

use crate::error::Structure;
use crate::storage::{Storage, StorageExt};
use crate::units::HostOffset;

use super::super::entry::{COMPRESSED, COPIED, EntryFormat, L1_RESERVED, L2_RESERVED, OFFSET_MASK, ZERO};
use super::super::geometry::{Geometry, MAX_L1_BYTES};
use super::super::header::Header;
use super::super::l1::words_from;
use super::super::snapshot::Snapshots;
use super::census::{Census, Claim};
use super::report::{Fault, Reporter};
use super::{CheckError, CheckOptions, CheckReport, MAX_CLUSTERS};

/// Bytes that an L2 table on the list takes, more or less.
const TABLE_BYTES: u64 = 48;

/// One check of one image.
#[derive(Debug)]
pub(super) struct Walk<'a, S> {
    pub(super) file: &'a S,
    pub(super) header: &'a Header,
    pub(super) geometry: Geometry,
    pub(super) file_len: u64,
    pub(super) census: Census,
    pub(super) reporter: Reporter,
    /// L2 tables inside the file, each once, by position.
    pub(super) tables: BTreeMap<u64, Users>,
    /// The refcount table as it is in the file.
    pub(super) refcount_table: Vec<u64>,
}

/// How often something is referred to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Users {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By those of internal snapshots.
    pub(super) snapshots: u64,
}

impl<'a, S: Storage> Walk<'a, S> {
    pub(super) async fn new(file: &'a S, header: &'a Header, options: &CheckOptions) -> Result<Self, CheckError> {
        let geometry = *header.geometry();
        let file_len = file.length().await.map_err(|source| CheckError::io("read", Structure::File, HostOffset::ZERO, source))?;
        let clusters = geometry.clusters(file_len);
        if clusters > MAX_CLUSTERS {
            return Err(CheckError::TooManyClusters { clusters });
        }
        let report = CheckReport {
            total_clusters: geometry.clusters(header.virtual_size()),
            dirty: header.is_dirty(),
            marked_corrupt: header.is_corrupt(),
            ..CheckReport::default()
        };
        Ok(Self {
            file,
            header,
            geometry,
            file_len,
            census: Census::new(&geometry, options.memory_limit),
            reporter: Reporter::new(report, options.max_findings),
            tables: BTreeMap::new(),
            refcount_table: Vec::new(),
        })
    }

    pub(super) fn take_report(&mut self) -> CheckReport {
        std::mem::take(&mut self.reporter.report)
    }

    /// Counts every reference in the file.
    pub(super) async fn count_all(&mut self) -> Result<(), CheckError> {
        let header = self.header;
        self.count(HostOffset::ZERO, self.geometry.cluster_bytes(), 1, Structure::Header)?;
        self.count_l1(header.l1_offset, header.l1_entries, Users { active: 1, snapshots: 0 }).await?;
        self.count_snapshots().await?;
        self.count_tables().await?;
        let table_bytes = u64::from(header.refcount_table_clusters) * self.geometry.cluster_bytes();
        self.count(header.refcount_table_offset, table_bytes, 1, Structure::RefcountTable)?;
        self.count_bitmaps().await?;
        self.count_refcount_blocks().await
    }

    /// Counts `times` references to all clusters of a range. `false`: it is not in the file, and nothing has been counted.
    pub(super) fn count(&mut self, at: HostOffset, len: u64, times: u64, owner: Structure) -> Result<bool, CheckError> {
        // The last cluster of the file may be there in part.
        if at.get().saturating_add(len).saturating_sub(self.file_len) >= self.geometry.cluster_bytes() {
            self.reporter.found(Fault::Outside { what: owner, at, len }, times);
            return Ok(false);
        }
        for cluster in self.geometry.cluster_numbers(at, len) {
            let excess = self.census.add(cluster, times, owner)?;
            if excess > 0 {
                let at = HostOffset::new(cluster << self.geometry.cluster_bits());
                self.reporter.found(Fault::Overflow { at, limit: self.geometry.max_refcount() }, excess);
            }
        }
        Ok(true)
    }

    /// Notes what `times` entries of the active disk say about the refcount of the cluster at `at`.
    fn claim(&mut self, at: HostOffset, times: u64, word: u64) -> Result<(), CheckError> {
        let copied = word & COPIED != 0;
        let cluster = self.geometry.host_cluster(at).0;
        if times == 0 {
            return Ok(());
        }
        if cluster >= self.geometry.clusters(self.file_len) {
            if copied {
                self.reporter.found(Fault::WronglyCopied { at, refcount: 0 }, times);
            }
            return Ok(());
        }
        self.census.claim(cluster, times, if copied { Claim::Copied } else { Claim::Shared })
    }

    /// Reads a table of words.
    pub(super) async fn read_words(&self, at: HostOffset, len: usize, what: Structure) -> Result<Vec<u64>, CheckError> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.file.read_bytes(at, len).await.map_err(|source| CheckError::io("read", what, at, source))?;
        Ok(words_from(&bytes))
    }

    async fn count_l1(&mut self, at: HostOffset, entries: u32, users: Users) -> Result<(), CheckError> {
        let what = Structure::L1Table;
        let times = users.active + users.snapshots;
        if entries == 0 {
            return Ok(());
        }
        self.count(at, u64::from(entries) * 8, times, what)?;
        let words = self.read_words(at, entries as usize * 8, what).await?;
        let mut next = 0;
        // Equal neighbours together: a hostile table may name one place millions of times.
        for equal in words.chunk_by(|one, other| one == other) {
            let (index, word) = (next, equal[0]);
            next += equal.len();
            if word == 0 {
                continue;
            }
            let users = Users { active: users.active * equal.len() as u64, snapshots: users.snapshots * equal.len() as u64 };
            let times = users.active + users.snapshots;
            let fault = |detail| Fault::Entry { what, at: at + index as u64 * 8, word, detail };
            if word & L1_RESERVED != 0 {
                self.reporter.found(fault("reserved bits are set"), times);
            }
            let table = HostOffset::new(word & OFFSET_MASK);
            if table == HostOffset::ZERO {
                if word & L1_RESERVED == 0 {
                    self.reporter.found(fault("it points to the header"), times);
                }
                continue;
            }
            let is_inside = self.count(table, self.geometry.cluster_bytes(), times, Structure::L2Table)?;
            self.claim(table, users.active, word)?;
            if !table.is_aligned(self.geometry.cluster_bytes()) {
                self.reporter.found(fault("it does not point to a whole cluster"), times);
            } else if is_inside {
                if !self.tables.contains_key(&table.get()) {
                    self.census.charge(TABLE_BYTES)?;
                }
                let known = self.tables.entry(table.get()).or_default();
                known.active += users.active;
                known.snapshots += users.snapshots;
            }
        }
        Ok(())
    }

    async fn count_snapshots(&mut self) -> Result<(), CheckError> {
        let header = self.header;
        if header.snapshot_count == 0 {
            return Ok(());
        }
        if header.has_data_file() {
            self.reporter.found(Fault::SnapshotsWithDataFile { count: header.snapshot_count }, 1);
        }
        let snapshots = Snapshots::read_unchecked(self.file, header).await?;
        // Each table once, however many entries name it.
        let mut tables: BTreeMap<(HostOffset, u32), u64> = BTreeMap::new();
        for (index, snapshot) in (0_u32..).zip(&snapshots.list) {
            let at = snapshot.l1_offset;
            let detail = if !at.is_aligned(self.geometry.cluster_bytes()) {
                "the table is not on a cluster boundary"
            } else if u64::from(snapshot.l1_entries) * 8 > MAX_L1_BYTES {
                "the table is larger than the limit of 32 MiB"
            } else {
                *tables.entry((at, snapshot.l1_entries)).or_default() += 1;
                continue;
            };
            self.reporter.found(Fault::SnapshotTable { index, at, detail }, 1);
        }
        let bytes = tables.keys().map(|(_, entries)| u64::from(*entries) * 8).sum();
        if bytes > self.file_len {
            return Err(CheckError::SnapshotTablesOverlap { bytes, file_bytes: self.file_len });
        }
        for ((at, entries), times) in tables {
            self.count_l1(at, entries, Users { active: 0, snapshots: times }).await?;
        }
        self.count(header.snapshots_offset, snapshots.table_bytes, 1, Structure::SnapshotTable)?;
        Ok(())
    }

    async fn count_tables(&mut self) -> Result<(), CheckError> {
        let tables = std::mem::take(&mut self.tables);
        for (&at, &users) in &tables {
            self.count_table(HostOffset::new(at), users).await?;
        }
        self.tables = tables;
        Ok(())
    }

    async fn count_table(&mut self, at: HostOffset, users: Users) -> Result<(), CheckError> {
        let words = self.read_words(at, self.geometry.cluster_len(), Structure::L2Table).await?;
        let entry_words = self.geometry.entry_words();
        let mut expected = None;
        for (index, entry) in words.chunks_exact(entry_words).enumerate() {
            let (word, bitmap) = (entry[0], entry.get(1).copied().unwrap_or(0));
            if word == 0 && bitmap == 0 {
                continue;
            }
            let entry_at = at + (index * entry_words * 8) as u64;
            let place = self.count_entry(entry_at, word, bitmap, users)?;
            let report = &mut self.reporter.report;
            match place {
                Place::None => {}
                Place::Compressed => {
                    report.allocated_clusters += users.active;
                    report.compressed_clusters += users.active;
                    report.fragmented_clusters += users.active;
                }
                Place::At(host) => {
                    report.allocated_clusters += users.active;
                    if expected.is_some_and(|expected| expected != host) {
                        report.fragmented_clusters += users.active;
                    }
                    expected = Some(host + self.geometry.cluster_bytes());
                }
            }
        }
        Ok(())
    }

    /// Counts what one L2 entry refers to.
    fn count_entry(&mut self, at: HostOffset, word: u64, bitmap: u64, users: Users) -> Result<Place, CheckError> {
        let times = users.active + users.snapshots;
        let fault = |detail| Fault::Entry { what: Structure::L2Table, at, word, detail };
        if word & COMPRESSED != 0 {
            if word & COPIED != 0 {
                self.reporter.found(fault("a compressed cluster claims to be writable in place"), times);
            }
            if self.header.has_data_file() {
                self.reporter.found(fault("a compressed cluster beside an external data file"), times);
                return Ok(Place::None);
            }
            if bitmap != 0 {
                self.reporter.found(fault("a compressed cluster has a sub-cluster bitmap"), times);
                return Ok(Place::None);
            }
            let (at, len) = self.format().compressed_place(word);
            self.count(at, len, times, Structure::Data)?;
            return Ok(Place::Compressed);
        }
        if word & L2_RESERVED != 0 {
            self.reporter.found(fault("reserved bits are set"), times);
        }
        let extended = self.geometry.extended_l2();
        if word & ZERO != 0 && (extended || self.header.version() < 3) {
            let detail = if extended { "the zero flag of a plain entry in an extended one" } else { "a zero cluster in a version 2 image" };
            self.reporter.found(Fault::Flags { what: Structure::L2Table, at, word, detail }, times);
        }
        let host = HostOffset::new(word & OFFSET_MASK);
        let (allocated, zero) = (bitmap & u64::from(u32::MAX), bitmap >> 32);
        if host == HostOffset::ZERO && !(self.header.has_data_file() && word & COPIED != 0) {
            if word & COPIED != 0 {
                let detail = "it claims the header as the guest's cluster";
                self.reporter.found(Fault::Flags { what: Structure::L2Table, at, word, detail }, times);
            }
            if allocated != 0 {
                self.reporter.found(fault("a sub-cluster is allocated without a cluster"), times);
            }
            return Ok(Place::None);
        }
        if allocated & zero != 0 {
            self.reporter.found(fault("a sub-cluster is both allocated and zero"), times);
        }
        if !host.is_aligned(self.geometry.cluster_bytes()) {
            self.reporter.found(fault("it does not point to a whole cluster"), times);
        }
        if self.header.has_data_file() {
            if word & COPIED == 0 && users.active > 0 {
                self.reporter.found(Fault::NotCopied { at: host }, users.active);
            }
        } else {
            self.count(host, self.geometry.cluster_bytes(), times, Structure::Data)?;
            self.claim(host, users.active, word)?;
        }
        Ok(Place::At(host))
    }

    fn format(&self) -> EntryFormat {
        EntryFormat { geometry: self.geometry, has_zero: self.header.version() >= 3, external_data: self.header.has_data_file() }
    }
}

/// Where the cluster of an entry is.
enum Place {
    None,
    Compressed,
    At(HostOffset),
}
