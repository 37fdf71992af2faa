#include "policy/packing.h"

#include <algorithm>

#include "tensor/device.h"

namespace lockstep::policy {

using tensor::Arena;

Packed pack(const tensor::Context& ctx, Arena& arena,
            std::span<const data::TrainSequence> sequences, std::int64_t max_positions) {
  LOCKSTEP_CHECK(!sequences.empty(), "pack: no sequences");
  Packed p;
  std::vector<std::int32_t> tokens, positions, offsets = {0}, lengths;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const data::TrainSequence& sequence = sequences[s];
    const auto n = static_cast<std::int64_t>(sequence.tokens.size());
    if (n < 2 || n - 1 > max_positions)
      base::fail<base::InputError>(
          "training sequence {} has {} tokens; a sequence needs 2 to {} tokens", s, n,
          max_positions + 1);
    for (std::int64_t t = 0; t + 1 < n; ++t) {
      if (sequence.loss_mask[t + 1] > 0) {
        p.row_R.push_back(static_cast<std::int32_t>(tokens.size()));
        p.target_R.push_back(sequence.tokens[t + 1]);
        p.sequence_R.push_back(static_cast<std::int32_t>(s));
        p.position_R.push_back(static_cast<std::int32_t>(t + 1));
      }
      tokens.push_back(sequence.tokens[t]);
      positions.push_back(static_cast<std::int32_t>(t));
    }
    offsets.push_back(static_cast<std::int32_t>(tokens.size()));
    lengths.push_back(static_cast<std::int32_t>(n - 1));
  }
  p.tokens = static_cast<std::int64_t>(tokens.size());
  const auto upload = [&](const std::vector<std::int32_t>& values) {
    return tensor::upload<std::int32_t>(ctx, arena, values);
  };
  p.batch.tokens_T = upload(tokens);
  p.batch.positions_T = upload(positions);
  p.batch.attention.q_offsets_S1 = upload(offsets);
  p.batch.attention.kv_lengths_S = upload(lengths);
  p.batch.attention.max_queries = p.batch.attention.max_keys =
      *std::max_element(lengths.begin(), lengths.end());
  return p;
}

}  // namespace lockstep::policy
