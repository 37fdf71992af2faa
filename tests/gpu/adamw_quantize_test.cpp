// ops/adamw_quantize.h on the GPU against the CPU, by bytes.
#include "ops/adamw_quantize.h"

#include "gpu/quant_case.h"

namespace lockstep::ops::test {
namespace {

using AdamwQuantizeGpu = QuantGpuTest;

struct Case {
  std::int64_t E, N, K;
};

// Master, moments and gradient of a weight: values over many powers of two, whole experts and rows
// of zeros, and where asked a few that are not finite.
struct Inputs {
  Tensor grad, master, m, v;
  Inputs(Rng& rng, const Shape& shape, DType m_type, DType v_type, bool nonfinite)
      : grad(random_normal(rng, DType::kFp32, shape, 0.01)),
        master(random_normal(rng, DType::kFp32, shape)),
        m(random_normal(rng, m_type, shape, 0.01)),
        v(empty(v_type, shape)) {
    const std::int64_t n = shape.count(), K = shape[2];
    for (std::int64_t i = 0; i < n; ++i) {
      set_value(v, i, 1e-4 * uniform(rng) * (i % 3 == 0 ? 1e-36 : 1));
      if (i % 5 == 0)
        set_value(master, i, std::ldexp(get_value(master, i), -static_cast<int>(i % 30)));
      const std::int64_t row = i / K;
      if (row % 11 == 1 || row / 128 % 4 == 1) {  // blocks of zeros, as padding has them
        for (const TensorView& x : {grad.view(), master.view(), m.view(), v.view()})
          set_value(x, i, 0.0);
      }
      if (nonfinite && rng() % 50000 == 7)
        set_value(grad, i, i % 2 == 0 ? std::nan("") : std::numeric_limits<double>::infinity());
    }
  }
};

Shape scales_shape(const Case& c) { return {c.E, (c.N + 127) / 128, (c.K + 127) / 128}; }
Shape scales_t_shape(const Case& c) { return {c.E, (c.K + 127) / 128, (c.N + 127) / 128}; }

TEST_F(AdamwQuantizeGpu, HasTheBytesOfTheCpu) {
  Rng rng(1);
  const std::vector<Case> cases{{0, 128, 16},  {1, 1, 1},     {3, 1, 1},     {1, 127, 33},
                                {2, 130, 200}, {1, 16, 8},    {2, 144, 136}, {5, 128, 128},
                                {2, 256, 129}, {1, 384, 640}, {3, 100, 384}, {1, 2176, 2048}};
  int mode = 0;
  for (const Case& c : cases)
    for (const DType m_type : {DType::kFp32, DType::kBf16})
      for (const DType v_type : {DType::kFp32, DType::kBf16}) {
        const bool large = c.N > 1000;  // several blocks a CTA
        if (large && m_type != v_type) continue;
        ++mode;
        if (left_out(5)) continue;
        const bool pow2 = mode % 2 != 0, both = mode % 3 != 0, counted = mode % 5 != 0,
                   nonfinite = mode % 7 == 3;
        const Shape shape{c.E, c.N, c.K}, turned{c.E, c.K, c.N};
        const std::string what = fmt::format(
            "E {} N {} K {} m {} v {} pow2 {} both {} counted {}", c.E, c.N, c.K,
            tensor::dtype_name(m_type), tensor::dtype_name(v_type), pow2, both, counted, nonfinite);
        const Inputs in(rng, shape, m_type, v_type, nonfinite);
        const TensorView gpu_grad = on_gpu(in.grad), gpu_master = on_gpu(in.master),
                         gpu_m = on_gpu(in.m), gpu_v = on_gpu(in.v),
                         gpu_w = gpu_output(DType::kBf16, shape);
        const Tensor w = cpu_output(DType::kBf16, shape), codes = cpu_output(DType::kE4m3, shape),
                     codes_t = cpu_output(DType::kE4m3, turned),
                     scales = cpu_output(DType::kFp32, scales_shape(c)),
                     scales_t = cpu_output(DType::kFp32, scales_t_shape(c));
        const Fp8Weight out{codes, scales, Scaling::kBlock},
            gpu_out{gpu_output(DType::kE4m3, shape), gpu_output(DType::kFp32, scales_shape(c)),
                    Scaling::kBlock};
        const Fp8Weight out_t{codes_t, scales_t, Scaling::kBlock},
            gpu_out_t{gpu_output(DType::kE4m3, turned), gpu_output(DType::kFp32, scales_t_shape(c)),
                      Scaling::kBlock};
        StatsPair s = stats(mode % 2 == 0);
        AdamwOptions o;
        o.lr = 3e-3;
        o.clip = 0.7f;
        for (o.step = 1; o.step <= 2; ++o.step) {
          adamw_quantize(cpu, in.grad, o, in.master, in.m, in.v, w, pow2, out,
                         both ? out_t : Fp8Weight{}, counted ? &s.cpu : nullptr);
          adamw_quantize(gpu, gpu_grad, o, gpu_master, gpu_m, gpu_v, gpu_w, pow2, gpu_out,
                         both ? gpu_out_t : Fp8Weight{}, counted ? s.on_gpu() : nullptr);
        }
        if (!nonfinite) {  // the sign and payload of an FP32 NaN are the machine's
          expect_same(in.master, gpu_master, what + " master");
          expect_same(in.m, gpu_m, what + " m");
          expect_same(in.v, gpu_v, what + " v");
        }
        expect_same(w, gpu_w, what + " w");
        expect_same(codes, gpu_out.codes_ENK, what + " codes");
        expect_same(scales, gpu_out.scales, what + " scales");
        expect_same(codes_t, gpu_out_t.codes_ENK, what + " transposed codes");
        expect_same(scales_t, gpu_out_t.scales, what + " transposed scales");
        expect_same(s, what);
      }
}

// What the GPU's separate ops write, at a size that fills it.
TEST_F(AdamwQuantizeGpu, HasTheBytesOfTheSeparateOps) {
  const Case c{5, 1536, 2048};
  const Shape shape{c.E, c.N, c.K}, turned{c.E, c.K, c.N};
  Rng rng(2);
  const Tensor grad = random_normal(rng, DType::kFp32, shape, 0.01),
               master = random_normal(rng, DType::kFp32, shape), zero = empty(DType::kFp32, shape);
  const TensorView gpu_grad = on_gpu(grad);
  struct Side {
    TensorView master, m, v, w;
    Fp8Weight out, out_t;
    StatsPair s;
  };
  const auto side = [&] {
    return Side{on_gpu(master),
                on_gpu(zero),
                on_gpu(zero),
                gpu_output(DType::kBf16, shape),
                {gpu_output(DType::kE4m3, shape), gpu_output(DType::kFp32, scales_shape(c)),
                 Scaling::kBlock},
                {gpu_output(DType::kE4m3, turned), gpu_output(DType::kFp32, scales_t_shape(c)),
                 Scaling::kBlock},
                stats(true)};
  };
  const Side a = side(), b = side();
  adamw_quantize(gpu, gpu_grad, {}, a.master, a.m, a.v, a.w, false, a.out, a.out_t, a.s.on_gpu());
  adamw(gpu, gpu_grad, {}, b.master, b.m, b.v, b.w);
  quantize_weight(gpu, b.w, WeightScales::kBlock128, false, {}, b.out, b.out_t, b.s.on_gpu());
  const auto same = [&](const TensorView& x, const TensorView& y, const char* what) {
    expect_same(from_gpu(y), x, what);
  };
  same(a.master, b.master, "master");
  same(a.m, b.m, "m");
  same(a.v, b.v, "v");
  same(a.w, b.w, "w");
  same(a.out.codes_ENK, b.out.codes_ENK, "codes");
  same(a.out.scales, b.out.scales, "scales");
  same(a.out_t.codes_ENK, b.out_t.codes_ENK, "transposed codes");
  same(a.out_t.scales, b.out_t.scales, "transposed scales");
  QuantStats got;
  tensor::copy_bytes(gpu, b.s.gpu.data, Device::kCuda, &got, Device::kCpu, sizeof got);
  StatsPair want = a.s;
  want.cpu = got;
  expect_same(want, "separate ops");
}

}  // namespace
}  // namespace lockstep::ops::test
