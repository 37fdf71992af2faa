// The engine's forward on whole sequences, for comparison with the reference.
#pragma once

#include <vector>

#include "model/forward.h"
#include "model/reference.h"

namespace lockstep::model {

struct EngineRun {
  std::vector<float> logits_TV;  // rows of all sequences one after the other
  ReferenceRouting routing;      // what the engine's routers chose
};

inline EngineRun run_engine(Weights& weights, const Precision& precision,
                            const std::vector<std::vector<std::int32_t>>& sequences) {
  using tensor::DType;
  tensor::Arena workspace, arena;
  const tensor::Context ctx = tensor::cpu_context(workspace, 1);
  const auto quantized = quantized_for(ctx, weights, precision);
  const RopeTables rope = make_rope_tables(ctx, weights.config);
  const ModelView view{&weights, quantized.get(), rope.cos_PK, rope.sin_PK};

  std::vector<std::int32_t> tokens, positions, offsets = {0}, lengths;
  for (const auto& sequence : sequences) {
    for (std::size_t t = 0; t < sequence.size(); ++t) {
      tokens.push_back(sequence[t]);
      positions.push_back(static_cast<std::int32_t>(t));
    }
    offsets.push_back(static_cast<std::int32_t>(tokens.size()));
    lengths.push_back(static_cast<std::int32_t>(sequence.size()));
  }
  const auto int32 = [&](const std::vector<std::int32_t>& values) {
    const auto view = arena.take(DType::kInt32, {static_cast<std::int64_t>(values.size())});
    std::copy(values.begin(), values.end(), view.as<std::int32_t>());
    return view;
  };
  ForwardBatch batch;
  batch.tokens_T = int32(tokens), batch.positions_T = int32(positions);
  batch.attention.q_offsets_S1 = int32(offsets), batch.attention.kv_lengths_S = int32(lengths);

  const auto T = static_cast<std::int64_t>(tokens.size());
  const std::int64_t V = weights.config.vocab_size;
  ForwardSink sink;
  sink.arena = &arena;
  const auto hidden_TD = arena.take(DType::kBf16, {T, weights.config.hidden_size});
  const auto logits_TV = arena.take(DType::kFp32, {T, V});
  forward(ctx, view, batch, nullptr, &sink, hidden_TD);
  head_logits(ctx, view, hidden_TD, logits_TV);
  EngineRun run;
  run.logits_TV.assign(logits_TV.as<float>(), logits_TV.as<float>() + T * V);
  for (const LayerSaved& layer : sink.layers) {
    if (!layer.experts_TC) {  // dense
      run.routing.emplace_back();
      continue;
    }
    const std::int32_t* experts = layer.experts_TC.as<std::int32_t>();
    run.routing.emplace_back(experts, experts + layer.experts_TC.count());
  }
  return run;
}

}  // namespace lockstep::model
