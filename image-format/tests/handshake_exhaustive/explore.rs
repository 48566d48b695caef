//! Every state that can be reached, on shortest paths.

use std::hash::{Hash, Hasher};
use std::time::Instant;

use crate::protocol::{Shape, State};

/// A state in few words: the small numbers that hashing it shows, one after another. They tell how many follow, so no two states are packed
/// alike.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Packed {
    words: [u64; 6],
    bits: u32,
}

impl Packed {
    fn of(state: &State) -> Self {
        let mut packed = Self::default();
        state.hash(&mut packed);
        packed
    }

    fn push(&mut self, number: u64, bits: u32) {
        assert!(number >> bits == 0, "{number} does not fit");
        let (word, shift) = ((self.bits / 64) as usize, self.bits % 64);
        self.words[word] |= number << shift;
        if shift + bits > 64 {
            self.words[word + 1] |= number >> (64 - shift);
        }
        self.bits += bits;
    }
}

impl Hasher for Packed {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.push(u64::from(*byte), 3));
    }

    /// Which variant it is.
    fn write_isize(&mut self, value: isize) {
        self.push(value as u64, 4);
    }

    /// Lengths, which are always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        let mixed = self.words.iter().fold(0u64, |sum, word| (sum.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed ^ (mixed >> 32)
    }
}

/// The states that were reached, by distance, each with the place of the one that it was reached from.
struct Reached {
    states: Vec<([u64; 6], u32)>,
    /// Places in `states`, with the upper half of the hash.
    table: Vec<u64>,
}

const FREE: u64 = u64::MAX;

impl Reached {
    fn new() -> Self {
        Self { states: Vec::new(), table: vec![FREE; 1 << 12] }
    }

    /// Gives the place of `state` if it is new.
    fn insert(&mut self, state: &State, from: u32) -> Option<u32> {
        let packed = Packed::of(state);
        let (mask, hash) = (self.table.len() - 1, packed.finish());
        let mut at = hash as usize & mask;
        while self.table[at] != FREE {
            if self.table[at] >> 32 == hash >> 32 && self.states[self.table[at] as u32 as usize].0 == packed.words {
                return None;
            }
            at = (at + 1) & mask;
        }
        let place = self.states.len() as u32;
        self.table[at] = (hash >> 32 << 32) | u64::from(place);
        self.states.push((packed.words, from));
        if self.states.len() * 2 > self.table.len() {
            self.grow();
        }
        Some(place)
    }

    fn grow(&mut self) {
        let mask = self.table.len() * 2 - 1;
        let mut table = vec![FREE; mask + 1];
        for place in 0..self.states.len() {
            let hash = Packed { words: self.states[place].0, bits: 0 }.finish();
            let mut at = hash as usize & mask;
            while table[at] != FREE {
                at = (at + 1) & mask;
            }
            table[at] = (hash >> 32 << 32) | place as u64;
        }
        self.table = table;
    }
}

/// What was explored.
struct Explored {
    transitions: u64,
    deepest: usize,
    /// What went wrong, and how, in as few transitions as possible.
    violation: Option<(&'static str, Vec<String>)>,
}

impl Shape {
    /// Explores breadth first, so that what goes wrong is found on a shortest path.
    fn explore(&self, reached: &mut Reached) -> Explored {
        let initial = self.initial();
        let mut level: Vec<_> = reached.insert(&initial, 0).map(|place| (initial, place)).into_iter().collect();
        let mut explored = Explored { transitions: 0, deepest: 0, violation: None };
        loop {
            let mut next = Vec::new();
            for (state, place) in &level {
                let before = explored.transitions;
                for actor in self.actors() {
                    let mut successor = *state;
                    let Some(step) = self.advance(actor, &mut successor) else { continue };
                    explored.transitions += 1;
                    next.extend(reached.insert(&successor, *place).map(|place| (successor, place)));
                    if let Some(violation) = step.violation {
                        let mut path = self.path(reached, *place);
                        path.push(step.describe(actor));
                        explored.violation = Some((violation, path));
                        return explored;
                    }
                }
                if explored.transitions == before
                    && let Some(violation) = self.judge_end(state)
                {
                    explored.violation = Some((violation, self.path(reached, *place)));
                    return explored;
                }
            }
            if next.is_empty() {
                return explored;
            }
            level = next;
            explored.deepest += 1;
        }
    }

    /// The transitions that lead to the state at `place`, found by making them again.
    fn path(&self, reached: &Reached, mut place: u32) -> Vec<String> {
        let mut places = Vec::new();
        while place != 0 {
            places.push(place);
            place = reached.states[place as usize].1;
        }
        let mut state = self.initial();
        let follow = |place: u32| {
            let mut successors = self.actors().filter_map(|actor| {
                let mut successor = state;
                self.advance(actor, &mut successor).map(|step| (successor, step.describe(actor)))
            });
            let is_next = |(successor, _): &(State, String)| Packed::of(successor).words == reached.states[place as usize].0;
            let (successor, description) = successors.find(is_next).expect("it was reached from there");
            state = successor;
            description
        };
        places.into_iter().rev().map(follow).collect()
    }

    /// Explores and says what there was. Gives what went wrong, having printed how.
    pub(crate) fn violation(&self, name: &str) -> Option<&'static str> {
        let began = Instant::now();
        let mut reached = Reached::new();
        let Explored { transitions, deepest, violation } = self.explore(&mut reached);
        let (states, seconds) = (reached.states.len(), began.elapsed().as_secs_f64());
        println!("{name}: {states} states, {transitions} transitions, deepest {deepest}, {seconds:.1} s");
        let (violation, path) = violation?;
        println!("{name}: {violation} after\n  {}", path.join("\n  "));
        Some(violation)
    }

    pub(crate) fn holds(&self, name: &str) {
        assert_eq!(self.violation(name), None, "{name}");
    }
}
