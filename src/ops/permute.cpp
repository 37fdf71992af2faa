#include "ops/permute.h"

#include <cstdint>

#include "ops/cpu/permute.h"
#include "ops/cuda/call.h"
#include "ops/cuda/permute.h"

namespace lockstep::ops {

namespace {

using numerics::Bf16;
using tensor::DType;

// Checked where the values can be read; the GPU's kernels clamp them.
const std::int32_t* indices(const TensorView& x, std::int64_t end, const char* name) {
  const auto* p = x.as<std::int32_t>();
  LOCKSTEP_CHECK(x.count() == 0 || end > 0, "{}: {} entries into nothing", name, x.count());
  if (!x.on_host()) return p;
  for (std::int64_t i = 0; i < x.count(); ++i)
    LOCKSTEP_CHECK(p[i] >= 0 && p[i] < end, "{}: entry {} is {}, outside [0, {})", name, i, p[i],
                   end);
  return p;
}

const Bf16* optional_rows(const TensorView& x, std::int64_t T, std::int64_t D, const char* name) {
  if (!x) return nullptr;
  tensor::require(x, DType::kBf16, {T, D}, name);
  return x.as<Bf16>();
}

}  // namespace

void plan_permutation(const Context& ctx, const TensorView& experts_TC, const Segments& segments,
                      const TensorView& row_TC, const TensorView& token_M) {
  tensor::require(experts_TC, DType::kInt32, {-1, -1}, "plan_permutation: experts_TC");
  const std::int64_t T = experts_TC.dim(0), C = experts_TC.dim(1);
  tensor::require(segments.offsets_E1, DType::kInt32, {-1}, "plan_permutation: offsets_E1");
  const std::int64_t E = segments.experts();
  LOCKSTEP_CHECK(E >= 0, "plan_permutation: offsets_E1 is empty");
  tensor::require(segments.padded_offsets_E1, DType::kInt32, {E + 1},
                  "plan_permutation: padded_offsets_E1");
  tensor::require(row_TC, DType::kInt32, {T, C}, "plan_permutation: row_TC");
  tensor::require(token_M, DType::kInt32, {T * C}, "plan_permutation: token_M");
  LOCKSTEP_CHECK(T * C + 127 * E <= INT32_MAX,
                 "plan_permutation: {} rows of {} experts, padded, exceed int32", T * C, E);
  LOCKSTEP_CHECK(ctx.device == tensor::Device::kCpu || E <= cuda::kMaxSortBins,
                 "plan_permutation: {} experts, the GPU takes at most {}", E, cuda::kMaxSortBins);
  const std::int32_t* experts = indices(experts_TC, E, "plan_permutation: experts_TC");
  LOCKSTEP_CUDA_CALL(ctx, plan_permutation, ctx, experts_TC, segments, row_TC, token_M);
  const tensor::ArenaScope scope(*ctx.workspace);
  const TensorView next_E = ctx.workspace->take(DType::kInt32, {E});
  LOCKSTEP_CPU_CALL(ctx, plan_permutation, experts, T, C, E, segments.offsets_E1.as<std::int32_t>(),
                    segments.padded_offsets_E1.as<std::int32_t>(), row_TC.as<std::int32_t>(),
                    token_M.as<std::int32_t>(), next_E.as<std::int32_t>());
}

void permute(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
             const TensorView& out_MD) {
  tensor::require(h_TD, DType::kBf16, {-1, -1}, "permute: h_TD");
  const std::int64_t T = h_TD.dim(0), D = h_TD.dim(1);
  tensor::require(token_M, DType::kInt32, {-1}, "permute: token_M");
  const std::int64_t M = token_M.dim(0);
  tensor::require(out_MD, DType::kBf16, {M, D}, "permute: out_MD");
  const std::int32_t* token = indices(token_M, T, "permute: token_M");
  LOCKSTEP_CUDA_CALL(ctx, permute, ctx, h_TD, token_M, out_MD);
  const cpu::RoutedShape shape{M, 1, D, ctx.threads};
  LOCKSTEP_CPU_CALL(ctx, permute, shape, h_TD.as<Bf16>(), token, out_MD.as<Bf16>());
}

void scatter_rows(const Context& ctx, const TensorView& from_RD, const TensorView& row_R,
                  const TensorView& to_TD) {
  tensor::require(from_RD, DType::kBf16, {-1, -1}, "scatter_rows: from_RD");
  const std::int64_t R = from_RD.dim(0), D = from_RD.dim(1);
  tensor::require(row_R, DType::kInt32, {R}, "scatter_rows: row_R");
  tensor::require(to_TD, DType::kBf16, {-1, D}, "scatter_rows: to_TD");
  const std::int32_t* row = indices(row_R, to_TD.dim(0), "scatter_rows: row_R");
  LOCKSTEP_CUDA_CALL(ctx, scatter_rows, ctx, from_RD, row_R, to_TD);
  const cpu::RoutedShape shape{R, 1, D, ctx.threads};
  LOCKSTEP_CPU_CALL(ctx, scatter_rows, shape, from_RD.as<Bf16>(), row, to_TD.as<Bf16>());
}

void combine(const Context& ctx, const TensorView& o_MD, const TensorView& weights_TC,
             const TensorView& row_TC, const TensorView& shared_TD, const TensorView& y_TD) {
  tensor::require(o_MD, DType::kBf16, {-1, -1}, "combine: o_MD");
  tensor::require(row_TC, DType::kInt32, {-1, -1}, "combine: row_TC");
  const std::int64_t T = row_TC.dim(0), C = row_TC.dim(1), D = o_MD.dim(1);
  tensor::require(weights_TC, DType::kFp32, {T, C}, "combine: weights_TC");
  tensor::require(y_TD, DType::kBf16, {T, D}, "combine: y_TD");
  const Bf16* shared = optional_rows(shared_TD, T, D, "combine: shared_TD");
  const std::int32_t* row = indices(row_TC, o_MD.dim(0), "combine: row_TC");
  LOCKSTEP_CUDA_CALL(ctx, combine, ctx, o_MD, weights_TC, row_TC, shared_TD, y_TD);
  const cpu::RoutedShape shape{T, C, D, ctx.threads};
  LOCKSTEP_CPU_CALL(ctx, combine, shape, o_MD.as<Bf16>(), weights_TC.as<float>(), row, shared,
                    y_TD.as<Bf16>());
}

void combine_backward(const Context& ctx, const TensorView& dy_TD, const TensorView& o_MD,
                      const TensorView& weights_TC, const TensorView& row_TC,
                      const TensorView& d_o_MD, const TensorView& d_weights_TC) {
  tensor::require(dy_TD, DType::kBf16, {-1, -1}, "combine_backward: dy_TD");
  const std::int64_t T = dy_TD.dim(0), D = dy_TD.dim(1);
  tensor::require(o_MD, DType::kBf16, {-1, D}, "combine_backward: o_MD");
  tensor::require(row_TC, DType::kInt32, {T, -1}, "combine_backward: row_TC");
  const std::int64_t M = o_MD.dim(0), C = row_TC.dim(1);
  tensor::require(weights_TC, DType::kFp32, {T, C}, "combine_backward: weights_TC");
  tensor::require(d_o_MD, DType::kBf16, {M, D}, "combine_backward: d_o_MD");
  tensor::require(d_weights_TC, DType::kFp32, {T, C}, "combine_backward: d_weights_TC");
  const std::int32_t* row = indices(row_TC, M, "combine_backward: row_TC");
  LOCKSTEP_CUDA_CALL(ctx, combine_backward, ctx, dy_TD, o_MD, weights_TC, row_TC, d_o_MD,
                     d_weights_TC);
  const cpu::RoutedShape shape{T, C, D, ctx.threads};
  LOCKSTEP_CPU_CALL(ctx, combine_backward, shape, dy_TD.as<Bf16>(), o_MD.as<Bf16>(),
                    weights_TC.as<float>(), row, d_o_MD.as<Bf16>(), d_weights_TC.as<float>());
}

void permute_backward(const Context& ctx, const TensorView& d_x_MD, const TensorView& row_TC,
                      const TensorView& first_TD, const TensorView& last_TD,
                      const TensorView& d_h_TD) {
  tensor::require(d_x_MD, DType::kBf16, {-1, -1}, "permute_backward: d_x_MD");
  tensor::require(row_TC, DType::kInt32, {-1, -1}, "permute_backward: row_TC");
  const std::int64_t T = row_TC.dim(0), C = row_TC.dim(1), D = d_x_MD.dim(1);
  tensor::require(d_h_TD, DType::kBf16, {T, D}, "permute_backward: d_h_TD");
  const Bf16* first = optional_rows(first_TD, T, D, "permute_backward: first_TD");
  const Bf16* last = optional_rows(last_TD, T, D, "permute_backward: last_TD");
  const std::int32_t* row = indices(row_TC, d_x_MD.dim(0), "permute_backward: row_TC");
  LOCKSTEP_CUDA_CALL(ctx, permute_backward, ctx, d_x_MD, row_TC, first_TD, last_TD, d_h_TD);
  const cpu::RoutedShape shape{T, C, D, ctx.threads};
  LOCKSTEP_CPU_CALL(ctx, permute_backward, shape, d_x_MD.as<Bf16>(), row, first, last,
                    d_h_TD.as<Bf16>());
}

}  // namespace lockstep::ops
