// Causal attention over packed sequences with paged keys and values (docs/numerics.md, section 8).
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// S sequences. Query rows q_offsets_S1[s] .. q_offsets_S1[s+1] belong to sequence s and are its
// last positions: with L = kv_lengths_S[s] and n query rows they stand at positions L-n .. L-1. Key
// position i of sequence s is row pages_SP[s][i / page_size] * page_size + i % page_size of the key
// and value tensors. Without pages (empty view) the keys of sequence s are rows q_offsets_S1[s] + i
// (training: n = L). All int32. Query rows that belong to no sequence are left alone. Every key a
// query sees must have been written; keys behind it, unwritten rows of a page and pages past the
// length are never used, so they may hold anything.
struct AttentionBatch {
  TensorView q_offsets_S1;
  TensorView kv_lengths_S;
  TensorView pages_SP;
  std::int64_t page_size = 0;
  // Host bounds of the queries and of the keys of one sequence, for launch sizes on a GPU, where
  // the arrays above are device memory. 0: unknown; then T queries, and keys as many as a row of
  // pages_SP holds, or R. A sequence beyond a bound that is too small is left unfinished.
  std::int64_t max_queries = 0, max_keys = 0;
};

// q_THK BF16, k and v BF16 [rows, J, K] (value width may differ from K: v is [rows, J, Kv]);
// out_THK BF16 [T, H, Kv]; lse2_TH FP32, may be empty. Query i sees keys 0..position(i). H is a
// multiple of J, scale > 0; on a GPU both widths are multiples of 16, up to 256. ContractError on
// shapes, dtypes, and on the CPU on offsets, lengths or pages, that do not fit.
// Latent attention (ADR 0008): with an empty v_RJK the value of a key is the first Kv columns of
// its row, Kv <= K as out_THK says; on a GPU then K is up to 576 and Kv up to 512.
void attention(const Context& ctx, const TensorView& q_THK, const TensorView& k_RJK,
               const TensorView& v_RJK, const AttentionBatch& batch, double scale,
               const TensorView& out_THK, const TensorView& lse2_TH);

// Training form only (no pages, n = L). Reads what the forward wrote (out, lse2). d_q_THK, d_k_TJK,
// d_v_TJK BF16. A sequence's gradients depend on that sequence alone. Where v_TJK is empty, so is
// d_v_TJK, and d_k_TJK gets the gradient of the whole row: in its first Kv columns bf16(key's +
// value's), an FP32 addition of the two before either is rounded to BF16.
void attention_backward(const Context& ctx, const TensorView& q_THK, const TensorView& k_TJK,
                        const TensorView& v_TJK, const TensorView& out_THK,
                        const TensorView& lse2_TH, const TensorView& d_out_THK,
                        const AttentionBatch& batch, double scale, const TensorView& d_q_THK,
                        const TensorView& d_k_TJK, const TensorView& d_v_TJK);

// Copies rows of k and v to their places: row t goes to row slots_T[t] (int32) of the cache
// tensors. Any dtype and trailing shape, the same for rows and cache. Slots are distinct; one
// outside the cache is a ContractError, and then nothing is written (on a GPU that row is left
// out). v and its cache are empty where values lie in the keys.
void write_kv(const Context& ctx, const TensorView& k_TJK, const TensorView& v_TJK,
              const TensorView& slots_T, const TensorView& k_cache_RJK,
              const TensorView& v_cache_RJK);

}  // namespace lockstep::ops
