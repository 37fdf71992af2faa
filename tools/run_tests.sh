#!/usr/bin/env bash
# Runs ctest on a build folder and ends with one line: "N passed, N failed". Tests that were skipped
# (those that need a GPU, on a machine without one) count as neither; the line before says how many.
# Usage: tools/run_tests.sh FOLDER [ctest options]
set -uo pipefail

folder=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ctest --test-dir "$folder" --output-on-failure --no-tests=error --progress "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
# ctest: "98% tests passed, 2 tests failed out of 100". The total holds the skipped ones, which a
# list at the end names: "	12 - VocabGpu.BrokenRows (Skipped)".
read -r failed total < <(sed -n 's/.*passed, \([0-9]*\) tests failed out of \([0-9]*\).*/\1 \2/p' "$log")
if [[ -z "${total:-}" ]]; then
  echo "no test ran, see above"
  exit 1
fi
skipped=$(grep -cE '^[[:space:]]+[0-9]+ - .* \(Skipped\)$' "$log")
if ((skipped > 0)); then echo "$skipped skipped"; fi
echo "$((total - failed - skipped)) passed, $failed failed"
exit "$status"
