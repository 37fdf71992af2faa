// T packed tokens, V vocabulary, R rows of a chunk.
#include "loop/score.h"

#include <algorithm>
#include <limits>

#include "ops/vocab.h"
#include "tensor/device.h"

namespace lockstep::loop {

using ops::RowSampling;
using ops::RowStats;
using tensor::ArenaScope;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::TensorView;

namespace {

constexpr std::int64_t kMaxTokens = 16384;                  // of one forward, or one sequence
constexpr std::int64_t kMaxLogits = std::int64_t{1} << 24;  // at a time

void check(const LoadedModel& m, const std::vector<std::int32_t>& tokens, std::size_t index) {
  const model::ModelConfig& c = m.weights.config;
  if (tokens.empty() || static_cast<std::int64_t>(tokens.size()) > c.max_positions)
    base::fail<base::InputError>("sequence {} has {} tokens; a sequence needs 1 to {} tokens",
                                 index + 1, tokens.size(), c.max_positions);
  for (const std::int32_t token : tokens)
    if (token < 0 || token >= c.vocab_size)
      base::fail<base::InputError>("sequence {}: token {} is outside the vocabulary of {}",
                                   index + 1, token, c.vocab_size);
}

// Sequences [first, last) in one forward.
void score_batch(LoadedModel& m, const std::vector<std::vector<std::int32_t>>& sequences,
                 std::size_t first, std::size_t last, const LogitsSink& sink,
                 std::vector<Scored>& out) {
  const Context& ctx = m.ctx;
  const ArenaScope scratch(m.workspace);
  std::vector<std::int32_t> tokens, positions, targets, offsets = {0}, lengths;
  for (std::size_t s = first; s < last; ++s) {
    const auto& sequence = sequences[s];
    for (std::size_t t = 0; t < sequence.size(); ++t) {
      tokens.push_back(sequence[t]);
      positions.push_back(static_cast<std::int32_t>(t));
      targets.push_back(t + 1 < sequence.size() ? sequence[t + 1] : 0);  // the last has none
    }
    offsets.push_back(static_cast<std::int32_t>(tokens.size()));
    lengths.push_back(static_cast<std::int32_t>(sequence.size()));
  }
  const auto upload = [&](const std::vector<std::int32_t>& values) {
    return tensor::upload<std::int32_t>(ctx, m.workspace, values);
  };
  model::ForwardBatch batch;
  batch.tokens_T = upload(tokens), batch.positions_T = upload(positions);
  batch.attention.q_offsets_S1 = upload(offsets), batch.attention.kv_lengths_S = upload(lengths);
  batch.attention.max_queries = batch.attention.max_keys =
      *std::max_element(lengths.begin(), lengths.end());
  const TensorView targets_T = upload(targets);
  const auto T = static_cast<std::int64_t>(tokens.size());
  const std::int64_t V = m.weights.config.vocab_size;
  const TensorView hidden_TD = m.workspace.take(DType::kBf16, {T, m.weights.config.hidden_size});
  model::forward(ctx, m.view(), batch, nullptr, nullptr, hidden_TD);

  const std::int64_t chunk = std::clamp<std::int64_t>(kMaxLogits / V, 1, T);
  const std::vector<RowSampling> plain(static_cast<std::size_t>(chunk));
  auto* sampling = tensor::take_structs<RowSampling>(m.workspace, chunk);
  auto* device_stats = tensor::take_structs<RowStats>(m.workspace, chunk);
  tensor::copy_bytes(ctx, plain.data(), Device::kCpu, sampling, ctx.device,
                     plain.size() * sizeof(RowSampling));
  std::vector<RowStats> stats(static_cast<std::size_t>(T));
  std::vector<float> logits;
  for (std::int64_t begin = 0; begin < T; begin += chunk) {
    const ArenaScope inner(m.workspace);
    const std::int64_t R = std::min(chunk, T - begin);
    const TensorView logits_RV = m.workspace.take(DType::kFp32, {R, V});
    model::head_logits(ctx, m.view(), hidden_TD.rows(begin, R), logits_RV);
    ops::vocab_logprobs(ctx, logits_RV, targets_T.rows(begin, R), sampling, device_stats);
    tensor::copy_bytes(ctx, device_stats, ctx.device, stats.data() + begin, Device::kCpu,
                       static_cast<std::size_t>(R) * sizeof(RowStats));
    if (sink == nullptr) continue;
    logits.resize(static_cast<std::size_t>(R * V));
    tensor::download(ctx, logits_RV, logits.data());
    for (std::size_t s = first; s < last; ++s) {  // the part of each sequence in this chunk
      const std::int64_t from = std::max<std::int64_t>(begin, offsets[s - first]),
                         to = std::min<std::int64_t>(begin + R, offsets[s - first + 1]);
      if (from < to)
        sink(s, from - offsets[s - first], to - from,
             std::span(logits).subspan(static_cast<std::size_t>((from - begin) * V),
                                       static_cast<std::size_t>((to - from) * V)));
    }
  }
  for (std::size_t s = first; s < last; ++s) {
    Scored& scored = out[s];
    scored.logprobs = {std::numeric_limits<float>::quiet_NaN()};
    for (std::int32_t row = offsets[s - first]; row + 1 < offsets[s - first + 1]; ++row) {
      scored.logprobs.push_back(stats[row].logprob);
      scored.sum += static_cast<double>(stats[row].logprob);
    }
  }
}

}  // namespace

std::vector<Scored> score(LoadedModel& model,
                          const std::vector<std::vector<std::int32_t>>& sequences,
                          const LogitsSink& sink) {
  for (std::size_t s = 0; s < sequences.size(); ++s) check(model, sequences[s], s);
  std::vector<Scored> out(sequences.size());
  for (std::size_t first = 0; first < sequences.size();) {
    std::size_t last = first, tokens = 0;
    do tokens += sequences[last++].size();
    while (last < sequences.size() && tokens + sequences[last].size() <= kMaxTokens);
    score_batch(model, sequences, first, last, sink, out);
    first = last;
  }
  return out;
}

}  // namespace lockstep::loop
