//! What the report is made of, whatever was measured: figures for programs, and tables and plots for people.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use snapfence_benches::machine::Machine;

use super::page;

/// What one suite has shown.
#[derive(Debug)]
pub(super) struct Section {
    /// Its name in the JSON.
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    /// How it was measured.
    pub(super) method: String,
    pub(super) parts: Vec<Part>,
    pub(super) figures: Value,
}

/// A table with what is to be seen in it.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) title: String,
    pub(super) head: Vec<&'static str>,
    /// The first cell of a row says what it is about.
    pub(super) rows: Vec<Vec<String>>,
    pub(super) plots: Vec<Plot>,
}

impl Part {
    /// Prints the table.
    pub(super) fn print(&self) {
        let cells = |column: usize| self.rows.iter().map(move |row| row.get(column).map_or(0, |cell| cell.chars().count()));
        let widths: Vec<usize> =
            self.head.iter().enumerate().map(|(column, head)| cells(column).max().unwrap_or(0).max(head.chars().count())).collect();
        println!("\n{}", self.title);
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded = cells.zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
                0 => format!("  {cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            });
            println!("{}", padded.collect::<String>().trim_end());
        };
        line(&mut self.head.iter().copied());
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str));
        }
    }
}

/// Something to look at.
#[derive(Debug)]
pub(super) enum Plot {
    /// A bar for each name.
    Bars { unit: &'static str, bars: Vec<(String, f64)> },
    /// Lines over a common scale.
    Lines { x: Axis, y: Axis, lines: Vec<(String, Vec<(f64, f64)>)> },
}

/// A scale with its name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    pub(super) name: &'static str,
    pub(super) is_logarithmic: bool,
}

/// Writes what all suites have shown into a folder, as `compare.json` and `compare.html`.
///
/// # Errors
/// If that is not possible.
pub(super) fn write(folder: &Path, machine: &Machine, contestants: &[String], sections: &[Section]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut figures = json!({ "machine": machine, "contestants": contestants });
    for section in sections {
        figures[section.name] = section.figures.clone();
    }
    for (name, content) in
        [("compare.json", serde_json::to_string_pretty(&figures)? + "\n"), ("compare.html", page::page(machine, contestants, sections))]
    {
        let path = folder.join(name);
        std::fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}
