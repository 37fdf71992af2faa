// Bytes a second of the ops that move rows (norms, router, permutation, embedding) at the sizes of
// Qwen3-30B-A3B and DeepSeek-V3, beside a copy on the device. Bytes: each operand once. A decode
// step (64 tokens) is given in microseconds.
#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "gpu_bench.h"
#include "ops/embedding.h"
#include "ops/norm.h"
#include "ops/permute.h"
#include "ops/router.h"
#include "tensor/device.h"

namespace {

using namespace lockstep;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Shape;
using tensor::Tensor;
using tensor::TensorView;

struct Sizes {
  const char* name;
  std::int64_t D, H, J, K, E, V;
  ops::RouterOptions router;
};

struct Bench {
  Context ctx;
  const char* filter = "";
  double ceiling = 0;  // bytes a second of a copy

  Tensor device(DType dtype, const Shape& shape) { return {Device::kCuda, dtype, shape}; }

  // Normal values, the same 2^20 over and over.
  Tensor random(DType dtype, const Shape& shape) {
    static const std::vector<float> values = [] {
      std::mt19937_64 rng(1);
      std::normal_distribution<float> normal;
      std::vector<float> v(1 << 20);
      for (float& x : v) x = normal(rng);
      return v;
    }();
    const Tensor out = device(dtype, shape);
    const std::size_t size = tensor::dtype_size(dtype), total = out.view().bytes();
    std::size_t filled = std::min(total, values.size() * size);
    std::vector<std::byte> host(filled);
    for (std::size_t i = 0; i < filled / size; ++i)
      if (dtype == DType::kBf16)
        reinterpret_cast<numerics::Bf16*>(host.data())[i] = numerics::to_bf16(values[i]);
      else
        reinterpret_cast<float*>(host.data())[i] = values[i];
    auto* to = static_cast<std::byte*>(out.view().data);
    tensor::copy_bytes(ctx, host.data(), Device::kCpu, to, Device::kCuda, filled);
    for (; filled < total; filled += std::min(filled, total - filled))
      tensor::copy_bytes(ctx, to, Device::kCuda, to + filled, Device::kCuda,
                         std::min(filled, total - filled));
    return out;
  }
  Tensor integers(const Shape& shape, const std::function<std::int64_t(std::int64_t)>& f) {
    std::vector<std::int32_t> host(static_cast<std::size_t>(shape.count()));
    for (std::size_t i = 0; i < host.size(); ++i)
      host[i] = static_cast<std::int32_t>(f(static_cast<std::int64_t>(i)));
    const Tensor out = device(DType::kInt32, shape);
    tensor::copy_bytes(ctx, host.data(), Device::kCpu, out.view().data, Device::kCuda,
                       host.size() * 4);
    return out;
  }

  void report(const Sizes& m, std::int64_t T, const char* op, double bytes,
              const std::function<void(int)>& run) {
    if (std::strstr(op, filter) == nullptr) return;
    const bench::Timing t = bench::time_kernel(ctx, run, 15, T > 1000 ? 3 : 10);
    std::printf("%-9s T %6ld  %-26s %8.2f us (%7.2f - %7.2f)", m.name, static_cast<long>(T), op,
                t.median * 1e6, t.p10 * 1e6, t.p90 * 1e6);
    if (T > 1000)
      std::printf("  %6.3f TB/s  %3.0f %% of a copy", bytes / t.median * 1e-12,
                  100 * bytes / t.median / ceiling);
    std::printf("\n");
  }

  void copy() {
    const std::int64_t n = std::int64_t{1} << 29;
    const Tensor a = device(DType::kBf16, {n}), b = device(DType::kBf16, {n});
    const bench::Timing t = bench::time_kernel(
        ctx, [&](int) { tensor::copy(ctx, a, b); }, 15, 2);
    ceiling = 4.0 * static_cast<double>(n) / t.median;
    std::printf("copy on the device: %.3f TB/s (read and written)\n", ceiling * 1e-12);
  }

  void norms(const Sizes& m, std::int64_t T) {
    constexpr int kSets = 3;
    const Shape TD{T, m.D};
    const double rows = 2.0 * static_cast<double>(T * m.D);
    std::vector<Tensor> a, b, c, d;
    for (int i = 0; i < kSets; ++i) {
      a.push_back(random(DType::kBf16, TD));
      b.push_back(random(DType::kBf16, TD));
      c.push_back(random(DType::kBf16, TD));
      d.push_back(device(DType::kBf16, TD));
    }
    const Tensor w = random(DType::kBf16, {m.D}), rstd = random(DType::kFp32, {T}),
                 dw = random(DType::kFp32, {m.D});
    report(m, T, "rms_norm", 4 * rows, [&](int i) {
      i %= kSets;
      ops::rms_norm(ctx, a[i], b[i], w, 1e-6f, c[i], d[i], rstd);
    });
    report(m, T, "rms_norm_backward", 4 * rows, [&](int i) {
      i %= kSets;
      ops::rms_norm_backward(ctx, a[i], b[i], c[i], w, rstd, d[i], dw);
    });
  }

  void heads(const Sizes& m, std::int64_t T) {
    constexpr int kSets = 3;
    const std::int64_t N = (m.H + 2 * m.J) * m.K;
    const double rows = 2.0 * static_cast<double>(T * m.H * m.K);
    const Tensor cos = random(DType::kFp32, {40960, m.K / 2}),
                 sin = random(DType::kFp32, {40960, m.K / 2}), w = random(DType::kBf16, {m.K}),
                 rstd = random(DType::kFp32, {T, m.H}), dw = random(DType::kFp32, {m.K});
    const Tensor positions = integers({T}, [](std::int64_t t) { return t * 7 % 40960; });
    std::vector<Tensor> x, dx, out;
    for (int i = 0; i < kSets; ++i) {
      x.push_back(random(DType::kBf16, {T, N}));
      dx.push_back(device(DType::kBf16, {T, N}));
      out.push_back(random(DType::kBf16, {T, m.H, m.K}));
    }
    report(m, T, "head_norm_rope", 2 * rows, [&](int i) {
      i %= kSets;
      ops::head_norm_rope(ctx, {x[i], 0}, w, 1e-6f, positions, cos, sin, rstd, out[i]);
    });
    report(m, T, "head_norm_rope_backward", 3 * rows, [&](int i) {
      i %= kSets;
      ops::head_norm_rope_backward(ctx, out[i], {x[i], 0}, w, positions, cos, sin, rstd, {dx[i], 0},
                                   dw);
    });
    report(m, T, "rope backward alone", 2 * rows, [&](int i) {
      i %= kSets;
      ops::head_norm_rope_backward(ctx, out[i], {x[i], 0}, {}, positions, cos, sin, {}, {dx[i], 0},
                                   {});
    });
  }

  void routing(const Sizes& m, std::int64_t T) {
    const std::int64_t C = m.router.top_k, M = T * C;
    const double row = 2.0 * static_cast<double>(m.D), t = static_cast<double>(T),
                 c = static_cast<double>(C), logits = 4.0 * t * static_cast<double>(m.E);
    const Tensor z = random(DType::kFp32, {T, m.E}), bias = random(DType::kFp32, {m.E}),
                 weights = random(DType::kFp32, {T, C}), d_weights = random(DType::kFp32, {T, C}),
                 dz = device(DType::kFp32, {T, m.E}), sum = device(DType::kFp64, {m.E});
    const Tensor experts = device(DType::kInt32, {T, C}), row_TC = device(DType::kInt32, {T, C}),
                 token = device(DType::kInt32, {M}), offsets = device(DType::kInt32, {m.E + 1}),
                 padded = device(DType::kInt32, {m.E + 1});
    const bool biased = m.router.score == ops::RouterScore::kSigmoid;
    report(m, T, "router", logits + 8 * t * c,
           [&](int) { ops::router(ctx, z, biased ? bias : Tensor(), m.router, weights, experts); });
    report(m, T, "plan_permutation", 16 * t * c, [&](int) {
      ops::plan_permutation(ctx, experts, {offsets, padded}, row_TC, token);
    });
    // Whatever the filter: what follows reads them.
    ops::router(ctx, z, biased ? bias : Tensor(), m.router, weights, experts);
    ops::plan_permutation(ctx, experts, {offsets, padded}, row_TC, token);
    report(m, T, "router_backward", 2 * logits,
           [&](int) { ops::router_backward(ctx, z, experts, d_weights, bias, m.router, dz); });
    report(m, T, "router_mean_scores", logits,
           [&](int) { ops::router_mean_scores(ctx, z, m.router, sum); });
    const ops::BalanceFactors factors{1e-3, 1.0, T, C};
    const Tensor d_score = device(DType::kFp32, {m.E}), value = device(DType::kFp64, {1});
    report(m, T, "balance_gradient", 0,
           [&](int) { ops::balance_gradient(ctx, offsets, sum, factors, d_score, value); });

    const Tensor h = random(DType::kBf16, {T, m.D}), y = device(DType::kBf16, {T, m.D}),
                 o = random(DType::kBf16, {M, m.D}), d_o = device(DType::kBf16, {M, m.D});
    report(m, T, "permute", t * row * (1 + c), [&](int) { ops::permute(ctx, h, token, d_o); });
    report(m, T, "combine", t * row * (1 + c),
           [&](int) { ops::combine(ctx, o, weights, row_TC, {}, y); });
    report(m, T, "combine_backward", t * row * (1 + 2 * c),
           [&](int) { ops::combine_backward(ctx, h, o, weights, row_TC, d_o, d_weights); });
    report(m, T, "permute_backward", t * row * (2 + c),
           [&](int) { ops::permute_backward(ctx, o, row_TC, h, {}, y); });
  }

  void embeddings(const Sizes& m, std::int64_t T) {
    std::mt19937_64 rng(2);
    // Ids as in text: the share of the id at rank r falls with 1 / r.
    const double top = std::log(static_cast<double>(m.V));
    const Tensor tokens = integers({T}, [&](std::int64_t) {
      const double u = static_cast<double>(rng() >> 11) * 0x1p-53;
      return std::min<std::int64_t>(m.V - 1, static_cast<std::int64_t>(std::exp(u * top)) - 1);
    });
    std::vector<std::int32_t> host(static_cast<std::size_t>(T));
    tensor::download(ctx, tokens, host.data());
    std::sort(host.begin(), host.end());
    const auto distinct = std::unique(host.begin(), host.end()) - host.begin();
    const double row = 2.0 * static_cast<double>(m.D), t = static_cast<double>(T);
    const Tensor w = device(DType::kBf16, {m.V, m.D}), dw = device(DType::kFp32, {m.V, m.D}),
                 x = random(DType::kBf16, {T, m.D});
    report(m, T, "embedding", 2 * t * row, [&](int) { ops::embedding(ctx, tokens, w, x); });
    report(m, T, "embedding_backward", t * row + 4 * static_cast<double>(distinct) * row,
           [&](int) { ops::embedding_backward(ctx, tokens, x, dw); });
  }
};

}  // namespace

int main(int count, char** arguments) {
  if (const std::string problem = tensor::cuda_problem(); !problem.empty()) {
    std::printf("%s\n", problem.c_str());
    return 0;
  }
  tensor::Arena arena(Device::kCuda);
  Bench bench;
  bench.ctx = tensor::cuda_context(arena);
  if (count > 1) bench.filter = arguments[1];  // how the names of the ops begin, or a part of them
  const std::int64_t tokens = count > 2 ? std::stoll(arguments[2]) : 8192;
  std::printf("%s\n", tensor::device_text(bench.ctx).c_str());
  bench.copy();
  const Sizes models[] = {
      {"Qwen3-30B",
       2048,
       32,
       4,
       128,
       128,
       151936,
       {ops::RouterScore::kSoftmax, 8, 1, 1, true, 1.0f}},
      {"DeepSeek3",
       7168,
       128,
       0,
       64,
       256,
       129280,
       {ops::RouterScore::kSigmoid, 8, 8, 4, true, 2.5f}},
  };
  for (const Sizes& m : models)
    for (const std::int64_t T : {tokens, std::int64_t{64}}) {
      const std::string f = bench.filter;
      const bool norm = f.starts_with("rms"), head = f.starts_with("head") || f.starts_with("rope"),
                 embedding = f.starts_with("embed");
      if (f.empty() || norm) bench.norms(m, T);
      if (f.empty() || head) bench.heads(m, T);
      if (!norm && !head && !embedding) bench.routing(m, T);
      if (f.empty() || embedding) bench.embeddings(m, T);
    }
  return 0;
}
