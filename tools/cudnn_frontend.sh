#!/usr/bin/env bash
# Fetches the headers of cuDNN's frontend (Apache-2.0 and MIT) for the benchmark of attention into FOLDER/include, out of
# its PyPI package. Does nothing where they are.
# Usage: tools/cudnn_frontend.sh [FOLDER]      (build-cudnn-frontend; needs python3 with pip)
set -euo pipefail

folder=${1:-build-cudnn-frontend}
if [[ -e "$folder/include/cudnn_frontend.h" ]]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$(dirname "${BASH_SOURCE[0]}")/fetch_wheel.sh" nvidia-cudnn-frontend==1.32.0 "$work"
mkdir -p "$folder"
rm -rf "$folder/include.new" "$folder/include"  # of a run that was stopped
cp -r "$work/include" "$folder/include.new"
mv "$folder/include.new" "$folder/include"
