#!/usr/bin/env bash
# Whether a GPU gives the same bits every time: several runs of the demo at once, and beside them a
# wide model's gradients again and again, which fill the GPU with other work. All runs must have
# equal metrics and weight checksums. Exit code 0 where they do.
# Usage: tools/gpu_repeat.sh LOCKSTEP GPU_TEST_PROGRAM [RUNS [STEPS [REPEATS]]]
#   (3 runs of 40 steps, 2 repeats of the gradients); the current folder holds configs/ and models/
set -uo pipefail

if [[ ! -x "${1:-}" || ! -x "${2:-}" ]]; then
  sed -n 's/^# \{0,1\}//p' "$0" | head -5
  exit 2
fi
program=$1 tests=$2 runs=${3:-3} steps=${4:-40} repeats=${5:-2}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_WAIT_POLICY=passive

"$tests" --gtest_filter='RepeatGpu.*' --gtest_repeat="$repeats" --gtest_throw_on_failure=0 \
  >"$folder/gradients.log" 2>&1 &
gradients=$!
pids=()
for ((i = 1; i <= runs; ++i)); do
  "$program" rl --config configs/demo.yaml device=cuda "logger.log_dir=$folder/run$i" \
    "grpo.max_num_steps=$steps" checkpointing.enabled=false >"$folder/run$i.log" 2>&1 &
  pids+=($!)
done
status=0
for ((i = 1; i <= runs; ++i)); do
  if ! wait "${pids[i - 1]}"; then
    echo "run $i failed:"
    tail -5 "$folder/run$i.log"
    status=1
  fi
done
if ! wait "$gradients"; then
  echo "the gradients differ:"
  grep -E 'Failure|run [0-9]' "$folder/gradients.log" | head -20
  status=1
fi
for ((i = 2; i <= runs && status == 0; ++i)); do
  "$program" compare "$folder/run1" "$folder/run$i" --require-equal >"$folder/compare.log" 2>&1 ||
    { status=1 && cat "$folder/compare.log"; }
done
if ((status == 0)); then
  echo "$runs runs of $steps steps at once: equal metrics and weight checksums; $repeats x 16 gradients of a wide model: equal"
fi
exit $status
