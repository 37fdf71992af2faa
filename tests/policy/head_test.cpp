#include "policy/head.h"

#include <gtest/gtest.h>

#include <cstring>

#include "ops/gemm.h"
#include "ops/permute.h"
#include "policy/tiny_model.h"
#include "tensor/device.h"

namespace lockstep::policy::test {
namespace {

using numerics::Bf16;
using tensor::DType;
using tensor::Tensor;
using tensor::TensorView;

std::string bytes(const TensorView& t) { return {static_cast<const char*>(t.data), t.bytes()}; }

float centred(std::uint64_t stream, std::uint64_t i) {
  return static_cast<float>(base::philox4x32(3, stream, i).word[0]) * 0x1p-31f - 1.0f;
}

// However many chunks of rows are at work at a time: the weight's gradient is the sum of the
// chunks' in their order, and the input's gradient is that of each row.
TEST(Head, GradientIsAddedChunkByChunk) {
  tensor::Arena arena;
  const tensor::Context ctx = tensor::cpu_context(arena, 1);
  const auto weights = tiny_weights();
  const model::RopeTables rope = model::make_rope_tables(ctx, weights->config);
  const auto quantized = model::quantized_for(ctx, *weights, {});
  const model::ModelView view{weights.get(), quantized.get(), rope.cos_PK, rope.sin_PK};
  const std::int64_t D = weights->config.hidden_size, V = weights->config.vocab_size, T = 9800;
  const Tensor hidden_TD(tensor::Device::kCpu, DType::kBf16, {T, D});
  for (std::int64_t i = 0; i < T * D; ++i)
    hidden_TD.as<Bf16>()[i] = numerics::to_bf16(centred(0, i));

  for (const std::int64_t R : {0, 1, 1024, 1025, 4096, 4097, 9300}) {
    std::vector<std::int32_t> row_R, target_R;
    std::vector<float> g_R;
    for (std::int64_t r = 0; r < R; ++r) {
      row_R.push_back(static_cast<std::int32_t>(r + r / 20));
      target_R.push_back(static_cast<std::int32_t>(r * 7 % V));
      g_R.push_back(centred(1, r));
    }
    tensor::ArenaScope scratch(arena);
    const HeadRows rows = make_head_rows(ctx, arena, row_R, target_R, {});
    head_forward(ctx, view, hidden_TD, rows);

    const Tensor d_hidden_TD(tensor::Device::kCpu, DType::kBf16, {T, D});
    const Tensor expected_d_hidden_TD(tensor::Device::kCpu, DType::kBf16, {T, D});
    const Tensor slab(tensor::Device::kCpu, DType::kFp32, {weights->table.count});
    const Tensor expected(tensor::Device::kCpu, DType::kFp32, {1, V, D});
    tensor::fill_bytes(ctx, expected, 0);
    tensor::fill_bytes(ctx, expected_d_hidden_TD, 0);
    const TensorView w = weights->view(weights->table.head);
    for (std::int64_t begin = 0; begin < R; begin += numerics::kHeadChunk) {
      tensor::ArenaScope chunk(arena);
      const std::int64_t n = std::min<std::int64_t>(numerics::kHeadChunk, R - begin);
      const TensorView chosen = rows.rows_R.rows(begin, n);
      const TensorView hidden = arena.take(DType::kBf16, {n, D}),
                       d_hidden = arena.take(DType::kBf16, {n, D}),
                       logits = arena.take(DType::kFp32, {n, V}),
                       d_logits = arena.take(DType::kBf16, {n, V});
      ops::permute(ctx, hidden_TD, chosen, hidden);
      model::head_logits(ctx, view, hidden, logits);
      ops::vocab_backward(
          ctx, logits, rows.targets_R.rows(begin, n), rows.sampling, rows.stats + begin,
          tensor::upload<float>(ctx, arena, std::span(g_R).subspan(begin, n)), d_logits);
      ops::bf16_gemm(ctx, d_logits, w, ops::BLayout::kKN, {}, d_hidden);
      ops::bf16_weight_gradient(ctx, d_logits, hidden, {}, true, expected);
      ops::scatter_rows(ctx, d_hidden, chosen, expected_d_hidden_TD);
    }
    for (const bool accumulate : {false, true}) {
      tensor::fill_bytes(ctx, slab, accumulate ? 0 : 0xFF);
      tensor::fill_bytes(ctx, d_hidden_TD, 0xFF);
      head_backward(ctx, view, hidden_TD, rows, g_R, d_hidden_TD, {slab, accumulate});
      EXPECT_TRUE(bytes(model::param_view(weights->table, slab, weights->table.head)) ==
                  bytes(expected))
          << R << " rows, accumulate " << accumulate;
      EXPECT_TRUE(bytes(d_hidden_TD) == bytes(expected_d_hidden_TD)) << R << " rows";
    }
  }
}

}  // namespace
}  // namespace lockstep::policy::test
