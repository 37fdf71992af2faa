#include "ops/head_gemm.h"

#include "ops/cpu/head_gemm.h"
#include "ops/cuda/call.h"
#include "ops/cuda/head_gemm.h"

namespace lockstep::ops {

using tensor::DType;

namespace {

void require_rows(const HeadRows& w, DType dtype, const char* name) {
  tensor::require(w.w_HNL, dtype, {-1, -1, -1}, name);
  LOCKSTEP_CHECK(w.row >= 0 && w.rows >= 0 && w.row + w.rows <= w.w_HNL.dim(1),
                 "{}: rows [{}, {}) of {}", name, w.row, w.row + w.rows, w.w_HNL.dim(1));
}

}  // namespace

void head_gemm(const Context& ctx, const Columns& a, const HeadRows& b, BLayout layout,
               const Columns& d) {
  require_rows(b, DType::kBf16, "head_gemm: b");
  tensor::require(a.slab_TN, DType::kBf16, {-1, -1}, "head_gemm: a");
  const std::int64_t T = a.slab_TN.dim(0), H = b.w_HNL.dim(0), L = b.w_HNL.dim(2);
  const bool nk = layout == BLayout::kNK;
  require_pieces(a, T, H, nk ? L : b.rows, "head_gemm: a");
  require_pieces(d, T, H, nk ? b.rows : L, "head_gemm: d");
  LOCKSTEP_CUDA_CALL(ctx, head_gemm, ctx, a, b, layout, d);
  LOCKSTEP_CPU_CALL(ctx, head_gemm, ctx, a, b, layout, d);
}

void head_weight_gradient(const Context& ctx, const Columns& y, const Columns& x, bool accumulate,
                          const HeadRows& d) {
  require_rows(d, DType::kFp32, "head_weight_gradient: d");
  tensor::require(y.slab_TN, DType::kBf16, {-1, -1}, "head_weight_gradient: y");
  const std::int64_t T = y.slab_TN.dim(0), H = d.w_HNL.dim(0);
  require_pieces(y, T, H, d.rows, "head_weight_gradient: y");
  require_pieces(x, T, H, d.w_HNL.dim(2), "head_weight_gradient: x");
  LOCKSTEP_CUDA_CALL(ctx, head_weight_gradient, ctx, y, x, accumulate, d);
  LOCKSTEP_CPU_CALL(ctx, head_weight_gradient, ctx, y, x, accumulate, d);
}

}  // namespace lockstep::ops
