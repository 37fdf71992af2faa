#include "ops/cuda/gemm_plain.h"
#include "ops/cuda/launch.cuh"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;

constexpr int kTile = 32;  // rows and columns of a block: four warps of 16 x 16
constexpr int kStep = 16;

struct Operand {
  const Bf16* data;
  std::int64_t row_stride, k_stride, rows, K;
  // Values (row, k) and (row, k + 1), zero outside.
  __device__ std::uint32_t pair(std::int64_t row, std::int64_t k) const {
    if (row >= rows) return 0;
    const Bf16* at = data + row * row_stride + k * k_stride;
    const std::uint32_t low = k < K ? at[0].bits : 0u;
    const std::uint32_t high = k + 1 < K ? at[k_stride].bits : 0u;
    return low | high << 16;
  }
};

__device__ void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ void write(const PlainGemm& x, std::int64_t at, float value, bool accumulate) {
  if (!x.d_is_fp32) {
    static_cast<Bf16*>(x.d)[at] = numerics::to_bf16(value);
    return;
  }
  float* to = static_cast<float*>(x.d) + at;
  const float sum = accumulate ? *to + value : value;
  *to = numerics::is_nan(sum) ? numerics::bits_float(0x7FC00000u) : sum;
}

// Block (row tile of all groups, column tile, group where the contraction is grouped).
__global__ void __launch_bounds__(128) plain_gemm_kernel(const PlainGemm x) {
  std::int64_t group = blockIdx.z, row_tile = blockIdx.x, first = 0, rows = x.M, K = x.K;
  if (x.offsets != nullptr && x.contraction_grouped) {
    first = x.offsets[group];
    K = x.offsets[group + 1] - first;
  } else if (x.offsets != nullptr) {
    for (;; ++group) {
      if (group == x.groups) return;
      first = x.offsets[group];
      rows = x.offsets[group + 1] - first;
      const std::int64_t tiles = (rows + kTile - 1) / kTile;
      if (row_tile < tiles) break;
      row_tile -= tiles;
    }
  }
  Operand a{x.a, x.a_row, x.a_k, rows, K}, b{x.b, x.b_row, x.b_k, x.N, K};
  std::int64_t d_row = 0;
  if (x.contraction_grouped) {
    a.data += first * x.a_k;
    b.data += first * x.b_k;
    d_row = group * x.M;
  } else {
    a.data += first * x.a_row;
    b.data += group * x.N * x.K;
    d_row = first;
  }

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = row_tile * kTile + warp / 2 * 16 + lane / 4;
  const std::int64_t column = std::int64_t{blockIdx.y} * kTile + warp % 2 * 16;
  std::int64_t begin = 0;
  do {
    const std::int64_t end = min(K, begin + x.piece);
    float c[2][4] = {};
    for (std::int64_t k0 = begin; k0 < end; k0 += kStep) {
      const std::int64_t k = k0 + lane % 4 * 2;
      const std::uint32_t from_a[4] = {a.pair(row, k), a.pair(row + 8, k), a.pair(row, k + 8),
                                       a.pair(row + 8, k + 8)};
      for (int j = 0; j < 2; ++j) {
        const std::int64_t n = column + j * 8 + lane / 4;
        multiply(c[j], from_a, {b.pair(n, k), b.pair(n, k + 8)});
      }
    }
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) {
        const std::int64_t m = row + i / 2 * 8, n = column + j * 8 + lane % 4 * 2 + i % 2;
        if (m < rows && n < x.N)
          write(x, (d_row + m) * x.N + n, c[j][i], x.accumulate || begin > 0);
      }
    begin = end;
  } while (begin < K);
}

}  // namespace

void plain_gemm(const Context& ctx, const PlainGemm& x) {
  const auto tiles = [](std::int64_t n) { return (n + kTile - 1) / kTile; };
  const bool rows_grouped = x.offsets != nullptr && !x.contraction_grouped;
  const std::int64_t row_tiles = tiles(x.M) + (rows_grouped ? x.groups : 0);
  const std::int64_t groups = x.contraction_grouped ? x.groups : 1;
  if (x.M == 0 || x.N == 0 || groups == 0) return;
  LOCKSTEP_CHECK(tiles(x.N) <= 65535 && groups <= 65535,
                 "BF16 product with rows that are not multiples of 16 bytes: {} columns in {} "
                 "groups are more than the plain kernel takes",
                 x.N, groups);
  const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(tiles(x.N)),
                  static_cast<unsigned>(groups));
  plain_gemm_kernel<<<grid, 128, 0, stream_of(ctx)>>>(x);
  LOCKSTEP_CUDA_LAUNCHED("plain_gemm");
}

}  // namespace lockstep::ops::cuda
