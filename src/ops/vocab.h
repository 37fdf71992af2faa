// Log-probabilities, entropy and sampling from rows of logits (docs/numerics.md, section 10). One
// function gives the log-probability while sampling and in the loss.
//
// Logits of -inf are legal: such a token is never kept, its log-probability is -inf. A row is
// broken when one of its z is NaN or +inf, or none is above -inf: its logprob, entropy, max and
// total are NaN, its token is the lowest index whose z is not NaN (0 if there is none), its
// gradient is NaN (zero where g = 0).
// ContractError: V = 0, and on the CPU, where the values can be seen: a target outside [0, V), a
// temperature that is negative or whose reciprocal is not a finite FP32 number, NaN in top_p or
// min_p.
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// How one row's distribution is made from its logits, and where its random numbers come from.
// temperature 0: greedy, the filters are off and everything else is that of temperature 1.
// top_k <= 0, top_p >= 1 and min_p <= 0 are off. The best token always stays in the kept set.
struct RowSampling {
  float temperature = 1.0f;
  int top_k = -1;
  float top_p = 1.0f;
  float min_p = 0.0f;
  std::uint64_t seed = 0;      // Philox key
  std::uint64_t stream = 0;    // counter high: the request
  std::uint32_t position = 0;  // index of the token in the response
};

// What the backward needs, and what the metrics want. The kept set of a row is
// { v : z_v > cut_z, or z_v == cut_z and v <= cut_index }; (-inf, -1) where no filter removes any.
// cut_z is never -0.
struct RowStats {
  float logprob = 0;  // -inf for a token outside the kept set
  float entropy = 0;
  float max = 0;
  float total = 0;
  float cut_z = 0;
  std::int32_t cut_index = 0;
};

// stats[r] of targets_R (int32) under logits_RV (FP32). `sampling` and `stats` are R entries in
// memory of the context's device.
void vocab_logprobs(const Context& ctx, const TensorView& logits_RV, const TensorView& targets_R,
                    const RowSampling* sampling, RowStats* stats);

// Draws tokens_R (int32) and gives the same stats as vocab_logprobs for them.
void vocab_sample(const Context& ctx, const TensorView& logits_RV, const RowSampling* sampling,
                  const TensorView& tokens_R, RowStats* stats);

// d_logits_RV BF16 from g_R = d loss / d logprob (FP32). A row with g = 0 or logprob = -inf gives
// zeros; elsewhere entries outside the kept set are zeros.
void vocab_backward(const Context& ctx, const TensorView& logits_RV, const TensorView& targets_R,
                    const RowSampling* sampling, const RowStats* stats, const TensorView& g_R,
                    const TensorView& d_logits_RV);

}  // namespace lockstep::ops
