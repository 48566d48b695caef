//! The report as a page that needs nothing else. Everything is in one section, for other reports to take in.

use std::fmt::Write as _;

use snapfence_benches::html::escape;

use crate::report::{Figures, Measured, Ratio, Report, Snapshots};

const STYLE: &str = "body{font:15px/1.4 sans-serif;max-width:70em;margin:2em auto}table{border-collapse:collapse;font-size:13px}\
    td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}";

pub(crate) fn page(report: &Report) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>fio in a guest</title>\n<style>{STYLE}</style>\n{}</html>\n",
        section(report)
    )
}

fn section(report: &Report) -> String {
    let setup = &report.setup;
    let mut html = String::from("<section id=\"guest-fio\">\n<h1>fio in a guest</h1>\n");
    // Writing to a string cannot fail.
    let _ = writeln!(
        html,
        "<p>{} disks at once: {}; {} MiB each, {} queue(s), on {}. Guest processors by {}. {}; {}; {}; guest: {}. {} processors, Linux {}. Blocks of \
         {} s in turns, medians of {}; ratios are those of neighbouring blocks, with the smallest and the largest.</p>",
        setup.disks.len(),
        escape(&setup.disks.join("; ")),
        setup.disk_mib,
        setup.queues,
        escape(&setup.file_system),
        setup.accelerator,
        escape(&setup.snapfenced),
        escape(setup.qemu_storage_daemon.as_deref().unwrap_or("no qemu-storage-daemon on this machine")),
        escape(&setup.qemu),
        escape(&setup.guest),
        setup.processors,
        escape(&setup.host_kernel),
        setup.block_seconds,
        setup.blocks,
    );
    for measured in &report.measured {
        table(&mut html, measured);
    }
    if let Some(snapshots) = &report.snapshots {
        with_and_without(&mut html, snapshots);
    }
    for check in &report.checks {
        let outcome = check.error.as_deref().map_or_else(|| "held".to_owned(), escape);
        let _ = writeln!(html, "<p>{} with {}: {outcome}</p>", escape(&check.job), escape(&check.side));
    }
    html.push_str("</section>\n");
    html
}

fn table(html: &mut String, measured: &Measured) {
    let _ = writeln!(html, "<h2>{}</h2>\n<p>{}", escape(&measured.job), escape(&measured.what));
    if measured.dropped > 0 {
        let _ = writeln!(html, " {} of {} turns were disturbed and dropped.", measured.dropped, measured.turns + measured.dropped);
    }
    html.push_str(
        "</p>\n<table><tr><th>disk</th><th></th><th>requests/s</th><th>MiB/s</th><th>p50 &micro;s</th><th>p99 &micro;s</th>\
         <th>longest &micro;s</th><th>flush p50 &micro;s</th></tr>\n",
    );
    for row in &measured.rows {
        line(html, &row.disk, "snapfence", &row.snapfence);
        if let Some(theirs) = &row.qemu_storage_daemon {
            line(html, &row.disk, "qemu-storage-daemon", theirs);
        }
        if let Some(ratio) = row.iops_ratio {
            let cell = |ratio: Option<Ratio>| ratio.map_or_else(String::new, |ratio| format!("{:.2}", ratio.median));
            let _ = writeln!(
                html,
                "<tr><td>{}</td><td>ratio</td><td>{:.2} ({:.2} to {:.2})</td><td></td><td>{}</td><td>{}</td><td></td><td></td></tr>",
                escape(&row.disk),
                ratio.median,
                ratio.lowest,
                ratio.highest,
                cell(row.p50_ratio),
                cell(row.p99_ratio)
            );
        }
    }
    html.push_str("</table>\n");
}

fn with_and_without(html: &mut String, snapshots: &Snapshots) {
    let _ = writeln!(
        html,
        "<h2>A group snapshot in its midst</h2>\n<p>{}, snapfence, all disks together, {} snapshots; the daemon held a completion for at most {} \
         &micro;s.</p>\n<table><tr><th></th><th></th><th>requests/s</th><th>MiB/s</th><th>p50 &micro;s</th><th>p99 &micro;s</th>\
         <th>longest &micro;s</th><th>flush p50 &micro;s</th></tr>",
        escape(&snapshots.job),
        snapshots.held_us.len(),
        snapshots.held_us.iter().max().unwrap_or(&0)
    );
    line(html, "all", "with", &snapshots.with);
    line(html, "all", "without", &snapshots.without);
    html.push_str("</table>\n");
}

fn line(html: &mut String, disk: &str, who: &str, figures: &Figures) {
    let flush = figures.flush_p50_us.map_or_else(String::new, |us| format!("{us:.0}"));
    let _ = writeln!(
        html,
        "<tr><td>{}</td><td>{who}</td><td>{:.0}</td><td>{:.1}</td><td>{:.0}</td><td>{:.0}</td><td>{:.0}</td><td>{flush}</td></tr>",
        escape(disk),
        figures.iops,
        figures.mib_per_second,
        figures.p50_us,
        figures.p99_us,
        figures.longest_us
    );
}
