# Helpers of the scripts that deal with Debian's packages. To be sourced; the caller sets `name`, which begins what it says.
# shellcheck shell=bash

say() { printf '%s: %s\n' "${name:?}" "$*"; }
fail() {
	printf '%s: %s\n' "${name:?}" "$*" >&2
	exit 1
}

# Prints the URI of the mirror this machine already takes Debian's main packages of a suite from, or nothing.
mirror() {
	# shellcheck disable=SC2016 # The fields are apt's.
	apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
		awk -F'|' -v codename="$1" '$1 == "Debian" && $2 == codename && $3 == "main" && !found { print $4; found = 1 }'
}
