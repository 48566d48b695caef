//! The README's table of the control socket names exactly the commands and events that there are.

use std::collections::BTreeSet;

use snapfence::protocol::{Event, NEGOTIATION, all_commands};

const README: &str = include_str!("../../README.md");

/// What stands between backticks in the rows of the table whose first cell is one of `titles`.
fn named(titles: &[&str]) -> BTreeSet<&'static str> {
    let section = README.split("## The control socket").nth(1).expect("the section is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| titles.iter().any(|title| line.starts_with(&format!("| {title} |"))));
    rows.flat_map(|row| row.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn the_table_names_all_commands() {
    // Negotiating is QMP's, and told of in the text.
    let there: BTreeSet<_> = all_commands().filter(|name| *name != NEGOTIATION).collect();
    assert_eq!(named(&["as in QEMU", "our own"]), there);
}

#[test]
fn the_table_names_all_events() {
    assert_eq!(named(&["events"]), BTreeSet::from(Event::NAMES));
}
