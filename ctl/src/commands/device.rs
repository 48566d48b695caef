//! `snapfence device`

use anyhow::Result;
use snapfence::protocol::{DeviceList, DeviceRemove, DeviceResume};

use super::{Session, absolute};
use crate::arguments::DeviceCommand;
use crate::render;

pub(super) fn run(session: &Session, command: DeviceCommand) -> Result<()> {
    match command {
        DeviceCommand::List => {
            let devices = session.connect()?.call(&DeviceList {})?;
            session.print(devices.as_slice(), render::devices)
        }
        DeviceCommand::Add { mut device } => {
            device.image = absolute(&device.image)?;
            device.socket = absolute(&device.socket)?;
            let added = session.connect()?.call(&device)?;
            session.print(&added, |added| render::devices(std::slice::from_ref(added)))
        }
        DeviceCommand::Resume { name } => {
            let resumed = session.connect()?.call(&DeviceResume { name: name.clone() })?;
            session.print(&resumed, |_| format!("{name} tries again what waits for space\n"))
        }
        DeviceCommand::Remove { name, force } => {
            let removed = session.connect()?.call(&DeviceRemove { name: name.clone(), force })?;
            session.print(&removed, |_| format!("{name} removed\n"))
        }
    }
}
