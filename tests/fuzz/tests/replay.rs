//! Every input of the corpus goes through its target: those that reach much, and those that once broke something.

use std::path::{Path, PathBuf};

use snapfence_fuzz::TARGETS;

/// Most files and bytes of the whole corpus.
const MAX_FILES: usize = 200;
const MAX_BYTES: usize = 1 << 20;

/// The inputs of a target, in order of their names.
fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a folder that can be read").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("a file that can be read"))).collect()
}

fn replay(target: &str) {
    let (_, run) = TARGETS.iter().find(|(name, _)| *name == target).expect("a target");
    let inputs = inputs(target);
    assert!(!inputs.is_empty(), "there is nothing to replay");
    run(&[]);
    for (path, bytes) in &inputs {
        // The name comes out with a panic only.
        println!("{}", path.display());
        run(bytes);
    }
    println!("{} inputs", inputs.len());
}

#[test]
fn damaged_catalogues_are_refused() {
    replay("catalogue");
}

#[test]
fn front_ends_leave_nothing_behind() {
    replay("vhost_user");
}

#[test]
fn chains_come_back_once() {
    replay("virtqueue");
}

#[test]
fn control_lines_are_answered() {
    replay("control");
}

#[test]
fn images_keep_what_is_written_or_are_refused() {
    replay("qcow2");
}

#[test]
fn the_corpus_is_small_and_every_folder_has_a_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut names: Vec<_> = std::fs::read_dir(corpus)
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    assert_eq!(names, TARGETS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let sizes: Vec<usize> = names.iter().flat_map(|name| inputs(name)).map(|(_, bytes)| bytes.len()).collect();
    assert!(sizes.len() < MAX_FILES, "{} files", sizes.len());
    assert!(sizes.iter().sum::<usize>() < MAX_BYTES, "{} bytes", sizes.iter().sum::<usize>());
}
