//! `snapfence image`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use snapfence::protocol::ImageFormat;

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Show what an image's header says.
    #[command(after_help = "Reads the header and takes no lock, so that images in use can be looked at as well.")]
    Info {
        #[command(flatten)]
        image: Image,

        /// The layers beneath as well.
        #[arg(long)]
        backing_chain: bool,
    },

    /// List which parts of the disk have data, and in which layer.
    #[command(after_help = "DEPTH 0 is the image itself, 1 the layer beneath, and so on.")]
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
}
