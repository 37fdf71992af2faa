#!/usr/bin/env bash
# Fetches the headers of cuDNN's frontend (Apache-2.0 and MIT) for the benchmark of attention into FOLDER/include, out of its PyPI package,
# which is only downloaded and unpacked. Does nothing where they are.
# Usage: tools/cudnn_frontend.sh [FOLDER]      (build-cudnn-frontend; needs python3 with pip)
set -euo pipefail

folder=${1:-build-cudnn-frontend}
package=nvidia-cudnn-frontend==1.32.0

if [[ -e "$folder/include/cudnn_frontend.h" ]]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "cudnn_frontend: downloading the PyPI package $package (12 MB)"
if ! python3 -m pip --disable-pip-version-check -q download --no-deps --only-binary :all: -d "$work" "$package"; then
  echo "cudnn_frontend: pip could not download $package (its message is above);" >&2
  echo "cudnn_frontend: check the network and that python3 has pip (Debian: python3-pip), then try again." >&2
  exit 1
fi
python3 -m zipfile -e "$work"/*.whl "$work"
mkdir -p "$folder"
cp -r "$work/include" "$folder/include.new"
mv "$folder/include.new" "$folder/include"
