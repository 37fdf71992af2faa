// What attention's implementations take: pointers and sizes that ops/attention.cpp has checked.
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

struct AttentionArgs {
  const numerics::Bf16* q = nullptr;
  const numerics::Bf16* k = nullptr;
  const numerics::Bf16* v = nullptr;  // k, where values_in_keys
  const std::int32_t* q_offsets = nullptr;
  const std::int32_t* kv_lengths = nullptr;
  const std::int32_t* pages = nullptr;  // null: keys are packed like the queries
  std::int64_t pages_per_sequence = 0, page_size = 0;
  std::int64_t sequences = 0, heads = 0, kv_heads = 0, width = 0, value_width = 0;
  std::int64_t value_row = 0;   // from one KV head's values to the next: value_width, or width
  bool values_in_keys = false;  // a key's value is the first value_width columns of its row
  std::int64_t tokens = 0;      // T: rows of q
  std::int64_t rows = 0;        // R: rows of k and v
  std::int64_t longest = 0;     // most query rows of one sequence; on a GPU a bound of it
  std::int64_t most_keys = 0;   // GPU: a bound of the keys of one sequence
  double scale = 0;
  numerics::Bf16* out = nullptr;  // written by the forward, read by the backward
  float* lse2 = nullptr;          // the same; null: not wanted
  // Backward only.
  const numerics::Bf16* d_out = nullptr;
  numerics::Bf16* d_q = nullptr;
  numerics::Bf16* d_k = nullptr;
  numerics::Bf16* d_v = nullptr;
};

}  // namespace lockstep::ops
