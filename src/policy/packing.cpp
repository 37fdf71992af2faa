#include "policy/packing.h"

#include <algorithm>

namespace lockstep::policy {

using tensor::Arena;
using tensor::DType;

Packed pack(Arena& arena, std::span<const data::TrainSequence> sequences,
            std::int64_t max_positions) {
  LOCKSTEP_CHECK(!sequences.empty(), "pack: no sequences");
  Packed p;
  const auto S = static_cast<std::int64_t>(sequences.size());
  for (std::int64_t s = 0; s < S; ++s) {
    const auto n = static_cast<std::int64_t>(sequences[s].tokens.size());
    if (n < 2 || n - 1 > max_positions)
      base::fail<base::InputError>(
          "training sequence {} has {} tokens; a sequence needs 2 to {} tokens", s, n,
          max_positions + 1);
    p.tokens += n - 1;
  }
  p.batch.tokens_T = arena.take(DType::kInt32, {p.tokens});
  p.batch.positions_T = arena.take(DType::kInt32, {p.tokens});
  p.batch.attention.q_offsets_S1 = arena.take(DType::kInt32, {S + 1});
  p.batch.attention.kv_lengths_S = arena.take(DType::kInt32, {S});
  auto* tokens = p.batch.tokens_T.as<std::int32_t>();
  auto* positions = p.batch.positions_T.as<std::int32_t>();
  auto* offsets = p.batch.attention.q_offsets_S1.as<std::int32_t>();
  std::int32_t row = 0;
  for (std::int64_t s = 0; s < S; ++s) {
    const data::TrainSequence& sequence = sequences[s];
    const auto n = static_cast<std::int32_t>(sequence.tokens.size());
    offsets[s] = row;
    p.batch.attention.kv_lengths_S.as<std::int32_t>()[s] = n - 1;
    for (std::int32_t t = 0; t + 1 < n; ++t, ++row) {
      tokens[row] = sequence.tokens[t];
      positions[row] = t;
      if (!(sequence.loss_mask[t + 1] > 0)) continue;
      p.row_R.push_back(row);
      p.target_R.push_back(sequence.tokens[t + 1]);
      p.sequence_R.push_back(static_cast<std::int32_t>(s));
      p.position_R.push_back(t + 1);
    }
  }
  offsets[S] = row;
  return p;
}

}  // namespace lockstep::policy
