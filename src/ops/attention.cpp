#include "ops/attention.h"

#include <cmath>
#include <cstring>

#include "ops/cpu/attention.h"
#include "ops/cuda/attention.h"
#include "ops/cuda/call.h"

namespace lockstep::ops {

using numerics::Bf16;
using tensor::DType;

namespace {

// Every offset, length and page that will be followed; finds args->longest.
void check_values(AttentionArgs& args) {
  for (std::int64_t s = 0; s < args.sequences; ++s) {
    const std::int64_t begin = args.q_offsets[s], end = args.q_offsets[s + 1];
    const std::int64_t length = args.kv_lengths[s];
    LOCKSTEP_CHECK(0 <= begin && begin <= end && end <= args.tokens,
                   "sequence {}: query rows {} to {} of {}", s, begin, end, args.tokens);
    LOCKSTEP_CHECK(end - begin <= length, "sequence {}: {} queries but {} keys", s, end - begin,
                   length);
    args.longest = end - begin > args.longest ? end - begin : args.longest;
    if (end == begin) continue;
    if (args.pages == nullptr) {
      LOCKSTEP_CHECK(begin + length <= args.rows, "sequence {}: keys {} to {} of {} rows", s, begin,
                     begin + length, args.rows);
      continue;
    }
    const std::int64_t B = args.page_size, used = (length + B - 1) / B;
    LOCKSTEP_CHECK(used <= args.pages_per_sequence, "sequence {}: {} keys need {} pages, has {}", s,
                   length, used, args.pages_per_sequence);
    for (std::int64_t p = 0; p < used; ++p) {
      const std::int64_t page = args.pages[s * args.pages_per_sequence + p];
      const std::int64_t rows = length - p * B < B ? length - p * B : B;
      LOCKSTEP_CHECK(page >= 0 && page * B + rows <= args.rows,
                     "sequence {}: page {} is number {}, cache has {} rows", s, p, page, args.rows);
    }
  }
}

// A host bound of a count that is `most` at the most; 0: unknown.
std::int64_t bound(std::int64_t given, std::int64_t most) {
  return given > 0 && given < most ? given : most;
}

// Shapes and dtypes, and on the CPU the batch's values.
AttentionArgs checked_args(const TensorView& q_THK, const TensorView& k_RJK,
                           const TensorView& v_RJK, const AttentionBatch& batch, double scale,
                           const TensorView& out_THK, const TensorView& lse2_TH) {
  tensor::require(q_THK, DType::kBf16, {-1, -1, -1}, "q_THK");
  const std::int64_t T = q_THK.dim(0), H = q_THK.dim(1), K = q_THK.dim(2);
  tensor::require(k_RJK, DType::kBf16, {-1, -1, K}, "k_RJK");
  const std::int64_t R = k_RJK.dim(0), J = k_RJK.dim(1);
  if (v_RJK) tensor::require(v_RJK, DType::kBf16, {R, J, -1}, "v_RJK");
  tensor::require(out_THK, DType::kBf16, {T, H, v_RJK ? v_RJK.dim(2) : -1}, "out_THK");
  const std::int64_t Kv = out_THK.dim(2);
  LOCKSTEP_CHECK(v_RJK || Kv <= K, "values of width {} inside keys of width {}", Kv, K);
  if (lse2_TH) tensor::require(lse2_TH, DType::kFp32, {T, H}, "lse2_TH");
  LOCKSTEP_CHECK(J > 0 && H % J == 0, "{} query heads over {} KV heads", H, J);
  LOCKSTEP_CHECK(scale > 0 && std::isfinite(scale), "attention scale {}", scale);

  tensor::require(batch.kv_lengths_S, DType::kInt32, {-1}, "kv_lengths_S");
  const std::int64_t S = batch.kv_lengths_S.dim(0);
  tensor::require(batch.q_offsets_S1, DType::kInt32, {S + 1}, "q_offsets_S1");
  AttentionArgs args;
  args.q = q_THK.as<Bf16>();
  args.k = k_RJK.as<Bf16>();
  args.v = v_RJK ? v_RJK.as<Bf16>() : args.k;
  args.q_offsets = batch.q_offsets_S1.as<std::int32_t>();
  args.kv_lengths = batch.kv_lengths_S.as<std::int32_t>();
  if (batch.pages_SP) {
    tensor::require(batch.pages_SP, DType::kInt32, {S, -1}, "pages_SP");
    LOCKSTEP_CHECK(batch.page_size > 0, "page size {}", batch.page_size);
    args.pages = batch.pages_SP.as<std::int32_t>();
    args.pages_per_sequence = batch.pages_SP.dim(1);
    args.page_size = batch.page_size;
  }
  args.sequences = S;
  args.heads = H;
  args.kv_heads = J;
  args.width = K;
  args.value_width = Kv;
  args.values_in_keys = !v_RJK;
  args.value_row = v_RJK ? Kv : K;
  args.scale = scale;
  args.out = out_THK.as<Bf16>();
  args.lse2 = lse2_TH ? lse2_TH.as<float>() : nullptr;

  args.tokens = T;
  args.rows = R;
  if (batch.kv_lengths_S.on_host()) {
    check_values(args);
    return args;
  }
  const std::int64_t most_K = v_RJK ? 256 : 576, most_Kv = v_RJK ? 256 : 512;
  LOCKSTEP_CHECK(K > 0 && K % 16 == 0 && K <= most_K && Kv > 0 && Kv % 16 == 0 && Kv <= most_Kv,
                 "attention on a GPU has head widths in multiples of 16 up to {} and {}, not {} "
                 "and {}",
                 most_K, most_Kv, K, Kv);
  args.longest = bound(batch.max_queries, T);
  args.most_keys =
      bound(batch.max_keys, batch.pages_SP ? args.pages_per_sequence * args.page_size : R);
  if (S == 0) args.longest = 0;
  return args;
}

}  // namespace

void attention(const Context& ctx, const TensorView& q_THK, const TensorView& k_RJK,
               const TensorView& v_RJK, const AttentionBatch& batch, double scale,
               const TensorView& out_THK, const TensorView& lse2_TH) {
  const auto args = checked_args(q_THK, k_RJK, v_RJK, batch, scale, out_THK, lse2_TH);
  if (args.longest == 0) return;
  LOCKSTEP_CUDA_CALL(ctx, attention, ctx, args);
  LOCKSTEP_CPU_CALL(ctx, attention, ctx, args);
}

void attention_backward(const Context& ctx, const TensorView& q_THK, const TensorView& k_TJK,
                        const TensorView& v_TJK, const TensorView& out_THK,
                        const TensorView& lse2_TH, const TensorView& d_out_THK,
                        const AttentionBatch& batch, double scale, const TensorView& d_q_THK,
                        const TensorView& d_k_TJK, const TensorView& d_v_TJK) {
  auto args = checked_args(q_THK, k_TJK, v_TJK, batch, scale, out_THK, lse2_TH);
  LOCKSTEP_CHECK(lse2_TH, "the backward needs lse2_TH");
  LOCKSTEP_CHECK(!batch.pages_SP, "the backward takes no pages");
  tensor::require(d_out_THK, DType::kBf16, out_THK.shape, "d_out_THK");
  tensor::require(d_q_THK, DType::kBf16, q_THK.shape, "d_q_THK");
  tensor::require(d_k_TJK, DType::kBf16, k_TJK.shape, "d_k_TJK");
  if (v_TJK) tensor::require(d_v_TJK, DType::kBf16, v_TJK.shape, "d_v_TJK");
  LOCKSTEP_CHECK(v_TJK || !d_v_TJK, "d_v_TJK without v_TJK");
  for (std::int64_t s = 0; batch.kv_lengths_S.on_host() && s < args.sequences; ++s)
    LOCKSTEP_CHECK(args.q_offsets[s + 1] - args.q_offsets[s] == args.kv_lengths[s],
                   "sequence {}: the backward needs all queries, {} of {} keys", s,
                   args.q_offsets[s + 1] - args.q_offsets[s], args.kv_lengths[s]);
  args.d_out = d_out_THK.as<Bf16>();
  args.d_q = d_q_THK.as<Bf16>();
  args.d_k = d_k_TJK.as<Bf16>();
  args.d_v = d_v_TJK ? d_v_TJK.as<Bf16>() : nullptr;
  if (args.longest == 0) return;
  LOCKSTEP_CUDA_CALL(ctx, attention_backward, ctx, args);
  LOCKSTEP_CPU_CALL(ctx, attention_backward, ctx, args);
}

void write_kv(const Context& ctx, const TensorView& k_TJK, const TensorView& v_TJK,
              const TensorView& slots_T, const TensorView& k_cache_RJK,
              const TensorView& v_cache_RJK) {
  tensor::require(slots_T, DType::kInt32, {-1}, "slots_T");
  const std::int64_t T = slots_T.dim(0);
  tensor::require(k_TJK, k_cache_RJK.dtype, {T, -1, -1}, "k_TJK");
  tensor::require(k_cache_RJK, k_TJK.dtype, {-1, k_TJK.dim(1), k_TJK.dim(2)}, "k_cache_RJK");
  const std::int64_t R = k_cache_RJK.dim(0);
  LOCKSTEP_CHECK(static_cast<bool>(v_TJK) == static_cast<bool>(v_cache_RJK),
                 "write_kv: values without a cache for them, or the other way round");
  if (v_TJK) {
    tensor::require(v_TJK, v_cache_RJK.dtype, {T, k_TJK.dim(1), -1}, "v_TJK");
    tensor::require(v_cache_RJK, v_TJK.dtype, {R, v_TJK.dim(1), v_TJK.dim(2)}, "v_cache_RJK");
  }
  LOCKSTEP_CUDA_CALL(ctx, write_kv, ctx, k_TJK, v_TJK, slots_T, k_cache_RJK, v_cache_RJK);
  const std::int32_t* slots = slots_T.as<std::int32_t>();
  for (std::int64_t t = 0; t < T; ++t)
    LOCKSTEP_CHECK(slots[t] >= 0 && slots[t] < R, "row {}: slot {} of a cache of {} rows", t,
                   slots[t], R);
  const auto copy_rows = [&](const TensorView& from, const TensorView& to) {
    const std::size_t row = T == 0 ? 0 : from.bytes() / static_cast<std::size_t>(T);
    for (std::int64_t t = 0; t < T; ++t)
      std::memcpy(static_cast<std::byte*>(to.data) + static_cast<std::size_t>(slots[t]) * row,
                  static_cast<const std::byte*>(from.data) + static_cast<std::size_t>(t) * row,
                  row);
  };
  copy_rows(k_TJK, k_cache_RJK);
  if (v_TJK) copy_rows(v_TJK, v_cache_RJK);
}

}  // namespace lockstep::ops
