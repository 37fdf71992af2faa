// Section 8 of docs/numerics.md for one sequence, one value at a time, every block at its full 128
// keys and with numerics::tensor_core_step alone. The CPU backend must give these bits. Shares
// nothing with ops/cpu.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <numbers>
#include <vector>

#include "numerics/reduce.h"
#include "numerics/tensor_core.h"

namespace lockstep::ops::test {

using numerics::Bf16;
using Value = std::function<Bf16(std::int64_t)>;

inline float contract_chain(std::int64_t K, float c, const Value& a, const Value& b) {
  for (std::int64_t k0 = 0; k0 < K; k0 += 16) {
    numerics::Term ta[16], tb[16];
    for (std::int64_t i = 0; i < 16; ++i) {
      ta[i] = numerics::bf16_term(k0 + i < K ? a(k0 + i) : Bf16{0});
      tb[i] = numerics::bf16_term(k0 + i < K ? b(k0 + i) : Bf16{0});
    }
    c = numerics::tensor_core_step(numerics::kBf16Step, ta, tb, c);
  }
  return c;
}

// One whole sequence: L positions, all of them queries.
struct ContractSequence {
  std::int64_t L, H, J, K, Kv;
  double scale;
  const Bf16 *q, *k, *v;  // [L, H, K], [L, J, K], [L, J, Kv]

  float c() const { return static_cast<float>(scale * std::numbers::log2e); }
  Bf16 q_at(std::int64_t t, std::int64_t h, std::int64_t d) const { return q[(t * H + h) * K + d]; }
  Bf16 k_at(std::int64_t i, std::int64_t h, std::int64_t d) const {
    return k[(i * J + h / (H / J)) * K + d];
  }
  Bf16 v_at(std::int64_t i, std::int64_t h, std::int64_t d) const {
    return v[(i * J + h / (H / J)) * Kv + d];
  }
  float score(std::int64_t t, std::int64_t i, std::int64_t h) const {
    return contract_chain(
        K, 0.0f, [&](std::int64_t d) { return q_at(t, h, d); },
        [&](std::int64_t d) { return k_at(i, h, d); });
  }
};

// One row of the forward: Kv outputs, returns lse2.
inline float contract_forward(const ContractSequence& seq, std::int64_t t, std::int64_t h,
                              Bf16* out) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float c = seq.c();
  float M = -kInf, L = 0;
  std::vector<float> A(static_cast<std::size_t>(seq.Kv));
  for (std::int64_t split = 0; split <= t; split += 2048) {
    float m = -kInf, l[4] = {0, 0, 0, 0};
    std::vector<float> O(A.size(), 0.0f);
    for (std::int64_t b = split; b <= t && b < split + 2048; b += 128) {
      float s[128], p[128];
      float new_m = m;
      for (std::int64_t i = 0; i < 128; ++i) {
        s[i] = b + i <= t ? seq.score(t, b + i, h) : -kInf;
        new_m = s[i] > new_m ? s[i] : new_m;
      }
      const float mc = new_m * c;
      const float corr = m == -kInf ? 0.0f : numerics::exp2_softmax(m * c - mc);
      for (std::int64_t i = 0; i < 128; ++i)
        p[i] = b + i <= t ? numerics::exp2_softmax(numerics::fma(s[i], c, -mc)) : 0.0f;
      for (float& x : l) x = x * corr;
      numerics::quad_accumulate(p, 128, l);
      for (std::int64_t d = 0; d < seq.Kv; ++d)
        O[static_cast<std::size_t>(d)] = contract_chain(
            128, O[static_cast<std::size_t>(d)] * corr,
            [&](std::int64_t i) { return numerics::to_bf16(p[i]); },
            [&](std::int64_t i) { return b + i <= t ? seq.v_at(b + i, h, d) : Bf16{0}; });
      m = new_m;
    }
    for (float& o : O) o = o + (o - o);
    const float total = (l[0] + l[1]) + (l[2] + l[3]);
    if (split == 0) {
      M = m;
      L = total;
      A = O;
      continue;
    }
    const float new_M = m > M ? m : M;
    const float a = numerics::exp2((M - new_M) * c), e = numerics::exp2((m - new_M) * c);
    L = numerics::fma(L, a, total * e);
    for (std::size_t d = 0; d < A.size(); ++d) A[d] = numerics::fma(A[d], a, O[d] * e);
    M = new_M;
  }
  for (std::size_t d = 0; d < A.size(); ++d) out[d] = numerics::to_bf16(A[d] * (1.0f / L));
  return numerics::fma(M, c, numerics::log(L) * numerics::kLog2e);
}

// The backward of one sequence; out [L, H, Kv] and lse2 [L, H] as the forward wrote them. d_v null:
// values lie in the keys, whose gradient goes to d_k.
inline void contract_backward(const ContractSequence& seq, const Bf16* out, const float* lse2,
                              const Bf16* d_out, Bf16* d_q, Bf16* d_k, Bf16* d_v) {
  const std::int64_t L = seq.L, H = seq.H, K = seq.K, Kv = seq.Kv;
  const std::int64_t blocks = (L + 127) / 128;
  const float c = seq.c();
  const auto scale = static_cast<float>(seq.scale);
  const auto at = [&](std::int64_t t, std::int64_t i) {
    return static_cast<std::size_t>(t * L + i);
  };
  std::vector<float> k_sum(static_cast<std::size_t>(L * K)),
      v_sum(static_cast<std::size_t>(L * Kv));
  for (std::int64_t h = 0; h < H; ++h) {
    std::vector<Bf16> p(static_cast<std::size_t>(L * L)), ds(p.size());
    for (std::int64_t t = 0; t < L; ++t) {
      const Bf16* g = d_out + (t * H + h) * Kv;
      const Bf16* o = out + (t * H + h) * Kv;
      const float delta = numerics::lane_sum<float>(Kv, [&](std::int64_t d, float acc) {
        return numerics::fma(numerics::to_float(g[d]), numerics::to_float(o[d]), acc);
      });
      for (std::int64_t i = 0; i <= t; ++i) {
        const float x =
            numerics::exp2_softmax(numerics::fma(seq.score(t, i, h), c, -lse2[t * H + h]));
        const float dp = contract_chain(
            Kv, 0.0f, [&](std::int64_t d) { return g[d]; },
            [&](std::int64_t d) { return seq.v_at(i, h, d); });
        p[at(t, i)] = numerics::to_bf16(x);
        ds[at(t, i)] = numerics::to_bf16(x * (dp - delta));
      }
      for (std::int64_t d = 0; d < K; ++d) {
        float acc = 0;
        for (std::int64_t b = 0; b < blocks; ++b)
          acc = acc + contract_chain(
                          128, 0.0f,
                          [&](std::int64_t i) {
                            return b * 128 + i < L ? ds[at(t, b * 128 + i)] : Bf16{0};
                          },
                          [&](std::int64_t i) {
                            return b * 128 + i < L ? seq.k_at(b * 128 + i, h, d) : Bf16{0};
                          });
        d_q[(t * H + h) * K + d] = numerics::to_bf16(acc * scale);
      }
    }
    const std::int64_t in_group = h % (H / seq.J), j = h / (H / seq.J);
    const auto add = [&](float* sum, float part) { *sum = in_group == 0 ? part : *sum + part; };
    for (std::int64_t i = 0; i < L; ++i) {
      for (std::int64_t d = 0; d < Kv; ++d)
        add(&v_sum[static_cast<std::size_t>(i * Kv + d)],
            contract_chain(
                L, 0.0f, [&](std::int64_t t) { return p[at(t, i)]; },
                [&](std::int64_t t) { return d_out[(t * H + h) * Kv + d]; }));
      for (std::int64_t d = 0; d < K; ++d)
        add(&k_sum[static_cast<std::size_t>(i * K + d)],
            contract_chain(
                L, 0.0f, [&](std::int64_t t) { return ds[at(t, i)]; },
                [&](std::int64_t t) { return seq.q_at(t, h, d); }));
      if (in_group != H / seq.J - 1) continue;
      for (std::int64_t d = 0; d < Kv && d_v != nullptr; ++d)
        d_v[(i * seq.J + j) * Kv + d] =
            numerics::to_bf16(v_sum[static_cast<std::size_t>(i * Kv + d)]);
      for (std::int64_t d = 0; d < K; ++d) {
        float total = k_sum[static_cast<std::size_t>(i * K + d)] * scale;
        if (d_v == nullptr && d < Kv) total = total + v_sum[static_cast<std::size_t>(i * Kv + d)];
        d_k[(i * seq.J + j) * K + d] = numerics::to_bf16(total);
      }
    }
  }
}

}  // namespace lockstep::ops::test
