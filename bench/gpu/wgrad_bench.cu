// Weight gradients of expert GEMMs (E experts, rows routed by a Dirichlet(4) draw), FP8 and BF16,
// written and accumulated in FP32, with cuBLASLt (one product an expert) beside them. TFLOPS on
// true rows.
//   gpu_wgrad_bench [path of libcublasLt] [part of the names of shapes]
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "cublaslt_product.h"
#include "gpu_bench.h"
#include "ops/gemm.h"
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
  std::int64_t chain_rows = 0;  // BF16 alone
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

// Cycles and nanoseconds of one multiprocessor, as far as it has got.
__global__ void clock_kernel(unsigned long long* cycles_nanoseconds) {
  unsigned multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  unsigned long long cycles, nanoseconds;
  asm volatile("mov.u64 %0, %%clock64;\n\tmov.u64 %1, %%globaltimer;"
               : "=l"(cycles), "=l"(nanoseconds));
  if (threadIdx.x == 0 && multiprocessor == 0) {
    cycles_nanoseconds[0] = cycles;
    cycles_nanoseconds[1] = nanoseconds;
  }
}

struct ClockedTiming : Timing {
  double gigahertz = 0;  // over all samples
};

// The card is warm after a measurement and its clock low: each starts after a pause.
ClockedTiming time_rested(const Context& ctx, const std::function<void(int)>& run, int samples,
                          int inner) {
  const Tensor clocks(Device::kCuda, DType::kFp64, {4});
  auto* at = static_cast<unsigned long long*>(clocks.view().data);
  const auto look = [&](int i) {
    clock_kernel<<<264, 1024, 0, tensor::stream_of(ctx)>>>(at + 2 * i);
    LOCKSTEP_CUDA_LAUNCHED("clock");
  };
  tensor::check_cuda(cudaStreamSynchronize(tensor::stream_of(ctx)), "cudaStreamSynchronize");
  std::this_thread::sleep_for(std::chrono::milliseconds(250));
  look(0);
  ClockedTiming t{time_kernel(ctx, run, samples, inner)};
  look(1);
  const Tensor host = tensor::to_host(clocks);
  const auto* v = static_cast<const unsigned long long*>(host.view().data);
  t.gigahertz = static_cast<double>(v[2] - v[0]) / static_cast<double>(v[3] - v[1]);
  return t;
}

void print(const Case& c, const std::string& what, const ClockedTiming& t, double error) {
  const double flops = 2.0 * static_cast<double>(c.s.rows * c.s.N * c.s.K);
  std::printf("%-20s %-26s %8.3f ms  %7.0f TFLOPS (p10 %.0f, p90 %.0f) at %.2f GHz", c.s.name,
              what.c_str(), t.median * 1e3, flops / t.median * 1e-12, flops / t.p90 * 1e-12,
              flops / t.p10 * 1e-12, t.gigahertz);
  if (error >= 0) std::printf("  error %.1e", error);
  std::printf("\n");
  std::fflush(stdout);
}

void run_fp8(const Context& ctx, const CublasLibrary& blas, const Case& c, int samples) {
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
  for (const bool accumulate : {false, true}) {
    once(false);
    const double error = probe_error(
        ctx, {dy.codes.view().data, x.codes.view().data, dy.scales.as<float>(),
              x.scales.as<float>(), c.d_ENK.as<float>(), c.offsets_E1.as<std::int32_t>(),
              c.padded_E1.as<std::int32_t>(), c.s.E, c.s.N, c.s.K, R, true});
    print(c, std::string("FP8 block") + (accumulate ? " +=" : " ="),
          time_rested(
              ctx, [&](int) { once(accumulate); }, samples, 2),
          error);
  }
  {
    const Tensor sdy(Device::kCuda, DType::kFp32, {c.s.E, c.s.N}),
        sx(Device::kCuda, DType::kFp32, {c.s.E, c.s.K});
    fill_normal(ctx, sdy.as<float>(), c.s.E * c.s.N, 5, 0.001f, 0.0067f);
    fill_normal(ctx, sx.as<float>(), c.s.E * c.s.K, 6, 0.001f, 0.0067f);
    const ops::Fp8Columns rdy{dy.codes, sdy, ops::Scaling::kRow},
        rx{x.codes, sx, ops::Scaling::kRow};
    print(c, "FP8 row +=",
          time_rested(
              ctx, [&](int) { ops::fp8_weight_gradient(ctx, rdy, rx, segments, true, c.d_ENK); },
              samples, 2),
          -1);
  }
  std::vector<std::unique_ptr<CublasProduct>> products;
  bool found = blas.found();
  for (std::size_t e = 0; e + 1 < c.offsets.size(); ++e) {
    products.push_back(std::make_unique<CublasProduct>(
        blas, CublasShape{CUDA_R_8F_E4M3, CUDA_R_32F, true, true, c.s.K, c.s.N,
                          c.padded[e + 1] - c.padded[e], R, R}));
    found = found && products.back()->found();
  }
  if (!found) return;
  print(c, "cuBLASLt FP8 +=",
        time_rested(
            ctx,
            [&](int) {
              for (std::size_t e = 0; e < products.size(); ++e)
                products[e]->run(x.codes.view().fp8() + c.padded[e],
                                 dy.codes.view().fp8() + c.padded[e], 1.0f,
                                 c.d_ENK.as<float>() + static_cast<std::int64_t>(e) * c.s.N * c.s.K,
                                 tensor::stream_of(ctx));
            },
            samples, 2),
        -1);
}

void run_bf16(const Context& ctx, const CublasLibrary& blas, const Case& c, int samples) {
  const std::int64_t M = c.s.rows;
  const Tensor dy(Device::kCuda, DType::kBf16, {M, c.s.N}),
      x(Device::kCuda, DType::kBf16, {M, c.s.K});
  fill_normal(ctx, dy.as<Bf16>(), M * c.s.N, 1);
  fill_normal(ctx, x.as<Bf16>(), M * c.s.K, 2);
  const auto once = [&](bool accumulate) {
    ops::bf16_weight_gradient(ctx, dy, x, c.offsets_E1, accumulate, c.d_ENK, c.s.chain_rows);
  };
  for (const bool accumulate : {false, true}) {
    once(false);
    const double error =
        probe_error(ctx, {dy.view().data, x.view().data, nullptr, nullptr, c.d_ENK.as<float>(),
                          c.offsets_E1.as<std::int32_t>(), nullptr, c.s.E, c.s.N, c.s.K, 0, false});
    print(c, std::string("BF16") + (accumulate ? " +=" : " ="),
          time_rested(
              ctx, [&](int) { once(accumulate); }, samples, 2),
          error);
  }
  std::vector<std::unique_ptr<CublasProduct>> products;
  bool found = blas.found();
  for (std::size_t e = 0; e + 1 < c.offsets.size(); ++e) {
    products.push_back(std::make_unique<CublasProduct>(
        blas, CublasShape{CUDA_R_16BF, CUDA_R_32F, false, false, c.s.K, c.s.N,
                          c.offsets[e + 1] - c.offsets[e], c.s.K, c.s.N}));
    found = found && products.back()->found();
  }
  if (!found) return;
  print(c, "cuBLASLt BF16 +=",
        time_rested(
            ctx,
            [&](int) {
              for (std::size_t e = 0; e < products.size(); ++e)
                products[e]->run(x.as<Bf16>() + c.offsets[e] * c.s.K,
                                 dy.as<Bf16>() + c.offsets[e] * c.s.N, 1.0f,
                                 c.d_ENK.as<float>() + static_cast<std::int64_t>(e) * c.s.N * c.s.K,
                                 tensor::stream_of(ctx));
            },
            samples, 2),
        -1);
}

void run(const char* cublas_path, const std::string& shapes) {
  tensor::Arena arena(Device::kCuda);
  const Context ctx = tensor::cuda_context(arena);
  const CublasLibrary blas(cublas_path);
  std::printf("%s\n", tensor::device_text(ctx).c_str());
  for (const Shape& s :
       {Shape{"dsv3 gate_up", 32, 32768, 4096, 7168}, Shape{"dsv3 down", 32, 32768, 7168, 2048},
        Shape{"qwen3-30b gate_up", 128, 131072, 1536, 2048},
        Shape{"qwen3-30b down", 128, 131072, 2048, 768}, Shape{"scout", 16, 16384, 8192, 5120},
        Shape{"head", 1, 1024, 151936, 2048},
        Shape{"head in chains", 1, 4096, 151936, 2048, 1024}}) {
    if (std::string(s.name).find(shapes) == std::string::npos) continue;
    const Case c = make_case(ctx, s);
    if (s.chain_rows == 0) run_fp8(ctx, blas, c, 20);
    run_bf16(ctx, blas, c, 20);
  }
}

}  // namespace
}  // namespace lockstep::bench

int main(int argc, char** argv) {
  try {
    lockstep::bench::run(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
