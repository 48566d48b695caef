//! Who refers to each cluster of the file, and how often.

use crate::error::Structure;

use super::super::geometry::Geometry;
use super::CheckError;

/// Clusters that are counted together. Parts of the file that nothing refers to take no memory.
const PAGE_CLUSTERS: usize = 4096;

/// What refers to clusters, each a bit of a cluster's owners.
pub(super) const OWNERS: [Structure; 8] = [
    Structure::Header,
    Structure::L1Table,
    Structure::L2Table,
    Structure::RefcountTable,
    Structure::RefcountBlock,
    Structure::SnapshotTable,
    Structure::Bitmaps,
    Structure::Data,
];

/// References to all clusters.
#[derive(Debug)]
pub(super) struct Census {
    pages: Vec<Option<Box<Page>>>,
    bytes: u64,
    limit: u64,
    /// The largest refcount that the image can state.
    max: u64,
}

#[derive(Debug)]
struct Page {
    owners: Box<[u8]>,
    references: Column,
    /// Of the references, those of the active disk that say the refcount is one.
    copied: Option<Column>,
    /// Of the references, those of the active disk that say it is not.
    shared: Option<Column>,
}

/// What is known of one cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) references: u64,
    pub(super) copied: u64,
    pub(super) shared: u64,
    /// Bits by position in [`OWNERS`].
    pub(super) owners: u8,
}

/// Whether a reference of the active disk claims that it is the only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    Copied,
    Shared,
}

/// One number for each cluster of a page, as wide as the largest needs.
#[derive(Debug)]
enum Column {
    U8(Box<[u8]>),
    U16(Box<[u16]>),
    U32(Box<[u32]>),
    U64(Box<[u64]>),
}

impl Column {
    fn new() -> Self {
        Self::U8(vec![0; PAGE_CLUSTERS].into())
    }

    fn get(&self, index: usize) -> u64 {
        match self {
            Self::U8(numbers) => numbers[index].into(),
            Self::U16(numbers) => numbers[index].into(),
            Self::U32(numbers) => numbers[index].into(),
            Self::U64(numbers) => numbers[index],
        }
    }

    /// Sets a number, and returns by how many bytes the column has grown for it.
    fn set(&mut self, index: usize, value: u64) -> u64 {
        let before = self.width();
        loop {
            let fits = match self {
                Self::U8(numbers) => u8::try_from(value).map(|value| numbers[index] = value).is_ok(),
                Self::U16(numbers) => u16::try_from(value).map(|value| numbers[index] = value).is_ok(),
                Self::U32(numbers) => u32::try_from(value).map(|value| numbers[index] = value).is_ok(),
                Self::U64(numbers) => {
                    numbers[index] = value;
                    true
                }
            };
            if fits {
                return (self.width() - before) * PAGE_CLUSTERS as u64;
            }
            *self = match self {
                Self::U8(numbers) => Self::U16(numbers.iter().map(|&number| number.into()).collect()),
                Self::U16(numbers) => Self::U32(numbers.iter().map(|&number| number.into()).collect()),
                Self::U32(numbers) => Self::U64(numbers.iter().map(|&number| number.into()).collect()),
                Self::U64(_) => unreachable!("every number fits"),
            };
        }
    }

    fn width(&self) -> u64 {
        match self {
            Self::U8(_) => 1,
            Self::U16(_) => 2,
            Self::U32(_) => 4,
            Self::U64(_) => 8,
        }
    }
}

fn place(cluster: u64) -> (usize, usize) {
    let page = usize::try_from(cluster / PAGE_CLUSTERS as u64).expect("the number of clusters is limited");
    (page, (cluster % PAGE_CLUSTERS as u64) as usize)
}

impl Census {
    /// Nobody refers to anything yet.
    pub(super) fn new(geometry: &Geometry, limit: u64) -> Self {
        Self { pages: Vec::new(), bytes: 0, limit, max: geometry.max_refcount() }
    }

    /// Takes memory for something else than the counts off the limit.
    pub(super) fn charge(&mut self, bytes: u64) -> Result<(), CheckError> {
        self.bytes += bytes;
        if self.bytes > self.limit { Err(CheckError::Memory { limit: self.limit }) } else { Ok(()) }
    }

    /// Counts `times` references to a cluster. Returns how many of them no refcount of this image can hold.
    pub(super) fn add(&mut self, cluster: u64, times: u64, owner: Structure) -> Result<u64, CheckError> {
        let max = self.max;
        let (page, index) = self.page(cluster)?;
        let bit = OWNERS.iter().position(|&known| known == owner).expect("everything that can refer to a cluster is listed");
        page.owners[index] |= 1 << bit;
        let before = page.references.get(index);
        let after = before.saturating_add(times).min(max);
        let grown = page.references.set(index, after);
        self.charge(grown)?;
        Ok(times - (after - before))
    }

    /// Notes what `times` references of the active disk, counted already, claim.
    pub(super) fn claim(&mut self, cluster: u64, times: u64, claim: Claim) -> Result<(), CheckError> {
        let (page, index) = self.page(cluster)?;
        let column = match claim {
            Claim::Copied => &mut page.copied,
            Claim::Shared => &mut page.shared,
        };
        let mut grown = if column.is_none() { PAGE_CLUSTERS as u64 } else { 0 };
        let column = column.get_or_insert_with(Column::new);
        grown += column.set(index, column.get(index).saturating_add(times));
        self.charge(grown)
    }

    /// What is known of a cluster.
    pub(super) fn get(&self, cluster: u64) -> Count {
        let (page, index) = place(cluster);
        let Some(Some(page)) = self.pages.get(page) else { return Count::default() };
        let claimed = |column: &Option<Column>| column.as_ref().map_or(0, |column| column.get(index));
        Count {
            references: page.references.get(index),
            copied: claimed(&page.copied),
            shared: claimed(&page.shared),
            owners: page.owners[index],
        }
    }

    /// Whether nobody refers to any cluster from `first` up to `end`.
    pub(super) fn is_empty(&self, first: u64, end: u64) -> bool {
        let (first, last) = (place(first).0, place(end.saturating_sub(1)).0);
        self.pages.iter().take(last + 1).skip(first).all(Option::is_none)
    }

    /// First cluster after all that are referred to.
    pub(super) fn end(&self) -> u64 {
        let Some(last) = self.pages.iter().rposition(Option::is_some) else { return 0 };
        let first = last as u64 * PAGE_CLUSTERS as u64;
        (first..first + PAGE_CLUSTERS as u64).rev().find(|&cluster| self.get(cluster).references > 0).map_or(first, |cluster| cluster + 1)
    }

    fn page(&mut self, cluster: u64) -> Result<(&mut Page, usize), CheckError> {
        let (number, index) = place(cluster);
        if number >= self.pages.len() {
            self.pages.resize_with(number + 1, || None);
        }
        if self.pages[number].is_none() {
            self.charge(2 * PAGE_CLUSTERS as u64)?;
        }
        let page = self.pages[number].get_or_insert_with(|| {
            Box::new(Page { owners: vec![0; PAGE_CLUSTERS].into(), references: Column::new(), copied: None, shared: None })
        });
        Ok((page, index))
    }
}

impl Count {
    /// What refers to the cluster.
    pub(super) fn owners(&self) -> impl Iterator<Item = Structure> + '_ {
        OWNERS.into_iter().enumerate().filter(|(bit, _)| self.owners & (1 << bit) != 0).map(|(_, owner)| owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_grow_as_wide_as_they_must() {
        let mut census = Census::new(&Geometry::new(16, false, 6), 1 << 20);
        for times in [1, 254, 1, 65_000, 1 << 20, 1 << 40] {
            assert_eq!(census.add(7, times, Structure::Data).expect("memory"), 0);
            census.claim(7, times, Claim::Shared).expect("memory");
        }
        let sum = 1 + 254 + 1 + 65_000 + (1 << 20) + (1 << 40);
        assert_eq!(census.get(7), Count { references: sum, copied: 0, shared: sum, owners: 1 << 7 });
        assert_eq!((census.get(6), census.get(1 << 30), census.end()), (Count::default(), Count::default(), 8));
        assert!(census.is_empty(4096, 8192) && !census.is_empty(0, 4097));
    }

    #[test]
    fn what_no_refcount_holds_is_counted_apart() {
        let mut census = Census::new(&Geometry::new(16, false, 1), 1 << 20);
        assert_eq!(census.add(0, 2, Structure::Data).expect("memory"), 0);
        assert_eq!(census.add(0, 5, Structure::L2Table).expect("memory"), 4);
        assert_eq!(census.get(0).references, 3);
        assert!(census.get(0).owners().eq([Structure::L2Table, Structure::Data]));
    }

    #[test]
    fn memory_is_limited() {
        let mut census = Census::new(&Geometry::new(16, false, 4), 30_000);
        census.add(0, 1, Structure::Data).expect("the first page");
        let error = (1..100).find_map(|page| census.add(page * 4096, 1, Structure::Data).err()).expect("too many pages");
        assert_eq!(error.to_string(), "counting the references takes more than 30000 bytes of memory");
    }
}
