//! Making a disk larger that nobody uses.

use std::sync::Arc;

use super::Stack;
use crate::buffer::AlignedBuffer;
use crate::layer::Layer;
use crate::qcow2::GrowError;
use crate::storage::Environment;
use crate::units::{GuestOffset, SECTOR_BYTES};

impl<E: Environment> Stack<E> {
    /// Makes the disk `new_size` bytes large, durably, and ends writing as [`close`](Self::close) does. The new part reads as zeros, whatever
    /// the layers beneath have there. Nobody else may use the stack; it keeps its old size itself, and is opened again to use the new one.
    ///
    /// # Errors
    /// If the top layer is no qcow2 image, the size makes no sense, or a layer cannot be read or written.
    pub async fn grow(self: &Arc<Self>, new_size: u64) -> Result<(), GrowError> {
        let view = self.view();
        let layers = view.layers();
        let [.., top] = layers else { unreachable!("a stack has a layer") };
        let Layer::Qcow2(image) = &**top else { return Err(GrowError::NotQcow2) };
        let beneath = layers.len().checked_sub(2).map(|beneath| layers[beneath].virtual_size());
        image.admit_growth(new_size)?;
        let size = self.virtual_size();
        if !size.is_multiple_of(image.geometry().cluster_bytes()) {
            // The last cluster becomes the top layer's own, with zeros in the part past the end of the disk.
            let last = GuestOffset::new(size - SECTOR_BYTES);
            let (result, sector) = view.read(last, AlignedBuffer::zeroed(512).into()).await;
            result?;
            view.write(last, sector).await.0?;
        }
        image.grow(new_size, beneath).await?;
        Ok(self.close().await?)
    }
}
