#!/usr/bin/env bash
# Packs what the GPU work needs on a machine that has only the driver: the program, the GPU tests and
# benchmarks, stripped, the shared libraries that such a machine may lack, the demo's model and the
# configurations. Usage: tools/gpu_bundle.sh BUILD_FOLDER BUNDLE_FOLDER
# The CUDA runtime is linked in. Left out: the C and C++ libraries of the system (glibc 2.36 and
# libstdc++ of GCC 12 or later must be there), the driver, and the CPU tests with their data.
set -euo pipefail

build=$1
bundle=$2
limit_mib=80
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

binaries=("$build/lockstep" "$build/tests/lockstep_gpu_test" "$build/tests/lockstep_device_test")
for bench in "$build"/bench/gpu_*_bench; do
  if [[ -x "$bench" ]]; then binaries+=("$bench"); fi
done
for binary in "${binaries[@]}"; do
  if [[ ! -x "$binary" ]]; then
    echo "gpu_bundle: $binary is not there. It needs a build with CUDA (nvcc 13): make gpu-bundle" >&2
    exit 1
  fi
done

rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/lib"
for binary in "${binaries[@]}"; do strip -o "$bundle/bin/$(basename "$binary")" "$binary"; done

# "libfmt.so.9 => /lib/x86_64-linux-gnu/libfmt.so.9 (0x...)"
missing=$(ldd "${binaries[@]}" | sed -n 's/^[[:space:]]*\(.*\) => not found.*/\1/p' | sort -u)
if [[ -n "$missing" ]]; then
  echo "gpu_bundle: libraries not found: $missing" >&2
  exit 1
fi
ldd "${binaries[@]}" | sed -n 's/.* => \(\/[^ ]*\) (.*/\1/p' | sort -u |
  grep -vE '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libcuda|libnvidia-[^/]*)\.so' |
  while read -r library; do cp -L "$library" "$bundle/lib/"; done

mkdir -p "$bundle/models"
cp -r "$source/configs" "$bundle/"
cp -r "$source/models/demo" "$bundle/models/"
cp "$source/tools/gpu_sanitize.sh" "$source/tools/gpu_repeat.sh" "$bundle/"

cat >"$bundle/run.sh" <<'END'
#!/usr/bin/env bash
# run.sh doctor | test [gtest options] | sanitize [options] | repeat [options] | bench [NAME] | lockstep VERB ...   (needs an H100 or H200)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export LD_LIBRARY_PATH=$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
what=${1:-help}
shift
case $what in
  doctor) exec bin/lockstep doctor ;;
  lockstep) exec bin/lockstep "$@" ;;
  test)
    bin/lockstep_device_test
    device=$?
    bin/lockstep_gpu_test "$@" || exit $?
    if [[ $device != 0 && $device != 77 ]]; then exit "$device"; fi  # 77: no GPU, skipped
    ;;
  sanitize) exec ./gpu_sanitize.sh bin/lockstep_gpu_test "$@" ;;
  repeat) exec ./gpu_repeat.sh bin/lockstep bin/lockstep_gpu_test "$@" ;;
  bench)
    for bench in bin/gpu_*"${1:-}"*_bench; do
      echo "$bench"
      "$bench" || exit $?
    done
    ;;
  *) sed -n '2s/^# //p' "$(basename "${BASH_SOURCE[0]}")" ;;
esac
END
chmod +x "$bundle/run.sh"

kib=$(du -sk "$bundle" | cut -f1)
echo "$bundle: $((kib / 1024)) MiB, $(find "$bundle/bin" -type f | wc -l) programs, libraries: $(cd "$bundle/lib" && echo *)"
if ((kib > limit_mib * 1024)); then
  echo "gpu_bundle: more than $limit_mib MiB" >&2
  exit 1
fi
