//! `snapfence image create`

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use snapfence_image_format::chain::{AllowedDirectories, Format};
use snapfence_image_format::qcow2::{Compression, CreateError, CreateOptions, Header, Preallocate, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::storage::uring::{UringEnvironment, UringFile};
use snapfence_image_format::storage::{Access, CacheMode, Environment as _, Location, Sharing, Storage as _};

use super::info::{self, ImageInfo};
use super::{Named, block_on};
use crate::arguments::{Compat, CompressionType, CreateArguments, Preallocation, Size, Switch};
use crate::commands::{Session, UsageError, absolute};

/// Smallest cluster with sub-clusters.
const MIN_EXTENDED_CLUSTER: u64 = 16 << 10;

/// What to make, as far as it can be told without looking at the backing file.
#[derive(Debug)]
struct Plan {
    path: PathBuf,
    /// What the backing file is called in the image, and its format.
    backing: Option<(PathBuf, Format)>,
    size: Option<u64>,
    /// `None`: a raw image.
    qcow2: Option<CreateOptions>,
}

pub(super) fn run(session: &Session, arguments: CreateArguments) -> Result<()> {
    let plan = plan(arguments)?;
    let info = block_on(create(plan))?;
    session.print(&info, |info| info::text(std::slice::from_ref(info)))
}

fn usage<T>(message: impl Into<String>) -> Result<T> {
    Err(UsageError(message.into()).into())
}

/// Puts the arguments together.
fn plan(arguments: CreateArguments) -> Result<Plan> {
    let path = real_path(&arguments.path)?;
    let backing = arguments.backing_file.clone().zip(arguments.backing_format.map(Format::from));
    let size = arguments.size.map(|Size(bytes)| bytes);
    if let Some(size) = size.filter(|size| size % 512 != 0) {
        return usage(format!("the size of {size} bytes is not a multiple of 512"));
    }
    let qcow2 = match arguments.format.into() {
        Format::Qcow2 => Some(qcow2_options(&arguments)?),
        Format::Raw => {
            let CreateArguments {
                cluster_size, extended_l2, refcount_bits, compat, compression_type, lazy_refcounts, preallocation, ..
            } = arguments;
            let wanted = [
                (backing.is_some(), "--backing-file"),
                (cluster_size.is_some(), "--cluster-size"),
                (extended_l2.is_some(), "--extended-l2"),
                (refcount_bits.is_some(), "--refcount-bits"),
                (compat.is_some(), "--compat"),
                (compression_type.is_some(), "--compression-type"),
                (lazy_refcounts.is_some(), "--lazy-refcounts"),
                (preallocation.is_some(), "--preallocation"),
            ];
            if let Some((_, option)) = wanted.iter().find(|(wanted, _)| *wanted) {
                return usage(format!("a raw image has no {option}"));
            }
            None
        }
    };
    Ok(Plan { path, backing, size, qcow2 })
}

/// The path without symbolic links on the way: names in images are relative to where they really are.
fn real_path(path: &Path) -> Result<PathBuf> {
    let path = absolute(path)?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return usage(format!("{} is not the name of a file", path.display()));
    };
    let directory = fs::canonicalize(directory).with_context(|| format!("cannot find the directory {}", directory.display()))?;
    Ok(directory.join(name))
}

/// The layout of a qcow2 image; its size is filled in later.
fn qcow2_options(arguments: &CreateArguments) -> Result<CreateOptions> {
    let is_v3 = arguments.compat != Some(Compat::V2);
    let is_overlay = arguments.backing_file.is_some();
    let cluster_size = arguments.cluster_size.map(|Size(bytes)| bytes);
    if let Some(bytes) = cluster_size.filter(|bytes| !bytes.is_power_of_two()) {
        return usage(format!("the cluster size {bytes} is not a power of two"));
    }
    let extended_l2 = match arguments.extended_l2 {
        Some(switch) => switch == Switch::On,
        None => is_overlay && is_v3 && cluster_size.is_none_or(|bytes| bytes >= MIN_EXTENDED_CLUSTER),
    };
    // The names are put in when the backing file has been looked at.
    let defaults = if extended_l2 { CreateOptions::overlay(0, "", "") } else { CreateOptions::standalone(0) };
    Ok(CreateOptions {
        version: if is_v3 { 3 } else { 2 },
        cluster_bits: cluster_size.map_or(defaults.cluster_bits, u64::ilog2),
        refcount_bits: arguments.refcount_bits.unwrap_or(defaults.refcount_bits),
        extended_l2,
        backing: None,
        lazy_refcounts: arguments.lazy_refcounts == Some(Switch::On),
        compression: match arguments.compression_type {
            Some(CompressionType::Zstd) => Compression::Zstd,
            Some(CompressionType::Zlib) | None => Compression::Deflate,
        },
        preallocate: match arguments.preallocation {
            Some(Preallocation::Metadata) => Preallocate::Metadata,
            Some(Preallocation::Off) | None => Preallocate::None,
        },
        ..defaults
    })
}

/// Makes the image, durably, and looks at it.
async fn create(plan: Plan) -> Result<ImageInfo> {
    let Plan { path, backing, size, qcow2 } = plan;
    let named = || path.display().to_string();
    let below = match &backing {
        Some((name, format)) => Some(size_of_backing(&path, name, *format).await?),
        None => None,
    };
    let Some(size) = size.or(below) else { bail!("neither a size nor a backing file") };
    let file = UringEnvironment.open(&Location::Trusted(path.clone()), Access::CreateNew, CacheMode::Buffered).await;
    let file = file.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow!("{} exists already and is never overwritten; remove it first, or give the new image another name", path.display())
        }
        _ => anyhow::Error::new(error).context(format!("cannot create {}", path.display())),
    })?;
    let format = if qcow2.is_some() { Format::Qcow2 } else { Format::Raw };
    let options = qcow2.map(|options| CreateOptions {
        virtual_size: size,
        backing: backing.map(|(name, format)| (name.into_os_string(), format.name().to_owned())),
        ..options
    });
    if let Err(error) = fill(&file, options, size).await {
        // It is ours, and worth nothing; the error says why.
        let _ = UringEnvironment.remove(&path).await;
        return Err(error.context(named()));
    }
    drop(file);
    if let Some(directory) = path.parent() {
        UringEnvironment.flush_directory(directory).await.with_context(|| format!("cannot make {} durable", path.display()))?;
    }
    let image = Named { path: path.clone(), format, allowed: AllowedDirectories::default(), shared: false };
    info::collect(image, false).await?.pop().with_context(|| format!("nothing is known of {}", path.display()))
}

async fn fill(file: &UringFile, options: Option<CreateOptions>, size: u64) -> Result<()> {
    file.set_sharing(Sharing::Writer).await?;
    match options {
        Some(options) => match Qcow2::<UringEnvironment>::create(file, &options).await {
            Err(error @ CreateError::Io { .. }) => Err(error.into()),
            Err(error) => usage(error.to_string()),
            Ok(()) => Ok(()),
        },
        None => {
            file.set_len(size).await?;
            Ok(file.flush().await?)
        }
    }
}

/// Size of the disk in the backing file, which must be there. Its locks are left alone: overlays are made above disks in use.
async fn size_of_backing(image: &Path, name: &Path, format: Format) -> Result<u64> {
    // Whoever opens the new image will take the name as a plain path only.
    let plain = AllowedDirectories::new([PathBuf::from("/")]).resolve(image, name.as_os_str().as_encoded_bytes());
    if let Err(error) = plain {
        return usage(format!("the name of the backing file: {error}"));
    }
    let path = image.parent().unwrap_or(Path::new("/")).join(name);
    let named = || format!("the backing file {}", path.display());
    let file = info::open(&Location::Trusted(path.clone())).await.context("the backing file")?;
    Ok(match format {
        Format::Raw => Raw::<UringEnvironment>::open(file, false).await.with_context(named)?.virtual_size(),
        Format::Qcow2 => Header::read(&file).await.with_context(named)?.virtual_size(),
    })
}
