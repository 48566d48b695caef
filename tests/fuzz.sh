#!/bin/bash
# Fuzzes every target of tests/fuzz for TIME seconds (60 if not set), as many at once as there are processors, at most 4; prints how many inputs each
# has taken and how many a second. A crash fails: it prints the input's file, and how to run it again.
#
#   tests/fuzz.sh [target...]             these targets only
#   tests/fuzz.sh --plain [target...]     without the address sanitizer: built in a third of the time, by any toolchain, and takes many times as
#                                         many inputs
#   tests/fuzz.sh --build                 builds only
#   tests/fuzz.sh --keep [target...]      afterwards replaces the corpus by the smallest part of all inputs so far that reaches the same, at most
#                                         FILES (36) of each target; inputs named regression-* stay
#
# Inputs that reach something new stay in target/fuzz/inputs from run to run. Built with the nightly toolchain, address sanitizer included, if not
# plain.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

target=${CARGO_TARGET_DIR:-target}/fuzz
seconds=${TIME:-60}
files=${FILES:-36}
at_once=$(nproc)
if [ "$at_once" -gt 4 ]; then at_once=4; fi
keep= build_only= plain=
case ${1:-} in
--plain) plain=yes && shift ;;
--keep) keep=yes && shift ;;
--build) build_only=yes && shift ;;
esac
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then mapfile -t targets < <(ls tests/fuzz/corpus); fi

# For the machine itself, but named: so that what only builds the programs is not instrumented.
machine=$(rustc -vV | sed -n 's/^host: //p')
# Little optimisation: building takes longer than it gives back.
export CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=line-tables-only

build_plain() {
	# What libFuzzer needs to see where an input gets to.
	local flags=(
		--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
		-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
		-Cllvm-args=-sanitizer-coverage-trace-compares
	)
	CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true RUSTFLAGS="${flags[*]}" \
		cargo build --release --package snapfence-fuzz --features libfuzzer --bins --target "$machine" --target-dir "$target/plain"
}

build_sanitized() {
	cargo +nightly fuzz build --fuzz-dir tests/fuzz --features libfuzzer --target-dir "$target"
}

build=build_sanitized programs=$target/$machine/release
if [ -n "$plain" ]; then
	build=build_plain programs=$target/plain/$machine/release
elif ! cargo +nightly fuzz --version >/dev/null 2>&1; then
	echo 'fuzz: cargo-fuzz or the nightly toolchain is missing; tests/setup/install.sh fuzzer installs them' >&2
	exit 1
fi
echo 'fuzz: building'
mkdir -p "$target"
"$build" >"$target/build.log" 2>&1 || {
	tail -n 40 "$target/build.log" >&2
	exit 1
}
echo "fuzz: built in $SECONDS s"
if [ -n "$build_only" ]; then exit 0; fi

# Runs one target.
fuzz() {
	local name=$1 log=$target/$1.log inputs=$target/inputs/$1 status=0 executions rate extra=()
	mkdir -p "$inputs" "$target/artifacts"
	if [ -e "tests/fuzz/dictionaries/$name" ]; then extra=("-dict=tests/fuzz/dictionaries/$name"); fi
	# What lives as long as a thread is no leak. Entropic schedules and names of functions cost more than they find at these speeds.
	ASAN_OPTIONS=detect_leaks=0 "$programs/$name" -max_total_time="$seconds" -timeout=30 \
		-rss_limit_mb=2048 -malloc_limit_mb=512 -max_len=4096 -print_final_stats=1 -entropic=0 -print_funcs=0 "${extra[@]}" \
		-artifact_prefix="$root/${target#"$root"/}/artifacts/$name-" "$inputs" "tests/fuzz/corpus/$name" >"$log" 2>&1 || status=$?
	executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
	rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
	if [ "$status" -ne 0 ]; then
		grep -aE 'panicked at|ERROR: |SUMMARY: ' -A 2 "$log" | head -n 12 >&2
		sed -n 's/.*Test unit written to //p' "$log" | while read -r artifact; do
			echo "fuzz: $name fails on $artifact; again: $programs/$name $artifact" >&2
		done
		echo "fuzz: $name FAILED after ${executions:-?} executions (all it said: $log)" >&2
		return 1
	fi
	echo "fuzz: $name: $executions executions, $rate a second"
}

# Puts the least that reaches all that the inputs so far reach in the corpus's place.
merge() {
	local name=$1 corpus=tests/fuzz/corpus/$1 merged=$target/merged/$1 kept
	rm -rf "$merged" && mkdir -p "$merged"
	ASAN_OPTIONS=detect_leaks=0 "$programs/$name" -merge=1 -max_len=4096 "$merged" "$corpus" "$target/inputs/$name" >"$target/merge.log" 2>&1
	# The first ones, by size, are those that were chosen first: each of them reaches something that no smaller one does.
	kept=$(find "$merged" -type f -printf '%s %p\n' | sort -n | awk -v files="$files" '{ all[NR] = $2 } END {
		for (i = 1; i <= files && i <= NR; i++) { at = NR <= files ? i : 1 + int((i - 1) * (NR - 1) / (files - 1)); print all[at] } }')
	find "$corpus" -type f ! -name 'regression-*' ! -name 'seed-*' -delete
	printf '%s\n' "$kept" | while read -r file; do cp "$file" "$corpus/$(basename "$file" | cut -c1-16)"; done
	echo "fuzz: $name: $(find "$corpus" -type f | wc -l) inputs kept of $(find "$merged" -type f | wc -l)"
}

status=0
running=0
for name in "${targets[@]}"; do
	if [ "$running" -ge "$at_once" ]; then
		wait -n || status=1
		running=$((running - 1))
	fi
	fuzz "$name" &
	running=$((running + 1))
done
while [ "$running" -gt 0 ]; do
	wait -n || status=1
	running=$((running - 1))
done
if [ -n "$keep" ] && [ "$status" -eq 0 ]; then
	for name in "${targets[@]}"; do merge "$name"; done
fi
echo "fuzz: ended after $SECONDS s"
exit "$status"
