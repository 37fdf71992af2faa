// ops/optimizer.h on the GPU.
#include "ops/optimizer.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

using OptimizerGpu = GpuTest;

AdamwOptions options_at(std::int64_t step) {
  AdamwOptions o;
  o.lr = 3e-3;
  o.clip = 0.7f;
  o.step = step;
  return o;
}

TensorView tail(TensorView x, std::int64_t begin) {
  x.data = static_cast<std::byte*>(x.data) +
           begin * static_cast<std::int64_t>(tensor::dtype_size(x.dtype));
  x.shape = {x.count() - begin};
  return x;
}

// Three steps in place; with an offset the tensors are not aligned to 16 bytes.
TEST_F(OptimizerGpu, AdamwHasTheBytesOfTheCpu) {
  Rng rng(1);
  for (const std::int64_t n : {0, 1, 7, 8, 9, 255, 2048, 2053, 100003, 5000011})
    for (const DType m_type : {DType::kFp32, DType::kBf16})
      for (const DType v_type : {DType::kFp32, DType::kBf16})
        for (const std::int64_t offset : {0, 1}) {
          if (n > 1000000 && (m_type != v_type || offset > 0)) continue;
          const std::int64_t size = n + offset;
          Tensor grad = random_normal(rng, DType::kFp32, {size}, 0.01);
          Tensor master = random_normal(rng, DType::kFp32, {size});
          Tensor m = random_normal(rng, m_type, {size}, 0.01), v = empty(v_type, {size});
          for (std::int64_t i = 0; i < size; ++i)
            set_value(v, i, i % 5 == 0 ? 0.0 : 1e-4 * uniform(rng) * (i % 3 == 0 ? 1e-36 : 1));
          for (std::int64_t i = 0; i < size; i += 10) {
            set_value(grad, i, i % 20 == 0 ? 0.0 : -0.0);
            set_value(m, i, 0.0);
          }
          const Tensor w = cpu_output(DType::kBf16, {size});
          const TensorView gpu_grad = on_gpu(grad), gpu_master = on_gpu(master), gpu_m = on_gpu(m),
                           gpu_v = on_gpu(v), gpu_w = gpu_output(DType::kBf16, {size});
          for (const std::int64_t step : {1, 2, 1000}) {
            const AdamwOptions o = options_at(step);
            adamw(cpu, tail(grad, offset), o, tail(master, offset), tail(m, offset),
                  tail(v, offset), tail(w, offset));
            adamw(gpu, tail(gpu_grad, offset), o, tail(gpu_master, offset), tail(gpu_m, offset),
                  tail(gpu_v, offset), tail(gpu_w, offset));
          }
          const std::string what =
              fmt::format("n {} m {} v {} offset {}", n, tensor::dtype_name(m_type),
                          tensor::dtype_name(v_type), offset);
          expect_same(master, gpu_master, what + " master");
          expect_same(m, gpu_m, what + " m");
          expect_same(v, gpu_v, what + " v");
          expect_same(w, gpu_w, what + " w");
        }
}

void expect_same_norm(double want, double got, const std::string& what) {
  EXPECT_EQ(std::memcmp(&want, &got, sizeof want), 0)
      << what << fmt::format(": CPU {:a}, GPU {:a}", want, got);
}

TEST_F(OptimizerGpu, NormsHaveTheBytesOfTheCpu) {
  Rng rng(2);
  EXPECT_EQ(global_norm(gpu, {}), 0.0);
  for (const std::int64_t n :
       {0, 1, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097, 8191, 40961, 1000003, 17000003}) {
    const Tensor x = random_normal(rng, DType::kFp32, {n});
    expect_same_norm(global_norm(cpu, {x}), global_norm(gpu, {on_gpu(x)}), fmt::format("n {}", n));
  }
  // Many tensors of odd sizes that follow each other in one slab: few of them are aligned.
  const Tensor slab = random_normal(rng, DType::kFp32, {3000000});
  const TensorView gpu_slab = on_gpu(slab);
  std::vector<TensorView> host, device;
  for (std::int64_t begin = 0; begin < 3000000;) {
    const std::int64_t count = std::min<std::int64_t>(uniform_int(rng, 0, 9000), 3000000 - begin);
    host.push_back(slab.view().rows(begin, count));
    device.push_back(gpu_slab.rows(begin, count));
    begin += count;
  }
  expect_same_norm(global_norm(cpu, host), global_norm(gpu, device),
                   fmt::format("{} tensors", host.size()));
}

TEST_F(OptimizerGpu, NormsOfNonFiniteValues) {
  Rng rng(3);
  Tensor x = random_normal(rng, DType::kFp32, {10000});
  x.as<float>()[9999] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(global_norm(gpu, {on_gpu(x)}), std::numeric_limits<double>::infinity());
  x.as<float>()[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(global_norm(gpu, {on_gpu(x)})));
}

TEST_F(OptimizerGpu, CountsValuesThatAreNotFinite) {
  Rng rng(4);
  for (const DType type : {DType::kFp32, DType::kBf16})
    for (const std::int64_t n : {0, 1, 3, 4, 8, 9, 4097, 1000003})
      for (const std::int64_t offset : {0, 1}) {
        const Tensor x = random_normal(rng, type, {n + offset});
        std::int64_t want = 0;
        for (std::int64_t i = offset; i < n + offset; ++i) {
          if (i % 97 != 0 && i != n + offset - 1) continue;
          set_value(x, i, i % 2 == 0 ? std::nan("") : -std::numeric_limits<double>::infinity());
          ++want;
        }
        const TensorView device = tail(on_gpu(x), offset);
        EXPECT_EQ(count_nonfinite(gpu, device), want) << tensor::dtype_name(type) << " n " << n;
        EXPECT_EQ(count_nonfinite(cpu, tail(x, offset)), want);
      }
}

}  // namespace
}  // namespace lockstep::ops::test
