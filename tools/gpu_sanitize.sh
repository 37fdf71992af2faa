#!/usr/bin/env bash
# Runs the GPU's op tests under compute-sanitizer: memcheck, racecheck, initcheck and synccheck, one
# process a test and tool, several side by side. Ends with one line a tool; exit code 0 where every
# test was clean under every tool. A test that failed, was skipped or ran out of time is not clean.
# Usage: tools/gpu_sanitize.sh TEST_PROGRAM [OPTIONS]
#   --tools "memcheck racecheck"   which tools (default: all four)
#   --filter PATTERN               gtest filter (default: all op tests; not those of whole models,
#                                  nor those that run out of memory or kill a kernel on purpose)
#   --sanitizer PATH               the compute-sanitizer to use (default: the one of the toolkit)
#   --jobs N                       processes side by side (default: one a core, up to 16)
#   --seconds N                    time limit of one test under one tool (default 300)
#   --logs FOLDER                  keep the logs of all runs there (default: a temporary folder)
#   --times                        print the slowest runs, too
#   --all-sizes                    the tests with all their sizes, not LOCKSTEP_TEST_SIZES=few
set -uo pipefail

tools="memcheck racecheck initcheck synccheck"
filter='-ModelGpu.*:RepeatGpu.*:InvarianceGpu.*:RunGpu.*:MemoryPlanGpu.*:FailureGpu*'
jobs=$(nproc)
if ((jobs > 16)); then jobs=16; fi
seconds=300 logs="" times=0 whole=0 sanitizer=""
program=${1:-}
if [[ ! -x "$program" ]]; then
  sed -n 's/^# \{0,1\}//p' "$0" | head -14
  exit 2
fi
shift
while (($# > 0)); do
  case $1 in
    --tools) tools=$2 ;;
    --filter) filter=$2 ;;
    --sanitizer) sanitizer=$2 ;;
    --jobs) jobs=$2 ;;
    --seconds) seconds=$2 ;;
    --logs) logs=$2 ;;
    --times) times=1; shift; continue ;;
    --all-sizes) whole=1; shift; continue ;;
    *) echo "gpu_sanitize: unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
if [[ -z "$sanitizer" ]]; then
  sanitizer=$(command -v compute-sanitizer || find /usr/local/cuda*/bin -name compute-sanitizer | head -1)
fi
if [[ ! -x "$sanitizer" ]]; then
  echo "gpu_sanitize: there is no compute-sanitizer ${sanitizer:+at $sanitizer}; it is part of the CUDA toolkit," \
    "and pip download nvidia-cuda-sanitizer-api has newer ones" >&2
  exit 2
fi
if [[ -z "$logs" ]]; then
  logs=$(mktemp -d)
  trap 'rm -rf "$logs"' EXIT
fi
mkdir -p "$logs"

# "Suite." lines, then "  Test" lines.
tests=$("$program" --gtest_list_tests --gtest_filter="$filter" | awk '/^[^ ].*\.$/ {s = $1} /^  / {print s $1}')
if [[ -z "$tests" ]]; then
  echo "gpu_sanitize: no test fits $filter" >&2
  exit 2
fi

# One test under one tool: a log, and a line "tool test verdict seconds" in a file of its own.
run_one() {
  local tool=$1 test=$2 log verdict=clean start=$SECONDS
  log=$logs/$tool.$test
  timeout -k 5 "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 97 --print-limit 20 \
    "$program" --gtest_filter="$test" >"$log" 2>&1
  local status=$?
  if ((status == 124 || status == 137)); then
    verdict=unfinished
  elif ! grep -qE '^=+ (ERROR|RACECHECK) SUMMARY: 0 (errors|hazards displayed \(0 errors, 0 warnings\))' "$log"; then
    verdict=reported
  elif ((status != 0)) || ! grep -q '^\[  PASSED  \] 1 test\.' "$log" || grep -q '^\[  SKIPPED \]' "$log"; then
    verdict=failed
  fi
  echo "$tool $test $verdict $((SECONDS - start))" >"$log.verdict"
}
export -f run_one
export logs seconds sanitizer program
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
if ((! whole)); then export LOCKSTEP_TEST_SIZES=few; fi

for tool in $tools; do
  for test in $tests; do echo "$tool $test"; done
done | xargs -P "$jobs" -L 1 bash -c 'run_one "$0" "$1"'

cat "$logs"/*.verdict >"$logs/verdicts"
if ((times)); then sort -k4,4nr "$logs/verdicts" | head -40; fi
status=0
for tool in $tools; do
  total=$(grep -c "^$tool " "$logs/verdicts")
  clean=$(grep -c "^$tool [^ ]* clean " "$logs/verdicts")
  if [[ $total != "$clean" ]]; then
    status=1
    grep "^$tool " "$logs/verdicts" | grep -v ' clean ' | while read -r _ test verdict spent; do
      echo "$tool: $test $verdict after $spent s"
      if [[ $verdict != unfinished ]]; then
        grep -E '^=========|Failure|differ|Skipped' "$logs/$tool.$test" | head -12 | cut -c1-180
      fi
    done
  fi
  echo "$tool: $clean of $total tests clean"
done
exit $status
