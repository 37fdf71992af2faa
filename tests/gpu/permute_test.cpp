// The sort by expert, the moves of rows and their gradients: the GPU's bytes against the CPU's.
#include "ops/permute.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

class PermuteGpu : public GpuTest {
 protected:
  struct Plan {
    Tensor offsets, padded, row, token;
    TensorView goffsets, gpadded, grow, gtoken;
    Segments segments() const { return {offsets, padded}; }
    Segments gsegments() const { return {goffsets, gpadded}; }
  };
  Plan plan(const TensorView& experts_TC, const TensorView& gexperts_TC, std::int64_t E,
            const std::string& what) {
    const Shape TC = experts_TC.shape;
    Plan p{cpu_output(DType::kInt32, {E + 1}), cpu_output(DType::kInt32, {E + 1}),
           cpu_output(DType::kInt32, TC),      cpu_output(DType::kInt32, {TC.count()}),
           gpu_output(DType::kInt32, {E + 1}), gpu_output(DType::kInt32, {E + 1}),
           gpu_output(DType::kInt32, TC),      gpu_output(DType::kInt32, {TC.count()})};
    plan_permutation(cpu, experts_TC, p.segments(), p.row, p.token);
    plan_permutation(gpu, gexperts_TC, p.gsegments(), p.grow, p.gtoken);
    expect_same(p.offsets, p.goffsets, what + " offsets");
    expect_same(p.padded, p.gpadded, what + " padded offsets");
    expect_same(p.row, p.grow, what + " row");
    expect_same(p.token, p.gtoken, what + " token");
    return p;
  }
};

enum class Spread { kEven, kOneExpert, kSkewed };

Tensor make_experts(Rng& rng, std::int64_t T, std::int64_t C, std::int64_t E, Spread spread) {
  Tensor experts = empty(DType::kInt32, {T, C});
  for (std::int64_t i = 0; i < T * C; ++i) {
    std::int64_t e = uniform_int(rng, 0, E - 1);
    if (spread == Spread::kOneExpert) e = E / 2;
    if (spread == Spread::kSkewed) e = std::min(e, uniform_int(rng, 0, E - 1));
    experts.as<std::int32_t>()[i] = static_cast<std::int32_t>(e);
  }
  return experts;
}

TEST_F(PermuteGpu, Plan) {
  Rng rng(1);
  for (const std::int64_t E : {1, 5, 8, 128, 256, 1000})
    for (const auto& [T, C] : std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 8},
                                                                                 {1, 1},
                                                                                 {1, 8},
                                                                                 {127, 3},
                                                                                 {128, 8},
                                                                                 {129, 8},
                                                                                 {512, 8},
                                                                                 {4096, 1},
                                                                                 {4097, 1},
                                                                                 {5003, 7},
                                                                                 {40009, 8}})
      for (const Spread spread : {Spread::kEven, Spread::kOneExpert, Spread::kSkewed}) {
        const Tensor experts = make_experts(rng, T, C, E, spread);
        plan(experts, on_gpu(experts), E,
             fmt::format("T {} C {} E {} spread {}", T, C, E, static_cast<int>(spread)));
      }
}

TEST_F(PermuteGpu, AMillionSlots) {
  Rng rng(2);
  const Tensor experts = make_experts(rng, 131072, 8, 256, Spread::kSkewed);
  plan(experts, on_gpu(experts), 256, "a million");
}

TEST_F(PermuteGpu, ExpertsOutOfRangeAreClamped) {
  const Tensor wild = int32_tensor({-1, 7, 1 << 30, 2, 8, -(1 << 30)}),
               tame = int32_tensor({0, 7, 7, 2, 7, 0});
  plan(tame.view().reshape({3, 2}), on_gpu(wild).reshape({3, 2}), 8, "clamped");
}

struct MoveCase {
  std::int64_t T, C, E, D;
};

TEST_F(PermuteGpu, Moves) {
  Rng rng(3);
  std::vector<MoveCase> cases = {{0, 2, 4, 8}, {1, 1, 1, 1}, {9, 0, 2, 16}, {2, 4, 4, 0}};
  for (const std::int64_t D : {1, 16, 31, 48, 128, 257, 768, 2048, 7168, 8200}) {
    cases.push_back({129, 8, 128, D});
    cases.push_back({17, 3, 5, D});
    cases.push_back({5, 11, 16, D});
  }
  for (const std::int64_t T : {1, 2, 127, 128, 1009}) cases.push_back({T, 8, 256, 128});
  for (const MoveCase& c : cases) {
    const std::string what = fmt::format("T {} C {} E {} D {}", c.T, c.C, c.E, c.D);
    const std::int64_t M = c.T * c.C;
    const Shape TD{c.T, c.D}, MD{M, c.D}, TC{c.T, c.C};
    const Tensor experts = make_experts(rng, c.T, c.C, c.E, Spread::kSkewed);
    const Plan p = plan(experts, on_gpu(experts), c.E, what);
    const Tensor h = random_normal(rng, DType::kBf16, TD), o = random_normal(rng, DType::kBf16, MD),
                 weights = random_normal(rng, DType::kFp32, TC),
                 shared = random_normal(rng, DType::kBf16, TD);
    const TensorView gh = on_gpu(h), go = on_gpu(o), gweights = on_gpu(weights),
                     gshared = on_gpu(shared);

    const Tensor out = cpu_output(DType::kBf16, MD);
    const TensorView gout = gpu_output(DType::kBf16, MD);
    permute(cpu, h, p.token, out);
    permute(gpu, gh, p.gtoken, gout);
    expect_same(out, gout, what + " permute");

    for (const bool with : {false, true}) {
      const Tensor y = cpu_output(DType::kBf16, TD);
      const TensorView gy = gpu_output(DType::kBf16, TD);
      combine(cpu, o, weights, p.row, with ? shared : Tensor(), y);
      combine(gpu, go, gweights, p.grow, with ? gshared : TensorView{}, gy);
      expect_same(y, gy, what + (with ? " combine, shared" : " combine"));
      for (const bool last : {false, true}) {
        const Tensor d_h = cpu_output(DType::kBf16, TD);
        const TensorView gd_h = gpu_output(DType::kBf16, TD);
        permute_backward(cpu, o, p.row, with ? shared : Tensor(), last ? h : Tensor(), d_h);
        permute_backward(gpu, go, p.grow, with ? gshared : TensorView{}, last ? gh : TensorView{},
                         gd_h);
        expect_same(d_h, gd_h, what + fmt::format(" permute_backward {} {}", with, last));
      }
    }

    const Tensor d_o = cpu_output(DType::kBf16, MD), d_weights = cpu_output(DType::kFp32, TC);
    const TensorView gd_o = gpu_output(DType::kBf16, MD), gd_weights = gpu_output(DType::kFp32, TC);
    combine_backward(cpu, h, o, weights, p.row, d_o, d_weights);
    combine_backward(gpu, gh, go, gweights, p.grow, gd_o, gd_weights);
    expect_same(d_o, gd_o, what + " d_o");
    expect_same(d_weights, gd_weights, what + " d_weights");
  }
}

TEST_F(PermuteGpu, ScatterRows) {
  Rng rng(4);
  for (const std::int64_t D : {0, 1, 48, 257, 2048, 7168})
    for (const std::int64_t R : {0, 1, 127, 401}) {
      std::vector<std::int32_t> row;
      for (std::int64_t r = 0; r < R; ++r) row.push_back(static_cast<std::int32_t>((r * 7) % 997));
      const Tensor index = int32_tensor(row), from = random_normal(rng, DType::kBf16, {R, D});
      const Tensor to = cpu_output(DType::kBf16, {997, D});
      const TensorView gto = gpu_output(DType::kBf16, {997, D});
      scatter_rows(cpu, from, index, to);
      scatter_rows(gpu, on_gpu(from), on_gpu(index), gto);
      expect_same(to, gto, fmt::format("R {} D {}", R, D));
    }
}

}  // namespace
}  // namespace lockstep::ops::test
