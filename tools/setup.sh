#!/usr/bin/env bash
# Installs the Debian packages that a build needs; does nothing when all are there.
# Usage: tools/setup.sh [bench]   (bench: the benchmark library, too)
set -euo pipefail

packages=(g++ cmake ninja-build make python3 libfmt-dev libspdlog-dev nlohmann-json3-dev
          libyaml-cpp-dev libcli11-dev libxxhash-dev libpcre2-dev libutf8proc-dev libgtest-dev)
if [[ "${1:-}" == bench ]]; then packages+=(libbenchmark-dev); fi

if ! command -v dpkg-query >/dev/null; then
  echo "setup: no Debian system. The build needs a C++20 compiler, CMake 3.25, Ninja, Python 3 and" >&2
  echo "setup: fmt, spdlog, nlohmann-json, yaml-cpp, CLI11, xxHash, PCRE2, utf8proc, GoogleTest; going on." >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ "$status" == installed ]] || missing+=("$package")
done
if [[ ${#missing[@]} == 0 ]]; then exit 0; fi

echo "setup: installing ${missing[*]}"
as_root=()
if [[ $(id -u) != 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: neither root nor sudo here. Run as root, then try again:" >&2
    echo "  apt-get install -y ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

# sudo drops the environment, so the setting travels as an argument of env.
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@"; }
install() { apt install -y --no-install-recommends "${missing[@]}" >/dev/null; }

if ! compgen -G '/var/lib/apt/lists/*Packages*' >/dev/null || ! install 2>/dev/null; then
  echo "setup: fetching the package lists"
  if ! { apt update && install; }; then
    echo "setup: apt-get could not install ${missing[*]} (its message is above);" >&2
    echo "setup: check the network and /etc/apt/sources.list, then try again." >&2
    exit 1
  fi
fi
echo "setup: done"
