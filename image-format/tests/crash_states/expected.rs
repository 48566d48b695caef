//! What must be found on the disk: of every sector the values that it may have.

use crate::pattern::Value;

/// What one operation makes of a sector.
#[derive(Clone, Debug)]
struct Entry {
    /// More than one after a discard, which may do nothing.
    values: Vec<Value>,
    ended: Option<u64>,
}

/// Where a snapshot has cut the disk.
#[derive(Clone, Debug)]
struct Cut {
    /// Number of the layer that it has frozen, from the base.
    layer: usize,
    /// What each sector had.
    values: Vec<Vec<Value>>,
    time: u64,
    frozen: bool,
}

/// A change under way.
#[must_use]
#[derive(Clone, Debug)]
pub(crate) struct Change(std::ops::Range<u64>);

/// See the module. Changes that overlap are not under way at the same time.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    sectors: Vec<Vec<Entry>>,
    cuts: Vec<Cut>,
    time: u64,
}

impl Expected {
    /// A disk that has these values, durably.
    pub(crate) fn new(values: impl Iterator<Item = Value>) -> Self {
        let sectors = values.map(|value| vec![Entry { values: vec![value], ended: Some(0) }]).collect();
        Self { sectors, cuts: Vec::new(), time: 0 }
    }

    /// How much has happened so far.
    pub(crate) fn time(&self) -> u64 {
        self.time
    }

    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// A change begins; `may_stay`: it is a discard.
    pub(crate) fn begin(&mut self, sectors: std::ops::Range<u64>, value: Value, may_stay: bool) -> Change {
        self.tick();
        for sector in sectors.clone() {
            let entries = &mut self.sectors[sector as usize];
            let mut values = if may_stay { possible(entries) } else { Vec::new() };
            if !values.contains(&value) {
                values.push(value);
            }
            entries.push(Entry { values, ended: None });
        }
        Change(sectors)
    }

    /// It has been acknowledged. One that fails never is.
    pub(crate) fn end(&mut self, change: Change) {
        let now = self.tick();
        for sector in change.0 {
            let last = self.sectors[sector as usize].last_mut().expect("it began");
            last.ended = Some(now);
        }
    }

    /// What had ended at that time has been acknowledged as durable.
    pub(crate) fn durable(&mut self, time: u64) {
        self.tick();
        for entries in &mut self.sectors {
            let last = entries.iter().rposition(|entry| entry.ended.is_some_and(|ended| ended <= time)).unwrap_or(0);
            entries.drain(..last);
        }
    }

    /// A snapshot cuts the disk, between two changes, and freezes a layer. Returns its number.
    pub(crate) fn cut(&mut self, layer: usize) -> usize {
        let time = self.tick();
        let values = self.sectors.iter().map(|entries| possible(entries)).collect();
        self.cuts.push(Cut { layer, values, time, frozen: false });
        self.cuts.len() - 1
    }

    /// The layer has been acknowledged as frozen.
    pub(crate) fn frozen(&mut self, cut: usize) {
        self.cuts[cut].frozen = true;
        self.durable(self.cuts[cut].time);
    }

    /// Whether readers may see this now.
    ///
    /// # Errors
    /// Where not.
    pub(crate) fn meet_read(&self, content: &[Value]) -> Result<(), String> {
        meet(content, self.sectors.iter().map(|entries| possible(entries)))
    }

    /// Whether a crash now may leave this: of each layer what the disk has down from there.
    ///
    /// # Errors
    /// Where not.
    pub(crate) fn meet_crash(&self, contents: &[Vec<Value>]) -> Result<(), String> {
        let all = |entries: &Vec<Entry>| entries.iter().flat_map(|entry| entry.values.iter().copied()).collect();
        meet(&contents[contents.len() - 1], self.sectors.iter().map(all))?;
        for cut in self.cuts.iter().filter(|cut| cut.frozen) {
            meet(&contents[cut.layer], cut.values.iter().cloned()).map_err(|error| format!("frozen layer {}: {error}", cut.layer))?;
        }
        Ok(())
    }
}

/// What a reader may see: what has ended last, or what has failed or is under way since.
fn possible(entries: &[Entry]) -> Vec<Value> {
    let last = entries.iter().rposition(|entry| entry.ended.is_some()).unwrap_or(0);
    entries[last..].iter().flat_map(|entry| entry.values.iter().copied()).collect()
}

fn meet(content: &[Value], allowed: impl Iterator<Item = Vec<Value>>) -> Result<(), String> {
    for (sector, (value, allowed)) in content.iter().zip(allowed).enumerate() {
        if !allowed.contains(value) {
            return Err(format!("sector {sector} has {value:?}, and may have {allowed:?}"));
        }
    }
    Ok(())
}
