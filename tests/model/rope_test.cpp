// Stretched rotary frequencies against transformers' formulas (modeling_rope_utils), evaluated in
// double by another program.
#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "model/forward.h"

namespace lockstep::model {
namespace {

ModelConfig config_of(double theta, std::int64_t head_dim, const RopeScaling& scaling) {
  ModelConfig c;
  c.rope_theta = theta;
  c.head_dim = head_dim;
  c.max_positions = 64;
  c.rope_scaling = scaling;
  return c;
}

void expect_frequencies(const ModelConfig& c, const std::map<std::size_t, double>& expected) {
  const RopeFrequencies f = rope_frequencies(c);
  ASSERT_EQ(static_cast<std::int64_t>(f.inverse.size()), c.head_dim / 2);
  for (const auto& [i, value] : expected)
    EXPECT_LE(std::fabs(f.inverse[i] - value), 1e-14 * value) << "pair " << i;
}

TEST(Rope, linear) {
  RopeScaling s;
  s.kind = RopeScaling::kLinear;
  s.factor = 4;
  expect_frequencies(config_of(1e4, 8, s), {{0, 0.25}, {1, 0.025}, {2, 0.0025}, {3, 0.00025}});
}

TEST(Rope, llama3) {
  RopeScaling s;
  s.kind = RopeScaling::kLlama3;
  s.factor = 8;
  s.original_positions = 8192;
  expect_frequencies(config_of(5e5, 128, s), {{0, 1.0},
                                              {10, 0.12868737343265052},
                                              {28, 0.0032114459947525913},
                                              {30, 0.0013718935677611381},
                                              {32, 0.0005248461609929547},
                                              {34, 0.00017850781276799638},
                                              {36, 7.78465527393245e-05},
                                              {63, 3.068925988914511e-07}});
}

TEST(Rope, yarn) {
  RopeScaling s;
  s.kind = RopeScaling::kYarn;
  s.factor = 4;
  s.original_positions = 32768;
  expect_frequencies(config_of(1e6, 128, s), {{0, 1.0},
                                              {20, 0.01333521432163324},
                                              {24, 0.005375321490790102},
                                              {30, 0.0010643609812470017},
                                              {36, 0.00017984115587395423},
                                              {40, 4.445698525097307e-05},
                                              {63, 3.102344401879299e-07}});
  s.factor = 40;
  s.original_positions = 4096;
  s.truncate = false;
  expect_frequencies(config_of(1e4, 64, s), {{1, 0.7498942093324559},
                                             {10, 0.056234132519034905},
                                             {16, 0.005524062977468265},
                                             {20, 0.0007226383418941806},
                                             {24, 2.5e-05},
                                             {30, 4.445698525097306e-06}});
  EXPECT_DOUBLE_EQ(yarn_attention_factor(4), 1.138629436111989);
  EXPECT_DOUBLE_EQ(yarn_attention_factor(40) / yarn_attention_factor(40, 0.5), 1.1557219901962608);
  EXPECT_EQ(yarn_attention_factor(0.5), 1.0);
}

TEST(Rope, tables_hold_the_frequencies_and_the_factor) {
  RopeScaling s;
  s.kind = RopeScaling::kYarn;
  s.factor = 2;
  s.original_positions = 32;
  s.attention_factor = 1.25;
  const ModelConfig c = config_of(1e4, 16, s);
  tensor::Arena arena;
  const RopeTables tables = make_rope_tables(tensor::cpu_context(arena, 1), c);
  const RopeFrequencies f = rope_frequencies(c);
  for (std::int64_t p = 0; p < 64; ++p)
    for (std::int64_t i = 0; i < 8; ++i) {
      const double angle = static_cast<double>(p) * f.inverse[i];
      EXPECT_EQ(tables.cos_PK.as<float>()[p * 8 + i], static_cast<float>(std::cos(angle) * 1.25));
      EXPECT_EQ(tables.sin_PK.as<float>()[p * 8 + i], static_cast<float>(std::sin(angle) * 1.25));
    }
}

}  // namespace
}  // namespace lockstep::model
