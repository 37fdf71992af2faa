// GEMMs written from docs/numerics.md, sections 4 and 6, with the scalar tensor-core step: what the
// fast ones must equal to the bit. Shared by tests and benches.
#pragma once

#include <functional>

#include "numerics/tensor_core.h"
#include "op_test_util.h"
#include "ops/gemm.h"

namespace lockstep::ops::test {

using CodeAt = std::function<numerics::Term(std::int64_t k)>;

// Chained steps over k in [begin, end), the last one padded with zeros.
inline float model_chain(const numerics::StepKind& kind, const CodeAt& a, const CodeAt& b,
                         std::int64_t begin, std::int64_t end, float c) {
  for (std::int64_t k0 = begin; k0 < end; k0 += kind.terms) {
    numerics::Term ta[32], tb[32];
    for (int i = 0; i < kind.terms; ++i) {
      ta[i] = k0 + i < end ? a(k0 + i) : numerics::Term{0, 0, false, true};
      tb[i] = k0 + i < end ? b(k0 + i) : numerics::Term{0, 0, false, true};
    }
    c = numerics::tensor_core_step(kind, ta, tb, c);
  }
  return c;
}

inline numerics::Term fp8_term(DType dtype, numerics::Fp8 code) {
  return dtype == DType::kE4m3 ? numerics::e4m3_term(code) : numerics::e5m2_term(code);
}

// One result of a scaled FP8 product; a_scale(g) and b_scale(g) give the scales of block g (g = 0
// for kRow).
inline float model_fp8(DType a_type, const numerics::Fp8* a, DType b_type, const numerics::Fp8* b,
                       std::int64_t K, Scaling scaling,
                       const std::function<float(std::int64_t)>& a_scale,
                       const std::function<float(std::int64_t)>& b_scale) {
  const int wide = (a_type == DType::kE5m2 ? 1 : 0) + (b_type == DType::kE5m2 ? 1 : 0);
  const numerics::StepKind kind = wide == 0   ? numerics::kE4m3Step
                                  : wide == 1 ? numerics::kE5m2E4m3Step
                                              : numerics::kE5m2Step;
  float acc = 0.0f;
  for (std::int64_t k0 = 0, g = 0; k0 < K; k0 += numerics::kQuantBlock, ++g) {
    const std::int64_t end = std::min<std::int64_t>(K, k0 + numerics::kQuantBlock);
    const float part = model_chain(
        kind, [&](std::int64_t k) { return fp8_term(a_type, a[k]); },
        [&](std::int64_t k) { return fp8_term(b_type, b[k]); }, k0, end, 0.0f);
    acc = scaling == Scaling::kBlock ? std::fma(part, a_scale(g) * b_scale(g), acc) : acc + part;
  }
  return scaling == Scaling::kBlock || K == 0 ? acc : acc * (a_scale(0) * b_scale(0));
}

inline void model_store(const TensorView& d, std::int64_t i, float x, bool accumulate) {
  if (d.dtype == DType::kBf16) {
    static_cast<numerics::Bf16*>(d.data)[i] = numerics::to_bf16(x);
    return;
  }
  float& out = static_cast<float*>(d.data)[i];
  out = accumulate ? out + x : x;
  if (numerics::is_nan(out)) out = std::numeric_limits<float>::quiet_NaN();
}

inline std::int64_t segment_begin(const TensorView& offsets, std::int64_t e) {
  return offsets ? offsets.as<std::int32_t>()[e] : 0;
}
inline std::int64_t segment_end(const TensorView& offsets, std::int64_t e, std::int64_t rows) {
  return offsets ? offsets.as<std::int32_t>()[e + 1] : rows;
}

inline void model_fp8_gemm(const Fp8Rows& a, const Fp8Weight& b, const TensorView& offsets_E1,
                           const TensorView& d_MN) {
  const std::int64_t M = a.codes_MK.dim(0), K = a.codes_MK.dim(1), E = b.codes_ENK.dim(0),
                     N = b.codes_ENK.dim(1), G = (K + 127) / 128;
  const bool block = a.scaling == Scaling::kBlock;
  const float* sa = a.scales.as<float>();
  const float* sb = b.scales.as<float>();
  for (std::int64_t e = 0; e < E; ++e)
    for (std::int64_t m = segment_begin(offsets_E1, e); m < segment_end(offsets_E1, e, M); ++m)
      for (std::int64_t n = 0; n < N; ++n)
        model_store(d_MN, m * N + n,
                    model_fp8(
                        a.codes_MK.dtype, a.codes_MK.fp8() + m * K, b.codes_ENK.dtype,
                        b.codes_ENK.fp8() + (e * N + n) * K, K, a.scaling,
                        [&](std::int64_t g) { return block ? sa[g * M + m] : sa[m]; },
                        [&](std::int64_t g) {
                          return block ? sb[(e * ((N + 127) / 128) + n / 128) * G + g]
                                       : sb[e * N + n];
                        }),
                    false);
}

inline void model_fp8_weight_gradient(const Fp8Columns& dy, const Fp8Columns& x,
                                      const Segments& segments, bool accumulate,
                                      const TensorView& d_ENK) {
  const std::int64_t E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2), R = dy.codes_NR.dim(1);
  const bool block = dy.scaling == Scaling::kBlock;
  const float* sa = dy.scales.as<float>();
  const float* sb = x.scales.as<float>();
  if (!accumulate) std::memset(d_ENK.data, 0, d_ENK.bytes());
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t first = segments.padded_offsets_E1.as<std::int32_t>()[e];
    const std::int64_t rows =
        segment_end(segments.offsets_E1, e, 0) - segment_begin(segments.offsets_E1, e);
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k)
        model_store(d_ENK, (e * N + n) * K + k,
                    model_fp8(
                        dy.codes_NR.dtype, dy.codes_NR.fp8() + n * R + first, x.codes_NR.dtype,
                        x.codes_NR.fp8() + k * R + first, rows, dy.scaling,
                        [&](std::int64_t g) {
                          return block ? sa[(first / 128 + g) * N + n] : sa[e * N + n];
                        },
                        [&](std::int64_t g) {
                          return block ? sb[(first / 128 + g) * K + k] : sb[e * K + k];
                        }),
                    true);
  }
}

inline void model_bf16_gemm(const TensorView& a_MK, const TensorView& b, BLayout layout,
                            const TensorView& offsets_E1, const TensorView& d_MN) {
  const std::int64_t M = a_MK.dim(0), K = a_MK.dim(1), E = b.dim(0), N = d_MN.dim(1);
  const auto* pa = a_MK.as<numerics::Bf16>();
  const auto* pb = b.as<numerics::Bf16>();
  for (std::int64_t e = 0; e < E; ++e)
    for (std::int64_t m = segment_begin(offsets_E1, e); m < segment_end(offsets_E1, e, M); ++m)
      for (std::int64_t n = 0; n < N; ++n)
        model_store(
            d_MN, m * N + n,
            model_chain(
                numerics::kBf16Step,
                [&](std::int64_t k) { return numerics::bf16_term(pa[m * K + k]); },
                [&](std::int64_t k) {
                  return numerics::bf16_term(
                      pb[layout == BLayout::kNK ? (e * N + n) * K + k : (e * K + k) * N + n]);
                },
                0, K, 0.0f),
            false);
}

inline void model_bf16_weight_gradient(const TensorView& dy_MN, const TensorView& x_MK,
                                       const TensorView& offsets_E1, bool accumulate,
                                       const TensorView& d_ENK) {
  const std::int64_t M = dy_MN.dim(0), E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2);
  const auto* dy = dy_MN.as<numerics::Bf16>();
  const auto* x = x_MK.as<numerics::Bf16>();
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t first = segment_begin(offsets_E1, e);
    const std::int64_t rows = segment_end(offsets_E1, e, M) - first;
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k)
        model_store(
            d_ENK, (e * N + n) * K + k,
            model_chain(
                numerics::kBf16Step,
                [&](std::int64_t m) { return numerics::bf16_term(dy[(first + m) * N + n]); },
                [&](std::int64_t m) { return numerics::bf16_term(x[(first + m) * K + k]); }, 0,
                rows, 0.0f),
            accumulate);
  }
}

struct Mix {
  double zeros = 0.1;
  int low = -9, high = 8;  // exponents of the values
};

// Random signs, significands and wide exponents; some zeros and subnormals.
inline Tensor wide(Rng& rng, DType dtype, const Shape& shape, const Mix& mix = {}) {
  Tensor out = empty(dtype, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const double magnitude =
        std::ldexp(uniform(rng, 1.0, 2.0), static_cast<int>(uniform_int(rng, mix.low, mix.high)));
    const bool zero = uniform(rng) < mix.zeros;
    set_value(out.view(), i, (zero ? 0.0 : magnitude) * (rng() % 2 == 0 ? 1.0 : -1.0));
  }
  return out;
}

}  // namespace lockstep::ops::test
