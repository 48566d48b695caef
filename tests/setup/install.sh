#!/bin/bash
# Installs what building, testing and the demo need on Debian 12 or 13, and nothing else.
#
# Safe to run at any time: it compares what is there with what is needed, returns at once when nothing is missing, and otherwise says what
# it installs before it does so. Runs as root, or as a user who may use sudo.
set -euo pipefail

# Debian keeps mke2fs, e2fsck, losetup and the like where only root looks.
export PATH=$PATH:/usr/sbin:/sbin

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
venv=$target/venv

# The oldest toolchain the workspace builds with.
rust_minimum=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")

# QEMU's programs must come from one suite: each package refuses to live beside another version of its siblings. Debian 12's own QEMU (7.2) is
# older than the tests want, so there they come from its backports.
qemu_packages=(qemu-system-x86 qemu-utils)
# What drives the build, makes the guest, and looks into images.
packages=(
	gcc g++ libc6-dev pkg-config make ca-certificates # cargo's linker, static glibc for the guest's agent, libFuzzer
	mmdebstrap e2fsprogs cpio zstd xz-utils       # the guest's file systems
	uidmap                                        # mmdebstrap, if it is not run by root
	fio busybox-static jq                         # load generator; the guest's shell; JSON in scripts
	python3 python3-venv python3-pip              # a stock QMP client
	mount procps
	fuse2fs                                       # a file server that can be made to hang
	valgrind                                      # counts instructions
	libfaketime                                   # a clock that can be set
)
python_packages=(qemu.qmp==0.0.6)
cargo_fuzz=0.13.2

name=install
# shellcheck source=tests/setup/debian.sh
. "$root/tests/setup/debian.sh"

as_root() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -- "$@"
	else
		fail "'$*' needs root; run this script as root, or install sudo"
	fi
}

# Runs apt-get without questions. What it says goes to a file, and is shown only if it fails.
apt() {
	mkdir -p "$target"
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 "$@" \
		>"$target/install.log" 2>&1 </dev/null || {
		tail -n 30 "$target/install.log" >&2
		fail "apt-get $* failed (the whole output: $target/install.log)"
	}
}

# Prints "package version" for each named package that is installed.
installed() {
	{ dpkg-query -W -f='${db:Status-Abbrev} ${Package} ${Version}\n' "$@" 2>/dev/null || true; } | awk '$1 == "ii" { print $2, $3 }'
}

# Prints each named package that is not installed.
missing() {
	local have
	have=" $(installed "$@" | awk '{ print $1 }' | tr '\n' ' ')"
	for package; do
		case $have in *" $package "*) ;; *) printf '%s\n' "$package" ;; esac
	done
}

updated=
update_lists() {
	[ -n "$updated" ] && return
	say "refreshing the package lists"
	apt update
	updated=yes
}

enable_backports() {
	local codename=$1 suite=$1-backports uri
	local key=/usr/share/keyrings/debian-archive-keyring.gpg
	update_lists
	if [ -n "$(mirror "$suite")" ]; then
		say "$suite is among the package sources already"
	else
		uri=$(mirror "$codename")
		[ -n "$uri" ] || fail "no package source for Debian $codename found; add one and $suite, then run this again"
		say "adding the package source $suite (for QEMU only) from this machine's Debian mirror"
		{
			printf '# QEMU for the snapfence tests. Other packages stay with %s: backports are never chosen unless asked for.\n' "$codename"
			printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$suite"
			! [ -e "$key" ] || printf 'Signed-By: %s\n' "$key"
		} | as_root tee "/etc/apt/sources.list.d/snapfence-$suite.sources" >/dev/null
		updated=
		update_lists
	fi
	if ! [ -e "/etc/apt/preferences.d/snapfence-$suite" ]; then
		as_root tee "/etc/apt/preferences.d/snapfence-$suite" >/dev/null <<-PIN
			Package: qemu-system-x86 qemu-system-common qemu-system-data qemu-utils qemu-block-extra
			Pin: release n=$suite
			Pin-Priority: 990
		PIN
	fi
}

install_debian_packages() {
	local codename=$1 wanted qemu versions
	mapfile -t wanted < <(missing "${packages[@]}")
	mapfile -t qemu < <(missing "${qemu_packages[@]}")
	versions=$(installed "${qemu_packages[@]}" | awk '{ print $2 }' | sort -u | wc -l)
	if [ "$codename" = bookworm ] && installed "${qemu_packages[@]}" | grep -q ' 1:7\.'; then
		say "QEMU here is Debian 12's own; taking the newer one from its backports"
		qemu=("${qemu_packages[@]}")
	elif [ "$versions" -gt 1 ]; then
		say "QEMU's packages here are of different versions; bringing them together"
		qemu=("${qemu_packages[@]}")
	fi
	if [ ${#qemu[@]} -gt 0 ]; then
		if [ "$codename" = bookworm ]; then enable_backports "$codename"; else update_lists; fi
		# All of them, also those present, so that none keeps another version.
		say "installing ${qemu_packages[*]}"
		if [ "$codename" = bookworm ]; then
			apt install --no-install-recommends -y -t "$codename-backports" "${qemu_packages[@]}"
		else
			apt install --no-install-recommends -y "${qemu_packages[@]}"
		fi
	fi
	if [ ${#wanted[@]} -gt 0 ]; then
		update_lists
		say "installing ${wanted[*]}"
		apt install --no-install-recommends -y "${wanted[@]}"
	fi
}

# Whether version `$1` is at least version `$2`.
at_least() { [ "$(printf '%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# A toolchain that is there stays as it is. Else Debian's: the one it keeps current for its browsers, or its own where that is new enough.
install_rust() {
	local found suffix
	if command -v cargo >/dev/null && command -v rustc >/dev/null; then
		found=$(rustc --version | awk '{ print $2 }')
		at_least "$found" "$rust_minimum" || fail "Rust $found is too old, $rust_minimum is needed; update it (for example: rustup update)"
		return
	fi
	update_lists
	for suffix in -web ''; do
		found=$(apt-cache policy "rustc$suffix" | awk '$1 == "Candidate:" { print $2 }')
		if [ -z "$found" ] || ! at_least "$found" "$rust_minimum"; then continue; fi
		say "installing Rust (cargo$suffix rustc$suffix rustfmt$suffix rust$suffix-clippy)"
		apt install --no-install-recommends -y "cargo$suffix" "rustc$suffix" "rustfmt$suffix" "rust$suffix-clippy"
		return
	done
	fail "no Rust toolchain found, and Debian has none new enough; install Rust $rust_minimum or newer with rustfmt and clippy"
}

# The fuzzer needs a nightly toolchain, which rustup alone has.
install_fuzzer() {
	if ! command -v rustup >/dev/null; then
		fail "the fuzz targets need the nightly toolchain, and rustup, which installs it, is missing; install rustup (https://rustup.rs), then run this again"
	fi
	if ! rustup run nightly rustc --version >/dev/null 2>&1; then
		say "installing the nightly toolchain of Rust, for the fuzz targets"
		rustup toolchain install nightly --profile minimal >/dev/null || fail "rustup could not install the nightly toolchain"
	fi
	if ! cargo fuzz --version >/dev/null 2>&1; then
		say "installing cargo-fuzz $cargo_fuzz"
		cargo install --quiet --locked "cargo-fuzz@$cargo_fuzz" || fail "cargo could not install cargo-fuzz $cargo_fuzz"
	fi
}

install_python_packages() {
	local stamp=$venv/installed
	[ "$(cat "$stamp" 2>/dev/null)" = "${python_packages[*]}" ] && return
	say "installing ${python_packages[*]} into ${venv#"$root"/}"
	rm -rf "$venv"
	mkdir -p "$target"
	/usr/bin/python3 -m venv "$venv"
	"$venv/bin/pip" install --quiet --disable-pip-version-check "${python_packages[@]}"
	printf '%s' "${python_packages[*]}" >"$stamp"
}

[ -r /etc/os-release ] || fail "this machine does not say what it runs (/etc/os-release is missing); Debian 12 or 13 is needed"
# shellcheck source=/dev/null
. /etc/os-release
[ "${ID:-}" = debian ] || fail "this is ${PRETTY_NAME:-not Debian}; the script knows Debian 12 and 13 only. Needed: ${qemu_packages[*]} ${packages[*]}"
[ "$(dpkg --print-architecture)" = amd64 ] || fail "the guest tests need an amd64 machine"

install_debian_packages "$VERSION_CODENAME"
install_rust
if [ "${1:-}" = fuzzer ]; then install_fuzzer; fi
install_python_packages
