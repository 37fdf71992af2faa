// Expert selection and its gradients: the GPU's bytes against the CPU's.
#include "ops/router.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

constexpr auto kSoft = RouterScore::kSoftmax, kSigm = RouterScore::kSigmoid;

struct RouterCase {
  std::int64_t T, E;
  RouterOptions options;
  bool bias;
  std::string text() const {
    return fmt::format("T {} E {} {} top {} groups {}/{} normalize {} bias {}", T, E,
                       options.score == kSoft ? "softmax" : "sigmoid", options.top_k,
                       options.top_groups, options.groups, options.normalize, bias);
  }
};

std::vector<RouterCase> router_cases() {
  std::vector<RouterCase> cases = {
      {0, 8, {kSoft, 2, 1, 1, true, 1.0f}, false},
      {1, 1, {kSoft, 1, 1, 1, true, 1.0f}, false},
      {1, 1, {kSigm, 1, 1, 1, true, 1.0f}, false},
      {5, 5, {kSoft, 5, 1, 1, true, 1.0f}, true},
      {131, 31, {kSigm, 4, 1, 1, false, 1.0f}, false},
      {64, 8, {kSoft, 2, 1, 1, false, 1.0f}, false},
      {33, 33, {kSoft, 3, 1, 1, true, 2.5f}, false},
      {20, 64, {kSoft, 6, 8, 3, false, 16.0f}, false},
      {20, 48, {kSigm, 40, 1, 1, true, 1.0f}, false},
      {13, 16, {kSigm, 3, 16, 5, true, 1.5f}, true},
      {13, 64, {kSigm, 4, 32, 4, true, 1.5f}, true},
      {13, 256, {kSigm, 5, 64, 5, true, 1.5f}, true},
      {13, 128, {kSigm, 4, 2, 1, true, 1.5f}, true},
      {13, 1024, {kSoft, 4, 16, 3, true, 1.5f}, true},
      {7, 257, {kSoft, 8, 1, 1, false, 0.7f}, true},
      {9, 1000, {kSigm, 8, 50, 7, true, 0.7f}, true},
      {9, 1024, {kSoft, 8, 1, 1, true, 1.0f}, true},
  };
  for (const std::int64_t T : {1, 127, 128, 129, 1009}) {
    cases.push_back({T, 128, {kSoft, 8, 1, 1, true, 1.0f}, false});
    cases.push_back({T, 256, {kSigm, 8, 8, 4, true, 2.5f}, true});
  }
  return cases;
}

enum class Logits { kNormal, kTies, kBroken };

Tensor make_logits(Rng& rng, const RouterCase& c, Logits kind) {
  Tensor z = random_normal(rng, DType::kFp32, {c.T, c.E}, 2.0);
  auto* p = z.as<float>();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float broken[] = {std::numeric_limits<float>::quiet_NaN(), kInf, -kInf, 0.0f, -0.0f};
  for (std::int64_t i = 0; i < c.T * c.E; ++i) {
    if (kind == Logits::kTies) p[i] = std::round(p[i] / 2);  // with -0
    if (kind == Logits::kBroken && (i / c.E % 3 == 0 || rng() % 9 == 0)) p[i] = broken[rng() % 5];
    if (kind == Logits::kBroken && i / c.E % 7 == 0) p[i] = broken[0];
  }
  return z;
}

class RouterGpu : public GpuTest {
 protected:
  // NaN equals NaN, whatever its bits.
  void expect_same_numbers(const TensorView& host, const TensorView& device,
                           const std::string& what) {
    const Tensor found = from_gpu(device);
    for (std::int64_t i = 0; i < host.count(); ++i) {
      const float a = host.as<float>()[i], b = found.as<float>()[i];
      if (std::isnan(a) && std::isnan(b)) continue;
      if (numerics::float_bits(a) == numerics::float_bits(b)) continue;
      ADD_FAILURE() << what << ": value " << i << " is " << a << " on the CPU, " << b
                    << " on the GPU";
      return;
    }
  }
};

TEST_F(RouterGpu, ChoiceAndWeights) {
  Rng rng(1);
  for (const RouterCase& c : router_cases())
    for (const Logits kind : {Logits::kNormal, Logits::kTies, Logits::kBroken}) {
      const std::string what = c.text() + fmt::format(" logits {}", static_cast<int>(kind));
      const Tensor z = make_logits(rng, c, kind);
      Tensor bias = c.bias ? random_normal(rng, DType::kFp32, {c.E}, 0.1) : Tensor();
      if (c.bias && kind == Logits::kTies)
        for (std::int64_t e = 0; e < c.E; ++e) bias.as<float>()[e] = e % 2 == 0 ? 0.0f : 0.25f;
      const Shape TC{c.T, c.options.top_k};
      const Tensor weights = cpu_output(DType::kFp32, TC), experts = cpu_output(DType::kInt32, TC);
      router(cpu, z, bias, c.options, weights, experts);
      const TensorView gweights = gpu_output(DType::kFp32, TC),
                       gexperts = gpu_output(DType::kInt32, TC);
      router(gpu, on_gpu(z), on_gpu(bias), c.options, gweights, gexperts);
      expect_same(experts, gexperts, what + " experts");
      if (kind == Logits::kBroken)
        expect_same_numbers(weights, gweights, what + " weights");
      else
        expect_same(weights, gweights, what + " weights");
    }
}

TEST_F(RouterGpu, Backward) {
  Rng rng(2);
  for (const RouterCase& c : router_cases())
    for (const bool balance : {false, true}) {
      const std::string what = c.text() + (balance ? " balance" : "");
      const Shape TC{c.T, c.options.top_k}, TE{c.T, c.E};
      const Tensor z = make_logits(rng, c, Logits::kNormal),
                   d_weights = random_normal(rng, DType::kFp32, TC),
                   d_score = random_normal(rng, DType::kFp32, {c.E});
      const Tensor weights = cpu_output(DType::kFp32, TC), experts = cpu_output(DType::kInt32, TC),
                   d_logits = cpu_output(DType::kFp32, TE);
      router(cpu, z, {}, c.options, weights, experts);
      router_backward(cpu, z, experts, d_weights, balance ? d_score : Tensor(), c.options,
                      d_logits);
      const TensorView gd_logits = gpu_output(DType::kFp32, TE);
      router_backward(gpu, on_gpu(z), on_gpu(experts), on_gpu(d_weights),
                      balance ? on_gpu(d_score) : TensorView{}, c.options, gd_logits);
      expect_same(d_logits, gd_logits, what);
    }
}

TEST_F(RouterGpu, ExpertsOutOfRangeAreClamped) {
  Rng rng(3);
  const RouterOptions options{kSoft, 2, 1, 1, true, 1.0f};
  const Tensor z = random_normal(rng, DType::kFp32, {2, 8}),
               d_weights = random_normal(rng, DType::kFp32, {2, 2});
  const Tensor d_logits = cpu_output(DType::kFp32, {2, 8});
  router_backward(cpu, z, int32_tensor({0, 7, 7, 3}).view().reshape({2, 2}), d_weights, {}, options,
                  d_logits);
  const TensorView gd_logits = gpu_output(DType::kFp32, {2, 8});
  router_backward(gpu, on_gpu(z), on_gpu(int32_tensor({-1, 8, 1 << 30, 3})).reshape({2, 2}),
                  on_gpu(d_weights), {}, options, gd_logits);
  expect_same(d_logits, gd_logits, "clamped");
}

TEST_F(RouterGpu, MeanScoresAndBalanceGradient) {
  Rng rng(4);
  for (const RouterCase& c : router_cases()) {
    const Tensor z = make_logits(rng, c, Logits::kNormal);
    const Tensor sum = cpu_output(DType::kFp64, {c.E});
    router_mean_scores(cpu, z, c.options, sum);
    const TensorView gsum = gpu_output(DType::kFp64, {c.E});
    router_mean_scores(gpu, on_gpu(z), c.options, gsum);
    expect_same(sum, gsum, c.text());
    if (c.T == 0) continue;

    std::vector<std::int32_t> offsets = {0};
    for (std::int64_t e = 0; e < c.E; ++e)
      offsets.push_back(offsets.back() + static_cast<std::int32_t>(uniform_int(rng, 0, 999)));
    const Tensor offsets_E1 = int32_tensor(offsets);
    const BalanceFactors factors{1e-3, 0.37, c.T, c.options.top_k};
    const Tensor d_score = cpu_output(DType::kFp32, {c.E}), value = empty(DType::kFp64, {1});
    set_value(value, 0, 0.1);
    const TensorView gvalue = on_gpu(value), gd_score = gpu_output(DType::kFp32, {c.E});
    balance_gradient(cpu, offsets_E1, sum, factors, d_score, value);
    balance_gradient(gpu, on_gpu(offsets_E1), gsum, factors, gd_score, gvalue);
    expect_same(d_score, gd_score, c.text() + " d_score");
    expect_same(value, gvalue, c.text() + " value");
  }
}

TEST_F(RouterGpu, TooManyExpertsAreRefused) {
  const RouterOptions options{kSoft, 1, 1, 1, true, 1.0f};
  EXPECT_THROW(router_mean_scores(gpu, gpu_output(DType::kFp32, {1, 1025}), options,
                                  gpu_output(DType::kFp64, {1025})),
               base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test
