// RMSNorm, head norm and rotary embedding: bytes against scalar loops in the contract's order,
// computed bounds against the double reference, the reference's backward against differences.
#include "ops/norm.h"

#include <gtest/gtest.h>

#include <functional>

#include "elementwise_util.h"
#include "ops/reference/norm.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;
using numerics::to_float;

constexpr double kUlp = 0x1p-24;  // half a step of FP32, relative
constexpr float kEps = 1e-6f;

// Section 3, written lane by lane.
float scalar_lane_sum(std::int64_t n, const std::function<float(std::int64_t, float)>& step) {
  std::vector<float> lane(32, 0.0f);
  for (std::int64_t i = 0; i < n; ++i) lane[index(i / 8 % 32)] = step(i, lane[index(i / 8 % 32)]);
  for (std::size_t d = 16; d >= 1; d /= 2)
    for (std::size_t l = 0; l < d; ++l) lane[l] = lane[l] + lane[l + d];
  return lane[0];
}

TEST(RmsNorm, FollowsTheContract) {
  Rng rng(1);
  for (const std::int64_t D : {1, 7, 8, 127, 129, 255, 256, 257, 576, 1031})
    for (const std::int64_t T : {0, 1, 5}) {
      SCOPED_TRACE(fmt::format("T {} D {}", T, D));
      const Tensor x = random_normal(rng, DType::kBf16, {T, D});
      const Tensor delta = random_normal(rng, DType::kBf16, {T, D});
      const Tensor w = random_normal(rng, DType::kBf16, {D});
      on_all_contexts([&](const Context& ctx) {
        const Poisoned x_out(DType::kBf16, {T, D}), h(DType::kBf16, {T, D}),
            rstd(DType::kFp32, {T});
        rms_norm(ctx, x, delta, w, kEps, x_out, h, rstd);
        EXPECT_TRUE(x_out.guards_intact() && h.guards_intact() && rstd.guards_intact());
        for (std::int64_t t = 0; t < T; ++t) {
          const Bf16* out = x_out.view().as<Bf16>() + t * D;
          for (std::int64_t d = 0; d < D; ++d)
            EXPECT_EQ(out[d], numerics::to_bf16(to_float(x.as<Bf16>()[t * D + d]) +
                                                to_float(delta.as<Bf16>()[t * D + d])));
          const float sum = scalar_lane_sum(D, [&](std::int64_t i, float acc) {
            return std::fma(to_float(out[i]), to_float(out[i]), acc);
          });
          const float r = 1.0f / std::sqrt(sum / static_cast<float>(D) + kEps);
          EXPECT_EQ(rstd.view().as<float>()[t], r);
          for (std::int64_t d = 0; d < D; ++d)
            EXPECT_EQ(h.view().as<Bf16>()[t * D + d],
                      numerics::to_bf16((to_float(out[d]) * r) * to_float(w.as<Bf16>()[d])));
        }
      });
    }
}

// BF16 hides most differences of an FP32 order, so the order is checked on half a million values.
TEST(RmsNorm, OrderOfTheProducts) {
  Rng rng(8);
  const std::int64_t T = 512, D = 1031;
  const Tensor x = random_normal(rng, DType::kBf16, {T, D});
  const Tensor dh = random_normal(rng, DType::kBf16, {T, D});
  const Tensor w = random_normal(rng, DType::kBf16, {D});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor h = empty(DType::kBf16, {T, D}), dx = empty(DType::kBf16, {T, D});
  const Tensor rstd = empty(DType::kFp32, {T}), dw = empty(DType::kFp32, {D});
  rms_norm(ctx, x, {}, w, kEps, x, h, rstd);
  rms_norm_backward(ctx, dh, h, x, w, rstd, dx, dw);
  std::int64_t forward = 0, backward = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    const Bf16* row = x.as<Bf16>() + t * D;
    const float r = rstd.as<float>()[t];
    const auto g = [&](std::int64_t d) {
      return to_float(dh.as<Bf16>()[t * D + d]) * to_float(w.as<Bf16>()[d]);
    };
    const float sum = scalar_lane_sum(
        D, [&](std::int64_t i, float acc) { return std::fma(g(i), to_float(row[i]), acc); });
    const float k = ((sum * r) * (r * r)) / static_cast<float>(D);
    for (std::int64_t d = 0; d < D; ++d) {
      const Bf16 out = numerics::to_bf16((to_float(row[d]) * r) * to_float(w.as<Bf16>()[d]));
      const float gradient = std::fma(-to_float(row[d]), k, r * g(d));
      forward += h.as<Bf16>()[t * D + d] == out ? 0 : 1;
      backward += dx.as<Bf16>()[t * D + d] == numerics::to_bf16(gradient + to_float(out)) ? 0 : 1;
    }
  }
  EXPECT_EQ(forward, 0);
  EXPECT_EQ(backward, 0);
}

// x * rstd comes first: x * w would overflow here.
TEST(RmsNorm, LargeWeightOnLargeValues) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor x = empty(DType::kBf16, {1, 4}), w = empty(DType::kBf16, {4});
  const Tensor h = empty(DType::kBf16, {1, 4}), rstd = empty(DType::kFp32, {1});
  for (std::int64_t i = 0; i < 4; ++i) set_value(x, i, 0x1p60), set_value(w, i, 0x1p80);
  rms_norm(ctx, x, {}, w, kEps, x, h, rstd);
  for (std::int64_t i = 0; i < 4; ++i) EXPECT_EQ(get_value(h, i), 0x1p80);
}

TEST(RmsNorm, AgainstTheReference) {
  Rng rng(2);
  const std::int64_t T = 9, D = 576;
  const Tensor x = random_normal(rng, DType::kBf16, {T, D}, 3.0);
  const Tensor w = random_normal(rng, DType::kBf16, {D});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Poisoned h(DType::kBf16, {T, D}), rstd(DType::kFp32, {T});
  rms_norm(ctx, x, {}, w, kEps, x, h, rstd);  // x_out may alias x
  const Values want = reference::rms_norm(values(x), values(w), kEps);
  // The mean errs by D/32 + 8 roundings, its root by half of that, then five more.
  const double relative = (D / 32.0 + 18) * kUlp;
  for (std::int64_t i = 0; i < T * D; ++i)
    EXPECT_LE(std::fabs(get_value(h, i) - want[index(i)]),
              bf16_rounding(want[index(i)]) + relative * std::fabs(want[index(i)]));
  // A row alone has the bytes that it has among others.
  const Poisoned one(DType::kBf16, {1, D}), one_rstd(DType::kFp32, {1});
  rms_norm(ctx, x.view().rows(4, 1), {}, w, kEps, x.view().rows(4, 1), one, one_rstd);
  EXPECT_TRUE(bytes_equal(one, h.view().rows(4, 1)));
}

TEST(RmsNorm, BackwardAgainstTheReferenceAndOnAllContexts) {
  Rng rng(3);
  for (const std::int64_t T : {0, 1, 127, 129, 300})
    for (const std::int64_t D : {1, 65, 264}) {
      SCOPED_TRACE(fmt::format("T {} D {}", T, D));
      const Tensor x = random_normal(rng, DType::kBf16, {T, D});
      const Tensor dh = random_normal(rng, DType::kBf16, {T, D});
      const Tensor residual = random_normal(rng, DType::kBf16, {T, D});
      const Tensor w = random_normal(rng, DType::kBf16, {D});
      const Tensor before = random_normal(rng, DType::kFp32, {D});
      const auto want = reference::rms_norm_backward(values(dh), values(x), values(w), kEps);
      Tensor first_dx, first_dw;
      on_all_contexts([&](const Context& ctx) {
        const Tensor x_out = empty(DType::kBf16, {T, D}), h = empty(DType::kBf16, {T, D});
        const Tensor rstd = empty(DType::kFp32, {T});
        rms_norm(ctx, x, {}, w, kEps, x_out, h, rstd);
        const Poisoned dx(DType::kBf16, {T, D}), plain(DType::kBf16, {T, D});
        const Tensor dw = empty(DType::kFp32, {D}), dw_again = empty(DType::kFp32, {D});
        std::memcpy(dw.view().data, before.view().data, dw.view().bytes());
        rms_norm_backward(ctx, dh, residual, x_out, w, rstd, dx, dw);
        rms_norm_backward(ctx, dh, {}, x_out, w, rstd, plain, dw_again);
        EXPECT_TRUE(dx.guards_intact() && plain.guards_intact() && plain.all_written());
        std::vector<double> dw_terms(index(D), 0.0);
        for (std::int64_t t = 0; t < T; ++t) {
          const double r = rstd.as<float>()[t];
          double terms = 0;  // sum of |dh w x|
          for (std::int64_t d = 0; d < D; ++d) {
            const std::int64_t i = t * D + d;
            terms += std::fabs(get_value(dh, i) * get_value(w, d) * get_value(x, i));
            dw_terms[index(d)] += std::fabs(get_value(dh, i) * get_value(x, i) * r);
          }
          for (std::int64_t d = 0; d < D; ++d) {
            const std::int64_t i = t * D + d;
            const double parts =
                std::fabs(r * get_value(dh, i) * get_value(w, d)) +
                std::fabs(get_value(x, i)) * terms * r * r * r / static_cast<double>(D) +
                std::fabs(get_value(residual, i));
            const double fp32 = (2.5 * static_cast<double>(D) / 32 + 60) * kUlp * parts;
            const double v = want.dx[index(i)], with = v + get_value(residual, i);
            EXPECT_LE(std::fabs(get_value(plain, i) - v), bf16_rounding(v) + 2 * fp32);
            EXPECT_LE(std::fabs(get_value(dx, i) - with), bf16_rounding(with) + 2 * fp32);
          }
        }
        for (std::int64_t d = 0; d < D; ++d) {
          const double start = get_value(before, d);
          EXPECT_LE(std::fabs(get_value(dw, d) - (start + want.dw[index(d)])),
                    (128 + 3 + static_cast<double>(D) / 32 + 20) * kUlp *
                        (dw_terms[index(d)] + std::fabs(start)));
          // Blocks of 128 rows in ascending order, then one addition.
          float total = 0;
          for (std::int64_t t0 = 0; t0 < T; t0 += 128) {
            float acc = 0;
            for (std::int64_t t = t0; t < std::min(T, t0 + 128); ++t)
              acc = std::fma(to_float(dh.as<Bf16>()[t * D + d]),
                             to_float(x.as<Bf16>()[t * D + d]) * rstd.as<float>()[t], acc);
            total = total + acc;
          }
          EXPECT_EQ(dw.as<float>()[d], before.as<float>()[d] + total);
        }
        if (!first_dx) {
          first_dx = empty(DType::kBf16, {T, D});
          first_dw = empty(DType::kFp32, {D});
          std::memcpy(first_dx.view().data, dx.view().data, dx.view().bytes());
          std::memcpy(first_dw.view().data, dw.view().data, dw.view().bytes());
        }
        EXPECT_TRUE(bytes_equal(dx, first_dx));
        EXPECT_TRUE(bytes_equal(dw, first_dw));
        // dx may alias the residual's gradient.
        const Tensor alias = empty(DType::kBf16, {T, D});
        std::memcpy(alias.view().data, residual.view().data, alias.view().bytes());
        rms_norm_backward(ctx, dh, alias, x_out, w, rstd, alias, dw);
        EXPECT_TRUE(bytes_equal(alias, dx));
      });
    }
}

TEST(RmsNorm, ReferenceBackwardAgainstDifferences) {
  Rng rng(4);
  const Values x = random_values(rng, 3 * 11), w = random_values(rng, 11);
  const Values c = random_values(rng, 3 * 11);
  const auto got = reference::rms_norm_backward(c, x, w, 1e-3);
  expect_near_differences(
      got.dx,
      differences([&](const Values& at) { return reference::rms_norm(at, w, 1e-3); }, c, x));
  expect_near_differences(
      got.dw,
      differences([&](const Values& at) { return reference::rms_norm(x, at, 1e-3); }, c, w));
}

TEST(Rope, TableAndFormula) {
  const Tensor c = empty(DType::kFp32, {50, 8}), s = empty(DType::kFp32, {50, 8});
  rope_table(1e4, c, s);
  for (int p = 0; p < 50; ++p)
    for (int i = 0; i < 8; ++i) {
      const double angle = p * std::pow(1e4, -2.0 * i / 16);
      EXPECT_EQ(c.as<float>()[p * 8 + i], static_cast<float>(std::cos(angle)));
      EXPECT_EQ(s.as<float>()[p * 8 + i], static_cast<float>(std::sin(angle)));
    }
  EXPECT_EQ(c.as<float>()[0], 1.0f);
  EXPECT_EQ(s.as<float>()[7], 0.0f);
}

struct HeadCase {
  std::int64_t T, H, K;
  bool norm, rotate;
};

void check_heads(Rng& rng, const HeadCase& at) {
  const auto [T, H, K, norm, rotate] = at;
  SCOPED_TRACE(fmt::format("T {} H {} K {} norm {} rotate {}", T, H, K, norm, rotate));
  const std::int64_t N = H * K + 13, column = 5, P = 400, half = K / 2;
  const Tensor slab = random_normal(rng, DType::kBf16, {T, N}, 2.0);
  const Tensor w = random_normal(rng, DType::kBf16, {K});
  const Tensor d_out = random_normal(rng, DType::kBf16, {T, H, K});
  const Tensor cos = empty(DType::kFp32, {P, half}), sin = empty(DType::kFp32, {P, half});
  rope_table(1e4, cos, sin);
  std::vector<std::int32_t> places;
  for (std::int64_t t = 0; t < T; ++t)
    places.push_back(static_cast<std::int32_t>(uniform_int(rng, 0, P - 1)));
  const Tensor positions = int32_tensor(places);
  const TensorView w_K = norm ? w.view() : TensorView{};
  const TensorView cos_PK = rotate ? cos.view() : TensorView{};
  const TensorView sin_PK = rotate ? sin.view() : TensorView{};

  reference::HeadNormRope op{H, K, norm ? values(w) : Values{}, kEps, rotate ? 1e4 : 0.0, {}};
  op.positions.assign(places.begin(), places.end());
  Values x;
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t i = 0; i < H * K; ++i) x.push_back(get_value(slab, t * N + column + i));
  const Values want = reference::head_norm_rope(op, x);
  const auto gradient = reference::head_norm_rope_backward(op, values(d_out), x);

  Tensor first;
  on_all_contexts([&](const Context& ctx) {
    const Poisoned out(DType::kBf16, {T, H, K}), rstd(DType::kFp32, {T, H});
    const TensorView rstd_TH = norm ? rstd.view() : TensorView{};
    head_norm_rope(ctx, {slab, column}, w_K, kEps, positions, cos_PK, sin_PK, rstd_TH, out);
    EXPECT_TRUE(out.guards_intact() && rstd.guards_intact() && out.all_written());
    const Poisoned d_slab(DType::kBf16, {T, N});
    const Tensor dw = empty(DType::kFp32, {K});
    head_norm_rope_backward(ctx, d_out, {slab, column}, w_K, positions, cos_PK, sin_PK, rstd_TH,
                            {d_slab, column}, norm ? dw.view() : TensorView{});
    EXPECT_TRUE(d_slab.guards_intact());
    std::vector<double> dw_terms(index(K), 0.0);
    const double roundings = (2.5 * static_cast<double>(K) / 32 + 70) * kUlp;
    for (std::int64_t row = 0; row < T * H; ++row) {
      const double r = norm ? rstd.view().as<float>()[row] : 1.0;
      const auto at = [&](const Tensor& v, std::int64_t i) { return std::fabs(get_value(v, i)); };
      const auto weight = [&](std::int64_t i) { return norm ? at(w, i) : 1.0; };
      double terms = 0;
      for (std::int64_t i = 0; i < K; ++i) {
        const std::int64_t other = half == 0 ? 0 : (i + half) % K;
        terms += (at(d_out, row * K + i) + at(d_out, row * K + other)) * weight(i) *
                 std::fabs(x[index(row * K + i)]);
      }
      for (std::int64_t i = 0; i < K; ++i) {
        const std::int64_t other = half == 0 ? 0 : (i + half) % K;
        const double xi = std::fabs(x[index(row * K + i)]);
        const double y =
            (xi * weight(i) + std::fabs(x[index(row * K + other)]) * weight(other)) * r;
        const double v = want[index(row * K + i)];
        EXPECT_LE(std::fabs(get_value(out, row * K + i) - v), bf16_rounding(v) + roundings * y);
        const double dy = at(d_out, row * K + i) + at(d_out, row * K + other);
        const double parts =
            dy * weight(i) * r + (norm ? xi * terms * r * r * r / static_cast<double>(K) : 0.0);
        const double g = gradient.dx[index(row * K + i)];
        const std::int64_t place = row / H * N + column + row % H * K + i;
        EXPECT_LE(std::fabs(get_value(d_slab, place) - g),
                  bf16_rounding(g) + 2 * roundings * parts);
        dw_terms[index(i)] += dy * xi * r;
      }
    }
    for (std::int64_t i = 0; norm && i < K; ++i)
      EXPECT_LE(
          std::fabs(get_value(dw, i) - gradient.dw[index(i)]),
          (static_cast<double>(std::min<std::int64_t>(T, 128) * H + T / 128) * kUlp + roundings) *
              dw_terms[index(i)]);
    // Columns of the slab that are not these heads keep their bytes.
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t n = 0; n < N; ++n)
        if (n < column || n >= column + H * K) {
          EXPECT_EQ(d_slab.view().as<Bf16>()[t * N + n].bits, 0xFFFF);
        }
    // One tensor of all bytes, compared over the contexts.
    const Tensor all =
        empty(DType::kE4m3, {static_cast<std::int64_t>(out.view().bytes() + d_slab.view().bytes() +
                                                       dw.view().bytes())});
    auto* to = all.view().fp8();
    std::memcpy(to, out.view().data, out.view().bytes());
    std::memcpy(to + out.view().bytes(), d_slab.view().data, d_slab.view().bytes());
    std::memcpy(to + out.view().bytes() + d_slab.view().bytes(), dw.view().data, dw.view().bytes());
    if (!first) first = all;
    EXPECT_TRUE(bytes_equal(all, first));
  });
}

TEST(HeadNormRope, AgainstTheReferenceAndOnAllContexts) {
  Rng rng(5);
  for (const bool norm : {false, true})
    for (const bool rotate : {false, true}) {
      check_heads(rng, {0, 2, 16, norm, rotate});
      check_heads(rng, {1, 1, 2, norm, rotate});
      check_heads(rng, {129, 3, 34, norm, rotate});
      check_heads(rng, {7, 2, 128, norm, rotate});
      check_heads(rng, {3, 1, 258, norm, rotate});
    }
}

// The rotation and the order of d_w, spelled out.
TEST(HeadNormRope, FollowsTheContract) {
  Rng rng(6);
  const std::int64_t T = 150, H = 2, K = 24, half = K / 2;
  const Tensor slab = random_normal(rng, DType::kBf16, {T, H * K});
  const Tensor d_out = random_normal(rng, DType::kBf16, {T, H, K});
  const Tensor w = random_normal(rng, DType::kBf16, {K});
  const Tensor cos = empty(DType::kFp32, {T, half}), sin = empty(DType::kFp32, {T, half});
  rope_table(5e5, cos, sin);
  std::vector<std::int32_t> places;
  for (std::int64_t t = 0; t < T; ++t) places.push_back(static_cast<std::int32_t>(t));
  const Tensor positions = int32_tensor(places);
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor rstd = empty(DType::kFp32, {T, H}), out = empty(DType::kBf16, {T, H, K});
  const Tensor d_slab = empty(DType::kBf16, {T, H * K}), dw = empty(DType::kFp32, {K});
  head_norm_rope(ctx, {slab, 0}, w, kEps, positions, cos, sin, rstd, out);
  head_norm_rope_backward(ctx, d_out, {slab, 0}, w, positions, cos, sin, rstd, {d_slab, 0}, dw);
  std::vector<float> total(index(K), 0.0f), acc;
  for (std::int64_t row = 0; row < T * H; ++row) {
    if (row % (128 * H) == 0) acc.assign(index(K), 0.0f);
    const Bf16* x = slab.as<Bf16>() + row * K;
    const Bf16* d = d_out.as<Bf16>() + row * K;
    const float* c = cos.as<float>() + row / H * half;
    const float* s = sin.as<float>() + row / H * half;
    const float squares = scalar_lane_sum(
        K, [&](std::int64_t i, float a) { return std::fma(to_float(x[i]), to_float(x[i]), a); });
    const float r = 1.0f / std::sqrt(squares / static_cast<float>(K) + kEps);
    EXPECT_EQ(rstd.as<float>()[row], r);
    std::vector<float> dy(index(K));
    for (std::int64_t i = 0; i < half; ++i) {
      const float y1 = (to_float(x[i]) * r) * to_float(w.as<Bf16>()[i]);
      const float y2 = (to_float(x[i + half]) * r) * to_float(w.as<Bf16>()[i + half]);
      EXPECT_EQ(out.as<Bf16>()[row * K + i], numerics::to_bf16(std::fma(y1, c[i], -(y2 * s[i]))));
      EXPECT_EQ(out.as<Bf16>()[row * K + i + half],
                numerics::to_bf16(std::fma(y2, c[i], y1 * s[i])));
      const float d1 = to_float(d[i]), d2 = to_float(d[i + half]);
      dy[index(i)] = std::fma(d1, c[i], -(d2 * -s[i]));
      dy[index(i + half)] = std::fma(d2, c[i], d1 * -s[i]);
    }
    const float t = scalar_lane_sum(K, [&](std::int64_t i, float a) {
      return std::fma(dy[index(i)] * to_float(w.as<Bf16>()[i]), to_float(x[i]), a);
    });
    const float k = ((t * r) * (r * r)) / static_cast<float>(K);
    for (std::int64_t i = 0; i < K; ++i) {
      const float g = dy[index(i)] * to_float(w.as<Bf16>()[i]);
      EXPECT_EQ(d_slab.as<Bf16>()[row * K + i],
                numerics::to_bf16(std::fma(-to_float(x[i]), k, r * g)));
      acc[index(i)] = std::fma(dy[index(i)], to_float(x[i]) * r, acc[index(i)]);
    }
    if ((row + 1) % (128 * H) == 0 || row + 1 == T * H)
      for (std::int64_t i = 0; i < K; ++i) total[index(i)] = total[index(i)] + acc[index(i)];
  }
  for (std::int64_t i = 0; i < K; ++i) EXPECT_EQ(dw.as<float>()[i], total[index(i)]);
}

TEST(HeadNormRope, ReferenceBackwardAgainstDifferences) {
  Rng rng(7);
  for (const double theta : {0.0, 100.0}) {
    reference::HeadNormRope op{2, 6, random_values(rng, 6), 1e-3, theta, {3, 0, 11}};
    const Values x = random_values(rng, 36), c = random_values(rng, 36);
    const auto got = reference::head_norm_rope_backward(op, c, x);
    expect_near_differences(
        got.dx, differences([&](const Values& at) { return head_norm_rope(op, at); }, c, x));
    const auto of_w = [&](const Values& at) {
      reference::HeadNormRope moved = op;
      moved.w = at;
      return reference::head_norm_rope(moved, x);
    };
    expect_near_differences(got.dw, differences(of_w, c, op.w));
    op.w.clear();
    expect_near_differences(
        reference::head_norm_rope_backward(op, c, x).dx,
        differences([&](const Values& at) { return head_norm_rope(op, at); }, c, x));
  }
}

TEST(HeadNormRope, WrongArgumentsAreNamed) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor slab = empty(DType::kBf16, {2, 16}), out = empty(DType::kBf16, {2, 2, 8});
  const Tensor cos = empty(DType::kFp32, {4, 4});
  const Tensor fits = int32_tensor({0, 3}), far = int32_tensor({0, 4}), low = int32_tensor({-1, 0});
  head_norm_rope(ctx, {slab, 0}, {}, kEps, fits, cos, cos, {}, out);
  EXPECT_THROW(head_norm_rope(ctx, {slab, 0}, {}, kEps, far, cos, cos, {}, out),
               base::ContractError);
  EXPECT_THROW(head_norm_rope(ctx, {slab, 0}, {}, kEps, low, cos, cos, {}, out),
               base::ContractError);
  EXPECT_THROW(head_norm_rope(ctx, {slab, 1}, {}, kEps, fits, cos, cos, {}, out),
               base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test
