// What goes wrong on a GPU is a message that says what to do, and memory that ran out leaves the
// device usable.
#include <cstdlib>

#include "base/error.h"
#include "gpu/gpu_test.h"
#include "gpu/trap.h"
#include "ops/cast.h"

namespace lockstep::ops::test {
namespace {

using FailureGpu = GpuTest;

TEST_F(FailureGpu, MemoryThatRunsOutIsAMessageAndTheDeviceGoesOn) {
  try {
    const Tensor t(Device::kCuda, DType::kE4m3, {std::int64_t{1} << 46});
    ADD_FAILURE() << "64 TiB were given";
  } catch (const base::SystemError& e) {
    EXPECT_NE(std::string(e.what()).find("out of GPU memory"), std::string::npos) << e.what();
    for (const char* key : {"policy.train_micro_batch_size", "policy.generation.num_blocks"})
      EXPECT_NE(std::string(e.what()).find(key), std::string::npos) << e.what();
  }
  const Tensor x = empty(DType::kFp32, {1000}), narrow = cpu_output(DType::kBf16, {1000});
  for (int i = 0; i < 1000; ++i) x.as<float>()[i] = 0.1f * static_cast<float>(i);
  const TensorView gpu_narrow = gpu_output(DType::kBf16, {1000});
  cast(cpu, x, narrow);
  cast(gpu, on_gpu(x), gpu_narrow);
  expect_same(narrow, gpu_narrow, "after the failure");
}

TEST(FailureGpuDeathTest, AKernelThatDiesEndsTheRunWithAMessage) {
  if (const std::string problem = tensor::cuda_problem(); !problem.empty()) GTEST_SKIP() << problem;
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a process of its own
  const auto die = [] {
    try {
      tensor::Arena arena(Device::kCuda);
      const Context ctx = tensor::cuda_context(arena);
      tensor::test::launch_trap(ctx);
      tensor::synchronize(ctx);
    } catch (const base::SystemError& e) {
      std::fprintf(stderr, "%s\n", e.what());
      std::_Exit(3);
    }
    std::_Exit(0);
  };
  EXPECT_EXIT(die(), ::testing::ExitedWithCode(3), "state in this process is lost.*--resume auto");
}

}  // namespace
}  // namespace lockstep::ops::test
