// Sequences and batches for the tests and benches of attention.
#pragma once

#include <algorithm>
#include <limits>

#include "ops/attention.h"
#include "ops/attention_contract.h"
#include "ops/op_test_util.h"
#include "ops/reference/attention.h"

namespace lockstep::ops::test {

struct AttentionSizes {
  std::int64_t H = 4, J = 2, K = 16, Kv = 16;
  double scale = 0.25;
  bool latent = false;  // a key's value is the first Kv columns of its row
};

// Whole sequences packed one behind the other, with all their queries: the training form.
struct AttentionCase {
  AttentionSizes sizes;
  std::vector<std::int64_t> lengths;
  Tensor q_THK, k_TJK, v_TJK, offsets_S1, lengths_S;

  std::int64_t T() const { return q_THK.view().dim(0); }
  std::int64_t begin(std::size_t s) const { return offsets_S1.as<std::int32_t>()[s]; }
  AttentionBatch batch() const { return {offsets_S1, lengths_S, {}, 0}; }
  // What the op gets for v: v_TJK repeats the keys' columns where the case is latent.
  TensorView v() const { return sizes.latent ? TensorView{} : v_TJK.view(); }
  void repeat_keys() const {
    for (std::int64_t i = 0; sizes.latent && i < T() * sizes.J; ++i)
      std::memcpy(v_TJK.as<Bf16>() + i * sizes.Kv, k_TJK.as<Bf16>() + i * sizes.K,
                  static_cast<std::size_t>(sizes.Kv) * sizeof(Bf16));
  }
};

inline AttentionCase attention_case(Rng& rng, const AttentionSizes& n,
                                    const std::vector<std::int64_t>& lengths,
                                    double deviation = 1.0) {
  AttentionCase out;
  out.sizes = n;
  out.lengths = lengths;
  std::vector<std::int32_t> offsets{0}, kv_lengths;
  for (const std::int64_t length : lengths) {
    kv_lengths.push_back(static_cast<std::int32_t>(length));
    offsets.push_back(offsets.back() + kv_lengths.back());
  }
  const std::int64_t T = offsets.back();
  out.q_THK = random_normal(rng, DType::kBf16, {T, n.H, n.K}, deviation);
  out.k_TJK = random_normal(rng, DType::kBf16, {T, n.J, n.K});
  out.v_TJK = random_normal(rng, DType::kBf16, {T, n.J, n.Kv});
  out.offsets_S1 = int32_tensor(offsets);
  out.lengths_S = int32_tensor(kv_lengths);
  out.repeat_keys();
  return out;
}

// Sequence s of a case on its own.
inline AttentionCase only(const AttentionCase& x, std::size_t s) {
  Rng rng(0);
  AttentionCase out = attention_case(rng, x.sizes, {x.lengths[s]});
  const auto copy = [&](const Tensor& from, const Tensor& to) {
    std::memcpy(to.view().data, from.view().rows(x.begin(s), x.lengths[s]).data, to.view().bytes());
  };
  copy(x.q_THK, out.q_THK);
  copy(x.k_TJK, out.k_TJK);
  copy(x.v_TJK, out.v_TJK);
  return out;
}

struct AttentionResult {
  explicit AttentionResult(const AttentionCase& x)
      : out_THK(DType::kBf16, {x.T(), x.sizes.H, x.sizes.Kv}),
        lse2_TH(DType::kFp32, {x.T(), x.sizes.H}) {}
  Poisoned out_THK, lse2_TH;
};

inline AttentionResult forward(const Context& ctx, const AttentionCase& x) {
  AttentionResult r(x);
  attention(ctx, x.q_THK, x.k_TJK, x.v(), x.batch(), x.sizes.scale, r.out_THK, r.lse2_TH);
  EXPECT_TRUE(r.out_THK.guards_intact() && r.lse2_TH.guards_intact());
  EXPECT_TRUE(r.out_THK.all_written() && r.lse2_TH.all_written());
  return r;
}

inline ::testing::AssertionResult same(const AttentionResult& a, const AttentionResult& b) {
  const auto out = bytes_equal(a.out_THK, b.out_THK);
  return out ? bytes_equal(a.lse2_TH, b.lse2_TH) : out;
}

inline ContractSequence contract_sequence(const AttentionCase& x, std::size_t s) {
  const AttentionSizes& n = x.sizes;
  return {x.lengths[s],
          n.H,
          n.J,
          n.K,
          n.Kv,
          n.scale,
          x.q_THK.as<Bf16>() + x.begin(s) * n.H * n.K,
          x.k_TJK.as<Bf16>() + x.begin(s) * n.J * n.K,
          x.v_TJK.as<Bf16>() + x.begin(s) * n.J * n.Kv};
}

// How a server would reach the same rows: a paged cache whose free rows hold NaN and infinity,
// pages in random order, chunks of `chunk()` queries, a random part of the sequences in each step.
// Sequences start with `cached` positions already in the cache; only later rows are computed.
inline AttentionResult forward_served(const Context& ctx, const AttentionCase& x,
                                      std::int64_t page_size,
                                      const std::function<std::int64_t()>& chunk, Rng& rng,
                                      std::int64_t cached = 0) {
  const AttentionSizes& n = x.sizes;
  const std::size_t S = x.lengths.size();
  std::int64_t longest = 0, pages = 3;
  for (const std::int64_t length : x.lengths) {
    longest = std::max(longest, (length + page_size - 1) / page_size);
    pages += (length + page_size - 1) / page_size;
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng() % i]);
  Tensor k_cache = empty(DType::kBf16, {pages * page_size, n.J, n.K});
  Tensor v_cache = empty(DType::kBf16, {pages * page_size, n.J, n.Kv});
  for (const Tensor* cache : {&k_cache, &v_cache})
    for (std::int64_t i = 0; i < cache->view().count(); ++i)
      set_value(*cache, i,
                (i % 2 == 0 ? 1 : -1) * (i % 3 == 0 ? std::numeric_limits<double>::quiet_NaN()
                                                    : std::numeric_limits<double>::infinity()));
  std::vector<std::vector<std::int32_t>> table(S);
  std::size_t next_page = 0;
  for (std::size_t s = 0; s < S; ++s) {
    table[s].assign(static_cast<std::size_t>(longest), -1);
    for (std::int64_t p = 0; p * page_size < x.lengths[s]; ++p)
      table[s][static_cast<std::size_t>(p)] = order[next_page++];
  }

  AttentionResult result(x);
  std::vector<std::int64_t> done(S, 0);
  bool first_step = cached > 0;  // fills the cache, computes nothing
  while (true) {
    std::vector<std::int32_t> offsets{0}, kv_lengths, page_rows, slots;
    std::vector<std::int64_t> rows;  // of the case
    bool left = false;
    for (std::size_t s = 0; s < S; ++s) {
      if (done[s] == x.lengths[s]) continue;
      left = true;
      if (!first_step && rng() % 4 == 0) continue;
      const std::int64_t count = std::min(first_step ? cached : chunk(), x.lengths[s] - done[s]);
      for (std::int64_t i = done[s]; i < done[s] + count; ++i) {
        rows.push_back(x.begin(s) + i);
        slots.push_back(static_cast<std::int32_t>(
            table[s][static_cast<std::size_t>(i / page_size)] * page_size + i % page_size));
      }
      done[s] += count;
      offsets.push_back(static_cast<std::int32_t>(rows.size()));
      kv_lengths.push_back(static_cast<std::int32_t>(done[s]));
      auto visible = table[s];  // pages past the length must not be followed
      for (std::size_t p = static_cast<std::size_t>((done[s] + page_size - 1) / page_size);
           p < visible.size(); ++p)
        visible[p] = -1;
      page_rows.insert(page_rows.end(), visible.begin(), visible.end());
    }
    if (!left) return result;
    const auto T = static_cast<std::int64_t>(rows.size());
    const auto pick = [&](const TensorView& from) {
      Shape shape = from.shape;
      shape.dim[0] = T;
      Tensor to = empty(from.dtype, shape);
      for (std::int64_t t = 0; t < T; ++t) {
        const TensorView row = to.view().rows(t, 1);
        std::memcpy(row.data, from.rows(rows[static_cast<std::size_t>(t)], 1).data, row.bytes());
      }
      return to;
    };
    const auto put_back = [&](const TensorView& from, const TensorView& to) {
      for (std::int64_t t = 0; t < T; ++t) {
        const TensorView row = from.rows(t, 1);
        std::memcpy(to.rows(rows[static_cast<std::size_t>(t)], 1).data, row.data, row.bytes());
      }
    };
    if (n.latent)
      write_kv(ctx, pick(x.k_TJK), {}, int32_tensor(slots), k_cache, {});
    else
      write_kv(ctx, pick(x.k_TJK), pick(x.v_TJK), int32_tensor(slots), k_cache, v_cache);
    if (first_step) {
      first_step = false;
      continue;
    }
    const Tensor offsets_S1 = int32_tensor(offsets), lengths_S = int32_tensor(kv_lengths);
    const Tensor pages_flat = int32_tensor(page_rows);
    const AttentionBatch batch{
        offsets_S1, lengths_S,
        pages_flat.view().reshape({static_cast<std::int64_t>(kv_lengths.size()), longest}),
        page_size};
    Poisoned out(DType::kBf16, {T, n.H, n.Kv}), lse2(DType::kFp32, {T, n.H});
    attention(ctx, pick(x.q_THK), k_cache, n.latent ? TensorView{} : v_cache.view(), batch, n.scale,
              out, lse2);
    EXPECT_TRUE(out.guards_intact() && lse2.guards_intact());
    put_back(out, result.out_THK);
    put_back(lse2, result.lse2_TH);
  }
}

}  // namespace lockstep::ops::test
