//! Backing chains that lead astray.

use snapfence_image_format::storage::MemoryEnvironment;

use crate::image::*;
use crate::ordeal::endure;

#[test]
fn chains_that_lead_astray_are_refused() {
    let image = |name: &[u8], format| {
        let mut image = Image::sound();
        image.back(name, Some(format));
        image.0
    };
    let environment = MemoryEnvironment::new();
    environment.put("/images/one", &image(b"two", "qcow2"));
    environment.put("/images/two", &image(b"sub/three", "qcow2"));
    environment.put("/images/sub/three", &image(b"../one", "qcow2"));
    environment.put("/images/over-link", &image(b"link", "raw"));
    environment.put("/images/over-folder-link", &image(b"folder-link/base", "raw"));
    environment.put("/images/over-broken", &image(b"broken", "qcow2"));
    environment.put("/images/over-folder", &image(b"sub", "raw"));
    environment.put("/outside/base", &[1; 512]);
    environment.put("/images/broken", &Image::sound().put64(40, 8).0);
    environment.symlink("/outside/base", "/images/link").expect("a new name");
    environment.symlink("/outside", "/images/folder-link").expect("a new name");
    for (path, expected) in [
        ("/images/one", "/images/one: is in the chain twice"),
        ("/images/sub/three", "lies outside the allowed directories (/images/sub)"),
        ("/images/over-link", "a symbolic link is on the way"),
        ("/images/over-folder-link", "a symbolic link is on the way"),
        ("/images/over-broken", "/images/broken: the L1 table at 0x8 is not on a cluster boundary"),
        ("/images/over-folder", "/images/sub: cannot be opened for reading"),
    ] {
        let outcome = endure(&environment, path);
        assert_eq!(outcome.open, outcome.open_for_writing);
        assert!(outcome.open.as_deref().unwrap_or_default().contains(expected), "{path}: {outcome:?}");
    }
}
