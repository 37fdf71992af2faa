#!/usr/bin/env bash
# Writes 1.4 MB of English prose, one paragraph a line, to FILE: the Jargon File 4.4.7 (public domain), from the Debian
# package jargon-text. The package is only downloaded and unpacked, so that this works as any user and where dpkg is set
# to leave documentation out. Does nothing when FILE is there.
# Usage: tools/text_corpus.sh [FILE]      (runs/text/jargon.txt)
set -euo pipefail

out=${1:-runs/text/jargon.txt}
package=jargon-text
member=./usr/share/doc/jargon-text/jargon.txt.gz
expected=c6dffb0e12df5c38fe8ca4fc8f63d1251989adb55097c75a88bb9c7a570b4108

if [[ -s "$out" ]]; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  echo "text: no Debian system, so the package $package cannot be fetched." >&2
  echo "text: put any plain English text of a megabyte or more at $out instead." >&2
  exit 1
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
download() { (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download "$package" >/dev/null); }

echo "text: downloading the Debian package $package (0.65 MB, not installed)"
if ! download 2>/dev/null; then
  echo "text: fetching the package lists"
  as_root=()
  if [[ $(id -u) != 0 ]]; then as_root=(sudo); fi
  if ! { "${as_root[@]}" apt-get -qq update && download; }; then
    echo "text: apt-get could not download $package (its message is above);" >&2
    echo "text: check the network and /etc/apt/sources.list, then try again." >&2
    exit 1
  fi
fi

# Paragraphs are unwrapped; headwords, lists of them and rules (lines of U+2550) are dropped.
dpkg-deb --fsys-tarfile "$folder"/*.deb | tar -xO "$member" | gunzip |
  LC_ALL=C awk 'BEGIN { RS = "" }
    { gsub(/[ \n]+/, " "); sub(/^ /, "") }
    length($0) >= 80 && !index($0, "\342\225\220") { print $0 "\n" }' >"$folder/text"

sum=$(sha256sum <"$folder/text")
if [[ "${sum%% *}" != "$expected" ]]; then
  echo "text: this release of $package differs from the one of docs/precision.md; figures will differ a little"
fi
mkdir -p "$(dirname "$out")"
mv "$folder/text" "$out"
echo "text: $out, $(stat -c %s "$out") bytes"
