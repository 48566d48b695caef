//! Overlays that are being made.

use redb::{ReadableTable, TableDefinition, TableError, WriteTransaction};

use super::super::records::Making;
use super::error::{read_error, write_error};
use super::{CatalogueError, Store, decode, encode};

const MAKING: TableDefinition<u64, &[u8]> = TableDefinition::new("making");

impl Store {
    /// Records that overlays are about to be made.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub fn begin_making(&mut self, making: &Making) -> Result<(), CatalogueError> {
        self.write(|transaction| put_making(transaction, making))
    }

    /// Forgets overlays that were being made.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub fn end_making(&mut self, mark: u64) -> Result<(), CatalogueError> {
        self.write(|transaction| drop_making(transaction, mark))
    }

    /// Overlays that were being made when the last run ended, or are now.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn making(&self) -> Result<Vec<Making>, CatalogueError> {
        self.read(|transaction| {
            let table = match transaction.open_table(MAKING) {
                Ok(table) => table,
                Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(read_error(error)),
            };
            let mut found = Vec::new();
            for row in table.iter().map_err(read_error)? {
                let (mark, value) = row.map_err(read_error)?;
                found.push(decode(value.value(), || format!("overlays being made ({:016x})", mark.value()))?);
            }
            Ok(found)
        })
    }
}

pub(super) fn put_making(transaction: &WriteTransaction, making: &Making) -> Result<(), CatalogueError> {
    let value = encode(making, || format!("overlays being made ({:016x})", making.mark))?;
    transaction.open_table(MAKING).map_err(write_error)?.insert(making.mark, value.as_slice()).map_err(write_error)?;
    Ok(())
}

pub(super) fn drop_making(transaction: &WriteTransaction, mark: u64) -> Result<(), CatalogueError> {
    transaction.open_table(MAKING).map_err(write_error)?.remove(mark).map_err(write_error)?;
    Ok(())
}
