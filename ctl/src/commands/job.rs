//! `snapfence job`

use std::time::Duration;

use anyhow::{Result, bail};
use snapfence::client::Client;
use snapfence::protocol::{JobCancel, JobInfo, QueryJobs};

use super::Session;
use crate::arguments::JobCommand;
use crate::render;

/// How long to rely on events before the daemon is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);

pub(super) fn run(session: &Session, command: JobCommand) -> Result<()> {
    match command {
        JobCommand::List => {
            let jobs = session.connect()?.call(&QueryJobs {})?;
            session.print(jobs.as_slice(), render::jobs)
        }
        JobCommand::Cancel { id } => {
            let cancelled = session.connect()?.call(&JobCancel { id: id.clone() })?;
            session.print(&cancelled, |_| format!("job {id} will be cancelled; `snapfence job wait {id}` waits for its end\n"))
        }
        JobCommand::Wait { id } => {
            let job = wait(&mut session.connect()?, &id)?;
            session.print(&job, |job| render::jobs(std::slice::from_ref(job)))?;
            if let Some(error) = job.error {
                bail!("job {id} failed: {error}");
            }
            Ok(())
        }
    }
}

/// Waits for the end of a job.
fn wait(client: &mut Client, id: &str) -> Result<JobInfo> {
    let mut known = false;
    loop {
        let job = client.call(&QueryJobs {})?.into_iter().find(|job| job.id == id);
        match job {
            Some(job) if job.status.is_over() => return Ok(job),
            Some(_) => known = true,
            None if known => bail!("job {id} is gone, and nothing is left to say how it ended"),
            None => bail!("there is no job '{id}'; `snapfence job list` shows those there are"),
        }
        // Any event is a reason to look again: its job's status, or events that were lost.
        client.next_event(Some(ASK_AGAIN))?;
    }
}
