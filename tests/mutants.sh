#!/bin/bash
# Changes the code on which the order of writes and the fence depend, one small thing at a time (cargo-mutants), and looks whether a test fails.
# Prints how many changes were found and which were not; docs/mutants.md says why those that remain are harmless.
#
#   tests/mutants.sh                     the files listed below
#   tests/mutants.sh FILE...             these only, for example image-format/src/rounds.rs
#
# RE is a pattern that the names of the changes must match (cargo mutants --list shows them), SHARD=k/n one part of them.
#
# Each change is tried with tests that take seconds: of the library its unit tests, the handshake of the fence under shuttle and the quick ones of
# qcow2, of the daemon its unit tests and those of the manager; then, if it was not found, with the long ones: simulations, crash states and the rest
# of qcow2. All of them try less than with `make test`, because every change costs a run. A change with which the tests do not end counts as found.
# Ends with status 1 if something was not found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Debian keeps mke2fs, e2fsck, losetup and the like where only root looks.
export PATH=$PATH:/usr/sbin:/sbin

files=(
	image-format/src/rounds.rs
	image-format/src/stack/{fence,retire,settle,read,write}.rs
	image-format/src/qcow2/{writeback,busy,turn,lifecycle,allocate,refcount,unmap,unwritten,write}.rs
	daemon/src/vring/inflight.rs
	daemon/src/snapshot/run.rs
)
cargo_mutants=27.1.0

name=mutants
# shellcheck source=tests/setup/debian.sh
. tests/setup/debian.sh

if ! cargo mutants --version >/dev/null 2>&1; then
	say "installing cargo-mutants $cargo_mutants"
	cargo install --quiet --locked "cargo-mutants@$cargo_mutants" || fail "cargo could not install cargo-mutants $cargo_mutants"
fi

if [ $# -gt 0 ]; then files=("$@"); fi
output=$(realpath -m "${CARGO_TARGET_DIR:-target}/mutants")
export CARGO_TARGET_DIR=$output/build RUST_BACKTRACE=0
rm -rf "$output"/*/{mutants.out,mutants.out.old,first}

# Tries the changes of the files in `chosen` with some tests. What cargo-mutants says of the outcome is in its files.
try() {
	local folder=$1 seconds=$2 status=0
	shift 2
	cargo mutants --no-config --profile mutants --jobs 1 --output "$folder" --colors never --timeout "$seconds" --build-timeout 600 \
		"${chosen[@]}" "$@" || status=$?
	# 2: something was not found; 3: something did not end.
	case $status in 0 | 2 | 3) ;; *) fail "cargo-mutants ended with status $status" ;; esac
}

# Which files of a folder are asked for, as arguments.
choose() {
	chosen=()
	for file in "${files[@]}"; do
		[ -e "$file" ] || fail "there is no file $file"
		case $file in "$1"/*) chosen+=(--file "$file") ;; esac
	done
	if [ ${#chosen[@]} -eq 0 ]; then return 1; fi
	if [ -n "${RE:-}" ]; then chosen+=(--re "$RE"); fi
	if [ -n "${SHARD:-}" ]; then chosen+=(--shard "$SHARD"); fi
	mkdir -p "$output/$1"
}

# Left out are tests that take long and look at other code: our check, io_uring, what a killed process leaves in a cache.
if choose image-format; then
	folder=$output/image-format
	SNAPFENCE_SEEDS=200 try "$folder" 60 -C--lib -C--test=handshake_shuttle -C--test=qcow2 -- -- --skip storage:: --skip qcow2::check \
		--skip random:: --skip killed:: --skip torn:: --skip grow:: --skip threads::
	cp -r "$folder/mutants.out" "$folder/first"
	if [ -s "$folder/first/missed.txt" ]; then
		SNAPFENCE_SEEDS=10 SNAPFENCE_LENGTH=1 try "$folder" 900 --iterate -C--test=crash_states -C--test=model -C--test=qcow2 -C--test=stack_raw -- -- \
			--skip a_seed_repeats_to_the_byte --skip killed:: --skip tables_written_over_others
	fi
fi
if choose daemon; then
	folder=$output/daemon
	try "$folder" 240 -C--lib -C--test=manager
	cp -r "$folder/mutants.out" "$folder/first"
	if [ -s "$folder/first/missed.txt" ]; then
		SNAPFENCE_SEEDS=1500 try "$folder" 900 --iterate -C--test=simulation
	fi
fi

# The names in the lists of this kind, of both runs or of one.
names() { cat "${@}" 2>/dev/null | sort -u; }
caught=$(names "$output"/*/{first,mutants.out}/caught.txt)
waited=$(comm -13 <(echo "$caught") <(names "$output"/*/{first,mutants.out}/timeout.txt))
missed=$(comm -13 <(printf '%s\n%s\n' "$caught" "$waited" | sort -u) <(names "$output"/*/mutants.out/missed.txt))
count() { grep -c . <<<"$1" || true; }
say "$(count "$caught") found, $(count "$waited") did not end, $(count "$(names "$output"/*/first/unviable.txt)") did not build," \
	"$(count "$missed") not found (in $SECONDS s)"
if [ -n "$missed" ]; then
	sed 's/^/  /' <<<"$missed"
	exit 1
fi
