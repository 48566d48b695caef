#!/bin/bash
# Changes the code on which the order of writes and the fence depend, one small thing at a time (cargo-mutants), and looks whether a test fails.
# Prints how many changes were found and which were not; docs/mutants.md says why those that remain are harmless.
#
#   tests/mutants.sh                     the files listed below
#   tests/mutants.sh FILE...             these only, for example image-format/src/rounds.rs
#
# RE is a pattern that the names of the changes must match (cargo mutants --list shows them), SHARD=k/n one part of them.
#
# Each change is tried twice. First with the simulations, which notice by themselves when nothing moves any more; then, if it was not found, with
# the tests of the library, where a change that lets something wait for ever shows only by the time that it takes. All of them try less than with
# `make test`, because every change costs a run. Ends with status 1 if something was not found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Debian keeps mke2fs, e2fsck, losetup and the like where only root looks.
export PATH=$PATH:/usr/sbin:/sbin

format_files=(
	image-format/src/rounds.rs
	image-format/src/stack/{fence,retire,settle}.rs
	image-format/src/qcow2/{writeback,busy,turn,lifecycle}.rs
)
cargo_mutants=27.1.0

name=mutants
# shellcheck source=tests/setup/debian.sh
. tests/setup/debian.sh

if ! cargo mutants --version >/dev/null 2>&1; then
	say "installing cargo-mutants $cargo_mutants"
	cargo install --quiet --locked "cargo-mutants@$cargo_mutants" || fail "cargo could not install cargo-mutants $cargo_mutants"
fi

files=("$@")
if [ ${#files[@]} -eq 0 ]; then files=("${format_files[@]}"); fi
output=$PWD/${MUTANTS_OUTPUT:-${CARGO_TARGET_DIR:-target}/mutants}
mkdir -p "$output"
chosen=()
for file in "${files[@]}"; do
	[ -e "$file" ] || fail "there is no file $file"
	chosen+=(--file "$file")
done
if [ -n "${RE:-}" ]; then chosen+=(--re "$RE"); fi
if [ -n "${SHARD:-}" ]; then chosen+=(--shard "$SHARD"); fi

export CARGO_TARGET_DIR=$output/build RUST_BACKTRACE=0
export SNAPFENCE_SEEDS=${SNAPFENCE_SEEDS:-10} SNAPFENCE_LENGTH=${SNAPFENCE_LENGTH:-2}

# Tries the chosen changes with some tests. What cargo-mutants says of its outcome is in its files.
try() {
	local baseline=$1 status=0
	shift
	cargo mutants --no-config --profile mutants --jobs 1 --output "$output" --colors never --baseline "$baseline" --timeout 120 --build-timeout 600 \
		--no-shuffle "${chosen[@]}" "$@" || status=$?
	# 2: something was not found; 3: something did not end.
	case $status in 0 | 2 | 3) ;; *) fail "cargo-mutants ended with status $status" ;; esac
}

rm -rf "$output/mutants.out" "$output/mutants.out.old" "$output/first"
try run -- --test handshake_shuttle --test crash_states --test model -- --skip a_seed_repeats_to_the_byte
cp -r "$output/mutants.out" "$output/first"
if [ -s "$output/first/missed.txt" ] || [ -s "$output/first/timeout.txt" ]; then
	# Those that take long and look at other code: our check, io_uring, what a killed process leaves in a cache.
	try run --iterate -- --lib --test qcow2 --test stack_raw -- \
		--skip storage::uring::file --skip qcow2::check --skip killed:: --skip tables_written_over_others
fi

count() { cat "$@" 2>/dev/null | sort -u | wc -l; }
found=$(count "$output/first/caught.txt")
later=0 waited=$(count "$output/first/timeout.txt") missed=0
if [ -e "$output/mutants.out/previously_caught.txt" ]; then
	later=$(count "$output/mutants.out/caught.txt")
	waited=$(count "$output/mutants.out/timeout.txt")
	missed=$(count "$output/mutants.out/missed.txt")
fi
say "$((found + later)) found ($found by simulations), $waited did not end, $(count "$output/first/unviable.txt") did not build, $missed not found (in $SECONDS s)"
if [ "$missed" -gt 0 ]; then
	sort -u "$output/mutants.out/missed.txt" | sed 's/^/  /'
	exit 1
fi
