// RMSNorm and the heads' norm with rotary embedding: the GPU's bytes against the CPU's.
#include "ops/norm.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

constexpr float kEps = 1e-6f;

// Normal values, every eighth of another magnitude, some zeros of either sign.
Tensor uneven(Rng& rng, DType dtype, const Shape& shape) {
  Tensor x = random_normal(rng, dtype, shape);
  for (std::int64_t i = 0; i < shape.count(); i += 8) {
    const double scale = std::ldexp(1.0, static_cast<int>(uniform_int(rng, -40, 4)));
    set_value(x, i, i % 64 == 0 ? (i % 128 == 0 ? 0.0 : -0.0) : get_value(x, i) * scale);
  }
  return x;
}

class NormGpu : public GpuTest {
 protected:
  Tensor copy_of(const TensorView& x) {
    Tensor out = cpu_output(x.dtype, x.shape);
    if (x.bytes() > 0) std::memcpy(out.view().data, x.data, x.bytes());
    return out;
  }
  std::vector<std::int64_t> row_counts(std::int64_t D) {
    if (D > 2048) return {1, 129};
    return {0, 1, 2, 127, 128, 129, 521};
  }
};

const std::vector<std::int64_t> kWidths = {1,    7,    8,    16,   48,   100,  128,  512, 768,
                                           1031, 2048, 2056, 4096, 4104, 7168, 8192, 8200};

TEST_F(NormGpu, RmsNorm) {
  Rng rng(1);
  for (const std::int64_t D : kWidths)
    for (const std::int64_t T : row_counts(D)) {
      if (left_out(5)) continue;
      const Shape TD{T, D};
      const Tensor x = uneven(rng, DType::kBf16, TD), delta = uneven(rng, DType::kBf16, TD),
                   w = random_normal(rng, DType::kBf16, {D});
      for (const char* kind : {"plain", "delta", "delta in place"}) {
        const std::string what = fmt::format("{} T {} D {}", kind, T, D);
        const bool adds = kind[0] == 'd', in_place = std::string(kind).size() > 5;
        const Tensor x_out = cpu_output(DType::kBf16, TD), h = cpu_output(DType::kBf16, TD),
                     rstd = cpu_output(DType::kFp32, {T});
        rms_norm(cpu, x, adds ? delta : Tensor(), w, kEps, x_out, h, rstd);
        const TensorView gx = on_gpu(x), gx_out = in_place ? gx : gpu_output(DType::kBf16, TD),
                         gh = gpu_output(DType::kBf16, TD), grstd = gpu_output(DType::kFp32, {T});
        rms_norm(gpu, gx, adds ? on_gpu(delta) : TensorView{}, on_gpu(w), kEps, gx_out, gh, grstd);
        expect_same(x_out, gx_out, what + " x_out");
        expect_same(rstd, grstd, what + " rstd");
        expect_same(h, gh, what + " h");
      }
    }
}

TEST_F(NormGpu, RmsNormBackward) {
  Rng rng(2);
  for (const std::int64_t D : kWidths)
    for (const std::int64_t T : row_counts(D)) {
      if (left_out(5)) continue;
      const Shape TD{T, D};
      const Tensor dh = uneven(rng, DType::kBf16, TD), residual = uneven(rng, DType::kBf16, TD),
                   x = uneven(rng, DType::kBf16, TD), w = random_normal(rng, DType::kBf16, {D}),
                   dw_before = random_normal(rng, DType::kFp32, {D});
      Tensor rstd = random_normal(rng, DType::kFp32, {T});
      for (const char* kind : {"plain", "residual", "residual in place"}) {
        const std::string what = fmt::format("{} T {} D {}", kind, T, D);
        const bool adds = kind[0] == 'r', in_place = std::string(kind).size() > 8;
        const Tensor dx = cpu_output(DType::kBf16, TD), dw = copy_of(dw_before);
        rms_norm_backward(cpu, dh, adds ? residual : Tensor(), x, w, rstd, dx, dw);
        const TensorView gresidual = adds ? on_gpu(residual) : TensorView{},
                         gdx = in_place ? gresidual : gpu_output(DType::kBf16, TD),
                         gdw = on_gpu(dw_before);
        rms_norm_backward(gpu, on_gpu(dh), gresidual, on_gpu(x), on_gpu(w), on_gpu(rstd), gdx, gdw);
        expect_same(dx, gdx, what + " dx");
        expect_same(dw, gdw, what + " dw");
      }
    }
}

// More blocks of 128 rows than are divided among thread blocks. The rows repeat.
TEST_F(NormGpu, RmsNormBackwardOfManyRows) {
  Rng rng(5);
  const std::int64_t T = 8197, period = 131;
  const auto rows = [&](DType dtype, std::int64_t width) {
    const Tensor some = uneven(rng, dtype, {period, width}), all = cpu_output(dtype, {T, width});
    for (std::int64_t t = 0; t < T; ++t)
      std::memcpy(all.view().rows(t, 1).data, some.view().rows(t % period, 1).data,
                  some.view().rows(0, 1).bytes());
    return all;
  };
  for (const std::int64_t D : {48, 2048, 4096, 7168}) {
    if (left_out(5)) continue;
    const Tensor dh = rows(DType::kBf16, D), residual = rows(DType::kBf16, D),
                 x = rows(DType::kBf16, D), of_rows = rows(DType::kFp32, 1),
                 w = random_normal(rng, DType::kBf16, {D}),
                 dw_before = random_normal(rng, DType::kFp32, {D});
    const TensorView rstd = of_rows.view().reshape({T});
    const Tensor dx = cpu_output(DType::kBf16, {T, D}), dw = copy_of(dw_before);
    rms_norm_backward(cpu, dh, residual, x, w, rstd, dx, dw);
    const TensorView gdx = gpu_output(DType::kBf16, {T, D}), gdw = on_gpu(dw_before);
    rms_norm_backward(gpu, on_gpu(dh), on_gpu(residual), on_gpu(x), on_gpu(w), on_gpu(rstd), gdx,
                      gdw);
    expect_same(dx, gdx, fmt::format("D {} dx", D));
    expect_same(dw, gdw, fmt::format("D {} dw", D));
  }
}

struct HeadCase {
  std::int64_t T, H, K;
  bool norm, rotate;
  std::int64_t before, after;  // columns of the slab on either side of the heads
};

std::vector<HeadCase> head_cases() {
  std::vector<HeadCase> cases;
  for (const std::int64_t K : {16, 32, 48, 64, 96, 128, 192, 256})
    for (const bool norm : {true, false})
      for (const bool rotate : {true, false}) {
        cases.push_back({129, 5, K, norm, rotate, 0, 0});
        cases.push_back({37, 3, K, norm, rotate, 5 * K, K});
      }
  for (const std::int64_t T : {0, 1, 2, 127, 128, 257})
    for (const std::int64_t H : {1, 4, 8}) {
      cases.push_back({T, H, 128, true, true, 128, 256});
      cases.push_back({T, H, 64, false, true, 64, 0});
    }
  // More blocks of 128 tokens than are divided among thread blocks.
  for (const std::int64_t K : {16, 32, 64, 128, 256})
    cases.push_back({4229, 2, K, true, true, K, 0});
  // Widths and columns that are not whole chunks.
  cases.push_back({130, 3, 2, true, true, 0, 0});
  cases.push_back({130, 3, 18, true, true, 3, 1});
  cases.push_back({130, 2, 7, true, false, 0, 0});
  cases.push_back({130, 2, 8, true, false, 8, 0});
  cases.push_back({130, 2, 24, true, true, 8, 8});
  cases.push_back({130, 2, 128, true, true, 4, 4});
  cases.push_back({130, 2, 320, true, true, 8, 8});
  cases.push_back({5, 2, 1024, true, true, 0, 0});
  cases.push_back({5, 2, 1024, false, true, 0, 0});
  return cases;
}

TEST_F(NormGpu, Heads) {
  Rng rng(3);
  constexpr std::int64_t P = 77;
  for (const HeadCase& c : head_cases()) {
    const std::string what = fmt::format("T {} H {} K {} norm {} rotate {} columns {}+{}", c.T, c.H,
                                         c.K, c.norm, c.rotate, c.before, c.after);
    const Shape THK{c.T, c.H, c.K}, TN{c.T, c.before + c.H * c.K + c.after}, TH{c.T, c.H};
    const Tensor x = uneven(rng, DType::kBf16, TN), d_out = uneven(rng, DType::kBf16, THK);
    const Tensor w = c.norm ? random_normal(rng, DType::kBf16, {c.K}) : Tensor();
    Tensor cos, sin, positions;
    if (c.rotate) {
      cos = cpu_output(DType::kFp32, {P, c.K / 2});
      sin = cpu_output(DType::kFp32, {P, c.K / 2});
      rope_table(10000.0, cos, sin);
      positions = cpu_output(DType::kInt32, {c.T});
      for (std::int64_t t = 0; t < c.T; ++t)
        positions.as<std::int32_t>()[t] = static_cast<std::int32_t>(uniform_int(rng, 0, P - 1));
    }
    const TensorView gx = on_gpu(x), gw = on_gpu(w), gcos = on_gpu(cos), gsin = on_gpu(sin),
                     gpositions = on_gpu(positions);

    const Tensor out = cpu_output(DType::kBf16, THK);
    const Tensor rstd = c.norm ? cpu_output(DType::kFp32, TH) : Tensor();
    head_norm_rope(cpu, {x, c.before}, w, kEps, positions, cos, sin, rstd, out);
    const TensorView gout = gpu_output(DType::kBf16, THK);
    const TensorView grstd = c.norm ? gpu_output(DType::kFp32, TH) : TensorView{};
    head_norm_rope(gpu, {gx, c.before}, gw, kEps, gpositions, gcos, gsin, grstd, gout);
    expect_same(out, gout, what);
    if (c.norm) expect_same(rstd, grstd, what + " rstd");

    const Tensor d_x = cpu_output(DType::kBf16, TN);
    const Tensor dw_before = random_normal(rng, DType::kFp32, {c.K}), dw = copy_of(dw_before);
    head_norm_rope_backward(cpu, d_out, {x, c.before}, w, positions, cos, sin, rstd,
                            {d_x, c.before}, c.norm ? dw : Tensor());
    const TensorView gd_x = gpu_output(DType::kBf16, TN), gdw = on_gpu(dw_before);
    head_norm_rope_backward(gpu, on_gpu(d_out), {gx, c.before}, gw, gpositions, gcos, gsin, grstd,
                            {gd_x, c.before}, c.norm ? gdw : TensorView{});
    expect_same(d_x, gd_x, what + " d_x");
    expect_same(dw, gdw, what + " dw");
  }
}

TEST_F(NormGpu, PositionsOutsideTheTableAreClamped) {
  Rng rng(4);
  const Shape THK{3, 2, 64};
  const Tensor x = random_normal(rng, DType::kBf16, {3, 128});
  const Tensor cos = cpu_output(DType::kFp32, {8, 32}), sin = cpu_output(DType::kFp32, {8, 32});
  rope_table(10000.0, cos, sin);
  const Tensor out = cpu_output(DType::kBf16, THK);
  head_norm_rope(cpu, {x, 0}, {}, kEps, int32_tensor({0, 7, 7}), cos, sin, {}, out);
  const TensorView gout = gpu_output(DType::kBf16, THK);
  head_norm_rope(gpu, {on_gpu(x), 0}, {}, kEps, on_gpu(int32_tensor({-3, 8, 1 << 30})), on_gpu(cos),
                 on_gpu(sin), {}, gout);
  expect_same(out, gout, "clamped");
}

}  // namespace
}  // namespace lockstep::ops::test
