//! `snapfence completions` and `snapfence manual`

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use clap_complete::Shell;

use super::output;
use crate::arguments::Arguments;

pub(super) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "snapfence", &mut script);
    output(&String::from_utf8_lossy(&script))
}

pub(super) fn manual(folder: &Path) -> Result<()> {
    clap_mangen::generate_to(Arguments::command(), folder).with_context(|| format!("cannot write manual pages to {}", folder.display()))
}
