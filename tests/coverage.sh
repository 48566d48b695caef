#!/bin/bash
# Prints how many lines of the image formats, the stack with its fence, and the queues the tests reach, file by file, and of all of them.
#
# It builds the library and the daemon once more, instrumented, and runs those of their tests that reach much in little time. Left out are those
# that do the same thing a thousand times, that boot a guest, and that run another build of the fence (the model checkers). What a daemon does
# that is killed is not counted: it has no time to write it down. Arguments go to cargo test in place of the choice of tests: --test model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PATH=$PATH:/usr/sbin:/sbin

target=${CARGO_TARGET_DIR:-target}
tests=(
	--lib
	# The library's.
	--test crash_states --test hostile --test model --test qcow2 --test stack_raw
	# The daemon's.
	--test block_devices --test held_completions --test hostile_chains --test manager --test shrinking_memory --test simulated_queue
	--test simulation --test virtio_driver
)
if [ $# -gt 0 ]; then tests=("$@"); fi
cargo_llvm_cov=0.9.1
# Tests themselves and what only tests use, and what is neither image format nor queue.
ignored='/tests/|/testing\.rs|/tests\.rs|/storage/(simulated|memory|sparse)|/benches/|/ctl/'

name=coverage
# shellcheck source=tests/setup/debian.sh
. tests/setup/debian.sh

if ! cargo llvm-cov --version >/dev/null 2>&1; then
	say "installing cargo-llvm-cov $cargo_llvm_cov"
	cargo install --quiet --locked "cargo-llvm-cov@$cargo_llvm_cov" || fail "cargo could not install cargo-llvm-cov $cargo_llvm_cov"
fi
if ! compgen -G "$(rustc --print sysroot)/lib/rustlib/*/bin/llvm-cov" >/dev/null; then
	command -v rustup >/dev/null || fail "llvm-cov of this toolchain is missing; it comes with rustup (component llvm-tools)"
	say "installing the component llvm-tools"
	rustup component add llvm-tools
fi

mkdir -p "$target"
# What earlier runs have reached, not what they have built.
cargo llvm-cov clean --profraw-only
# A few runs of each simulation reach what many reach. Nobody looks into these programs with a debugger.
RUST_BACKTRACE=0 SNAPFENCE_SEEDS=${SNAPFENCE_SEEDS:-40} SNAPFENCE_LENGTH=${SNAPFENCE_LENGTH:-1} CARGO_PROFILE_DEV_DEBUG=false \
	cargo llvm-cov --no-report --package snapfence-image-format --package snapfenced --no-fail-fast "${tests[@]}" \
	>"$target/coverage.log" 2>&1 || {
	grep -E '^test .* FAILED|^error' "$target/coverage.log" >&2 || tail -n 30 "$target/coverage.log" >&2
	fail "not all tests passed (the whole output: $target/coverage.log)"
}
report() { cargo llvm-cov report --ignore-filename-regex "$ignored" "$@"; }
report --json --summary-only --output-path "$target/coverage.json"
report --lcov --output-path "$target/coverage.lcov"

# Lines of a part of the sources.
part() {
	jq -r --arg name "$1" --arg pattern "$2" '
		[.data[0].files[] | select(.filename | test($pattern)) | .summary.lines]
		| "\([.[].covered] | add // 0) \([.[].count] | add // 0)"' "$target/coverage.json" |
		awk -v name="$1" '{ printf "%-28s %6d of %6d lines  %5.1f %%\n", name, $1, $2, ($2 ? 100 * $1 / $2 : 0) }'
}

jq -r '.data[0].files[] | "\(.summary.lines.percent) \(.summary.lines.covered) \(.summary.lines.count) \(.filename)"' "$target/coverage.json" |
	sed "s|$PWD/||" | sort -n | awk '{ printf "%5.1f %%  %5d of %5d  %s\n", $1, $2, $3, $4 }'
echo
part 'image formats' 'image-format/src/(qcow2|chain|raw|layer|rounds)'
part 'stack and fence' 'image-format/src/stack/'
part 'queues' 'daemon/src/(vring|worker)'
part 'these three' 'image-format/src/(qcow2|chain|raw|layer|rounds|stack)|daemon/src/(vring|worker)'
part 'all that is measured' '.'
