//! Images that strangers have written, at the daemon: each is added as a device and given as the overlay of a device that is served. Each is
//! answered with an error of its own that names the file and says what is wrong, and is left as it was; where the damage shows only in use, the
//! front-end gets I/O errors. After each one the daemon is the same process with the same descriptors, and a neighbour's requests do what they
//! should.
//!
//! The damages are those that the image library is put through: its tables are compiled into this test, with another `refuse`.

mod common;
#[path = "../../image-format/tests/hostile/headers.rs"]
mod headers;
#[path = "../../image-format/tests/hostile/image.rs"]
mod image;
#[path = "../../image-format/tests/hostile/names.rs"]
mod names;
#[path = "../../image-format/tests/hostile/tables.rs"]
mod tables;

use std::path::{Path, PathBuf};

use common::daemon::Daemon;
use common::machine::{DISCARD, Data, FLUSH, IN, Link, Machine, OUT, WRITE_ZEROES, range};
use serde_json::json;
use snapfence::client::{Client, ClientError};

use image::{CLUSTER, Image, SIZE};

/// Where the damage shows, as the library's test says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Open,
    OpenForWriting,
    Read,
    Write,
    Close,
    Check,
    Nothing,
}

/// One kind of damage: what it is called, what is done to the image, where that shows, and a part of the message.
type Damage = (&'static str, fn(&mut Image) -> &mut Image, Step, &'static str);

/// What a request answers that failed in the back-end.
const IOERR: u8 = 1;
const SECTORS: u64 = SIZE / 512;
/// Bytes of a read.
const PIECE: usize = 64 << 10;

/// A daemon with a disk that it serves all the time.
struct Place {
    // Ends before the directory goes.
    daemon: Daemon,
    client: Client,
    machine: Machine,
    _link: Link,
    /// Descriptors that it has when nothing but the neighbour is served.
    descriptors: usize,
    id: u32,
    directory: tempfile::TempDir,
    /// Makes what is written, and the names of devices, which the daemon remembers, new each time.
    tries: u64,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("base.raw"), vec![5; SIZE as usize]).expect("a file");
        common::make_qcow2(&path("neighbour.qcow2"), snapfence_image_format::qcow2::CreateOptions::standalone(SIZE));
        let device = format!("name=neighbour,image={},format=qcow2,socket={}", path("neighbour.qcow2").display(), path("n.sock").display());
        let daemon = Daemon::start(directory.path(), &[device]);
        let machine = Machine::new(1);
        let link = machine.connect(&path("n.sock"));
        let (client, id) = (daemon.client(), daemon.id());
        let mut place = Self { daemon, client, machine, _link: link, descriptors: 0, id, directory, tries: 0 };
        // What is made at the first use is there afterwards.
        place.put("hostile.qcow2", &Image::sound());
        assert_eq!(place.add("hostile.qcow2").map_err(|error| error.to_string()), Ok(()));
        let statuses = place.use_it();
        assert!(statuses.iter().all(|(_, status)| *status == 0), "{statuses:?}");
        place.remove().expect("a sound image is closed");
        place.neighbour_works();
        place.settle();
        place.descriptors = place.daemon.descriptors();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn put(&self, name: &str, image: &Image) {
        std::fs::write(self.path(name), &image.0).expect("a file");
    }

    fn add(&mut self, name: &str) -> Result<(), ClientError> {
        self.tries += 1;
        let arguments = json!({ "name": self.guest(), "image": self.path(name), "format": "qcow2", "socket": self.path("guest.sock") });
        self.client.execute("device-add", arguments).map(drop)
    }

    /// The device that was added last.
    fn guest(&self) -> String {
        format!("guest{}", self.tries)
    }

    fn remove(&mut self) -> Result<(), ClientError> {
        let arguments = json!({ "name": self.guest(), "force": true });
        self.client.execute("device-remove", arguments).map(drop)
    }

    fn snapshot(&mut self, name: &str) -> Result<(), ClientError> {
        let member = json!({ "device": "neighbour", "overlay": self.path(name) });
        let name = format!("s{}", self.tries);
        self.client.execute("snapshot-create", json!({ "name": name, "devices": [member] })).map(drop)
    }

    /// Reads, writes, zeroes and discards all over the disk, and gives what was done with its status.
    fn use_it(&mut self) -> Vec<(u32, u8)> {
        let mut machine = Machine::new(1);
        let link = machine.connect(&self.path("guest.sock"));
        let queue = &mut machine.queues[0];
        let mut statuses = Vec::new();
        let step = (PIECE / 512) as u64;
        for sector in (0..SECTORS).step_by(step as usize) {
            statuses.push((IN, queue.request(IN, sector, Data::In(PIECE)).status));
        }
        // A part of a cluster, so that the rest has to be filled from what is there.
        for sector in (0..SECTORS).step_by(step as usize) {
            statuses.push((OUT, queue.request(OUT, sector + 1, Data::Out(&[9; 1024])).status));
        }
        for sector in (0..SECTORS).step_by(step as usize) {
            for kind in [WRITE_ZEROES, DISCARD] {
                statuses.push((kind, queue.request(kind, 0, Data::Out(&range(sector, step as u32, 0))).status));
            }
        }
        statuses.push((FLUSH, queue.request(FLUSH, 0, Data::None).status));
        drop(link);
        statuses
    }

    /// Writes what was never written before, and reads it.
    fn neighbour_works(&mut self) {
        self.tries += 1;
        let (sector, bytes) = (self.tries % SECTORS, self.tries.to_le_bytes().repeat(64));
        let queue = &mut self.machine.queues[0];
        assert_eq!(queue.request(OUT, sector, Data::Out(&bytes)).status, 0);
        assert_eq!(queue.request(FLUSH, 0, Data::None).status, 0);
        assert_eq!(queue.request(IN, sector, Data::In(512)).status, 0);
        assert_eq!(queue.data(0, 512), bytes);
    }

    /// Waits until connections that were dropped are gone.
    fn settle(&mut self) {
        let client = &mut self.client;
        self.daemon.wait_until("front-ends to have gone", |_| {
            let devices = client.execute("device-list", json!({})).expect("an answer");
            devices.as_array().expect("a list").iter().all(|device| device["name"] == "neighbour" || device["connected"] == false)
        });
    }

    /// The daemon is as it was.
    fn is_unharmed(&mut self) {
        self.neighbour_works();
        let allowed = self.descriptors;
        self.daemon.wait_until("descriptors to be closed", |daemon| daemon.descriptors() <= allowed);
        assert_eq!(self.daemon.id(), self.id);
    }
}

/// Checks that an error says what it should about the file.
fn check_error(name: &str, path: &Path, result: Result<(), ClientError>, expected: &str) {
    let Err(ClientError::Failed(failure)) = result else { panic!("{name}: not refused: {result:?}") };
    let file = path.display().to_string();
    assert!(failure.desc.contains(&file), "{name}: {file} is not named: {failure}");
    assert!(failure.desc.contains(expected), "{name}: no {expected:?} in: {failure}");
    assert!(!failure.desc.contains(char::is_control), "{name}: {failure:?}");
}

/// Reasons for refusing an overlay that come before the damage is met, or in its place.
const OF_OVERLAYS: [&str; 5] =
    ["it names no backing file", "its backing file is ", "it says that ", "its virtual size is ", "it is not empty: "];

/// Gives the daemon an image with each damage of a table.
fn refuse(sound: fn() -> Image, damages: &[Damage]) {
    let mut place = Place::new();
    let path = place.path("hostile.qcow2");
    for &(name, damage, step, expected) in damages {
        let mut damaged = sound();
        damage(&mut damaged);
        place.put("hostile.qcow2", &damaged);
        let logged = place.daemon.log().len();
        let added = place.add("hostile.qcow2");
        if matches!(step, Step::Open | Step::OpenForWriting) {
            // Where the file beneath is at fault, that is the one to name.
            check_error(name, place.directory.path(), added, expected);
            assert!(std::fs::read(&path).expect("a file") == damaged.0, "{name}: the image was changed");
            assert!(!place.path("guest.sock").exists(), "{name}: a socket is left");
        } else {
            assert!(added.is_ok(), "{name}: {added:?}");
            let statuses = place.use_it();
            let removed = place.remove();
            let log = place.daemon.log().split_off(logged);
            let told =
                |event: &str| log.lines().any(|line| line.contains(event) && line.contains(&place.guest()) && line.contains(expected));
            let failed = |kind| statuses.iter().any(|(done, status)| *done == kind && *status == IOERR);
            match step {
                Step::Read => assert!(failed(IN) && told("request_failed"), "{name}: {statuses:?}: {log}"),
                Step::Write => assert!(failed(OUT) && told("request_failed"), "{name}: {statuses:?}: {log}"),
                Step::Close => {
                    let Err(ClientError::Failed(failure)) = &removed else { panic!("{name}: {removed:?}: {statuses:?}") };
                    assert!(failure.desc.contains(expected) && told("close_failed"), "{name}: {failure}: {log}");
                }
                _ => assert!(removed.is_ok() && !log.contains("request_failed"), "{name}: {statuses:?}: {log}"),
            }
        }
        place.is_unharmed();

        let overlay = as_overlay(damaged);
        place.put("hostile.qcow2", &overlay);
        let taken = place.snapshot("hostile.qcow2");
        let own = taken.as_ref().is_err_and(|error| OF_OVERLAYS.iter().any(|reason| error.to_string().contains(reason)));
        check_error(name, &path, taken, if own { "" } else { expected });
        assert!(std::fs::read(&path).expect("a file") == overlay.0, "{name}: the overlay was changed");
        place.is_unharmed();
    }
    let Place { daemon, client, .. } = place;
    drop(client);
    daemon.stop();
}

/// The image with the name of the neighbour's top in it, so that it is looked into, unless the damage is in that place.
fn as_overlay(mut image: Image) -> Image {
    let version_and_clusters = |image: &Image| (image.0[4..8].to_vec(), image.0[20..24].to_vec());
    let is_usual = image.0.len() >= CLUSTER && version_and_clusters(&image) == version_and_clusters(&Image::sound());
    if is_usual && image.0[8..20] == [0; 12] && image.0[112..120] == [0; 8] {
        image.back(b"neighbour.qcow2", Some("qcow2"));
    }
    image
}
