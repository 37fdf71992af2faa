#include <cuda_pipeline.h>

#include "ops/cuda/head_norm_backward.cuh"
#include "ops/cuda/norm.h"

namespace lockstep::ops::cuda {
namespace {

constexpr int kProducers = 512;  // threads that turn rows into terms
constexpr unsigned kFewBlocks = kMultiprocessors / 4;
constexpr int kTileValues = kProducers * 16;

// Threads that add them up, K / consumers(K) columns each.
constexpr int consumers(int K) { return K < 32 ? 32 : K > 128 ? 128 : K; }

// Named barriers between the two, a pair for each of two buffers; all threads count.
template <int kThreads>
__device__ void barrier_wait(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ void barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Where column 8q + 2p + b of a row lies among its (dy, x * rstd) pairs: 16-byte pieces are swapped
// so that neighbouring threads' stores, of kMine threads a row, fall on different banks. What the
// row adds to that of row 0 is pair_turn.
template <int kMine>
__device__ int pair_place(int q, int p) {
  return q * 8 + (p ^ (q % kMine >> 1 & 3)) * 2;
}
template <int kMine>
__device__ int pair_turn(int row) {
  const int piece = kMine == 1 ? (row & 1) * 4 + (row >> 1 & 3) : row * kMine >> 1 & 3;
  return piece * 2;
}

// A producer's share of a row: chunks `pair` and `pair + kPairs`, which the rotation mixes, of
// d_out and x. They come by asynchronous copies into the thread's own slots, kStages tiles of them.
constexpr int kStages = 3;  // this tile's and the two that `produce` fetches ahead

// A row's token and head, counted from the block's first, and the step to the next tile: without a
// division, which would cost as much as a chunk's arithmetic.
struct Place {
  int t, j;
  __device__ void advance(int rows, int H) {
    t += rows / H;
    j += rows % H;
    if (j >= H) {
      j -= H;
      ++t;
    }
  }
};

template <int kPairs>
__device__ void fetch(const Heads& a, int pair, int r, int t, int rows, uint4* slot) {
  if (r < rows) {
    const auto* d_out = reinterpret_cast<const uint4*>(a.d_out) + (r * 2 * kPairs + pair);
    const auto* x =
        reinterpret_cast<const uint4*>(a.x) +
        (r * 2 * kPairs + t * (static_cast<int>(a.x_stride) / 8 - a.H * 2 * kPairs) + pair);
    __pipeline_memcpy_async(slot, d_out, 16);
    __pipeline_memcpy_async(slot + kProducers, d_out + kPairs, 16);
    __pipeline_memcpy_async(slot + 2 * kProducers, x, 16);
    __pipeline_memcpy_async(slot + 3 * kProducers, x + kPairs, 16);
  }
  __pipeline_commit();
}

// A chunk's terms: dy and x * rstd, in turn.
template <int kMine>
__device__ void store_terms(float2* terms, int row, int q, const float (&dy)[8],
                            const float (&x)[8], float rstd) {
  float2* const to = terms + row * 16 * kMine;
#pragma unroll
  for (int p = 0; p < 4; ++p)
    *reinterpret_cast<float4*>(to + (pair_place<kMine>(q, p) ^ pair_turn<kMine>(row))) = {
        dy[2 * p], x[2 * p] * rstd, dy[2 * p + 1], x[2 * p + 1] * rstd};
}

// Turns tiles of rows into terms in shared memory, those of the kMine pairs of chunks from `first`
// on; where these are all, it writes d_x, too.
template <int kPairs, int kMine>
__device__ void produce(const Heads& a, int first, int rows, float2* stage, uint4* raw) {
  constexpr int kColumns = 16 * kMine, kRows = kProducers / kMine;
  constexpr int kThreads = kProducers + consumers(kColumns);
  const int mine = static_cast<int>(threadIdx.x) % kMine, pair = first + mine;
  const int row = static_cast<int>(threadIdx.x) / kMine;
  uint4* slot = raw + threadIdx.x;
  Place place{row / a.H, row % a.H};
  int t = place.t;
  place.advance(kRows, a.H);
  int next_t = place.t;
  place.advance(kRows, a.H);
  fetch<kPairs>(a, pair, row, t, rows, slot);
  fetch<kPairs>(a, pair, row + kRows, next_t, rows, slot + 4 * kProducers);
  RowValues values = load_values(a, row, t, rows, pair);
  for (int tile = 0; tile * kRows < rows; ++tile) {
    const int r = tile * kRows + row;
    fetch<kPairs>(a, pair, r + 2 * kRows, place.t, rows,
                  slot + (tile + 2) % kStages * 4 * kProducers);
    __pipeline_wait_prior(kStages - 1);
    const uint4* from = slot + tile % kStages * 4 * kProducers;
    float d_low[8], d_high[8], x_low[8], x_high[8];
    unpack(from[0], d_low);
    unpack(from[kProducers], d_high);
    unpack(from[2 * kProducers], x_low);
    unpack(from[3 * kProducers], x_high);
    if (a.cos != nullptr) turn_back(values, d_low, d_high);
    const float rstd = values.rstd;
    values = load_values(a, r + kRows, next_t, rows, pair);  // in the registers that are now free
    if (tile >= 2) barrier_wait<kThreads>(3 + tile % 2);
    float2* terms = stage + tile % 2 * kTileValues;
    store_terms<kMine>(terms, row, mine, d_low, x_low, rstd);
    store_terms<kMine>(terms, row, mine + kMine, d_high, x_high, rstd);
    barrier_arrive<kThreads>(1 + tile % 2);
    if constexpr (kMine == kPairs) {
      float w_low[8], w_high[8];
      unpack(__ldg(reinterpret_cast<const uint4*>(a.w) + pair), w_low);
      unpack(__ldg(reinterpret_cast<const uint4*>(a.w) + pair + kPairs), w_high);
      const float factor = head_factor<kPairs>(chunk_sum(d_low, w_low, x_low),
                                               chunk_sum(d_high, w_high, x_high), rstd);
      if (r < rows) {
        auto* out =
            reinterpret_cast<uint4*>(a.out) +
            (r * 2 * kPairs + t * (static_cast<int>(a.out_stride) / 8 - a.H * 2 * kPairs) + pair);
        out[0] = gradient(d_low, w_low, x_low, factor, rstd);
        out[kPairs] = gradient(d_high, w_high, x_high, factor, rstd);
      }
    }
    t = next_t;
    next_t = place.t;
    place.advance(kRows, a.H);
  }
}

// Adds the terms of a thread's columns, row by row.
template <int kPairs, int kMine>
__device__ void consume(int first, int rows, const float2* stage, float* partial_K) {
  constexpr int K = 16 * kMine, kRows = kProducers / kMine, kConsumers = consumers(K);
  constexpr int kThreads = kProducers + kConsumers, kColumns = (K + kConsumers - 1) / kConsumers;
  const int first_column = static_cast<int>(threadIdx.x) - kProducers;
  int place[kColumns];
  float acc[kColumns] = {};
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int i = min(first_column + c * kConsumers, K - 1);
    place[c] = pair_place<kMine>(i / 8, i % 8 / 2) + i % 2;
  }
  int tile = 0;
  for (int begin = 0; begin < rows; begin += kRows, ++tile) {
    barrier_wait<kThreads>(1 + tile % 2);
    const float2* terms = stage + tile % 2 * kTileValues;
    const int end = min(kRows, rows - begin);
#pragma unroll 16
    for (int r = 0; r < end; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float2 term = terms[r * K + (place[c] ^ pair_turn<kMine>(r))];
        acc[c] = numerics::fma(term.x, term.y, acc[c]);
      }
    if (begin + 2 * kRows < rows) barrier_arrive<kThreads>(3 + tile % 2);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int i = first_column + c * kConsumers, chunk = i / 8;
    if (i < K)
      partial_K[(first + (chunk < kMine ? chunk : chunk - kMine + kPairs)) * 8 + i % 8] = acc[c];
  }
}

// A block of 128 tokens, or kMine pairs of chunks of it; its rows are (token, head).
template <int kPairs, int kMine>
__global__ void __launch_bounds__(kProducers + consumers(16 * kMine), 1)
    head_backward_kernel(Heads a, float* partial_BK) {
  extern __shared__ float4 shared[];
  auto* stage = reinterpret_cast<float2*>(shared);                // [2 buffers][kTileValues]
  auto* raw = reinterpret_cast<uint4*>(stage + 2 * kTileValues);  // [kStages][4][kProducers]
  const std::int64_t begin = std::int64_t{blockIdx.x} * numerics::kRowBlock;
  const int rows = static_cast<int>(min(std::int64_t{numerics::kRowBlock}, a.T - begin)) * a.H;
  const int first = static_cast<int>(blockIdx.y) * kMine;
  if (threadIdx.x < kProducers) {
    a.x += begin * a.x_stride;
    a.out += begin * a.out_stride;
    a.d_out += begin * a.H * a.K;
    a.rstd += begin * a.H;
    if (a.positions != nullptr) a.positions += begin;
    produce<kPairs, kMine>(a, first, rows, stage, raw);
  } else {
    consume<kPairs, kMine>(first, rows, stage, partial_BK + std::int64_t{blockIdx.x} * 16 * kPairs);
  }
}

template <int kPairs, int kMine>
void launch_blocks(const Heads& a, float* partial_BK, cudaStream_t stream) {
  constexpr int kBytes = 2 * kTileValues * static_cast<int>(sizeof(float2)) +
                         kStages * 4 * kProducers * static_cast<int>(sizeof(uint4));
  const auto kernel = head_backward_kernel<kPairs, kMine>;
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "head_norm_rope_backward: shared memory");
  const dim3 grid(blocks_for(a.T, numerics::kRowBlock), kPairs / kMine);
  kernel<<<grid, kProducers + consumers(16 * kMine), kBytes, stream>>>(a, partial_BK);
  LOCKSTEP_CUDA_LAUNCHED("head_norm_rope_backward");
}

// With few blocks their columns are divided, and d_x, which needs whole rows, has its own kernel.
template <int kPairs>
void launch_pairs(const Heads& a, float* partial_BK, cudaStream_t stream) {
  constexpr int kMine = kPairs < 4 ? 1 : kPairs / 4;
  if (kMine == kPairs || blocks_for(a.T, numerics::kRowBlock) > kFewBlocks)
    return launch_blocks<kPairs, kPairs>(a, partial_BK, stream);
  launch_blocks<kPairs, kMine>(a, partial_BK, stream);
  head_d_x_kernel<kPairs>
      <<<blocks_for(a.T * a.H, kRowThreads / kPairs), kRowThreads, 0, stream>>>(a);
  LOCKSTEP_CUDA_LAUNCHED("head_norm_rope_backward: d_x");
}

}  // namespace

void launch_head_backward(const Heads& a, float* partial_BK, cudaStream_t stream) {
  switch (a.K) {
    case 16:
      return launch_pairs<1>(a, partial_BK, stream);
    case 32:
      return launch_pairs<2>(a, partial_BK, stream);
    case 64:
      return launch_pairs<4>(a, partial_BK, stream);
    case 128:
      return launch_pairs<8>(a, partial_BK, stream);
    default:
      return launch_pairs<16>(a, partial_BK, stream);
  }
}

void head_norm_rope_backward(const Context& ctx, const TensorView& d_out_THK, const HeadColumns& x,
                             const TensorView& w_K, const TensorView& positions_T,
                             const TensorView& cos_PK, const TensorView& sin_PK,
                             const TensorView& rstd_TH, const HeadColumns& d_x,
                             const TensorView& dw_K) {
  Heads a{};
  a.T = d_out_THK.dim(0);
  a.H = static_cast<int>(d_out_THK.dim(1));
  a.K = static_cast<int>(d_out_THK.dim(2));
  a.x = x.slab_TN.as<Bf16>() + x.column;
  a.x_stride = x.slab_TN.dim(1);
  a.d_out = d_out_THK.as<Bf16>();
  a.out = d_x.slab_TN.as<Bf16>() + d_x.column;
  a.out_stride = d_x.slab_TN.dim(1);
  if (cos_PK) {
    a.positions = positions_T.as<std::int32_t>();
    a.cos = cos_PK.as<float>();
    a.sin = sin_PK.as<float>();
    a.P = cos_PK.dim(0);
  }
  const cudaStream_t stream = stream_of(ctx);
  const bool empty = a.T == 0 || a.H == 0;
  if (!w_K) {
    if (empty) return;
    if (!head_in_chunks(a)) return launch_head_backward_any(a, nullptr, stream);
    a.x = a.d_out;
    a.x_stride = std::int64_t{a.H} * a.K;
    return launch_head_chunks(a, -1.0f, stream);
  }
  a.w = w_K.as<Bf16>();
  a.rstd = rstd_TH.as<float>();
  const tensor::ArenaScope scope(*ctx.workspace);
  const std::int64_t blocks = empty ? 0 : blocks_for(a.T, numerics::kRowBlock);
  float* partial = ctx.workspace->take(tensor::DType::kFp32, {blocks, a.K}).as<float>();
  const bool power_of_two = (a.K & (a.K - 1)) == 0;
  if (!empty && head_in_chunks(a) && a.K >= 16 && power_of_two)
    launch_head_backward(a, partial, stream);
  else if (!empty)
    launch_head_backward_any(a, partial, stream);
  add_row_blocks(ctx, partial, blocks, a.K, dw_K.as<float>());
}

}  // namespace lockstep::ops::cuda
