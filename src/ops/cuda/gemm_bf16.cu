#include <algorithm>

#include "ops/cuda/gemm_bf16.h"
#include "ops/cuda/gemm_bf16_kernel.cuh"
#include "ops/cuda/gemm_plain.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;
using tensor::DType;

constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

template <typename Tile, typename Output>
void launch(const Context& ctx, const TensorView& a_MK, const TensorView& b, const Bf16Product& x) {
  const CUtensorMap a_map =
      tensor_map(a_MK.data, DType::kBf16,
                 {{x.K, 2, Tile::kDepth}, {x.M, std::int64_t{x.K} * 2, Tile::kBlockRows}}, kSwizzle,
                 "bf16_gemm a");
  const std::int64_t slab = std::int64_t{x.N} * x.K * 2;
  const CUtensorMap b_map =
      Tile::kWeights == Major::kK
          ? tensor_map(b.data, DType::kBf16,
                       {{x.K, 2, Tile::kDepth},
                        {x.N, std::int64_t{x.K} * 2, Tile::kBlockColumns},
                        {x.groups, slab, 1}},
                       kSwizzle, "bf16_gemm b")
          : tensor_map(b.data, DType::kBf16,
                       {{x.N, 2, 64}, {x.K, std::int64_t{x.N} * 2, 64}, {x.groups, slab, 1}},
                       kSwizzle, "bf16_gemm b");
  const CUtensorMap d_map = tensor_map(
      x.d_MN, tensor::DTypeOf<Output>::value,
      {{x.N, sizeof(Output), kStoreBoxColumns<Output>},
       {x.M, std::int64_t{x.N} * static_cast<std::int64_t>(sizeof(Output)), kStoreBoxRows},
       {1, std::int64_t{x.M} * x.N * static_cast<std::int64_t>(sizeof(Output)), 1}},
      kSwizzle, "bf16_gemm output");
  const auto kernel = bf16_gemm_kernel<Tile, Output>;
  allow_shared_memory(kernel, Tile::kSharedBytes);
  const std::int64_t row_tiles =
      (x.M + Tile::kBlockRows - 1) / Tile::kBlockRows + (x.offsets_E1 == nullptr ? 0 : x.groups);
  const std::int64_t tiles = row_tiles * ((x.N + Tile::kBlockColumns - 1) / Tile::kBlockColumns);
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(tiles, kMultiprocessors));
  kernel<<<blocks, Tile::kThreads, Tile::kSharedBytes, stream_of(ctx)>>>(a_map, b_map, d_map, x);
  LOCKSTEP_CUDA_LAUNCHED("bf16_gemm");
}

template <int kColumns, bool kSwap>
void launch_any(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
                DType out, const Bf16Product& x) {
  using Nk = Bf16Tile<kColumns, kSwap, false>;
  using Kn = Bf16Tile<kColumns, kSwap, true>;
  if (layout == BLayout::kNK && out == DType::kFp32) return launch<Nk, float>(ctx, a_MK, b, x);
  if (layout == BLayout::kNK) return launch<Nk, Bf16>(ctx, a_MK, b, x);
  if (out == DType::kFp32) return launch<Kn, float>(ctx, a_MK, b, x);
  launch<Kn, Bf16>(ctx, a_MK, b, x);
}

}  // namespace

Bf16Plan plan_bf16_gemm(std::int64_t M, std::int64_t N, std::int64_t E) {
  const std::int64_t rows = M / E;  // of a group, on average
  if (rows <= 16) return Bf16Plan::kSwap16;
  if (rows <= 64) return Bf16Plan::kSwap64;
  // Rounds of tiles over the multiprocessors, a large tile taking 1.7 times as long.
  const std::int64_t row_tiles = (M + 127) / 128 + E - 1;
  const auto rounds = [&](std::int64_t columns) {
    return (row_tiles * ((N + columns - 1) / columns) + kMultiprocessors - 1) / kMultiprocessors;
  };
  return 17 * rounds(256) <= 10 * rounds(128) ? Bf16Plan::k128x256 : Bf16Plan::k128x128;
}

void bf16_gemm(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
               const TensorView& offsets_E1, const TensorView& d_MN) {
  bf16_gemm(ctx, plan_bf16_gemm(a_MK.dim(0), d_MN.dim(1), std::max<std::int64_t>(b.dim(0), 1)),
            a_MK, b, layout, offsets_E1, d_MN);
}

void bf16_gemm(const Context& ctx, Bf16Plan plan, const TensorView& a_MK, const TensorView& b,
               BLayout layout, const TensorView& offsets_E1, const TensorView& d_MN) {
  const std::int64_t M = a_MK.dim(0), K = a_MK.dim(1), N = d_MN.dim(1), E = b.dim(0);
  if (M == 0 || N == 0) return;
  const std::int32_t* offsets = offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr;
  const bool rows_at_16_bytes = K % 8 == 0 && N % 8 == 0 && K > 0 && aligned(a_MK.data) &&
                                aligned(b.data) && aligned(d_MN.data);
  if (!rows_at_16_bytes) {
    const bool nk = layout == BLayout::kNK;
    return plain_gemm(ctx, {a_MK.as<Bf16>(), K, 1, b.as<Bf16>(), nk ? K : 1, nk ? 1 : N, d_MN.data,
                            d_MN.dtype == DType::kFp32, false, offsets, false, E, M, N, K});
  }
  const Bf16Product x{offsets,
                      d_MN.data,
                      static_cast<int>(E),
                      static_cast<int>(M),
                      static_cast<int>(N),
                      static_cast<int>(K)};
  switch (plan) {
    case Bf16Plan::k128x256:
      return launch_any<256, false>(ctx, a_MK, b, layout, d_MN.dtype, x);
    case Bf16Plan::k128x128:
      return launch_any<128, false>(ctx, a_MK, b, layout, d_MN.dtype, x);
    case Bf16Plan::kSwap64:
      return launch_any<64, true>(ctx, a_MK, b, layout, d_MN.dtype, x);
    case Bf16Plan::kSwap16:
      return launch_any<16, true>(ctx, a_MK, b, layout, d_MN.dtype, x);
  }
}

}  // namespace lockstep::ops::cuda
