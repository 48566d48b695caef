//! `snapfence stack`

use anyhow::Result;
use snapfence::protocol::StackShow;

use super::Session;
use crate::arguments::StackCommand;
use crate::render;

pub(super) fn run(session: &Session, command: StackCommand) -> Result<()> {
    let StackCommand::Show { device } = command;
    let stack = session.connect()?.call(&StackShow { device })?;
    session.print(&stack, render::stack)
}
