// BF16 products: head, router and attention-free linears, with cuBLASLt beside them.
//   gpu_gemm_bf16_bench [path of libcublasLt]
#include <cmath>
#include <string>

#include "cublaslt_product.h"
#include "gpu_bench.h"
#include "ops/cuda/gemm_bf16.h"
#include "ops/gemm.h"
#include "random_fill.cuh"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using numerics::Bf16;
using ops::BLayout;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;

struct Shape {
  const char* name;
  std::int64_t M, N, K;
  BLayout layout;
  DType out;
};

// Samples of d against the product in double: the relative error of their norm.
constexpr int kProbes = 256;
__global__ void probe_kernel(const Bf16* a, const Bf16* b, const void* d, bool fp32, bool nk,
                             std::int64_t M, std::int64_t N, std::int64_t K, double* out) {
  const std::uint32_t r = mix(blockIdx.x * 3 + 1);
  const std::int64_t m = r % M, n = mix(r) % N;
  double sum = 0;
  for (std::int64_t k = threadIdx.x; k < K; k += blockDim.x)
    sum += static_cast<double>(numerics::to_float(a[m * K + k])) *
           numerics::to_float(nk ? b[n * K + k] : b[k * N + n]);
  atomicAdd(&out[2 * blockIdx.x], sum);
  if (threadIdx.x == 0)
    out[2 * blockIdx.x + 1] = fp32 ? static_cast<const float*>(d)[m * N + n]
                                   : numerics::to_float(static_cast<const Bf16*>(d)[m * N + n]);
}

void run_case(const Context& ctx, const CublasLibrary& blas, const Shape& s) {
  const bool nk = s.layout == BLayout::kNK, fp32 = s.out == DType::kFp32;
  const double bytes = 2.0 * static_cast<double>(s.M * s.K + s.N * s.K) +
                       (fp32 ? 4.0 : 2.0) * static_cast<double>(s.M * s.N);
  // Sets of operands, so that together they do not fit in the L2 cache.
  const int sets = bytes > 400e6 ? 1 : static_cast<int>(400e6 / bytes) + 1;
  std::vector<Tensor> a, b, d;
  for (int i = 0; i < sets && i < 16; ++i) {
    a.emplace_back(Device::kCuda, DType::kBf16, tensor::Shape{s.M, s.K});
    b.emplace_back(Device::kCuda, DType::kBf16,
                   nk ? tensor::Shape{1, s.N, s.K} : tensor::Shape{1, s.K, s.N});
    d.emplace_back(Device::kCuda, s.out, tensor::Shape{s.M, s.N});
    fill_normal(ctx, a.back().as<Bf16>(), s.M * s.K, static_cast<std::uint32_t>(2 * i));
    fill_normal(ctx, b.back().as<Bf16>(), s.N * s.K, static_cast<std::uint32_t>(2 * i + 1));
  }
  const auto set = [&](int launch) { return static_cast<std::size_t>(launch) % a.size(); };
  const auto row = [&](const char* what, const Timing& t, double error) {
    const double flops = 2.0 * static_cast<double>(s.M * s.N) * static_cast<double>(s.K);
    std::printf(
        "%-26s %6ld x %6ld x %5ld %-9s %9.1f us %7.0f TFLOPS %6.2f TB/s (p10 %.1f, p90 %.1f us)",
        s.name, static_cast<long>(s.M), static_cast<long>(s.N), static_cast<long>(s.K), what,
        t.median * 1e6, flops / t.median * 1e-12, bytes / t.median * 1e-12, t.p10 * 1e6,
        t.p90 * 1e6);
    if (error >= 0) std::printf(" error %.1e", error);
    std::printf("\n");
    std::fflush(stdout);
  };
  const auto probe = [&] {
    Tensor sums(Device::kCuda, DType::kFp64, {kProbes, 2});
    probe_kernel<<<kProbes, 256, 0, tensor::stream_of(ctx)>>>(a[0].as<Bf16>(), b[0].as<Bf16>(),
                                                              d[0].view().data, fp32, nk, s.M, s.N,
                                                              s.K, sums.as<double>());
    LOCKSTEP_CUDA_LAUNCHED("probe");
    const Tensor host = tensor::to_host(sums);
    double difference = 0, size = 0;
    for (int i = 0; i < kProbes; ++i) {
      const double* v = host.as<double>() + 2 * i;
      difference += (v[0] - v[1]) * (v[0] - v[1]);
      size += v[0] * v[0];
    }
    return std::sqrt(difference / size);
  };
  using ops::cuda::Bf16Plan;
  const Bf16Plan chosen = ops::cuda::plan_bf16_gemm(s.M, s.N, 1);
  for (const auto& [plan, name] :
       {std::pair{Bf16Plan::k128x256, "128x256"}, std::pair{Bf16Plan::k128x128, "128x128"},
        std::pair{Bf16Plan::kSwap64, "swap64"}, std::pair{Bf16Plan::kSwap16, "swap16"}}) {
    const bool worth = plan == chosen || (plan == Bf16Plan::k128x256 && s.M > 64) ||
                       (plan == Bf16Plan::k128x128 && s.M > 16) ||
                       (plan == Bf16Plan::kSwap64 && s.M > 8 && s.M <= 256);
    if (!worth) continue;
    const auto once = [&](int i) {
      ops::cuda::bf16_gemm(ctx, plan, a[set(i)], b[set(i)], s.layout, {}, d[set(i)]);
    };
    once(0);
    const double error = probe();
    row((std::string(plan == chosen ? "*" : " ") + name).c_str(), time_kernel(ctx, once, 15),
        error);
  }
  const CublasProduct product(blas, {CUDA_R_16BF, fp32 ? CUDA_R_32F : CUDA_R_16BF, nk, true, s.N,
                                     s.M, s.K, nk ? s.K : s.N, s.K});
  if (!product.found()) return;
  row(" cuBLASLt",
      time_kernel(
          ctx,
          [&](int i) {
            product.run(b[set(i)].as<Bf16>(), a[set(i)].as<Bf16>(), 0.0f, d[set(i)].view().data,
                        tensor::stream_of(ctx));
          },
          15),
      -1);
}

void run(const char* cublas_path) {
  tensor::Arena arena(Device::kCuda);
  const Context ctx = tensor::cuda_context(arena);
  const CublasLibrary blas(cublas_path);
  std::printf("%s (* the plan that is chosen)\n", tensor::device_text(ctx).c_str());
  constexpr BLayout kNK = BLayout::kNK, kKN = BLayout::kKN;
  constexpr DType kFp32 = DType::kFp32, kBf16 = DType::kBf16;
  for (const Shape& s : {
           Shape{"square", 8192, 8192, 8192, kNK, kBf16},
           Shape{"head, qwen3-30b", 4096, 151936, 2048, kNK, kFp32},
           Shape{"head, qwen3-30b", 1024, 151936, 2048, kNK, kFp32},
           Shape{"head d_h, qwen3-30b", 1024, 2048, 151936, kKN, kBf16},
           Shape{"head, decode", 1, 151936, 2048, kNK, kFp32},
           Shape{"head, decode", 32, 151936, 2048, kNK, kFp32},
           Shape{"head, decode", 128, 151936, 2048, kNK, kFp32},
           Shape{"head, decode", 512, 151936, 2048, kNK, kFp32},
           Shape{"router, qwen3-30b", 16384, 128, 2048, kNK, kFp32},
           Shape{"router, decode", 64, 128, 2048, kNK, kFp32},
           Shape{"router, dsv3", 16384, 256, 7168, kNK, kFp32},
           Shape{"router d_h, qwen3-30b", 16384, 2048, 128, kKN, kBf16},
           Shape{"qkv, qwen3-30b", 16384, 5120, 2048, kNK, kBf16},
           Shape{"qkv dx, qwen3-30b", 16384, 2048, 5120, kKN, kBf16},
           Shape{"o, qwen3-30b", 16384, 2048, 4096, kNK, kBf16},
       })
    run_case(ctx, blas, s);
}

}  // namespace
}  // namespace lockstep::bench

int main(int argc, char** argv) {
  try {
    lockstep::bench::run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
