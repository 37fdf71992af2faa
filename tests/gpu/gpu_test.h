// A case of the CUDA backend: the same op on the CPU and on the GPU, compared byte by byte. Outputs
// on the GPU start as NaN between guard rows. Without a GPU a case is skipped.
#pragma once

#include "base/env.h"
#include "ops/op_test_util.h"
#include "tensor/device.h"

namespace lockstep::ops::test {

class GpuTest : public ::testing::Test {
 protected:
  // A CPU tensor's values on the GPU; they live as long as the test. An empty view stays empty.
  TensorView on_gpu(const TensorView& host) {
    if (!host) return {};
    const TensorView memory = guarded(host.dtype, host.shape);
    tensor::copy(gpu, host, memory);
    return memory;
  }
  // Memory on the GPU for an output: all bytes 0xFF (NaN, or -1), guards on both sides.
  TensorView gpu_output(DType dtype, const Shape& shape) { return guarded(dtype, shape); }
  // CPU memory for an output, all bytes 0xFF.
  Tensor cpu_output(DType dtype, const Shape& shape) {
    Tensor t(Device::kCpu, dtype, shape);
    std::memset(t.view().data, 0xFF, t.view().bytes());
    return t;
  }
  Tensor from_gpu(const TensorView& view) {
    Tensor host(Device::kCpu, view.dtype, view.shape);
    tensor::copy(gpu, view, host);
    return host;
  }

  void expect_same(const TensorView& host, const TensorView& device, const std::string& what) {
    ASSERT_EQ(host.bytes(), device.bytes()) << what;
    const Tensor found = from_gpu(device);
    const std::size_t size = tensor::dtype_size(host.dtype);
    const auto* a = static_cast<const std::byte*>(host.data);
    const auto* b = static_cast<const std::byte*>(found.view().data);
    std::int64_t different = 0, first = -1;
    for (std::int64_t i = 0; i < host.count(); ++i)
      if (std::memcmp(a + i * size, b + i * size, size) != 0) {
        if (first < 0) first = i;
        ++different;
      }
    if (different == 0) return;
    ADD_FAILURE() << what << " " << host.shape.text() << ": " << different << " of " << host.count()
                  << " differ, first at " << first << ": CPU " << get_value(host, first) << ", GPU "
                  << get_value(found, first);
  }

  // That nothing was written around the tensors of on_gpu and gpu_output.
  void expect_guards_intact() {
    for (const auto& [memory, inner] : guarded_) {
      const Tensor bytes = from_gpu(memory);
      const auto* p = static_cast<const unsigned char*>(bytes.view().data);
      const auto total = static_cast<std::int64_t>(memory.view().bytes());
      std::int64_t broken = 0;
      for (std::int64_t i = 0; i < total; ++i)
        if ((i < kGuard || i >= kGuard + inner) && p[i] != 0xFF) ++broken;
      EXPECT_EQ(broken, 0) << "bytes written outside a tensor of " << inner << " bytes";
    }
  }

  // LOCKSTEP_TEST_SIZES=few: under a tool that slows kernels down by a hundred times.
  static bool few_sizes() { return base::env_choice("LOCKSTEP_TEST_SIZES", {"few"}).has_value(); }
  // Whether it leaves this case out: it runs the first of every `n` cases that
  // a test asks for. An `n` without a factor in common with a test's loops meets all their values.
  bool left_out(int n) { return few_sizes() && cases_++ % n != 0; }

  void SetUp() override {
    if (const std::string problem = tensor::cuda_problem(); !problem.empty())
      GTEST_SKIP() << problem;
    static const Context shared = tensor::cuda_context(gpu_arena());
    gpu = shared;
    gpu_arena().reset();
    // Scratch that nobody wrote is NaN, not the zeros that fresh memory has.
    tensor::fill_bytes(gpu, gpu_arena().take(DType::kE4m3, {kPoisoned}), 0xFF);
    gpu_arena().reset();
    cpu = tensor::cpu_context(cpu_arena_);
  }
  void TearDown() override {
    if (gpu.device != Device::kCuda) return;
    tensor::synchronize(gpu);
    if (!HasFatalFailure()) expect_guards_intact();
  }

  Context cpu, gpu;

 private:
  static constexpr std::int64_t kGuard = 4096;
  static constexpr std::int64_t kPoisoned = std::int64_t{64} << 20;

  static tensor::Arena& gpu_arena() {
    static auto* arena = new tensor::Arena(Device::kCuda);  // not destroyed: the driver goes first
    return *arena;
  }
  TensorView guarded(DType dtype, const Shape& shape) {
    const auto bytes = shape.count() * static_cast<std::int64_t>(tensor::dtype_size(dtype));
    Tensor memory(Device::kCuda, DType::kE4m3, {bytes + 2 * kGuard});
    tensor::fill_bytes(gpu, memory, 0xFF);
    TensorView view = memory;
    view.data = static_cast<std::byte*>(view.data) + kGuard;
    view.dtype = dtype;
    view.shape = shape;
    guarded_.emplace_back(std::move(memory), bytes);
    return view;
  }

  tensor::Arena cpu_arena_;
  int cases_ = 0;
  std::vector<std::pair<Tensor, std::int64_t>> guarded_;
};

}  // namespace lockstep::ops::test
