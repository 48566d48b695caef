//! `snapfence image check`, in the shape of QEMU's `ImageCheck`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde::Serialize;
use snapfence_image_format::chain::{self, Format};
use snapfence_image_format::qcow2::{self, CheckOptions, CheckReport};
use snapfence_image_format::storage::CacheMode;
use snapfence_image_format::storage::uring::UringEnvironment;

use super::{Named, block_on};
use crate::arguments::Repair;
use crate::commands::{Session, UsageError};

/// QEMU's `ImageCheck`, and what we say beyond it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageCheck {
    filename: PathBuf,
    format: &'static str,
    /// Always 0: what cannot be checked is an error.
    check_errors: u64,
    image_end_offset: u64,
    corruptions: u64,
    leaks: u64,
    corruptions_fixed: u64,
    leaks_fixed: u64,
    total_clusters: u64,
    allocated_clusters: u64,
    fragmented_clusters: u64,
    compressed_clusters: u64,
    /// Ours: corruptions that QEMU does not look for.
    contradictions: u64,
    /// Ours: the image says that its reference counts may be out of date.
    dirty_flag: bool,
    /// Ours: what was found, one by one, and how much more there was.
    findings: Vec<String>,
    findings_omitted: u64,
}

pub(super) fn run(session: &Session, image: Named, repair: Option<Repair>) -> Result<ExitCode> {
    if image.format == Format::Raw {
        return Err(UsageError("a raw image has no tables that could be checked".to_owned()).into());
    }
    let path = image.path.clone();
    let report = block_on(check(image, repair))?;
    let is_clean = report.is_clean();
    session.print(&of_report(path, report), |check| text(check, repair))?;
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn check(image: Named, repair: Option<Repair>) -> Result<CheckReport> {
    let named = || image.path.display().to_string();
    let (writable, repair) = match repair {
        None => (false, qcow2::Repair::None),
        Some(Repair::Leaks) => (true, qcow2::Repair::Leaks),
    };
    let location = image.location();
    let file = chain::open_file(&UringEnvironment, &location, writable, CacheMode::Buffered).await.with_context(named)?;
    if !image.shared {
        chain::lock_file(&file, writable).await.with_context(named)?;
    }
    qcow2::check(&file, &CheckOptions { repair, ..CheckOptions::default() }).await.with_context(named)
}

fn of_report(filename: PathBuf, report: CheckReport) -> ImageCheck {
    ImageCheck {
        filename,
        format: Format::Qcow2.name(),
        check_errors: 0,
        image_end_offset: report.image_end,
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_fixed: 0,
        leaks_fixed: report.leaks_fixed,
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
        contradictions: report.contradictions,
        dirty_flag: report.dirty,
        findings: report.findings.iter().map(ToString::to_string).collect(),
        findings_omitted: report.findings_omitted,
    }
}

fn text(check: &ImageCheck, repair: Option<Repair>) -> String {
    let mut text: String = check.findings.iter().map(|finding| format!("{finding}\n")).collect();
    let mut line = |line: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    };
    if check.findings_omitted > 0 {
        line(format!("and {} more", check.findings_omitted));
    }
    let corruptions = check.corruptions + check.contradictions;
    if check.leaks_fixed > 0 {
        line(format!("{} leaked clusters were freed", check.leaks_fixed));
    }
    line(match (corruptions, check.leaks) {
        (0, 0) => "no errors were found".to_owned(),
        (0, leaks) => format!("{leaks} leaked clusters: wasted space, no harm to data; --repair leaks frees it"),
        (_, leaks) => {
            let kept = if leaks > 0 && repair.is_some() { "; leaks are not repaired while there is worse" } else { "" };
            format!("{corruptions} corruptions and {leaks} leaked clusters: copy the image before you write to it{kept}")
        }
    });
    if check.dirty_flag {
        line("the image is marked dirty: a program that updates reference counts late did not end properly".to_owned());
    }
    let percent = |part: u64, of: u64| (part * 100).checked_div(of).unwrap_or(0);
    line(format!(
        "{} of {} clusters allocated ({} %), of which {} % are fragmented and {} % compressed; the image ends at {:#x}",
        check.allocated_clusters,
        check.total_clusters,
        percent(check.allocated_clusters, check.total_clusters),
        percent(check.fragmented_clusters, check.allocated_clusters),
        percent(check.compressed_clusters, check.allocated_clusters),
        check.image_end_offset
    ));
    text
}
