#!/bin/bash
# Runs all tests of the workspace, then each fuzz target for TIME seconds (60 if not set), and ends with one line: how many passed, how many failed,
# how many were left out wholly or in part, how many inputs were fuzzed, and how long it took, building included. A fuzz target counts as a test.
# Where CI is set, nothing may be left out for want of something on the machine: such a test fails.
#
# cargo test, not a test runner of its own: it is wherever cargo is, and runs the examples in the documentation too. Arguments go to it, and nothing is
# fuzzed then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Debian keeps mke2fs, e2fsck, losetup and the like where only root looks.
export PATH=$PATH:/usr/sbin:/sbin

target=${CARGO_TARGET_DIR:-target}
log=$target/test.log
mkdir -p "$target"
status=0
# A panic's place and message say enough in a test; traces of the harness only hide them.
RUST_BACKTRACE=${RUST_BACKTRACE:-0} cargo test --workspace --no-fail-fast "$@" 2>&1 | tee "$log" || status=$?

# One line of the kind "test result: ok. 3 passed; 0 failed; 1 ignored; ..." comes from each test program.
read -r passed failed ignored < <(awk '/^test result: / {
	for (i = 1; i <= NF; i++) {
		if ($i ~ /^passed/) passed += $(i - 1)
		if ($i ~ /^failed/) failed += $(i - 1)
		if ($i ~ /^ignored/) ignored += $(i - 1)
	}
} END { print passed + 0, failed + 0, ignored + 0 }' "$log")

if [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then
	echo "The tests did not all build, or one of their programs died." >&2
	failed=1
fi
if [ "$status" -eq 0 ] && [ "$passed" -eq 0 ]; then
	echo "No test ran." >&2
	status=1
fi
fuzzed=
if [ $# -eq 0 ]; then
	fuzz_log=$target/fuzz.log
	fuzz_status=0
	tests/fuzz.sh --plain 2>&1 | tee "$fuzz_log" || fuzz_status=$?
	# Of each target there is one line of the kind "fuzz: control: 1234 executions, 20 a second", or "fuzz: control FAILED after ...".
	read -r held broken executions < <(awk '/^fuzz: [a-z0-9_]+: [0-9]+ executions, / { held++; executions += $3 }
		/^fuzz: [a-z0-9_]+ FAILED / { broken++ } END { print held + 0, broken + 0, executions + 0 }' "$fuzz_log")
	if [ "$fuzz_status" -ne 0 ]; then
		status=1
		# It did not build.
		if [ "$broken" -eq 0 ]; then broken=1; fi
	fi
	passed=$((passed + held))
	failed=$((failed + broken))
	fuzzed=", $executions inputs fuzzed"
fi
# What tests have left out because of this machine, in lines that tests/src/skip.rs writes. They may begin in the middle of one of the harness's.
left_out=$(grep -o 'skipped: .*' "$log" | sed 's/^skipped: //' || true)
if [ -n "$left_out" ]; then
	echo 'Left out:'
	printf '%s\n' "$left_out" | sed 's/^/  /'
	ignored=$((ignored + $(printf '%s\n' "$left_out" | wc -l)))
fi
skipped=
if [ "$ignored" -gt 0 ]; then skipped=", $ignored skipped"; fi
echo "$passed passed, $failed failed$skipped$fuzzed (in $SECONDS s)"
exit "$status"
