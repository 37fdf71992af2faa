// Attention backward. One thread takes one KV head of one sequence: query heads one after the other
// onto the same keys, queries ascending, so that the chains over queries run in their order.
#include <omp.h>

#include <cstring>

#include "numerics/reduce.h"
#include "ops/cpu/attention.h"
#include "ops/cpu/attention_parts.h"
#include "ops/cpu/chain.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

using numerics::Bf16;

namespace {

// Queries a tile: a multiple of the chain's step of 16 that divides the key block, so that tiles
// cut no step and every row of a tile sees the first key of every block the tile reads.
constexpr std::int64_t kTile = 32;
static_assert(kBlock % kTile == 0 && kTile % 16 == 0);

// One thread's memory.
struct Scratch {
  float* s;         // [kTile, kBlock] scores, then p
  float* dp;        // [kTile, kBlock], then ds
  Bf16* p;          // [kTile, kBlock]
  Bf16* ds;         // [kTile, kBlock]
  float* part;      // [kTile, K] of dQ
  float* d_q;       // [kTile, K]
  float* d_k;       // [longest, K] of the group so far
  float* d_v;       // [longest, Kv]
  float* head_d_k;  // the same of one head, where the group has several
  float* head_d_v;
};

// Lays the scratch out from `memory`; returns the bytes it takes.
std::int64_t lay_out(const AttentionArgs& args, std::byte* memory, Scratch* scratch) {
  const std::int64_t more = args.heads > args.kv_heads ? args.longest : 0;
  Carver carve{memory, 0};
  scratch->s = carve.take<float>(kTile * kBlock);
  scratch->dp = carve.take<float>(kTile * kBlock);
  scratch->p = carve.take<Bf16>(kTile * kBlock);
  scratch->ds = carve.take<Bf16>(kTile * kBlock);
  scratch->part = carve.take<float>(kTile * args.width);
  scratch->d_q = carve.take<float>(kTile * args.width);
  scratch->d_k = carve.take<float>(args.longest * args.width);
  scratch->d_v = carve.take<float>(args.longest * args.value_width);
  scratch->head_d_k = carve.take<float>(more * args.width);
  scratch->head_d_v = carve.take<float>(more * args.value_width);
  return carve.used;
}

void clear(float* x, std::int64_t count) {
  std::memset(x, 0, static_cast<std::size_t>(count) * sizeof(float));
}

// p and ds of one row in BF16 over `keys` columns, the first `visible` of them seen.
void row_gradient(float* s, float* dp, std::int64_t visible, std::int64_t keys, float c, float lse2,
                  float delta, Bf16* p, Bf16* ds) {
  const std::int64_t padded = pad_scores(s, visible, keys);
  for (std::int64_t i = visible; i < padded; ++i) dp[i] = 0.0f;
  for (std::int64_t i = 0; i < padded; ++i)
    s[i] = numerics::exp2_softmax(numerics::fma(s[i], c, -lse2));
  for (std::int64_t i = 0; i < padded; ++i) dp[i] = s[i] * (dp[i] - delta);
  for (std::int64_t i = 0; i < padded; ++i) p[i] = numerics::to_bf16(s[i]);
  for (std::int64_t i = 0; i < padded; ++i) ds[i] = numerics::to_bf16(dp[i]);
}

// Query tile [first, first + count) of query head h of sequence s: writes its dQ, adds onto the
// head's dK and dV.
void run_tile(const AttentionArgs& args, const Scratch& scratch, std::int64_t s, std::int64_t h,
              std::int64_t first, std::int64_t count, float* d_k, float* d_v) {
  const std::int64_t K = args.width, Kv = args.value_width, H = args.heads, J = args.kv_heads;
  const std::int64_t begin = args.q_offsets[s], j = h / (H / J);
  const std::int64_t place = (begin + first) * H + h;
  const float c = softmax_factor(args.scale);
  const auto scale = static_cast<float>(args.scale);
  const Bf16* q = args.q + place * K;
  const Bf16* d_out = args.d_out + place * Kv;

  float delta[kTile];
  for (std::int64_t r = 0; r < count; ++r) {
    const Bf16* o = args.out + (place + r * H) * Kv;
    const Bf16* d = d_out + r * H * Kv;
    delta[r] = numerics::lane_sum<float>(Kv, [&](std::int64_t i, float acc) {
      return numerics::fma(numerics::to_float(d[i]), numerics::to_float(o[i]), acc);
    });
  }

  clear(scratch.d_q, count * K);
  for (std::int64_t b = 0; b < first + count; b += kBlock) {
    const std::int64_t keys = first + count - b < kBlock ? first + count - b : kBlock;
    const Bf16* k = args.k + ((begin + b) * J + j) * K;
    const Bf16* v = args.v + ((begin + b) * J + j) * args.value_row;
    clear(scratch.s, count * kBlock);
    clear(scratch.dp, count * kBlock);
    bf16_chain({q, H * K, 1}, {k, J * K, 1}, scratch.s, kBlock, count, keys, K);
    bf16_chain({d_out, H * Kv, 1}, {v, J * args.value_row, 1}, scratch.dp, kBlock, count, keys, Kv);
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t seen = first + r - b + 1;
      row_gradient(scratch.s + r * kBlock, scratch.dp + r * kBlock, seen < keys ? seen : keys, keys,
                   c, args.lse2[place + r * H], delta[r], scratch.p + r * kBlock,
                   scratch.ds + r * kBlock);
    }
    clear(scratch.part, count * K);
    bf16_chain({scratch.ds, kBlock, 1}, {k, 1, J * K}, scratch.part, K, count, K, keys);
    for (std::int64_t i = 0; i < count * K; ++i) scratch.d_q[i] = scratch.d_q[i] + scratch.part[i];
    bf16_chain({scratch.p, 1, kBlock}, {d_out, 1, H * Kv}, d_v + b * Kv, Kv, keys, Kv, count);
    bf16_chain({scratch.ds, 1, kBlock}, {q, 1, H * K}, d_k + b * K, K, keys, K, count);
  }
  for (std::int64_t r = 0; r < count; ++r)
    for (std::int64_t d = 0; d < K; ++d)
      args.d_q[(place + r * H) * K + d] = numerics::to_bf16(scratch.d_q[r * K + d] * scale);
}

void run_kv_head(const AttentionArgs& args, const Scratch& scratch, std::int64_t s,
                 std::int64_t j) {
  const std::int64_t K = args.width, Kv = args.value_width, J = args.kv_heads;
  const std::int64_t group = args.heads / J, begin = args.q_offsets[s];
  const std::int64_t length = args.q_offsets[s + 1] - begin;
  const auto scale = static_cast<float>(args.scale);
  for (std::int64_t g = 0; g < group; ++g) {
    float* d_k = g == 0 ? scratch.d_k : scratch.head_d_k;
    float* d_v = g == 0 ? scratch.d_v : scratch.head_d_v;
    clear(d_k, length * K);
    clear(d_v, length * Kv);
    for (std::int64_t first = 0; first < length; first += kTile)
      run_tile(args, scratch, s, j * group + g, first,
               length - first < kTile ? length - first : kTile, d_k, d_v);
    if (g == 0) continue;
    for (std::int64_t i = 0; i < length * K; ++i) scratch.d_k[i] = scratch.d_k[i] + d_k[i];
    for (std::int64_t i = 0; i < length * Kv; ++i) scratch.d_v[i] = scratch.d_v[i] + d_v[i];
  }
  for (std::int64_t i = 0; i < length; ++i) {
    const std::int64_t place = (begin + i) * J + j;
    const float *d_k = scratch.d_k + i * K, *d_v = scratch.d_v + i * Kv;
    const std::int64_t shared = args.values_in_keys ? Kv : 0;  // columns with both gradients
    for (std::int64_t d = 0; d < shared; ++d)
      args.d_k[place * K + d] = numerics::to_bf16(d_k[d] * scale + d_v[d]);
    for (std::int64_t d = shared; d < K; ++d)
      args.d_k[place * K + d] = numerics::to_bf16(d_k[d] * scale);
    for (std::int64_t d = 0; d < Kv && !args.values_in_keys; ++d)
      args.d_v[place * Kv + d] = numerics::to_bf16(d_v[d]);
  }
}

}  // namespace

void attention_backward(const tensor::Context& ctx, const AttentionArgs& args) {
  Scratch layout;
  const std::int64_t bytes = lay_out(args, nullptr, &layout);
  tensor::ArenaScope scope(*ctx.workspace);
  auto* memory = static_cast<std::byte*>(
      ctx.workspace->take(tensor::DType::kE4m3, {bytes * ctx.threads}).data);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(ctx.threads)
  for (std::int64_t s = 0; s < args.sequences; ++s)
    for (std::int64_t j = 0; j < args.kv_heads; ++j) {
      Scratch scratch;
      lay_out(args, memory + omp_get_thread_num() * bytes, &scratch);
      run_kv_head(args, scratch, s, j);
    }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
