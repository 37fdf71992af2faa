// Weight gradients of expert GEMMs (E experts, rows routed by a Dirichlet(4) draw), FP8 and BF16,
// written and accumulated in FP32, with cuBLASLt (one product an expert) beside them. TFLOPS on
// true rows.
//   gpu_wgrad_bench [path of libcublasLt]
#include <chrono>
#include <cmath>
#include <thread>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "gpu_bench.h"
#include "ops/gemm.h"
#include "ops/cuda/gemm_wgrad_next.cuh"
#include "random_fill.cuh"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using numerics::Bf16;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;
using tensor::TensorView;

struct Shape {
  const char* name;
  std::int64_t E, rows, N, K;
};

struct Case {
  Shape s;
  std::vector<std::int32_t> offsets, padded;
  Tensor offsets_E1, padded_E1, d_ENK;
};

Case make_case(const Context& ctx, const Shape& s) {
  std::mt19937 rng(7);
  std::gamma_distribution<double> gamma(4.0);
  std::vector<double> share(static_cast<std::size_t>(s.E));
  double sum = 0;
  for (double& x : share) sum += x = gamma(rng);
  Case c{s, {0}, {0}, {}, {}, {}};
  double reached = 0;
  for (const double x : share) {
    reached += x / sum;
    const auto next =
        static_cast<std::int32_t>(std::llround(reached * static_cast<double>(s.rows)));
    const std::int32_t rows = next - c.offsets.back();
    c.offsets.push_back(next);
    c.padded.push_back(c.padded.back() + (rows + 127) / 128 * 128);
  }
  const auto on_gpu = [&](const std::vector<std::int32_t>& v) {
    Tensor host(Device::kCpu, DType::kInt32, {static_cast<std::int64_t>(v.size())});
    std::memcpy(host.view().data, v.data(), v.size() * 4);
    Tensor t(Device::kCuda, DType::kInt32, host.view().shape);
    tensor::copy(ctx, host, t);
    return t;
  };
  c.offsets_E1 = on_gpu(c.offsets);
  c.padded_E1 = on_gpu(c.padded);
  c.d_ENK = Tensor(Device::kCuda, DType::kFp32, {s.E, s.N, s.K});
  return c;
}

// Samples of d against the product in double; prints and returns the relative error of their norm.
struct Probe {
  const void *dy, *x;
  const float *sdy, *sx, *d;
  const std::int32_t *offsets, *padded;
  std::int64_t E, N, K, R;
  bool fp8;
};
constexpr int kProbes = 256;
__global__ void probe_kernel(const Probe p, double* error) {
  const std::uint32_t r = mix(blockIdx.x * 3 + 1);
  const std::int64_t e = r % p.E, n = mix(r) % p.N, k = mix(r + 5) % p.K;
  double sum = 0;
  const std::int64_t rows = p.offsets[e + 1] - p.offsets[e];
  for (std::int64_t m = threadIdx.x; m < rows; m += blockDim.x) {
    if (p.fp8) {
      const std::int64_t at = p.padded[e] + m;
      const auto code = [&](const void* codes, std::int64_t c) {
        return numerics::e4m3_to_float(static_cast<const std::uint8_t*>(codes)[c * p.R + at]);
      };
      sum += static_cast<double>(code(p.dy, n)) * code(p.x, k) * p.sdy[at / 128 * p.N + n] *
             p.sx[at / 128 * p.K + k];
    } else {
      const std::int64_t at = p.offsets[e] + m;
      sum += static_cast<double>(numerics::to_float(static_cast<const Bf16*>(p.dy)[at * p.N + n])) *
             numerics::to_float(static_cast<const Bf16*>(p.x)[at * p.K + k]);
    }
  }
  atomicAdd(&error[2 * blockIdx.x], sum);
  if (threadIdx.x == 0) error[2 * blockIdx.x + 1] = p.d[(e * p.N + n) * p.K + k];
}
double probe_error(const Context& ctx, const Probe& p) {
  Tensor sums(Device::kCuda, DType::kFp64, {kProbes, 2});
  probe_kernel<<<kProbes, 256, 0, tensor::stream_of(ctx)>>>(p, sums.as<double>());
  LOCKSTEP_CUDA_LAUNCHED("probe");
  const Tensor host = tensor::to_host(sums);
  double difference = 0, size = 0;
  for (int i = 0; i < kProbes; ++i) {
    const double* v = host.as<double>() + 2 * i;
    difference += (v[0] - v[1]) * (v[0] - v[1]);
    size += v[0] * v[0];
  }
  return std::sqrt(difference / size);
}

void print(const Case& c, const std::string& what, const Timing& t, double error) {
  const double flops = 2.0 * static_cast<double>(c.s.rows * c.s.N * c.s.K);
  std::printf("%-20s %-26s %8.3f ms  %7.0f TFLOPS (p10 %.0f, p90 %.0f)", c.s.name, what.c_str(),
              t.median * 1e3, flops / t.median * 1e-12, flops / t.p90 * 1e-12,
              flops / t.p10 * 1e-12);
  if (error >= 0) std::printf("  error %.1e", error);
  std::printf("\n");
  std::fflush(stdout);
}

__global__ void differ_kernel(const std::uint32_t* a, const std::uint32_t* b, std::int64_t n,
                              unsigned long long* out) {
  unsigned long long count = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x)
    if (a[i] != b[i]) {
      ++count;
      atomicMin(out + 1, static_cast<unsigned long long>(i));
    }
  if (count) atomicAdd(out, count);
}
struct Bench {
  const Context& ctx;
  const Case& c;
  const ops::Fp8Columns &dy, &x;
  const ops::cuda::WeightGradient& g;
  const Tensor& expected_E;
  int samples;
};
template <int kV, bool kAccumulate>
void one(const Bench& b, const char* name, bool check = true) {
  using ops::cuda::Fp8Type;
  const cudaStream_t s = tensor::stream_of(b.ctx);
  const Tensor cycles(Device::kCuda, DType::kInt64, {3});
  auto* p = reinterpret_cast<long long*>(cycles.view().data);
  const auto run = [&](int) {
    ops::cuda::launch_next<Fp8Type::kE4m3, Fp8Type::kE4m3, kAccumulate, kV>(b.ctx, b.dy, b.x, b.g, p);
  };
  long long h[3] = {0, 0, -1};
  tensor::check_cuda(cudaMemcpyAsync(p, h, 24, cudaMemcpyHostToDevice, s), "copy");
  if (check) {
    fill_normal(b.ctx, b.c.d_ENK.as<float>(), b.c.s.E * b.c.s.N * b.c.s.K, 77);
    run(0);
    tensor::check_cuda(cudaStreamSynchronize(s), name);
    differ_kernel<<<1024, 256, 0, s>>>(static_cast<const std::uint32_t*>(b.expected_E.view().data),
                                       static_cast<const std::uint32_t*>(b.c.d_ENK.view().data), b.c.s.E * b.c.s.N * b.c.s.K,
                                       reinterpret_cast<unsigned long long*>(p + 1));
  }
  tensor::check_cuda(cudaStreamSynchronize(s), name);
  std::this_thread::sleep_for(std::chrono::milliseconds(250));
  const Timing t = time_kernel(b.ctx, run, b.samples, 2);
  tensor::check_cuda(cudaMemcpyAsync(h, p, 24, cudaMemcpyDeviceToHost, s), "copy");
  tensor::check_cuda(cudaStreamSynchronize(s), name);
  const double flops = 2.0 * static_cast<double>(b.c.s.rows * b.c.s.N * b.c.s.K);
  std::printf("%-18s %-34s %s %7.3f ms %6.0f TFLOPS (best %.0f) %6.2f Mcycles %5.2f GHz", b.c.s.name, name,
              kAccumulate ? "+=" : " =", t.median * 1e3, flops / t.median * 1e-12,
              flops / t.p10 * 1e-12, h[0] * 1e-6, h[0] / t.median * 1e-9);
  if (check && h[1]) std::printf("  DIFFER %lld from %lld", h[1], h[2]);
  std::printf("\n");
  std::fflush(stdout);
}
void run_fp8(const Context& ctx, const Case& c, int samples, int level) {
  const std::int64_t R = c.padded.back();
  struct Operand {
    Tensor codes, scales;
  };
  const auto operand = [&](std::int64_t columns, std::uint32_t seed) {
    Operand o{Tensor(Device::kCuda, DType::kE4m3, {columns, R}),
              Tensor(Device::kCuda, DType::kFp32, {R / 128, columns})};
    fill_normal(ctx, o.codes.view().fp8(), columns * R, seed, 150.0f);
    fill_normal(ctx, o.scales.as<float>(), R / 128 * columns, seed + 1, 0.001f, 0.0067f);
    return o;
  };
  const Operand dy = operand(c.s.N, 1), x = operand(c.s.K, 3);
  // Rows of padding are zero in training; here they are cut off by the row counts in `probe` only
  // where they are, so they are cleared as well.
  for (std::size_t e = 0; e + 1 < c.offsets.size(); ++e) {
    const std::int64_t rows = c.offsets[e + 1] - c.offsets[e], end = c.padded[e] + rows,
                       spare = c.padded[e + 1] - end;
    for (const auto& [o, columns] : {std::pair{&dy, c.s.N}, std::pair{&x, c.s.K}})
      if (spare > 0)
        tensor::check_cuda(
            cudaMemset2DAsync(o->codes.view().fp8() + end, static_cast<std::size_t>(R), 0,
                              static_cast<std::size_t>(spare), static_cast<std::size_t>(columns),
                              tensor::stream_of(ctx)),
            "cudaMemset2DAsync");
  }
  const ops::Fp8Columns fdy{dy.codes, dy.scales, ops::Scaling::kBlock},
      fx{x.codes, x.scales, ops::Scaling::kBlock};
  const ops::Segments segments{c.offsets_E1, c.padded_E1};
  const auto once = [&](bool accumulate) {
    ops::fp8_weight_gradient(ctx, fdy, fx, segments, accumulate, c.d_ENK);
  };
  const ops::cuda::WeightGradient g{c.offsets_E1.as<std::int32_t>(), c.padded_E1.as<std::int32_t>(),
                                    c.d_ENK.as<float>(), static_cast<int>(c.s.E), static_cast<int>(R),
                                    static_cast<int>(c.s.N), static_cast<int>(c.s.K)};
  const Tensor expected(Device::kCuda, DType::kFp32, {c.s.E, c.s.N, c.s.K});
  const auto expect = [&](bool accumulate) {
    if (accumulate) fill_normal(ctx, expected.as<float>(), c.s.E * c.s.N * c.s.K, 77);
    ops::fp8_weight_gradient(ctx, fdy, fx, segments, accumulate, expected);
  };
  const Bench b{ctx, c, fdy, fx, g, expected, samples};
  using V = ops::cuda::NextVariant;
  expect(false);
  std::this_thread::sleep_for(std::chrono::milliseconds(250));
  print(c, "now =", time_kernel(ctx, [&](int) { once(false); }, samples, 2), -1);
  one<V{1, 1, 0}.code(), false>(b, "products under");
  one<V{1, 1, 6}.code(), false>(b, "reads, products before");
  one<V{1, 1, 7}.code(), false>(b, "reads one ahead");
  if (level == 0) {
    one<V{1, 1, 1}.code(), false>(b, "reads, products behind");
    one<V{1, 1, 4}.code(), false>(b, "reads only", false);
    one<V{1, 1, 5}.code(), false>(b, "no reads", false);
    one<V{1, 1, 8}.code(), false>(b, "fma only", false);
    one<V{1, 1, 2}.code(), false>(b, "none", false);
    return;
  }
  one<V{1, 2, 6}.code(), false>(b, "1x2 reads, products before");
  one<V{1, 2, 7}.code(), false>(b, "1x2 reads one ahead");
  expect(true);
  std::this_thread::sleep_for(std::chrono::milliseconds(250));
  print(c, "now +=", time_kernel(ctx, [&](int) { once(true); }, samples, 2), -1);
  one<V{1, 1, 6}.code(), true>(b, "reads, products before");
  one<V{1, 1, 7}.code(), true>(b, "reads one ahead");
}
void run(int samples) {
  tensor::Arena arena(Device::kCuda);
  const Context ctx = tensor::cuda_context(arena);
  std::printf("%s\n", tensor::device_text(ctx).c_str());
  int level = 0;
  for (const Shape& s :
       {Shape{"long", 1, 65536, 4096, 4224}, Shape{"dsv3 gate_up", 32, 32768, 4096, 7168}}) {
    const Case c = make_case(ctx, s);
    run_fp8(ctx, c, samples, level);
    level = 1;
  }
}

}  // namespace
}  // namespace lockstep::bench

int main() {
  try {
    lockstep::bench::run(14);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
