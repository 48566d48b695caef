#!/bin/bash
# Runs all tests of the workspace and ends with one line: how many passed, how many failed, how many were left out wholly or in part, and how
# long it took, building included. Where CI is set, nothing may be left out for want of something on the machine: such a test fails.
#
# cargo test, not a test runner of its own: it is wherever cargo is, and runs the examples in the documentation too. Arguments go to it.
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
# What tests have left out because of this machine, in lines that tests/src/skip.rs writes. They may begin in the middle of one of the harness's.
left_out=$(grep -o 'skipped: .*' "$log" | sed 's/^skipped: //' || true)
if [ -n "$left_out" ]; then
	echo 'Left out:'
	printf '%s\n' "$left_out" | sed 's/^/  /'
	ignored=$((ignored + $(printf '%s\n' "$left_out" | wc -l)))
fi
skipped=
if [ "$ignored" -gt 0 ]; then skipped=", $ignored skipped"; fi
echo "$passed passed, $failed failed$skipped (in $SECONDS s)"
exit "$status"
