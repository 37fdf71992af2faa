#include "sync/refit.h"

#include <gtest/gtest.h>

#include "policy/tiny_model.h"

namespace lockstep::sync {
namespace {

using model::ModelView;
using numerics::Bf16;

struct RefitSetup {
  tensor::Arena arena;
  tensor::Context ctx = tensor::cpu_context(arena, 1);
  std::shared_ptr<model::Weights> weights = policy::test::tiny_weights();
  std::shared_ptr<model::QuantizedWeights> fp8, bf16;

  RefitSetup() {
    model::Precision precision;
    precision.fp8 = true;
    fp8 = model::quantized_for(ctx, *weights, precision);
    bf16 = model::quantized_for(ctx, *weights, {});
  }
  ModelView view(const std::shared_ptr<model::QuantizedWeights>& q) const {
    return {weights.get(), q.get(), {}, {}};
  }
};

TEST(Refit, ChecksumSeesEveryByteThatTheRolloutReads) {
  RefitSetup s;
  const std::string before = weight_checksum(s.view(s.fp8));
  EXPECT_EQ(before.size(), 32u);
  EXPECT_EQ(weight_checksum(s.view(s.fp8)), before);
  EXPECT_NE(weight_checksum(s.view(s.bf16)), before);
  const auto changes = [&](auto& byte) {
    byte ^= 1;
    const bool seen = weight_checksum(s.view(s.fp8)) != before;
    byte ^= 1;
    return seen;
  };
  for (std::size_t p = 0; p < s.weights->table.params.size(); ++p) {
    SCOPED_TRACE(s.weights->table.params[p].name);
    const tensor::TensorView w = s.weights->view(static_cast<int>(p));
    if (s.fp8->fp8[p]) {
      const ops::Fp8Weight& q = s.fp8->forward[p];
      EXPECT_TRUE(changes(q.codes_ENK.fp8()[q.codes_ENK.count() - 1]));
      EXPECT_TRUE(changes(static_cast<std::uint8_t*>(q.scales.data)[0]));
      EXPECT_FALSE(changes(w.as<Bf16>()[0].bits))
          << "BF16 values of an FP8 parameter are not read by the rollout";
    } else {
      EXPECT_TRUE(changes(w.as<Bf16>()[w.count() - 1].bits));
    }
  }
  EXPECT_TRUE(changes(static_cast<std::uint8_t*>(s.weights->router_bias.view().data)[0]));
}

TEST(Refit, SharingCopiesNothingAndNamesTheVersion) {
  RefitSetup s;
  s.weights->version = 17;
  const RefitReport report = share(s.view(s.fp8), s.view(s.fp8));
  EXPECT_EQ(report.version, 17u);
  EXPECT_EQ(report.bytes_copied, 0);
  EXPECT_EQ(report.checksum, weight_checksum(s.view(s.fp8)));
  RefitSetup other;
  EXPECT_THROW(share(s.view(s.fp8), other.view(other.fp8)), base::ContractError);
}

// What the optimizer's FP8 emission is: the quantizer on the BF16 weights, in place.
TEST(Refit, RequantizingInPlaceEqualsQuantizingAnew) {
  RefitSetup s;
  const void* codes =
      s.fp8->forward[static_cast<std::size_t>(s.weights->table.layers[0].gate_up)].codes_ENK.data;
  model::initialize(*s.weights, 99);
  model::requantize(s.ctx, *s.weights);
  EXPECT_EQ(
      s.fp8->forward[static_cast<std::size_t>(s.weights->table.layers[0].gate_up)].codes_ENK.data,
      codes);
  RefitSetup fresh;
  model::initialize(*fresh.weights, 99);
  fresh.weights->quantized.clear();
  const auto anew = model::quantized_for(fresh.ctx, *fresh.weights, s.fp8->precision);
  EXPECT_EQ(weight_checksum(s.view(s.fp8)), weight_checksum(fresh.view(anew)));
}

}  // namespace
}  // namespace lockstep::sync
