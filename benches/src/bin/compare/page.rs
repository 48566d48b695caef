//! The report as a page that needs nothing else.

use std::fmt::Write as _;

use super::{Cell, Report};

const COLOURS: [&str; 4] = ["#0b6e4f", "#7fb69a", "#c44536", "#5c677d"];
const BAR: f64 = 360.0;

/// All cells as bars, with the figures in a table below.
pub(super) fn page(report: &Report) -> String {
    let mut page = String::from(
        "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>snapfence compared</title>\n<style>body{font:15px/1.4 sans-serif;\
         max-width:60em;margin:2em auto}table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .7em;text-align:right;border-bottom:1px \
         solid #ddd}td:first-child,th:first-child{text-align:left}text{font:12px sans-serif}</style>\n<h1>snapfence compared</h1>\n",
    );
    let machine = &report.machine;
    let contestants = report.contestants.iter().map(|name| escape(name)).collect::<Vec<_>>().join("; ");
    // Writing to a string cannot fail.
    let _ = writeln!(
        page,
        "<p>{} processors ({}), {} GiB, Linux {}. {contestants}. Requests of 4 KiB, one queue, blocks of {} s in turns, medians; ratios with \
         95 % intervals from resampling.</p>",
        machine.processors,
        escape(&machine.processor),
        machine.memory_gib,
        escape(&machine.kernel),
        report.block_seconds
    );
    for cell in &report.cells {
        bars(&mut page, cell);
    }
    page.push_str("</html>\n");
    page
}

fn bars(page: &mut String, cell: &Cell) {
    let title = format!("{:?}, {}, {:?}, depth {}", cell.medium, cell.image, cell.rw, cell.iodepth).to_lowercase();
    let most = cell.entries.iter().map(|entry| entry.iops).fold(1.0, f64::max);
    let height = cell.entries.len() * 22 + 4;
    let _ = writeln!(page, "<h2>{title}</h2>\n<svg width=\"720\" height=\"{height}\" role=\"img\" aria-label=\"{title}\">");
    for (row, (entry, colour)) in cell.entries.iter().zip(COLOURS).enumerate() {
        let (y, width) = (row * 22, entry.iops / most * BAR);
        let _ = writeln!(
            page,
            "<text x=\"0\" y=\"{}\">{}</text><rect x=\"170\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{:.0}/s</text>",
            y + 14,
            escape(&entry.contestant),
            176.0 + width,
            y + 14,
            entry.iops
        );
    }
    page.push_str(
        "</svg>\n<table><tr><th></th><th>requests/s</th><th>p50 &micro;s</th><th>p99 &micro;s</th><th>CPU &micro;s a request</th>\
         <th>snapfence is</th><th>blocks (disturbed)</th></tr>\n",
    );
    for entry in &cell.entries {
        let cpu = entry.cpu_us.map_or_else(|| "&ndash;".to_owned(), |cpu| format!("{cpu:.2}"));
        let ratio = entry.snapfence_ratio.map_or_else(String::new, |ratio| ratio.to_string());
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{:.0}</td><td>{:.1}</td><td>{:.1}</td><td>{cpu}</td><td>{ratio}</td><td>{} ({})</td></tr>",
            escape(&entry.contestant),
            entry.iops,
            entry.p50_us,
            entry.p99_us,
            entry.blocks,
            entry.disturbed
        );
    }
    page.push_str("</table>\n");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
