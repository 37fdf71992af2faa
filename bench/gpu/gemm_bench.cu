// FP8 GEMM, block-scaled, grouped, BF16 out: TFLOPS on true rows and TB/s of weights, beside
// cuBLASLt's dense FP8 product over the same number of rows (one expert). Data are N(0,1) quantized
// as in training; rows an expert are drawn from a Dirichlet(4). Each plan's output is compared by
// bytes with that of another one before it is timed.
//
// gpu_gemm_bench [shapes=TEXT,..] [plans=NAME,..|auto] [samples=N] [inner=N] [cublas=PATH]
// [scaling=block|row] [pause=MS] [zero=1]
//
// Under this load the GPU runs at its power limit, and its clock follows the last tenths of a
// second: every measurement starts after a pause. MHz: the clock in the 50 us after the last
// product; it is lower while products run. zero=1: all codes 0, which draw less power.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "cublaslt_fp8.h"
#include "gpu_bench.h"
#include "numerics/formats.h"
#include "ops/cuda/gemm_plan.h"
#include "ops/gemm.h"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using ops::Scaling;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;
using tensor::TensorView;

struct Shape {
  const char* name;
  std::int64_t E, rows, N, K;
  bool even;  // the same rows for every expert
};
constexpr Shape kShapes[] = {
    {"dsv3-gate_up", 32, 32768, 4096, 7168, false},
    {"dsv3-down", 32, 32768, 7168, 2048, false},
    {"qwen3-gate_up", 128, 131072, 1536, 2048, false},
    {"qwen3-down", 128, 131072, 2048, 768, false},
    {"mixtral-gate_up", 8, 16384, 28672, 4096, false},
    {"mixtral-down", 8, 16384, 4096, 14336, false},
    {"scout", 16, 16384, 8192, 5120, false},
    {"dense-8192", 1, 8192, 8192, 8192, false},
    {"decode-qwen3-gate_up-4", 128, 512, 1536, 2048, true},
    {"decode-qwen3-gate_up-16", 128, 2048, 1536, 2048, true},
    {"decode-qwen3-down-4", 128, 512, 2048, 768, true},
    {"decode-dsv3-gate_up-4", 32, 128, 4096, 7168, true},
    {"decode-dsv3-gate_up-32", 32, 1024, 4096, 7168, true},
    {"decode-qwen3-gate_up-64", 128, 8192, 1536, 2048, true},
    {"decode-qwen3-gate_up-128", 128, 16384, 1536, 2048, true},
    {"decode-qwen3-gate_up-256", 128, 32768, 1536, 2048, true},
};

__device__ std::uint32_t hash(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<std::uint32_t>((x ^ (x >> 31)) >> 16);
}
__device__ float normal(std::uint64_t i) {
  const float u = (static_cast<float>(hash(2 * i)) + 0.5f) * 0x1p-32f;
  const float v = static_cast<float>(hash(2 * i + 1)) * 0x1p-32f;
  return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

// One block of threads quantizes `rows` x 128 values of a [R, K] matrix with one scale.
__global__ void fill_block(numerics::Fp8* codes, float* scales, std::int64_t R, std::int64_t K,
                           int rows, std::int64_t row_stride, std::int64_t block_stride,
                           std::uint64_t seed) {
  __shared__ float largest[32];
  const std::int64_t row = std::int64_t{blockIdx.x} * rows, k = std::int64_t{blockIdx.y} * 128;
  float amax = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < rows * 128; i += static_cast<int>(blockDim.x)) {
    const std::int64_t at = (row + i / 128) * K + k + i % 128;
    if (row + i / 128 < R && k + i % 128 < K)
      amax =
          fmaxf(amax, fabsf(numerics::round_bf16(normal(seed + static_cast<std::uint64_t>(at)))));
  }
  for (int d = 16; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, d));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = amax;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / 32; ++w) amax = fmaxf(amax, largest[w]);
  const float scale = amax / 448.0f, inverse = 1.0f / scale;
  for (int i = static_cast<int>(threadIdx.x); i < rows * 128; i += static_cast<int>(blockDim.x)) {
    const std::int64_t at = (row + i / 128) * K + k + i % 128;
    if (row + i / 128 < R && k + i % 128 < K)
      codes[at] = numerics::to_e4m3(
          numerics::round_bf16(normal(seed + static_cast<std::uint64_t>(at))) * inverse);
  }
  if (threadIdx.x == 0)
    scales[std::int64_t{blockIdx.x} * row_stride + std::int64_t{blockIdx.y} * block_stride] = scale;
}

__global__ void count_different(const std::uint32_t* a, const std::uint32_t* b, std::int64_t n,
                                unsigned long long* count) {
  unsigned long long mine = 0;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x)
    mine += a[i] != b[i] ? 1 : 0;
  if (mine != 0) atomicAdd(count, mine);
}

// Cycles in 50 us.
__global__ void count_cycles(long long* cycles) {
  const auto now = [] {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  };
  unsigned long long from = now(), to = now();
  while (to == from) from = to, to = now();
  const long long start = clock64();
  from = to;
  while (to - from < 50000) to = now();
  *cycles = (clock64() - start) * 50000 / static_cast<long long>(to - from);
}

// The clock of the multiprocessors after what the stream holds.
double clock_rate(const Context& ctx) {
  const Tensor cycles(Device::kCuda, DType::kInt64, {1});
  count_cycles<<<1, 1, 0, tensor::stream_of(ctx)>>>(
      reinterpret_cast<long long*>(cycles.as<std::int64_t>()));
  std::int64_t count = 0;
  tensor::download(ctx, cycles, &count);
  return static_cast<double>(count) / 50e-6;
}

std::vector<std::int32_t> route(const Shape& s) {
  std::mt19937_64 rng(7);
  std::gamma_distribution<double> gamma(4.0, 1.0);
  std::vector<double> share;
  double sum = 0;
  for (std::int64_t e = 0; e < s.E; ++e) sum += share.emplace_back(s.even ? 1.0 : gamma(rng));
  std::vector<std::int32_t> offsets{0};
  double before = 0;
  for (const double x : share)
    offsets.push_back(
        static_cast<std::int32_t>(static_cast<double>(s.rows) * ((before += x) / sum) + 0.5));
  return offsets;
}

struct Options {
  std::string shapes, plans = "auto", cublas, scaling = "block";
  int samples = 20, inner = 3, pause = 400, zero = 0;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> out;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    if (comma > at) out.push_back(text.substr(at, comma - at));
    at = comma + 1;
  }
  return out;
}

bool wanted(const Shape& s, const std::string& shapes) {
  if (shapes.empty()) return true;
  for (const std::string& part : split(shapes))
    if (std::strstr(s.name, part.c_str()) != nullptr) return true;
  return false;
}

void rest(const Options& options) {
  std::this_thread::sleep_for(std::chrono::milliseconds(options.pause));
}

void force_plan(const std::string& plan) {
  if (plan == "auto")
    unsetenv("LOCKSTEP_PLAN");
  else
    setenv("LOCKSTEP_PLAN", plan.c_str(), 1);
}

void print(const Shape& s, const char* what, const Timing& t, double reference, double clock) {
  const double flops = 2.0 * static_cast<double>(s.rows) * static_cast<double>(s.N * s.K);
  const double weights = static_cast<double>(s.E * s.N * s.K);
  std::printf(
      "%-25s %-12s %9.1f us  p10 %9.1f  p90 %9.1f  %7.0f TFLOPS  %4.0f MHz  %5.2f TB/s of weights",
      s.name, what, t.median * 1e6, t.p10 * 1e6, t.p90 * 1e6, flops / t.median * 1e-12,
      clock * 1e-6, weights / t.median * 1e-12);
  if (reference > 0) std::printf("  x%.2f", reference / t.median);
  std::printf("\n");
  std::fflush(stdout);
}

void run(const Context& ctx, CublasLt& cublas, const Shape& s, const Options& options) {
  const std::int64_t G = (s.K + 127) / 128, blocks = (s.N + 127) / 128;
  const Tensor a(Device::kCuda, DType::kE4m3, {s.rows, s.K});
  const Tensor b(Device::kCuda, DType::kE4m3, {s.E, s.N, s.K});
  const Tensor sa(Device::kCuda, DType::kFp32, {G, s.rows});
  const Tensor sb(Device::kCuda, DType::kFp32, {s.E, blocks, G});
  const Tensor d(Device::kCuda, DType::kBf16, {s.rows, s.N});
  const Tensor check(Device::kCuda, DType::kBf16, {s.rows, s.N});
  const Tensor count(Device::kCuda, DType::kInt64, {1});
  tensor::Arena arena(Device::kCuda);
  const std::vector<std::int32_t> rows = route(s);
  const TensorView offsets = tensor::upload<std::int32_t>(ctx, arena, rows);
  const cudaStream_t stream = tensor::stream_of(ctx);
  fill_block<<<dim3(static_cast<unsigned>(s.rows), static_cast<unsigned>(G)), 128, 0, stream>>>(
      a.view().fp8(), sa.as<float>(), s.rows, s.K, 1, 1, s.rows, 1);
  for (std::int64_t e = 0; e < s.E; ++e)
    fill_block<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(G)), 512, 0, stream>>>(
        b.view().fp8() + e * s.N * s.K, sb.as<float>() + e * blocks * G, s.N, s.K, 128, G, 1,
        static_cast<std::uint64_t>(e + 1) << 40);
  if (options.zero) tensor::fill_bytes(ctx, a, 0), tensor::fill_bytes(ctx, b, 0);
  tensor::synchronize(ctx);

  double reference = 0;
  if (cublas.found() && s.rows >= 4096) {
    using Scales = CublasLt::Scales;
    const auto time = [&](Scales scales, const char* name) {
      if (!cublas.prepare(s.rows, s.N, s.K, scales, sa.as<float>(), sb.as<float>())) {
        std::printf("%-25s %-12s has no algorithm\n", s.name, name);
        return;
      }
      rest(options);
      const Timing t = time_kernel(
          ctx, [&](int) { cublas.run(a.view().data, b.view().data, d.view().data, stream); },
          options.samples, options.inner);
      cublas.run(a.view().data, b.view().data, d.view().data, stream);
      if (scales == Scales::kBlock) reference = t.median;
      print(s, name, t, reference, clock_rate(ctx));
    };
    time(Scales::kBlock, "cublas-block");
    if (s.E * blocks * G >= s.N) time(Scales::kRow, "cublas-row");
  }
  const Tensor sa_row(Device::kCuda, DType::kFp32, {s.rows});
  const Tensor sb_row(Device::kCuda, DType::kFp32, {s.E, s.N});
  tensor::fill_bytes(ctx, sa_row, 0x3C);  // 0.0115
  tensor::fill_bytes(ctx, sb_row, 0x3C);
  const bool row = options.scaling == "row";
  const auto product = [&](const TensorView& out) {
    if (row)
      ops::fp8_gemm(ctx, {a, sa_row, Scaling::kRow}, {b, sb_row, Scaling::kRow}, offsets, out);
    else
      ops::fp8_gemm(ctx, {a, sa, Scaling::kBlock}, {b, sb, Scaling::kBlock}, offsets, out);
  };
  for (const std::string& plan : split(options.plans)) {
    if (plan == "few" && s.rows / s.E > 256) continue;
    tensor::fill_bytes(ctx, d, 0xFF);
    tensor::fill_bytes(ctx, check, 0xFF);
    tensor::fill_bytes(ctx, count, 0);
    force_plan(plan);
    product(d);
    force_plan(plan == "128x128" ? "128x256" : "128x128");
    product(check);
    count_different<<<1024, 256, 0, stream>>>(static_cast<const std::uint32_t*>(d.view().data),
                                              static_cast<const std::uint32_t*>(check.view().data),
                                              s.rows * s.N / 2,
                                              static_cast<unsigned long long*>(count.view().data));
    std::int64_t different = 0;
    tensor::download(ctx, count, &different);
    force_plan(plan);
    if (different != 0) {
      std::printf("%-25s %-12s WRONG: %lld of %lld pairs differ\n", s.name, plan.c_str(),
                  static_cast<long long>(different), static_cast<long long>(s.rows * s.N / 2));
      continue;
    }
    rest(options);
    const bool decode = s.even;
    const Timing t = time_kernel(
        ctx, [&](int) { product(d); }, options.samples, decode ? 4 * options.inner : options.inner);
    product(d);
    print(s, plan.c_str(), t, reference, clock_rate(ctx));
  }
}

int main_of(int argc, char** argv) {
  Options options;
  const std::map<std::string, std::string*> texts = {{"shapes", &options.shapes},
                                                     {"plans", &options.plans},
                                                     {"cublas", &options.cublas},
                                                     {"scaling", &options.scaling}};
  const std::map<std::string, int*> numbers = {{"samples", &options.samples},
                                               {"inner", &options.inner},
                                               {"pause", &options.pause},
                                               {"zero", &options.zero}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i], key = argument.substr(0, argument.find('='));
    const std::string value = argument.substr(std::min(argument.size(), key.size() + 1));
    if (const auto text = texts.find(key); text != texts.end())
      *text->second = value;
    else if (const auto number = numbers.find(key); number != numbers.end())
      *number->second = std::atoi(value.c_str());
    else
      return std::fprintf(stderr, "unknown argument %s\n", argv[i]), 2;
  }
  tensor::Arena workspace(Device::kCuda);
  const Context ctx = tensor::cuda_context(workspace);
  CublasLt cublas(options.cublas);
  std::printf("%s; cuBLASLt %s\n", tensor::device_text(ctx).c_str(),
              cublas.found() ? "found" : "not found");
  for (const Shape& s : kShapes)
    if (wanted(s, options.shapes)) run(ctx, cublas, s, options);
  return 0;
}

}  // namespace
}  // namespace lockstep::bench

int main(int argc, char** argv) { return lockstep::bench::main_of(argc, argv); }
