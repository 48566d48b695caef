//! What a device offers to the front-end: feature bits and the configuration space (VIRTIO 1.3, 5.2.3 and 5.2.4).

use snapfence_image_format::storage::Environment;
use snapfence_image_format::units::SECTOR_BYTES;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::Device;
use crate::vring::RingFeatures;
use crate::vring::request::{MAX_RANGE_SECTORS, MAX_RANGES};

/// Bytes of the configuration space that mean something to us. Front-ends may know less or more of it.
const BYTES: usize = 60;
/// Where `writeback` is, the only byte that a driver may write.
const WRITE_BACK_AT: u32 = 32;

/// What guests should write whole and aligned: 2^3 sectors, that is 4 KiB. Our overlays map by as much, so such a write copies nothing.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const PHYSICAL_BLOCK_SECTORS: u16 = 1 << PHYSICAL_BLOCK_EXPONENT;

/// Virtio feature bits that the device offers. `IN_ORDER`, `NOTIFICATION_DATA` and packed rings are not among them: some front-ends accept for
/// the driver whatever is offered, and we would have to honour it.
pub(super) fn features<E: Environment>(device: &Device<E>) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
    ];
    if device.options().read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.into_iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
}

/// What accepted feature bits mean for rings.
pub(super) fn ring_features(accepted: u64) -> RingFeatures {
    RingFeatures { event_idx: accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0, indirect: accepted & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0 }
}

/// Features of the protocol between front-end and us.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::DEVICE_STATE
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// The configuration space from `offset` on, exactly `size` bytes: zeros where it has ended. QEMU asks for a prefix, Cloud Hypervisor for the
/// whole of what it knows, and both take no other length.
pub(super) fn read<E: Environment>(device: &Device<E>, offset: u32, size: u32) -> Vec<u8> {
    let space = space(device);
    let start = usize::try_from(offset).unwrap_or(BYTES).min(BYTES);
    let mut reply = space[start..].to_vec();
    // `size` fits in a message, which is checked before we are asked.
    reply.resize(size as usize, 0);
    reply
}

/// Whether these bytes of the configuration space include the driver's choice of the cache.
pub(super) fn covers_write_back(offset: u32, size: usize) -> bool {
    WRITE_BACK_AT.checked_sub(offset).is_some_and(|at| (at as usize) < size)
}

/// The driver writes `bytes` at `offset`. What it may not write stays, without an error: an error would cost the guest its disk.
pub(super) fn write<E: Environment>(device: &Device<E>, offset: u32, bytes: &[u8]) {
    if covers_write_back(offset, bytes.len()) && !device.options().read_only {
        match bytes[(WRITE_BACK_AT - offset) as usize] {
            0 => device.cache().set_write_back(false),
            1 => device.cache().set_write_back(true),
            // Reserved values.
            _ => {}
        }
    }
}

fn space<E: Environment>(device: &Device<E>) -> [u8; BYTES] {
    let options = device.options();
    let mut space = [0; BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let (max_range_sectors, max_ranges) = if options.read_only { (0, 0) } else { (MAX_RANGE_SECTORS, MAX_RANGES) };
    put(0, &(device.limits().bytes / SECTOR_BYTES).to_le_bytes());
    // The header and the status byte take a descriptor each.
    put(12, &u32::from(options.queue_size.saturating_sub(2).max(1)).to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXPONENT]);
    put(26, &PHYSICAL_BLOCK_SECTORS.to_le_bytes());
    put(WRITE_BACK_AT as usize, &[device.cache().report_write_back()]);
    put(34, &options.queues.to_le_bytes());
    put(36, &max_range_sectors.to_le_bytes());
    put(40, &max_ranges.to_le_bytes());
    put(44, &u32::from(PHYSICAL_BLOCK_SECTORS).to_le_bytes());
    put(48, &max_range_sectors.to_le_bytes());
    put(52, &max_ranges.to_le_bytes());
    put(56, &[u8::from(!options.read_only)]);
    space
}
