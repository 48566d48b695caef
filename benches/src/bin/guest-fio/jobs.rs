//! The job files, as they lie in `benches/fio/guest`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// The file that says how long jobs run; the program puts its own in its place.
const TIMES: &str = "times.inc";

/// A job file.
#[derive(Debug)]
pub(crate) struct Job {
    /// Its name without the ending.
    pub(crate) name: String,
    /// What its first line says it does.
    pub(crate) what: String,
    /// Whether it runs for a time and so measures something. Others check something, and end when they have.
    pub(crate) is_timed: bool,
}

/// All job files of a folder.
#[derive(Debug)]
pub(crate) struct Jobs {
    files: Vec<(String, String)>,
    pub(crate) jobs: Vec<Job>,
}

impl Jobs {
    /// Reads those of the folder that `only` names; all, if it names none.
    pub(crate) fn read(folder: &Path, only: &[String]) -> Result<Self> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| format!("no job files in {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("the name of a job file is not UTF-8")?;
            if name.ends_with(".fio") || name.ends_with(".inc") {
                files.push((name.to_owned(), fs::read_to_string(&path)?));
            }
        }
        files.sort();
        let mut jobs: Vec<Job> = files.iter().filter_map(|(name, text)| Some(job(name.strip_suffix(".fio")?, text))).collect();
        for name in only {
            ensure!(jobs.iter().any(|job| job.name == *name), "{} has no job file {name}.fio", folder.display());
        }
        jobs.retain(|job| only.is_empty() || only.contains(&job.name));
        // Reading first: what is written may change what is read afterwards. What checks something comes last.
        jobs.sort_by_key(|job| (!job.is_timed, !(job.name.starts_with("read-") || job.name.starts_with("randread-"))));
        Ok(Self { files, jobs })
    }

    /// A script that puts the files where it is run; jobs that run for a time take `seconds` seconds then, and `ramp_ms` milliseconds before that.
    pub(crate) fn put(&self, seconds: u32, ramp_ms: u32) -> String {
        let times = format!("time_based=1\nramp_time={ramp_ms}ms\nruntime={seconds}s\n");
        let mut script = String::new();
        for (name, text) in &self.files {
            let text = if name == TIMES { &times } else { text };
            // Writing to a string cannot fail.
            let _ = write!(script, "cat >{name} <<'end-of-file'\n{}\nend-of-file\n", text.trim_end());
        }
        script
    }
}

fn job(name: &str, text: &str) -> Job {
    let what = text.lines().next().unwrap_or_default().trim_start_matches([';', ' ']).to_owned();
    let is_timed = text.lines().any(|line| line.trim() == format!("include {TIMES}"));
    Job { name: name.to_owned(), what, is_timed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_comes_first_and_checking_last() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fio/guest");
        let jobs = Jobs::read(&folder, &[]).unwrap();
        let names: Vec<&str> = jobs.jobs.iter().map(|job| job.name.as_str()).collect();
        assert_eq!(names[..2], ["randread-4k-qd1", "randread-4k-qd32"]);
        assert_eq!(names.last(), Some(&"verify"));
        assert!(jobs.jobs.iter().all(|job| job.is_timed == (job.name != "verify") && job.what.ends_with('.')), "{jobs:?}");
        let script = jobs.put(7, 300);
        assert!(script.contains("runtime=7s\n") && script.contains("ramp_time=300ms\n") && !script.contains("runtime=10s"), "{script}");
        assert!(Jobs::read(&folder, &["nothing".to_owned()]).unwrap_err().to_string().contains("nothing.fio"));
    }
}
