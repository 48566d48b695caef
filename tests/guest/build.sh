#!/bin/bash
# Builds the test guest into target/guest:
#
#   vmlinuz        the kernel of Debian's linux-image-cloud-amd64
#   initramfs      its virtio drivers, busybox, mkfs, e2fsck, fio, and our agent as process 1
#   root.raw       with the argument `root`: a small Debian on ext4, whose init runs the same agent
#
# Each part is made again only when what it is made from has changed. Installs nothing on this machine.
set -euo pipefail

# Debian keeps mke2fs, e2fsck, losetup and the like where only root looks.
export PATH=$PATH:/usr/sbin:/sbin

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
out=$target/guest
name=guest
# shellcheck source=tests/setup/debian.sh
. "$root/tests/setup/debian.sh"

with_root_disk=
case ${1-} in
'') ;;
root) with_root_disk=yes ;;
*) fail "usage: build.sh [root]" ;;
esac

# The drivers the guest is to have; those they need in turn are found.
drivers=(virtio_pci virtio_blk virtio_console)
# The programs of this machine that the initramfs gets beside busybox.
programs=(fio mkfs.ext4 e2fsck dumpe2fs blkdiscard)
# What the Debian on root.raw has beside the essential packages.
root_packages=(busybox-static e2fsprogs mount util-linux)
root_mib=512

for tool in busybox cpio mmdebstrap mke2fs xz strip "${programs[@]}"; do
	command -v "$tool" >/dev/null || fail "$tool is missing; run tests/setup/install.sh first"
done
# shellcheck source=/dev/null
codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
mkdir -p "$out"
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Whether `part` was made from exactly the text on standard input. If not, remembers that text for `made`.
unchanged() {
	local part=$1
	sha256sum >"$work/$part.inputs"
	[ -e "$out/$part" ] && cmp -s "$work/$part.inputs" "$out/.$part.inputs"
}

# Puts a finished part in place. The record of its inputs goes first and comes last, so that a half-made part never counts as made.
made() {
	local part=$1
	rm -rf "$out/.$part.inputs" "${out:?}/$part"
	mv "$work/$part" "$out/$part"
	mv "$work/$part.inputs" "$out/.$part.inputs"
}

# Prints the drivers that the driver file `$1` names as needed, one a line.
needed_by() {
	tr '\0' '\n' <"$1" | sed -n 's/^depends=//p' | tr ',' '\n'
}

# Puts the driver `$1` and before it whatever it needs into $work/kernel/modules, and their order into its file `order`.
add_driver() {
	local wanted=$1 file plain needed modules=$work/kernel/modules
	grep -qxF "$wanted.ko" "$modules/order" && return
	# File names and names within drivers differ in - and _.
	file=$(find "$work/tree" -name "${wanted//[-_]/[-_]}.ko*" | head -n 1)
	# Not a file: built into the kernel, if it exists at all.
	if [ -z "$file" ]; then
		find "$work/tree" -name modules.builtin -exec cat {} + | grep -q "/${wanted//[-_]/[-_]}\.ko$" || fail "the kernel has no driver $wanted"
		return
	fi
	plain=$modules/$wanted.ko
	case $file in *.xz) xz -dc "$file" >"$plain" ;; *) cp "$file" "$plain" ;; esac
	for needed in $(needed_by "$plain"); do add_driver "$needed"; done
	grep -qxF "$wanted.ko" "$modules/order" || printf '%s.ko\n' "$wanted" >>"$modules/order"
}

build_kernel() {
	printf '%s\n' "$codename" "${drivers[@]}" | unchanged kernel && return
	local package
	package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
	[ -n "$package" ] || fail "the package lists do not know linux-image-cloud-amd64; run: apt-get update"
	say "unpacking the kernel of $package"
	# In a folder that everybody may enter, which the tree need not be: apt fetches as a user of its own.
	local fetched
	fetched=$(mktemp -d)
	chmod 755 "$fetched"
	(cd "$fetched" && apt-get -qq -o Acquire::Retries=3 download "$package" 2>"$work/download.log") || {
		cat "$work/download.log" >&2
		rm -rf "$fetched"
		fail "cannot download $package"
	}
	dpkg -x "$fetched"/*.deb "$work/tree"
	rm -rf "$fetched"
	mkdir -p "$work/kernel/modules"
	: >"$work/kernel/modules/order"
	cp "$work"/tree/boot/vmlinuz-* "$work/kernel/vmlinuz"
	for driver in "${drivers[@]}"; do add_driver "$driver"; done
	made kernel
}

# Cargo knows by itself whether there is anything to do. The target is named, so that the flags do not reach build scripts.
build_agent() {
	(cd "$root" && RUSTFLAGS='-C target-feature=+crt-static' cargo build --quiet --package snapfence-guest-agent --target x86_64-unknown-linux-gnu)
	agent=$target/x86_64-unknown-linux-gnu/debug/snapfence-guest-agent
}

build_initramfs() {
	local files program library tree=$work/initramfs.tree
	mapfile -t files < <(command -v "${programs[@]}")
	# The programs' shared libraries, the loader among them.
	local libraries
	mapfile -t libraries < <(ldd "${files[@]}" | grep -o '/[^ :]*\.so[^ :]*' | sort -u)
	sha256sum "$0" "$agent" "$out/kernel/modules/order" "$(command -v busybox)" "${files[@]}" "${libraries[@]}" | unchanged initramfs && return
	say "packing the initramfs"
	mkdir -p "$tree"/{bin,sbin,dev,proc,sys,run,tmp,root,etc,mnt,usr}
	ln -s ../bin "$tree/usr/bin"
	ln -s ../sbin "$tree/usr/sbin"
	strip -o "$tree/init" "$agent"
	cp -r "$out/kernel/modules" "$tree/modules"
	for program in $(busybox --list); do ln -s busybox "$tree/bin/$program"; done
	rm -f "$tree/bin/busybox"
	cp "$(command -v busybox)" "$tree/bin/busybox"
	for program in "${files[@]}"; do
		rm -f "$tree/bin/${program##*/}"
		cp -L "$program" "$tree/bin/"
	done
	for library in "${libraries[@]}"; do
		# Where the loader looks, whichever of /lib and /usr/lib ldd names.
		mkdir -p "$tree${library%/*}"
		cp -L "$library" "$tree${library%/*}/"
	done
	: >"$tree/etc/mtab"
	(cd "$tree" && find . -print0 | sort -z | cpio --quiet --null -o -H newc -R 0:0) >"$work/initramfs"
	made initramfs
}

build_root_disk() {
	printf '%s\n' "$codename" "$root_mib" "${root_packages[@]}" "$(sha256sum "$root/tests/guest/inittab")" | unchanged root.raw && return
	local uri include
	uri=$(mirror "$codename")
	[ -n "$uri" ] || fail "no package source for Debian $codename found"
	include=$(IFS=,; printf '%s' "${root_packages[*]}")
	say "making the guest's root disk (a small Debian $codename)"
	# The file system is made inside mmdebstrap's last hook, where the files have their owners even if this is not run by root. The bind mount
	# leaves out what mmdebstrap has mounted below, such as /proc.
	truncate -s "${root_mib}M" "$work/root.raw"
	chmod 666 "$work/root.raw"
	chmod 755 "$work"
	# shellcheck disable=SC2016 # $1 is for the hooks.
	mmdebstrap --quiet --variant=essential --include="$include" \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--customize-hook="upload '$root/tests/guest/inittab' /etc/inittab" \
		--customize-hook='ln -sf /bin/busybox "$1/sbin/init"; ln -sf /bin/busybox "$1/sbin/reboot"; ln -sf /bin/busybox "$1/sbin/poweroff"' \
		--customize-hook='echo snapfence >"$1/etc/hostname"; rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*' \
		--customize-hook="unshare --mount sh -ec 'mount --bind \"\$0\" /mnt; mke2fs -q -t ext4 -L snapfence-root -d /mnt \"$work/root.raw\"' \"\$1\"" \
		"$codename" /dev/null "deb $uri $codename main" 2>"$work/mmdebstrap.log" || {
		tail -n 30 "$work/mmdebstrap.log" >&2
		fail "cannot make the root disk"
	}
	chmod 644 "$work/root.raw"
	made root.raw
}

build_kernel
build_agent
build_initramfs
ln -sf kernel/vmlinuz "$out/vmlinuz"
if [ -n "$with_root_disk" ]; then build_root_disk; fi
