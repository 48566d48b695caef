//! Images under the eyes of `qemu-img`.

use std::path::Path;
use std::process::Command;

use snapfence_image_format::storage::simulated::SimulatedEnvironment;

/// Checks some images of the environment's files, which must lie in one directory and name one another by plain names.
///
/// # Errors
/// What `qemu-img check` says about an image that is corrupt, or that leaks although it may not.
pub(crate) fn check(environment: &SimulatedEnvironment, images: &[&str], may_leak: bool) -> Result<(), String> {
    let scratch = tempfile::tempdir().expect("a directory for the test");
    let real = |path: &Path| scratch.path().join(path.file_name().expect("a file"));
    for file in environment.files() {
        environment.export(&file, real(&file)).expect("a copy of the file");
    }
    for image in images {
        let output = Command::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(real(Path::new(image)))
            .output()
            .map_err(|error| format!("qemu-img does not run: {error}"))?;
        // 0: nothing wrong; 3: leaks only.
        match output.status.code() {
            Some(0) => {}
            Some(3) if may_leak => {}
            code => {
                let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
                return Err(format!("qemu-img check of {image} ends with {code:?}:\n{text}"));
            }
        }
    }
    Ok(())
}
