// The norm's tree of chunks, a warp a chunk: first the chunks of all tensors in one launch, then
// their sums, level by level. And the count of values that are not finite.
#include <cmath>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/optimizer.h"
#include "tensor/device.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;
using numerics::kNormChunk;

constexpr int kThreads = 256;
constexpr int kRound = 256;  // elements of one round of lane_sum: 8 a lane

struct Source {
  const float* data;
  std::int64_t count;
  std::int64_t first_chunk;  // of all chunks of all tensors
};

std::int64_t chunks_of(std::int64_t n) { return (n + kNormChunk - 1) / kNormChunk; }

Grid warp_grid(std::int64_t warps) { return elementwise_grid(warps * 32, kThreads); }

__device__ double add_square(float x, double sum) {
  const double g = static_cast<double>(x);
  return __fma_rn(g, g, sum);  // g * g is exact: the same bits as two roundings
}

// The chunk's sum on every lane. A missing element is a zero, which adds nothing.
__device__ double chunk_squares(const float* x, std::int64_t n, int lane) {
  double sum = 0.0;
  if (n == kNormChunk && reinterpret_cast<std::uintptr_t>(x) % 16 == 0) {
    const float4* wide = reinterpret_cast<const float4*>(x) + 2 * lane;
#pragma unroll 4
    for (int i = 0; i < kNormChunk / kRound; ++i) {
      const float4 a = wide[i * (kRound / 4)], b = wide[i * (kRound / 4) + 1];
      for (const float v : {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}) sum = add_square(v, sum);
    }
  } else {
    for (std::int64_t base = 8 * lane; base < n; base += kRound)
#pragma unroll
      for (int k = 0; k < 8; ++k) sum = add_square(base + k < n ? x[base + k] : 0.0f, sum);
  }
  return butterfly_sum(sum);
}

__global__ __launch_bounds__(kThreads) void squares_kernel(const Source* sources, int count,
                                                           std::int64_t chunks, double* sums) {
  const int lane = threadIdx.x % 32;
  const std::int64_t stride = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t c = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; c < chunks;
       c += stride) {
    int low = 0, high = count;  // the last source that begins at c or before
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (sources[middle].first_chunk <= c ? low : high) = middle;
    }
    const Source s = sources[low];
    const std::int64_t begin = (c - s.first_chunk) * kNormChunk;
    const std::int64_t left = s.count - begin;
    const double sum = chunk_squares(s.data + begin, left < kNormChunk ? left : kNormChunk, lane);
    if (lane == 0) sums[c] = sum;
  }
}

__global__ __launch_bounds__(kThreads) void totals_kernel(const double* from, std::int64_t n,
                                                          double* to) {
  const int lane = threadIdx.x % 32;
  const std::int64_t c = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (c * kNormChunk >= n) return;
  const double* x = from + c * kNormChunk;
  const std::int64_t left = n - c * kNormChunk, size = left < kNormChunk ? left : kNormChunk;
  double sum = 0.0;
  for (std::int64_t base = 8 * lane; base < size; base += kRound) {
    double v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = base + k < size ? x[base + k] : 0.0;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = sum + v[k];
  }
  sum = butterfly_sum(sum);
  if (lane == 0) to[c] = sum;
}

__device__ bool nonfinite(float x) { return !numerics::is_finite(x); }
__device__ bool nonfinite(Bf16 x) { return (x.bits & 0x7F80u) == 0x7F80u; }

template <typename T>
struct alignas(16) Pack {
  T x[16 / sizeof(T)];
};

// The first `wide` packs with 16-byte loads, the other values one by one.
template <typename T>
__global__ __launch_bounds__(kThreads) void count_kernel(const T* x, std::int64_t n,
                                                         std::int64_t wide,
                                                         unsigned long long* total) {
  constexpr int kPack = 16 / sizeof(T);
  const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  unsigned long long found = 0;
#pragma unroll 4
  for (std::int64_t i = first; i < wide; i += stride) {
    const Pack<T> p = reinterpret_cast<const Pack<T>*>(x)[i];
#pragma unroll
    for (int k = 0; k < kPack; ++k) found += nonfinite(p.x[k]) ? 1 : 0;
  }
  for (std::int64_t i = wide * kPack + first; i < n; i += stride) found += nonfinite(x[i]) ? 1 : 0;
  if (found != 0) atomicAdd(total, found);
}

template <typename T>
void launch_count(const Context& ctx, const TensorView& x, unsigned long long* total) {
  constexpr std::int64_t kPack = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
  const Grid grid = elementwise_grid(aligned ? (x.count() + kPack - 1) / kPack : x.count());
  count_kernel<T><<<grid.blocks, kThreads, 0, stream_of(ctx)>>>(
      x.as<T>(), x.count(), aligned ? x.count() / kPack : 0, total);
  LOCKSTEP_CUDA_LAUNCHED("count_nonfinite");
}

}  // namespace

double global_norm(const Context& ctx, const std::vector<TensorView>& grads) {
  std::vector<Source> sources;
  std::int64_t chunks = 0;
  for (const TensorView& grad : grads) {
    if (grad.count() == 0) continue;
    sources.push_back({grad.as<float>(), grad.count(), chunks});
    chunks += chunks_of(grad.count());
  }
  if (chunks == 0) return 0.0;
  const tensor::ArenaScope scope(*ctx.workspace);
  const auto count = static_cast<std::int64_t>(sources.size());
  Source* table = tensor::take_structs<Source>(*ctx.workspace, count);
  tensor::copy_bytes(ctx, sources.data(), tensor::Device::kCpu, table, tensor::Device::kCuda,
                     sources.size() * sizeof(Source));
  TensorView sums = ctx.workspace->take(tensor::DType::kFp64, {chunks});
  const Grid grid = warp_grid(chunks);
  squares_kernel<<<grid.blocks, kThreads, 0, stream_of(ctx)>>>(table, static_cast<int>(count),
                                                               chunks, sums.as<double>());
  LOCKSTEP_CUDA_LAUNCHED("global_norm");
  for (std::int64_t n = chunks; n > 1; n = chunks_of(n)) {
    const TensorView next = ctx.workspace->take(tensor::DType::kFp64, {chunks_of(n)});
    const auto blocks = static_cast<unsigned>((chunks_of(n) * 32 + kThreads - 1) / kThreads);
    totals_kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(sums.as<double>(), n, next.as<double>());
    LOCKSTEP_CUDA_LAUNCHED("global_norm");
    sums = next;
  }
  double sum = 0.0;
  tensor::copy_bytes(ctx, sums.data, tensor::Device::kCuda, &sum, tensor::Device::kCpu,
                     sizeof(sum));
  return std::sqrt(sum);
}

std::int64_t count_nonfinite(const Context& ctx, const TensorView& x) {
  if (x.count() == 0) return 0;
  const tensor::ArenaScope scope(*ctx.workspace);
  const TensorView total = ctx.workspace->take(tensor::DType::kInt64, {1});
  tensor::fill_bytes(ctx, total, 0);
  auto* counter = static_cast<unsigned long long*>(total.data);
  if (x.dtype == tensor::DType::kBf16)
    launch_count<Bf16>(ctx, x, counter);
  else
    launch_count<float>(ctx, x, counter);
  std::int64_t found = 0;
  tensor::download(ctx, total, &found);
  return found;
}

}  // namespace lockstep::ops::cuda
