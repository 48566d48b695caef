//! The report as a page that needs nothing else.

use std::fmt::Write as _;

use snapfence_benches::html::escape;
use snapfence_benches::machine::Machine;

use super::plot;
use super::report::{Part, Section};

const STYLE: &str = "body{font:15px/1.4 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;font-size:13px}\
    td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
    svg text{font:12px sans-serif}h3{margin:2em 0 .3em}";

/// All sections, one after the other.
pub(super) fn page(machine: &Machine, contestants: &[String], sections: &[Section]) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>snapfence compared</title>\n<style>{STYLE}</style>\n\
         <h1>snapfence compared</h1>\n"
    );
    // Writing to a string cannot fail.
    let _ = writeln!(
        page,
        "<p>{} processors ({}), {} GiB, Linux {}. {}.</p>",
        machine.processors,
        escape(&machine.processor),
        machine.memory_gib,
        escape(&machine.kernel),
        contestants.iter().map(|name| escape(name)).collect::<Vec<_>>().join("; ")
    );
    for section in sections {
        let _ = writeln!(page, "<h2>{}</h2>\n<p>{}</p>", escape(section.title), escape(&section.method));
        section.parts.iter().for_each(|part| show(&mut page, part));
    }
    page.push_str("</html>\n");
    page
}

fn show(page: &mut String, part: &Part) {
    let _ = writeln!(page, "<h3>{}</h3>", escape(&part.title));
    for plot in &part.plots {
        let _ = writeln!(page, "<div>{}</div>", plot::svg(plot, &part.title));
    }
    let row = |page: &mut String, tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        let _ = writeln!(page, "<tr>{cells}</tr>");
    };
    page.push_str("<table>\n");
    row(page, "th", &mut part.head.iter().copied());
    for cells in &part.rows {
        row(page, "td", &mut cells.iter().map(String::as_str));
    }
    page.push_str("</table>\n");
}
