#include "ops/gemm.h"

#include "ops/cpu/gemm.h"
#include "ops/cuda/call.h"
#include "ops/cuda/gemm_bf16.h"
#include "ops/cuda/gemm_fp8.h"
#include "ops/cuda/gemm_wgrad.h"

namespace lockstep::ops {
namespace {

using tensor::Device;
using tensor::DType;
using tensor::Shape;

// More rows than there are, so that one chain takes them all; a multiple of 64.
constexpr std::int64_t kMaxChainRows = std::int64_t{1} << 30;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void require_fp8(const TensorView& codes, const Shape& shape, const char* name) {
  LOCKSTEP_CHECK(codes.dtype == DType::kE4m3 || codes.dtype == DType::kE5m2,
                 "{}: expected e4m3 or e5m2, got {}", name, tensor::dtype_name(codes.dtype));
  tensor::require(codes, codes.dtype, shape, name);
}

void require_output(const TensorView& d, const Shape& shape) {
  LOCKSTEP_CHECK(d.dtype == DType::kFp32 || d.dtype == DType::kBf16,
                 "output of a GEMM: expected fp32 or bf16, got {}", tensor::dtype_name(d.dtype));
  tensor::require(d, d.dtype, shape, "output of a GEMM");
}

// Offsets start at 0, never fall, end at `rows`. (Device memory is not looked at.)
void require_offsets(const TensorView& offsets_E1, std::int64_t E, std::int64_t rows) {
  tensor::require(offsets_E1, DType::kInt32, {E + 1}, "offsets");
  if (!offsets_E1.on_host()) return;
  const auto* offsets = offsets_E1.as<std::int32_t>();
  LOCKSTEP_CHECK(offsets[0] == 0 && offsets[E] == rows,
                 "offsets run from {} to {}, expected 0 to {}", offsets[0], offsets[E], rows);
  for (std::int64_t e = 0; e < E; ++e)
    LOCKSTEP_CHECK(offsets[e] <= offsets[e + 1], "offsets fall from {} to {} at expert {}",
                   offsets[e], offsets[e + 1], e);
}

void require_groups(const TensorView& offsets_E1, std::int64_t E, std::int64_t rows) {
  if (offsets_E1)
    require_offsets(offsets_E1, E, rows);
  else
    LOCKSTEP_CHECK_EQ(E, std::int64_t{1}, "GEMM without offsets: number of experts");
}

void require_columns(const Fp8Columns& x, const Segments& segments, const char* name) {
  require_fp8(x.codes_NR, {-1, -1}, name);
  const std::int64_t N = x.codes_NR.dim(0), R = x.codes_NR.dim(1);
  if (x.scaling == Scaling::kBlock)
    tensor::require(x.scales, DType::kFp32, {ceil_div(R, numerics::kQuantBlock), N}, name);
  else
    tensor::require(x.scales, DType::kFp32, {segments.experts(), N}, name);
}

// That each padded segment starts at a multiple of 128 and holds its rows.
void require_segments(const Segments& segments, std::int64_t R) {
  const std::int64_t E = segments.experts();
  const auto* offsets = segments.offsets_E1.as<std::int32_t>();
  const auto* padded = segments.padded_offsets_E1.as<std::int32_t>();
  require_offsets(segments.offsets_E1, E, offsets[E]);
  LOCKSTEP_CHECK(padded[0] == 0 && padded[E] <= R, "padded offsets run from {} to {} of {} rows",
                 padded[0], padded[E], R);
  for (std::int64_t e = 0; e < E; ++e)
    LOCKSTEP_CHECK(padded[e] % numerics::kQuantBlock == 0 &&
                       padded[e + 1] - padded[e] >= offsets[e + 1] - offsets[e],
                   "expert {}: padded segment {}..{} does not hold rows {}..{}", e, padded[e],
                   padded[e + 1], offsets[e], offsets[e + 1]);
}

}  // namespace

void fp8_gemm(const Context& ctx, const Fp8Rows& a, const Fp8Weight& b,
              const TensorView& offsets_E1, const TensorView& d_MN) {
  require_fp8(a.codes_MK, {-1, -1}, "fp8_gemm a");
  require_fp8(b.codes_ENK, {-1, -1, a.codes_MK.dim(1)}, "fp8_gemm b");
  LOCKSTEP_CHECK(a.scaling == b.scaling, "fp8_gemm: a and b are scaled in different ways");
  const std::int64_t M = a.codes_MK.dim(0), K = a.codes_MK.dim(1);
  const std::int64_t E = b.codes_ENK.dim(0), N = b.codes_ENK.dim(1);
  const std::int64_t G = ceil_div(K, numerics::kQuantBlock);
  if (a.scaling == Scaling::kBlock) {
    tensor::require(a.scales, DType::kFp32, {G, M}, "fp8_gemm a scales");
    tensor::require(b.scales, DType::kFp32, {E, ceil_div(N, numerics::kQuantBlock), G},
                    "fp8_gemm b scales");
  } else {
    tensor::require(a.scales, DType::kFp32, {M}, "fp8_gemm a scales");
    tensor::require(b.scales, DType::kFp32, {E, N}, "fp8_gemm b scales");
  }
  require_groups(offsets_E1, E, M);
  require_output(d_MN, {M, N});
  LOCKSTEP_CUDA_CALL(ctx, fp8_gemm, ctx, a, b, offsets_E1, d_MN);
  LOCKSTEP_CPU_CALL(ctx, fp8_gemm, ctx, a, b, offsets_E1, d_MN);
}

void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                         const Segments& segments, bool accumulate, const TensorView& d_ENK) {
  require_columns(dy, segments, "fp8_weight_gradient dy");
  require_columns(x, segments, "fp8_weight_gradient x");
  LOCKSTEP_CHECK(dy.scaling == x.scaling, "fp8_weight_gradient: dy and x are scaled differently");
  const std::int64_t E = segments.experts(), R = dy.codes_NR.dim(1);
  LOCKSTEP_CHECK_EQ(x.codes_NR.dim(1), R, "fp8_weight_gradient: padded rows");
  tensor::require(segments.offsets_E1, DType::kInt32, {E + 1}, "offsets");
  tensor::require(segments.padded_offsets_E1, DType::kInt32, {E + 1}, "padded offsets");
  if (segments.offsets_E1.on_host()) require_segments(segments, R);
  tensor::require(d_ENK, DType::kFp32, {E, dy.codes_NR.dim(0), x.codes_NR.dim(0)},
                  "fp8_weight_gradient output");
  LOCKSTEP_CUDA_CALL(ctx, fp8_weight_gradient, ctx, dy, x, segments, accumulate, d_ENK);
  LOCKSTEP_CPU_CALL(ctx, fp8_weight_gradient, ctx, dy, x, segments, accumulate, d_ENK);
}

void bf16_gemm(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
               const TensorView& offsets_E1, const TensorView& d_MN) {
  tensor::require(a_MK, DType::kBf16, {-1, -1}, "bf16_gemm a");
  const std::int64_t M = a_MK.dim(0), K = a_MK.dim(1);
  if (layout == BLayout::kNK)
    tensor::require(b, DType::kBf16, {-1, -1, K}, "bf16_gemm b");
  else
    tensor::require(b, DType::kBf16, {-1, K, -1}, "bf16_gemm b");
  require_groups(offsets_E1, b.dim(0), M);
  require_output(d_MN, {M, layout == BLayout::kNK ? b.dim(1) : b.dim(2)});
  LOCKSTEP_CUDA_CALL(ctx, bf16_gemm, ctx, a_MK, b, layout, offsets_E1, d_MN);
  LOCKSTEP_CPU_CALL(ctx, bf16_gemm, ctx, a_MK, b, layout, offsets_E1, d_MN);
}

void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                          const TensorView& offsets_E1, bool accumulate, const TensorView& d_ENK,
                          std::int64_t chain_rows) {
  tensor::require(dy_MN, DType::kBf16, {-1, -1}, "bf16_weight_gradient dy");
  tensor::require(x_MK, DType::kBf16, {dy_MN.dim(0), -1}, "bf16_weight_gradient x");
  tensor::require(d_ENK, DType::kFp32, {-1, dy_MN.dim(1), x_MK.dim(1)},
                  "bf16_weight_gradient output");
  require_groups(offsets_E1, d_ENK.dim(0), dy_MN.dim(0));
  LOCKSTEP_CHECK(chain_rows >= 0 && chain_rows % 64 == 0 && chain_rows <= kMaxChainRows,
                 "bf16_weight_gradient: chains of {} rows", chain_rows);
  if (chain_rows == 0) chain_rows = kMaxChainRows;
  LOCKSTEP_CUDA_CALL(ctx, bf16_weight_gradient, ctx, dy_MN, x_MK, offsets_E1, accumulate, d_ENK,
                     chain_rows);
  LOCKSTEP_CPU_CALL(ctx, bf16_weight_gradient, ctx, dy_MN, x_MK, offsets_E1, accumulate, d_ENK,
                    chain_rows);
}

}  // namespace lockstep::ops
