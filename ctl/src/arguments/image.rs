//! `snapfence image`

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use snapfence::protocol::ImageFormat;

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make a new image; one that exists is never overwritten.
    #[command(after_help = "\
Examples: snapfence image create vda.qcow2 20G
          snapfence image create vda.monday.qcow2 --backing-file vda.qcow2 --backing-format qcow2")]
    Create(CreateArguments),

    /// Show what an image's header says.
    #[command(after_help = "Reads the header and takes no lock, so that images in use can be looked at as well, with and without -U.")]
    Info {
        #[command(flatten)]
        image: Image,

        /// The layers beneath as well.
        #[arg(long)]
        backing_chain: bool,
    },

    /// Find out whether an image's tables and reference counts agree. The exit status is 1 if they do not.
    #[command(after_help = "\
Refused while another program or device writes to the image, unless -U is given; then what is under way may look like an error. Leaks are space that nothing uses; they do no harm. Anything else may destroy \
data: copy the image first, then try `qemu-img check -r all` on the copy.")]
    Check {
        #[command(flatten)]
        image: Image,

        /// What may be changed. Leaks are repaired only if there is nothing worse.
        #[arg(long, value_name = "WHAT", conflicts_with = "force_share")]
        repair: Option<Repair>,
    },

    /// List which parts of the disk have data, and in which layer.
    #[command(after_help = "DEPTH 0 is the image itself, 1 the layer beneath, and so on. An image in use is refused unless -U is given.")]
    Map {
        #[command(flatten)]
        image: Image,
    },
}

/// An image and what may be read with it.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// The image file or block device.
    #[arg(value_name = "IMAGE")]
    pub(crate) path: PathBuf,

    /// Its format: raw or qcow2. Never guessed from the file.
    #[arg(long, short, value_name = "FORMAT", default_value = "qcow2")]
    pub(crate) format: ImageFormat,

    /// A directory, beside that of the image itself, in which the files named by images may be opened. Repeatable.
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_dir: Vec<PathBuf>,

    /// Look at images that are in use as well. What changes meanwhile may look as it never was.
    #[arg(long, short = 'U')]
    pub(crate) force_share: bool,
}

/// What `image check` may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Repair {
    /// Reference counts that are too high.
    Leaks,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// The file to make.
    #[arg(value_name = "IMAGE")]
    pub(crate) path: PathBuf,

    /// Size of the disk in bytes, or with K, M, G, T (times 1024) and so on. Without it, that of the backing file.
    #[arg(required_unless_present = "backing_file")]
    pub(crate) size: Option<Size>,

    /// The format: raw or qcow2.
    #[arg(long, short, value_name = "FORMAT", default_value = "qcow2")]
    pub(crate) format: ImageFormat,

    /// The image beneath the new one, as it is to be named there: relative to the new image's directory, or absolute.
    #[arg(long, short, value_name = "FILE", requires = "backing_format")]
    pub(crate) backing_file: Option<PathBuf>,

    /// Format of the backing file: raw or qcow2. Never guessed.
    #[arg(long, short = 'F', value_name = "FORMAT", requires = "backing_file")]
    pub(crate) backing_format: Option<ImageFormat>,

    /// Allocation unit, a power of two from 512 to 2M [default: 64K; 128K above a backing file].
    #[arg(long, value_name = "SIZE")]
    pub(crate) cluster_size: Option<Size>,

    /// Sub-clusters, 32 in each cluster: small writes then copy little [default: off; on above a backing file].
    #[arg(long, value_name = "on|off")]
    pub(crate) extended_l2: Option<Switch>,

    /// Width of reference counts: 1, 2, 4, 8, 16, 32 or 64 [default: 16].
    #[arg(long, value_name = "N")]
    pub(crate) refcount_bits: Option<u32>,

    /// Version of qcow2: 0.10 (version 2) for old programs, or 1.1 (version 3) [default: 1.1].
    #[arg(long, value_name = "VERSION")]
    pub(crate) compat: Option<Compat>,

    /// How programs that compress clusters are to do it [default: zlib].
    #[arg(long, value_name = "TYPE")]
    pub(crate) compression_type: Option<CompressionType>,

    /// Let other programs update reference counts late; snapfence never does [default: off].
    #[arg(long, value_name = "on|off")]
    pub(crate) lazy_refcounts: Option<Switch>,

    /// What is allocated at once: off for nothing, metadata for all tables [default: off].
    #[arg(long, value_name = "WHAT")]
    pub(crate) preallocation: Option<Preallocation>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compat {
    /// Version 2.
    #[value(name = "0.10", alias = "2")]
    V2,
    /// Version 3.
    #[value(name = "1.1", alias = "3")]
    V3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionType {
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preallocation {
    Off,
    Metadata,
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const UNITS: &str = "KMGTPE";
        let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        let power = match &text[digits.len()..] {
            "" => 0,
            unit if unit.len() == 1 => UNITS.find(&unit.to_ascii_uppercase()).ok_or("the units are K, M, G, T, P and E")? + 1,
            _ => return Err("the units are K, M, G, T, P and E"),
        };
        let number: u64 = digits.parse().map_err(|_| "a size is a whole number with a unit, such as 20G")?;
        number.checked_mul(1 << (10 * power)).map(Self).ok_or("the size is beyond all limits")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("512", 512), ("4k", 4096), ("3M", 3 << 20), ("20G", 20 << 30), ("1t", 1 << 40), ("7E", 7 << 60)] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "k", "-1", "1.5G", "1KiB", "1X", "16E", "99999999999999999999", "1 G", "\u{e4}"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
