#include <bit>

#include "ops/cuda/copy_rows.cuh"
#include "ops/cuda/embedding.h"
#include "ops/cuda/stable_sort.cuh"

namespace lockstep::ops::cuda {
namespace {

// Tokens sorted by id, equal ones by place: one pass over a digit of the id.
struct TokenDigit {
  const std::int32_t* token;
  const std::int32_t* place_in;  // null: 0, 1, 2, ...
  std::int32_t* sorted;
  std::int32_t* place_out;
  std::int64_t V;
  int shift, mask;
  __device__ int key(int i) const { return (clamp_index(token[i], V) >> shift) & mask; }
  __device__ void place(int i, int row) const {
    sorted[row] = clamp_index(token[i], V);
    place_out[row] = place_in != nullptr ? place_in[i] : i;
  }
};

struct TokenSums {
  std::int64_t T, D;
  const std::int32_t* sorted;  // token ids
  const std::int32_t* place;
  const Bf16* dx;
  float* dw;
};

constexpr int kWarps = 4;

// Adds rows [begin, begin + n) of the 32 whose places the lanes hold, kRows in flight.
template <int kRows, int kColumns>
__device__ void add_rows(const TokenSums& a, int place, int begin, int n, std::int64_t d,
                         float (&acc)[kColumns]) {
  uint2 row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t t = __shfl_sync(kFullWarp, place, (begin + r) % 32);
    if (r < n && d < a.D) {
      const Bf16* from = a.dx + t * a.D + d;
      if constexpr (kColumns == 4)
        row[r] = __ldg(reinterpret_cast<const uint2*>(from));
      else
        row[r] = {from->bits, 0};
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < n) {
      float v[4];
      unpack_pair(row[r].x, v[0], v[1]);
      unpack_pair(row[r].y, v[2], v[3]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) acc[k] = acc[k] + v[k];
    }
}

// A warp a run of one token id and 32 * kColumns columns. A block has the runs that begin in 32
// places; its warps take them in turn.
template <int kColumns>
__device__ void add_run(const TokenSums& a, std::int64_t first, std::int32_t token) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t d = (std::int64_t{blockIdx.y} * 32 + lane) * kColumns;
  float* dw = a.dw + token * a.D + d;
  float acc[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) acc[k] = d < a.D ? dw[k] : 0.0f;
  for (std::int64_t i0 = first; i0 < a.T; i0 += 32) {
    const std::int64_t i = i0 + lane;
    const bool same = i < a.T && a.sorted[i] == token;
    const int place = same ? a.place[i] : 0;
    const int n = __popc(__ballot_sync(kFullWarp, same));
    if (n > 4) add_rows<16>(a, place, 0, n, d, acc);
    if (n > 16) add_rows<16>(a, place, 16, n - 16, d, acc);
    if (n <= 4) add_rows<4>(a, place, 0, n, d, acc);
    if (n < 32) break;
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k)
    if (d < a.D) dw[k] = acc[k];
}

template <int kColumns>
__global__ void __launch_bounds__(32 * kWarps) token_sums_kernel(TokenSums a) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const std::int64_t block = std::int64_t{blockIdx.x} * 32, i = block + threadIdx.x % 32;
  const std::int32_t token = i < a.T ? a.sorted[i] : -1;
  const bool begins = i < a.T && (i == 0 || a.sorted[i - 1] != token);
  unsigned runs = __ballot_sync(kFullWarp, begins);
  for (int run = 0; runs != 0; ++run, runs &= runs - 1) {
    const int at = __ffs(static_cast<int>(runs)) - 1;
    const std::int32_t run_token = __shfl_sync(kFullWarp, token, at);
    if (run % kWarps == warp) add_run<kColumns>(a, block + at, run_token);
  }
}

}  // namespace

void embedding(const Context& ctx, const TensorView& tokens_T, const TensorView& w_VD,
               const TensorView& x_TD) {
  gather_rows(ctx, w_VD, tokens_T, x_TD);
}

void embedding_backward(const Context& ctx, const TensorView& tokens_T, const TensorView& dx_TD,
                        const TensorView& dw_VD) {
  const std::int64_t T = dx_TD.dim(0), D = dx_TD.dim(1), V = dw_VD.dim(0);
  if (T == 0 || D == 0) return;
  constexpr int kDigitBits = 9;
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(V - 1))));
  const int passes = (bits + kDigitBits - 1) / kDigitBits, digit = (bits + passes - 1) / passes;

  const tensor::ArenaScope scope(*ctx.workspace);
  const auto take = [&] {
    return ctx.workspace->take(tensor::DType::kInt32, {T}).as<std::int32_t>();
  };
  std::int32_t* sorted[2] = {take(), take()};
  std::int32_t* place[2] = {take(), take()};
  TokenDigit d{tokens_T.as<std::int32_t>(), nullptr, nullptr, nullptr, V, 0, (1 << digit) - 1};
  for (int pass = 0; pass < passes; ++pass) {
    d.sorted = sorted[pass % 2];
    d.place_out = place[pass % 2];
    d.shift = pass * digit;
    const tensor::ArenaScope pass_scope(*ctx.workspace);
    stable_sort(ctx, d, T, Bins{1 << digit, nullptr, nullptr});
    d.token = d.sorted;
    d.place_in = d.place_out;
  }
  const TokenSums a{T, D, d.token, d.place_in, dx_TD.as<Bf16>(), dw_VD.as<float>()};
  const unsigned runs = blocks_for(T, 32);
  if (in_chunks(D, a.dx, a.dw))
    token_sums_kernel<4><<<dim3(runs, blocks_for(D, 128)), 32 * kWarps, 0, stream_of(ctx)>>>(a);
  else
    token_sums_kernel<1><<<dim3(runs, blocks_for(D, 32)), 32 * kWarps, 0, stream_of(ctx)>>>(a);
  LOCKSTEP_CUDA_LAUNCHED("embedding_backward");
}

}  // namespace lockstep::ops::cuda
