# make build | demo | test | fuzz | bench | smollm2 | format | tidy | clean    (make help)
JOBS ?= $(shell nproc)
# Tests run side by side: threads that spin would stall each other.
export OMP_WAIT_POLICY ?= passive
SOURCES = $(shell git ls-files '*.h' '*.cpp')

.PHONY: help setup build demo check-demo precision-proof test test-asan test-tsan fuzz bench gpu-bundle smollm2 format tidy clean

help:
	@echo "make build      set up and build build/lockstep"
	@echo "make demo       set up, build, and teach a small model by reinforcement learning"
	@echo "make check-demo the demo with 1 thread, with 2, and killed and resumed: the same bits"
	@echo "make test       set up, build everything, run all tests"
	@echo "make test-asan  the fast tests under AddressSanitizer and UBSan (test-tsan: threads)"
	@echo "make fuzz       the fuzz targets under AddressSanitizer and UBSan, 5 minutes each (FUZZ_SECONDS=300)"
	@echo "make smollm2    fetch SmolLM2-135M-Instruct; models/smollm2, and as a mixture of experts models/smollm2-moe"
	@echo "make precision-proof  pretrain on English text in BF16 and in FP8, and compare (docs/precision.md)"
	@echo "make bench      build and run the benchmarks"
	@echo "make gpu-bundle  the GPU tests, benchmarks and the program in build/gpu-bundle, to copy to a GPU machine"
	@echo "make format     clang-format on all sources;  make tidy: clang-tidy"
	@echo "make clean      remove the build folders (runs/ stays)"

setup:
	@tools/setup.sh

# cmake runs again by itself when its files change.
configure = cmake --preset $(1) >/dev/null || { echo "cmake --preset $(1) failed, see above" >&2; exit 1; }
build/build.ninja: | setup
	@$(call configure,cpu)
build-%/build.ninja: | setup
	@$(call configure,$*)

build: setup build/build.ninja
	@cmake --build build --target lockstep -j $(JOBS)

# A run that already stands in runs/demo is kept as runs/demo.1, .2, ...
demo: build
	build/lockstep rl --config configs/demo.yaml $(if $(wildcard runs/demo/config.yaml),--fresh)

# Runs that already stand there are kept as runs/text_bf16.1, ...
precision-proof: build
	@tools/text_corpus.sh
	build/lockstep pretrain --config configs/pretrain_text.yaml policy.precision=bf16 logger.log_dir=runs/text_bf16 \
	  $(if $(wildcard runs/text_bf16/config.yaml),--fresh)
	build/lockstep pretrain --config configs/pretrain_text.yaml policy.precision=fp8 logger.log_dir=runs/text_fp8 \
	  $(if $(wildcard runs/text_fp8/config.yaml),--fresh)
	build/lockstep compare runs/text_bf16 runs/text_fp8 --output runs/precision_proof.html

# The demo with 1 thread, with 2, and killed at random and resumed: the same bits.
check-demo: build
	@python3 tools/check_demo.py --binary build/lockstep

test: setup build/build.ninja
	@cmake --build build -j $(JOBS)
	@tools/run_tests.sh build -j $(JOBS)

test-asan: setup build-asan/build.ninja
	@cmake --build build-asan -j $(JOBS)
	@tools/run_tests.sh build-asan -L cpu -j $(JOBS)

test-tsan: setup build-tsan/build.ninja
	@cmake --build build-tsan -j $(JOBS) --target openmp_race lockstep_ops_test lockstep_rollout_test lockstep_policy_test
	@tools/run_tests.sh build-tsan -L cpu -E 'NOT_BUILT|Layering|Hf|Fuzz' -j $(JOBS)

FUZZ_SECONDS ?= 300
FUZZ_TARGETS = $(patsubst tests/fuzz/%.cpp,lockstep_%,$(wildcard tests/fuzz/*_fuzz.cpp))
fuzz: setup build-asan/build.ninja
	@cmake --build build-asan -j $(JOBS) --target $(FUZZ_TARGETS)
	@for t in $(FUZZ_TARGETS); do build-asan/tests/$$t --seconds $(FUZZ_SECONDS) || exit 1; done

smollm2: build
	@tools/smollm2.sh

bench:
	@tools/setup.sh bench
	@$(call configure,bench)
	@cmake --build build-bench -j $(JOBS)
	@for b in $$(find build-bench/bench -maxdepth 1 -name '*_bench' -type f); do echo "$$b"; "$$b" || exit 1; done

# A build folder of its own, because the benchmarks are on; nvcc 13 must be here, a GPU need not.
gpu-bundle:
	@tools/setup.sh bench
	@tools/cudnn_frontend.sh || echo "the benchmark of attention goes without cuDNN as its baseline" >&2
	@cmake --preset cuda -DLOCKSTEP_BENCH=ON >/dev/null || { echo "cmake --preset cuda failed, see above" >&2; exit 1; }
	@cmake --build build-cuda -j $(JOBS) --target lockstep lockstep_gpu_test lockstep_device_test gpu_benches
	@tools/gpu_bundle.sh build-cuda build/gpu-bundle

format:
	@clang-format -i $(SOURCES)

tidy: build/build.ninja
	@clang-tidy -p build --quiet $(filter src/%.cpp,$(SOURCES))

clean:
	rm -rf build build-asan build-tsan build-bench build-cuda build-cudnn-frontend
