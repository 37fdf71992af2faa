// Attention forward. A tile is a few neighbouring positions of one sequence with all query heads of
// one KV head, so that a key block is read once for the group. Which positions share a tile changes
// no bits: rows only share the calls of bf16_chain, and blocks a row does not see are left out for
// it.
#include "ops/cpu/attention.h"

#include <omp.h>

#include <cstring>
#include <limits>

#include "ops/cpu/attention_parts.h"
#include "ops/cpu/chain.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

using numerics::Bf16;

namespace {

constexpr std::int64_t kTileRows = 32;
constexpr std::int64_t kSplit = numerics::kAttentionSplit;

// The running state of one row: within a split, and over the splits merged so far.
struct Row {
  float m, mc, corr;
  float l[4];
  float merged_m, merged_l;
};

// One thread's memory.
struct Scratch {
  Bf16* q;        // [rows, K]
  float* s;       // [rows, kBlock]
  Bf16* p;        // [rows, kBlock]
  float* o;       // [rows, Kv], the split at work
  float* merged;  // [rows, Kv]
  Bf16* k;        // [kBlock, K], keys of pages
  Bf16* v;        // [kBlock, Kv]
  Row* row;
};

std::int64_t group_of(const AttentionArgs& args) { return args.heads / args.kv_heads; }

std::int64_t tile_positions(const AttentionArgs& args) {
  const std::int64_t group = group_of(args);
  return group < kTileRows ? kTileRows / group : 1;
}

// Lays the scratch out from `memory`; returns the bytes it takes.
std::int64_t lay_out(const AttentionArgs& args, std::byte* memory, Scratch* scratch) {
  const std::int64_t rows = tile_positions(args) * group_of(args);
  Carver carve{memory, 0};
  scratch->q = carve.take<Bf16>(rows * args.width);
  scratch->s = carve.take<float>(rows * kBlock);
  scratch->p = carve.take<Bf16>(rows * kBlock);
  scratch->o = carve.take<float>(rows * args.value_width);
  scratch->merged = carve.take<float>(rows * args.value_width);
  scratch->k = carve.take<Bf16>(args.pages == nullptr ? 0 : kBlock * args.width);
  scratch->v = carve.take<Bf16>(
      args.pages == nullptr || args.values_in_keys ? 0 : kBlock * args.value_width);
  scratch->row = carve.take<Row>(rows);
  return carve.used;
}

std::int64_t key_row(const AttentionArgs& args, std::int64_t s, std::int64_t position) {
  if (args.pages == nullptr) return args.q_offsets[s] + position;
  const std::int64_t page = args.pages[s * args.pages_per_sequence + position / args.page_size];
  return page * args.page_size + position % args.page_size;
}

// Keys or values [first, first + count) of a sequence and KV head as a matrix of rows; those of
// pages are gathered.
StridedBf16 block_rows(const AttentionArgs& args, const Bf16* x, std::int64_t width, std::int64_t s,
                       std::int64_t j, std::int64_t first, std::int64_t count, Bf16* gathered) {
  const std::int64_t stride = args.kv_heads * width;
  if (args.pages == nullptr) return {x + key_row(args, s, first) * stride + j * width, stride, 1};
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(gathered + i * width, x + key_row(args, s, first + i) * stride + j * width,
                static_cast<std::size_t>(width) * sizeof(Bf16));
  return {gathered, width, 1};
}

bool values_finite(const AttentionArgs& args, std::int64_t s, std::int64_t j, std::int64_t first,
                   std::int64_t end) {
  const std::int64_t width = args.value_width;
  unsigned found = 0;
  for (std::int64_t i = first; i < end; ++i) {
    const Bf16* v = args.v + (key_row(args, s, i) * args.kv_heads + j) * args.value_row;
    for (std::int64_t d = 0; d < width; ++d) found |= (v[d].bits & 0x7F80) == 0x7F80 ? 1u : 0u;
  }
  return found == 0;
}

// The softmax of one row over the first `visible` of `keys` scores: p, the sums l, the correction.
void softmax_block(float* s, std::int64_t visible, std::int64_t keys, float c, Row* row, Bf16* p) {
  const std::int64_t padded = pad_scores(s, visible, keys);
  const float m = max_score(s, padded, row->m);
  const float mc = m * c;
  row->corr = numerics::exp2_softmax(row->mc - mc);
  row->m = m;
  row->mc = mc;
  for (std::int64_t i = 0; i < padded; ++i)
    s[i] = numerics::exp2_softmax(numerics::fma(s[i], c, -mc));
  for (std::int64_t i = 0; i < padded; ++i) p[i] = numerics::to_bf16(s[i]);
  float l[4];
  for (int t = 0; t < 4; ++t) l[t] = row->l[t] * row->corr;
  for (std::int64_t i = 0; i < padded; i += 8)
    for (int t = 0; t < 4; ++t) l[t] = l[t] + (s[i + 2 * t] + s[i + 2 * t + 1]);
  for (int t = 0; t < 4; ++t) row->l[t] = l[t];
}

// One block of keys for the rows [0, rows) of a tile that see at least its first key.
// `first_visible` is the number of keys the first of them sees; it grows by one each position.
void add_block(const AttentionArgs& args, const StridedBf16& keys, const StridedBf16& values,
               std::int64_t count, std::int64_t first_visible, std::int64_t rows, float c,
               const Bf16* q, const Scratch& scratch, float* o, Row* row) {
  const std::int64_t K = args.width, Kv = args.value_width, group = group_of(args);
  float* s = scratch.s;
  std::memset(s, 0, static_cast<std::size_t>(rows * kBlock) * sizeof(float));
  bf16_chain({q, K, 1}, keys, s, kBlock, rows, count, K);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t seen = first_visible + r / group;
    softmax_block(s + r * kBlock, seen < count ? seen : count, count, c, row + r,
                  scratch.p + r * kBlock);
    float* o_row = o + r * Kv;
    for (std::int64_t d = 0; d < Kv; ++d) o_row[d] = o_row[d] * row[r].corr;
  }
  bf16_chain({scratch.p, kBlock, 1}, {values.data, 1, values.row_stride}, o, Kv, rows, Kv, count);
}

// Ends a split of rows [0, rows): merges (m, l, o) into the merged state, which for the first split
// is o itself.
void end_split(bool first_split, std::int64_t rows, std::int64_t Kv, float c, float* o,
               float* merged, Row* row) {
  for (std::int64_t i = 0; i < rows * Kv; ++i) o[i] = o[i] + (o[i] - o[i]);
  for (std::int64_t r = 0; r < rows; ++r) {
    Row& w = row[r];
    const float l = (w.l[0] + w.l[1]) + (w.l[2] + w.l[3]);
    if (first_split) {
      w.merged_m = w.m;
      w.merged_l = l;
      continue;
    }
    const float m = w.m > w.merged_m ? w.m : w.merged_m;
    const float a = numerics::exp2((w.merged_m - m) * c), b = numerics::exp2((w.m - m) * c);
    w.merged_l = numerics::fma(w.merged_l, a, l * b);
    for (std::int64_t d = 0; d < Kv; ++d)
      merged[r * Kv + d] = numerics::fma(merged[r * Kv + d], a, o[r * Kv + d] * b);
    w.merged_m = m;
  }
}

// Queries [first, first + count) of sequence s with all heads of KV head j.
void run_tile(const AttentionArgs& args, const Scratch& scratch, std::int64_t s, std::int64_t j,
              std::int64_t first, std::int64_t count) {
  const std::int64_t group = group_of(args), rows = count * group;
  const std::int64_t K = args.width, Kv = args.value_width;
  const std::int64_t q_begin = args.q_offsets[s];
  const std::int64_t position = args.kv_lengths[s] - (args.q_offsets[s + 1] - q_begin) + first;
  const std::int64_t end = position + count;
  const float c = softmax_factor(args.scale);
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(scratch.q + i * group * K,
                args.q + ((q_begin + first + i) * args.heads + j * group) * K,
                static_cast<std::size_t>(group * K) * sizeof(Bf16));

  for (std::int64_t split = 0; split < end; split += kSplit) {
    float* o = split == 0 ? scratch.merged : scratch.o;
    // Rows before the first that sees a key of the split (of the block) have no part in it.
    const std::int64_t in_split = split > position ? (split - position) * group : 0;
    std::memset(o, 0, static_cast<std::size_t>(rows * Kv) * sizeof(float));
    for (std::int64_t r = in_split; r < rows; ++r) {
      Row& w = scratch.row[r];
      w.m = w.mc = -std::numeric_limits<float>::infinity();
      for (float& l : w.l) l = 0.0f;
    }
    const std::int64_t split_end = split + kSplit < end ? split + kSplit : end;
    for (std::int64_t b = split; b < split_end; b += kBlock) {
      const std::int64_t keys = end - b < kBlock ? end - b : kBlock;
      const std::int64_t skipped = b > position ? b - position : 0;
      const std::int64_t r0 = skipped * group;
      const StridedBf16 k = block_rows(args, args.k, K, s, j, b, keys, scratch.k);
      add_block(args, k,
                args.values_in_keys ? k : block_rows(args, args.v, Kv, s, j, b, keys, scratch.v),
                keys, position + skipped - b + 1, rows - r0, c, scratch.q + r0 * K, scratch,
                o + r0 * Kv, scratch.row + r0);
    }
    end_split(split == 0, rows - in_split, Kv, c, o + in_split * Kv, scratch.merged + in_split * Kv,
              scratch.row + in_split);
  }

  for (std::int64_t r = 0; r < rows; ++r) {
    const Row& w = scratch.row[r];
    const std::int64_t place = (q_begin + first + r / group) * args.heads + j * group + r % group;
    const float inverse = 1.0f / w.merged_l;
    for (std::int64_t d = 0; d < Kv; ++d)
      args.out[place * Kv + d] = numerics::to_bf16(scratch.merged[r * Kv + d] * inverse);
    if (args.lse2 != nullptr)
      args.lse2[place] = numerics::fma(w.merged_m, c, numerics::log(w.merged_l) * numerics::kLog2e);
  }
}

}  // namespace

void attention(const tensor::Context& ctx, const AttentionArgs& args) {
  Scratch layout;
  const std::int64_t bytes = lay_out(args, nullptr, &layout);
  tensor::ArenaScope scope(*ctx.workspace);
  auto* memory = static_cast<std::byte*>(
      ctx.workspace->take(tensor::DType::kE4m3, {bytes * ctx.threads}).data);
  const std::int64_t step = tile_positions(args);
  const std::int64_t tiles = (args.longest + step - 1) / step;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(ctx.threads)
  for (std::int64_t s = 0; s < args.sequences; ++s)
    for (std::int64_t j = 0; j < args.kv_heads; ++j)
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t queries = args.q_offsets[s + 1] - args.q_offsets[s];
        const std::int64_t first = tile * step;
        if (first >= queries) continue;
        const std::int64_t count = queries - first < step ? queries - first : step;
        Scratch scratch;
        lay_out(args, memory + omp_get_thread_num() * bytes, &scratch);
        // Where rows see different keys a masked key has p = +0, but 0 * NaN is NaN: rows must not
        // share a tile with a value that is not finite and that not all of them see.
        const std::int64_t position = args.kv_lengths[s] - queries + first;
        if (values_finite(args, s, j, position + 1, position + count)) {
          run_tile(args, scratch, s, j, first, count);
        } else {
          for (std::int64_t i = 0; i < count; ++i) run_tile(args, scratch, s, j, first + i, 1);
        }
      }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
