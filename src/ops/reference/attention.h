// Causal grouped-query attention of one sequence and its backward in double precision, from the
// maths.
#pragma once

#include <cstdint>

namespace lockstep::ops::reference {

// The queries stand at positions keys - queries .. keys - 1; query head h reads KV head
// h / (heads / kv_heads).
struct AttentionShape {
  std::int64_t queries, keys, heads, kv_heads, width, value_width;
  double scale;
};

// q [queries, heads, width], k [keys, kv_heads, width], v [keys, kv_heads, value_width]; out
// [queries, heads, value_width] = softmax(scale * q k) v. lse2 [queries, heads] = log2 of the sum
// of exp(scale * q k); may be null.
void attention(const AttentionShape& shape, const double* q, const double* k, const double* v,
               double* out, double* lse2);

// Gradients of sum(d_out * out) with the shapes of q, k and v; overwritten.
void attention_backward(const AttentionShape& shape, const double* q, const double* k,
                        const double* v, const double* d_out, double* d_q, double* d_k,
                        double* d_v);

}  // namespace lockstep::ops::reference
