# make demo    a guest boots from snapfence stacks and is snapshotted live; ends with a table and a plot
# make test    everything that is checked: formatting, lints, documentation, unit and whole-system tests, a minute of each fuzz target
# make sim     the whole daemon in a simulation, as many runs as SEEDS says
# make build   the programs, optimised
# make bench   what finding a place in a chain costs, at different depths; what the daemon costs, and a snapshot; how fast it is beside others
# make bench-full the same for longer, large requests, chains of up to a thousand layers, and fio in a guest: about two hours
# make guest-fio fio in a real guest, on three disks of ours and of qemu-storage-daemon in turns (benches/fio)
# make fuzz    what strangers may hand to the programs, made up by libFuzzer, TIME=60 seconds for each kind (tests/fuzz), address sanitizer included
# make mutants whether the tests notice small changes of the code that writes in order, and of the fence (cargo-mutants; docs/mutants.md)
# make coverage how many lines of image formats, fence and queues the faster tests reach (cargo-llvm-cov)
# make guest   the guest that the tests and the demo boot
# make install what this machine lacks for the above, from Debian's packages; make install-fuzzer that and what fuzzing takes, by rustup
# make fmt, make lint, make clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory
.PHONY: demo test sim build bench bench-full guest-fio fuzz mutants coverage guest install install-fuzzer fmt fmt-check lint doc clean

# Debian keeps mke2fs, e2fsck, losetup and the like where only root looks.
export PATH := $(PATH):/usr/sbin:/sbin

# The folder that cargo builds into; the scripts use the same.
TARGET := $(or $(CARGO_TARGET_DIR),target)
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
GUEST_FIO_ARGUMENTS ?=
SEEDS ?= 20000

demo: install
	@cargo build --release --workspace --bins
	@tests/guest/build.sh root
	@$(TARGET)/release/snapfence-demo --output $(TARGET)/demo $(DEMO_ARGUMENTS)

test: install fmt-check lint doc
	@cargo build --workspace --bins
	@tests/guest/build.sh root
	@tests/run.sh

sim:
	@SNAPFENCE_SEEDS=$(SEEDS) cargo test --package snapfenced --test simulation nothing_is_lost -- --nocapture

build: install
	@cargo build --release --workspace --bins

bench: install
	@cargo build --release --package snapfence-benches --package snapfenced --bins
	@$(TARGET)/release/lookup
	@$(TARGET)/release/daemon
	@$(TARGET)/release/compare --output $(TARGET)/bench $(BENCH_ARGUMENTS)

bench-full: install
	@cargo build --release --package snapfence-benches --package snapfenced --bins
	@$(TARGET)/release/lookup
	@$(TARGET)/release/daemon
	@$(TARGET)/release/compare --suites throughput,sequential,snapshots,chains --blocks 15 --seconds 2 --snapshots 1000 --devices 1,2,4,16 \
		--output $(TARGET)/bench $(BENCH_ARGUMENTS)
	@$(MAKE) guest-fio

guest-fio: install
	@cargo build --release --package snapfence-benches --package snapfenced --package snapfence --bins
	@tests/guest/build.sh
	@$(TARGET)/release/guest-fio --output $(TARGET)/bench $(GUEST_FIO_ARGUMENTS)

fuzz: install-fuzzer
	@tests/fuzz.sh

mutants:
	@tests/mutants.sh

coverage:
	@tests/coverage.sh

guest: install
	@tests/guest/build.sh root

install:
	@tests/setup/install.sh

install-fuzzer:
	@tests/setup/install.sh fuzzer

fmt:
	@cargo fmt --all

fmt-check:
	@cargo fmt --all --check

lint:
	@cargo clippy --version >/dev/null 2>&1 || { echo 'lint: cargo clippy is missing; install it (for example: rustup component add clippy)' >&2; exit 1; }
	@cargo clippy --workspace --all-targets -- -D warnings

doc:
	@RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items --quiet

clean:
	@cargo clean
