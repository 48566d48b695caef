use std::cell::RefCell;
use std::rc::Rc;

use futures_util::future::join;

use super::*;
use crate::buffer::AlignedBuffer;
use crate::runtime::WaitQueue;
use crate::storage::StorageExt;

fn trusted(path: &str) -> Location {
    Location::Trusted(path.into())
}

async fn file(environment: &SimulatedEnvironment, access: Access) -> SimulatedFile {
    environment.open(&trusted("/file"), access, CacheMode::Direct).await.unwrap()
}

fn sector(byte: u8) -> Buffer {
    Buffer::Owned(AlignedBuffer::copy_of(&[byte; 512]))
}

/// Writes from several threads with a few waits, and says in which order everything ended.
fn busy_run(seed: u64) -> (Vec<Operation>, Vec<(usize, Duration)>, Vec<u8>) {
    let mut simulation = Simulation::new(seed);
    let environment = simulation.environment().clone();
    environment.put("/file", &[0; 64 * 512]);
    let ends = Rc::new(RefCell::new(Vec::new()));
    for thread in 0..3 {
        let executor = simulation.add_executor();
        for task in 0..4 {
            let (environment, ends) = (environment.clone(), Rc::clone(&ends));
            executor.spawn(async move {
                let file = file(&environment, Access::Write).await;
                for round in 0..5 {
                    let at = HostOffset::new(environment.random() % 64 * 512);
                    file.write(at, sector(round)).await.0.unwrap();
                }
                environment.sleep_until(environment.now() + Duration::from_micros(environment.random() % 100)).await;
                file.flush().await.unwrap();
                ends.borrow_mut().push((thread * 10 + task, environment.now()));
            });
        }
    }
    simulation.run_until_stalled();
    assert_eq!(ends.borrow().len(), 12);
    let crashed = environment.crash();
    (environment.log(), ends.take(), crashed.bytes("/file").unwrap())
}

#[test]
fn a_seed_repeats_to_the_byte_and_another_differs() {
    assert_eq!(busy_run(7), busy_run(7));
    assert_ne!(busy_run(7), busy_run(8));
}

#[test]
fn only_flushed_writes_survive_every_crash() {
    for seed in 0..50 {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        environment.put("/file", &[0; 1024]);
        let inner = environment.clone();
        simulation.block_on(async move {
            let file = file(&inner, Access::Write).await;
            file.write(HostOffset::ZERO, sector(1)).await.0.unwrap();
            file.flush().await.unwrap();
            file.write(HostOffset::new(512), sector(2)).await.0.unwrap();
        });
        let states: Vec<_> = environment.crash_states(100).map(|state| state.bytes("/file").unwrap()).collect();
        assert_eq!(states.len(), 2, "seed {seed}");
        assert!(states.iter().all(|bytes| bytes[..512] == [1; 512]), "seed {seed}");
        assert_eq!(states.iter().map(|bytes| bytes[512]).collect::<Vec<_>>(), [0, 2], "seed {seed}");
    }
}

/// Sectors that could be seen before the write failed are in the cache like others.
#[test]
fn what_can_be_seen_of_a_failed_write_is_durable_after_a_flush() {
    let mut seen = 0;
    for seed in 0..200 {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        environment.put("/file", &[7; 4096]);
        let inner = environment.clone();
        simulation.block_on(async move {
            let file = file(&inner, Access::Write).await;
            file.set_len(8192).await.unwrap();
            inner.set_space_limit(Some(inner.allocated("/file").unwrap()));
            file.write(HostOffset::ZERO, Buffer::Owned(AlignedBuffer::copy_of(&[1; 8192]))).await.0.unwrap_err();
            file.flush().await.unwrap();
        });
        let bytes = environment.bytes("/file").unwrap();
        assert!(environment.crash().bytes("/file").unwrap() == bytes, "seed {seed}");
        seen += usize::from(bytes.contains(&1));
    }
    assert!(seen > 0);
}

#[test]
fn a_flush_covers_only_what_had_ended_when_it_began() {
    let mut lost = 0;
    for seed in 0..50 {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        environment.put("/file", &[0; 512]);
        let inner = environment.clone();
        simulation.block_on(async move {
            let file = file(&inner, Access::Write).await;
            let writing = file.write(HostOffset::ZERO, sector(1));
            file.flush().await.unwrap();
            writing.await.0.unwrap();
        });
        lost += usize::from(environment.crash_states(2).any(|state| state.bytes("/file").unwrap() == [0; 512]));
    }
    assert!(lost > 0);
}

#[test]
fn the_power_goes_off_after_exactly_as_many_effects() {
    let run = |cut: u64| {
        let mut simulation = Simulation::new(3);
        let environment = simulation.environment().clone();
        environment.put("/file", &[0; 512 * 8]);
        environment.stop_after(cut);
        let inner = environment.clone();
        let ended = simulation.run(async move {
            let file = file(&inner, Access::Write).await;
            for at in 0..8 {
                file.write(HostOffset::new(at * 512), sector(1)).await.0.unwrap();
            }
        });
        (ended.is_some(), environment.is_stopped(), environment.effects(), environment.restarted().bytes("/file").unwrap())
    };
    for cut in 0..8 {
        let (ended, stopped, effects, bytes) = run(cut);
        assert_eq!((ended, stopped, effects), (false, true, cut));
        let written = cut as usize * 512;
        assert!(bytes[..written].iter().all(|byte| *byte == 1) && bytes[written..].iter().all(|byte| *byte == 0));
    }
    let (ended, stopped, ..) = run(8);
    assert_eq!((ended, stopped), (true, false));
}

#[test]
fn operations_under_way_are_torn_by_a_crash() {
    let mut simulation = Simulation::new(1);
    let environment = simulation.environment().clone();
    environment.put("/file", &[0; 2048]);
    environment.stop_after(0);
    let inner = environment.clone();
    let ended = simulation.run(async move {
        let file = file(&inner, Access::Write).await;
        file.write(HostOffset::ZERO, Buffer::Owned(AlignedBuffer::copy_of(&[1; 2048]))).await.0.unwrap();
    });
    assert!(ended.is_none());
    let states: std::collections::BTreeSet<_> = environment.crash_states(1000).map(|state| state.bytes("/file").unwrap()).collect();
    assert_eq!(states.len(), 16);
}

#[test]
fn dropped_transfers_run_to_their_end() {
    let mut simulation = Simulation::new(1);
    let environment = simulation.environment().clone();
    environment.put("/file", &[0; 512]);
    let inner = environment.clone();
    simulation.block_on(async move { drop(file(&inner, Access::Write).await.write(HostOffset::ZERO, sector(1))) });
    simulation.run_until_stalled();
    assert_eq!(environment.bytes("/file").unwrap(), [1; 512]);
}

#[test]
fn faults_strike_once_or_for_ever_and_hung_operations_go_on_when_released() {
    let mut simulation = Simulation::new(5);
    let environment = simulation.environment().clone();
    environment.put("/file", &[0; 512]);
    environment.inject(Fault::once(OperationKind::Write, 1));
    environment.inject(Fault::lasting(OperationKind::Flush, 0).with(FaultEffect::Error(libc::ENOSPC)));
    let inner = environment.clone();
    simulation.block_on(async move {
        let file = file(&inner, Access::Write).await;
        let mut results = Vec::new();
        for _ in 0..3 {
            results.push(file.write(HostOffset::ZERO, sector(1)).await.0.is_ok());
        }
        assert_eq!(results, [true, false, true]);
        for _ in 0..2 {
            assert_eq!(file.flush().await.unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
        inner.clear_faults();
        file.flush().await.unwrap();
        inner.inject(Fault::once(OperationKind::Read, 0).with(FaultEffect::Hang));
        let releaser = inner.clone();
        spawn(async move {
            releaser.sleep_until(releaser.now() + Duration::from_secs(3600)).await;
            releaser.release_hung();
        });
        let before = inner.now();
        file.read(HostOffset::ZERO, sector(0)).await.0.unwrap();
        assert!(inner.now() - before >= Duration::from_secs(3600));
    });
}

#[test]
fn short_transfers_are_resumed() {
    let mut simulation = Simulation::new(6);
    let environment = simulation.environment().clone();
    environment.put("/file", &[0; 2048]);
    let inner = environment.clone();
    let torn = simulation.block_on(async move {
        let file = file(&inner, Access::Write).await;
        let mut torn = 0;
        for value in 1..40 {
            inner.inject(Fault::once(OperationKind::Write, 0).with(FaultEffect::Short));
            inner.inject(Fault::once(OperationKind::Read, 0).with(FaultEffect::Short));
            let bytes = || AlignedBuffer::copy_of(&[value; 2048]).into();
            let before = inner.effects();
            let ((written, _), (read, buffer)) = join(file.write(HostOffset::ZERO, bytes()), file.read(HostOffset::ZERO, bytes())).await;
            written.unwrap();
            read.unwrap();
            assert_eq!(inner.effects() - before, 2, "a crash may come between the parts");
            let seen = buffer.into_owned();
            assert!(seen.iter().all(|byte| *byte == value || *byte == value - 1), "{value}");
            torn += u32::from(seen[0] != seen[2047]);
            assert_eq!(inner.bytes("/file").unwrap(), [value; 2048]);
        }
        torn
    });
    assert!(torn > 0, "no read saw a part of a write");
}

#[test]
fn a_full_disk_takes_only_what_fits() {
    for (is_quota, error) in [(false, io::ErrorKind::StorageFull), (true, io::ErrorKind::QuotaExceeded)] {
        let mut simulation = Simulation::new(5);
        let environment = simulation.environment().clone();
        environment.put("/file", &[0; 4096]);
        if is_quota {
            environment.set_quota(Some(2 * 4096));
        } else {
            environment.set_space_limit(Some(2 * 4096));
        }
        let inner = environment.clone();
        simulation.block_on(async move {
            let file = file(&inner, Access::Write).await;
            file.write(HostOffset::new(4096), sector(1)).await.0.unwrap();
            let full = |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), error);
            full(file.write(HostOffset::new(8192), sector(1)).await.0);
            full(file.allocate(HostOffset::new(8192), 1).await);
            file.write(HostOffset::new(512), sector(1)).await.0.unwrap();
            file.punch(HostOffset::ZERO, 4096).await.unwrap();
            file.write(HostOffset::new(8192), sector(1)).await.0.unwrap();
        });
    }
}

#[test]
fn names_need_their_directory_flushed() {
    for seed in 0..20 {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        let inner = environment.clone();
        simulation.block_on(async move {
            let new = inner.open(&trusted("/d/new"), Access::CreateNew, CacheMode::Direct).await.unwrap();
            new.write_bytes(HostOffset::ZERO, &[1; 512]).await.unwrap();
            new.flush().await.unwrap();
        });
        let names: Vec<_> = environment.crash_states(10).map(|state| state.files().len()).collect();
        assert_eq!(names, [0, 1], "seed {seed}");
        let inner = environment.clone();
        simulation.block_on(async move {
            inner.flush_directory(Path::new("/d")).await.unwrap();
            inner.rename(Path::new("/d/new"), Path::new("/d/old")).await.unwrap();
        });
        let names: Vec<_> = environment.crash_states(10).flat_map(|state| state.files()).collect();
        assert_eq!(names, [PathBuf::from("/d/new"), PathBuf::from("/d/old")], "seed {seed}");
        assert_eq!(environment.crash().files().len(), 1);
    }
}

#[test]
fn threads_interleave_and_wake_one_another() {
    let mut orders = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let mut simulation = Simulation::new(seed);
        let shared = Rc::new((RefCell::new(Vec::new()), WaitQueue::new()));
        for thread in 0..3 {
            let shared = Rc::clone(&shared);
            simulation.add_executor().spawn(async move {
                shared.0.borrow_mut().push(thread);
                shared.1.notify_all();
            });
        }
        let waiting = Rc::clone(&shared);
        simulation.block_on(async move { waiting.1.wait_until(|| (waiting.0.borrow().len() == 3).then_some(())).await });
        orders.insert(shared.0.take());
    }
    assert!(orders.len() > 3);
}

#[test]
fn a_kill_leaves_everything_to_be_seen_and_nothing_more_durable() {
    let mut simulation = Simulation::new(7);
    let environment = simulation.environment().clone();
    environment.put("/file", &[1; 1024]);
    let inner = environment.clone();
    simulation.block_on(async move {
        let file = inner.open(&trusted("/file"), Access::Write, CacheMode::Direct).await.unwrap();
        file.write_bytes(HostOffset::ZERO, &[2; 512]).await.unwrap();
    });
    let killed = environment.killed();
    assert_eq!(killed.bytes("/file").unwrap()[..513], [[2; 512].as_slice(), &[1]].concat());
    let left = |environment: &SimulatedEnvironment| -> std::collections::BTreeSet<u8> {
        environment.crash_states(8).map(|state| state.bytes("/file").unwrap()[0]).collect()
    };
    assert_eq!(left(&killed), [1, 2].into(), "a power cut may still take it");
    let mut simulation = Simulation::on(killed.clone());
    let inner = killed.clone();
    simulation.block_on(async move {
        // Without leave to write, through another descriptor.
        inner.open(&trusted("/file"), Access::Read, CacheMode::Direct).await.unwrap().flush().await.unwrap();
    });
    assert_eq!(left(&killed), [2].into());
}
