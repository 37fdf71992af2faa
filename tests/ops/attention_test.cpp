#include <gtest/gtest.h>

#include "ops/attention_bounds.h"
#include "ops/attention_case.h"

namespace lockstep::ops::test {
namespace {

const std::vector<std::int64_t> kLengths{1, 2, 127, 128, 129, 255, 300};

void expect_contract(const AttentionCase& x, const AttentionResult& r, std::int64_t stride) {
  const AttentionSizes& n = x.sizes;
  std::vector<Bf16> out(static_cast<std::size_t>(n.Kv));
  std::int64_t different = 0;
  for (std::size_t s = 0; s < x.lengths.size(); ++s) {
    const ContractSequence seq = contract_sequence(x, s);
    for (std::int64_t t = x.lengths[s] - 1; t >= 0; t -= stride)
      for (std::int64_t h = 0; h < n.H; ++h) {
        const float lse2 = contract_forward(seq, t, h, out.data());
        const std::int64_t place = (x.begin(s) + t) * n.H + h;
        different += std::memcmp(&lse2, r.lse2_TH.view().as<float>() + place, sizeof lse2) != 0;
        different += std::memcmp(out.data(), r.out_THK.view().as<Bf16>() + place * n.Kv,
                                 out.size() * sizeof(Bf16)) != 0;
      }
  }
  EXPECT_EQ(different, 0);
}

TEST(Attention, HasTheBitsOfTheContract) {
  Rng rng(1);
  tensor::Arena arena;
  const AttentionSizes all_sizes[] = {{2, 1, 16, 16, 0.25},      {3, 3, 20, 7, 0.2},
                                      {8, 2, 64, 32, 0.125},     {40, 1, 16, 17, 0.3},
                                      {5, 1, 48, 32, 0.2, true}, {4, 2, 21, 13, 0.2, true}};
  for (const AttentionSizes& n : all_sizes) {
    const AttentionCase x = attention_case(rng, n, kLengths);
    const AttentionResult r = forward(context(arena, tensor::best_isa()), x);
    expect_contract(x, r, n.H > 4 ? 29 : 5);
  }
}

// Scores of hundreds: maxima move, most p are below 2^-127, corrections underflow.
TEST(Attention, HasTheBitsOfTheContractAtExtremeScores) {
  Rng rng(2);
  tensor::Arena arena;
  for (const double deviation : {1e-30, 40.0, 3e4}) {
    AttentionCase x = attention_case(rng, {2, 1, 16, 16, 0.7}, {130, 300}, deviation);
    for (std::int64_t i = 0; i < x.v_TJK.view().count(); i += 3)  // sums that end as -0
      set_value(x.v_TJK, i, -1e-40);
    expect_contract(x, forward(context(arena, tensor::best_isa()), x), 7);
  }
}

// One key takes all the weight and has v = 0; what the others add lies below FP32. The block's
// steps of zeros decide the sign of that zero, and turn a sum beyond FP32 into NaN.
TEST(Attention, HasTheBitsOfTheContractWhereSumsLeaveTheRange) {
  Rng rng(11);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  for (const std::int64_t length : {3, 40, 113, 128, 130}) {
    const AttentionCase x = attention_case(rng, {2, 1, 16, 2, 0.25}, {length});
    for (std::int64_t i = 0; i < length * 2 * 16; ++i) set_value(x.q_THK, i, 1.0);
    for (std::int64_t i = 0; i < length * 16; ++i) set_value(x.k_TJK, i, i < 2 * 16 ? 8.0 : 0.0);
    for (std::int64_t i = 0; i < length; ++i) {
      set_value(x.v_TJK, i * 2, i < 2 ? 0.0 : -0x1p-110);
      set_value(x.v_TJK, i * 2 + 1, 0x1.8p127);
    }
    const AttentionResult r = forward(ctx, x);
    expect_contract(x, r, 1);
    EXPECT_TRUE(same(r, forward_served(
                            ctx, x, 16, [] { return 1; }, rng)));
    EXPECT_FALSE(std::signbit(get_value(r.out_THK, 2 * 2 * 2)));
    EXPECT_TRUE(std::isnan(get_value(r.out_THK, 2 * 2 * 2 + 1)));
  }
}

TEST(Attention, AgreesWithTheReference) {
  Rng rng(3);
  tensor::Arena arena;
  for (const double deviation : {0.1, 1.0, 5.0}) {
    const AttentionCase x =
        attention_case(rng, {4, 2, 32, 16, 0.2, deviation > 1}, kLengths, deviation);
    const AttentionResult r = forward(context(arena, tensor::best_isa()), x);
    for (std::size_t s = 0; s < x.lengths.size(); ++s) {
      const ReferenceForward ref = reference_forward(x, s);
      const std::int64_t first = x.begin(s) * x.sizes.H;
      for (std::size_t i = 0; i < ref.lse2.size(); ++i)
        EXPECT_LE(
            std::abs(get_value(r.lse2_TH, first + static_cast<std::int64_t>(i)) - ref.lse2[i]),
            ref.lse2_bound[i]);
      for (std::size_t i = 0; i < ref.out.size(); ++i) {
        const double got = get_value(r.out_THK, first * x.sizes.Kv + static_cast<std::int64_t>(i));
        ASSERT_LE(std::abs(got - ref.out[i]), ref.out_bound[i]) << "length " << x.lengths[s];
      }
    }
  }
}

TEST(Attention, BitsDoNotDependOnChunksPagesOrNeighbours) {
  Rng rng(4);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  for (const AttentionSizes& n :
       {AttentionSizes{4, 2, 16, 16, 0.25}, AttentionSizes{4, 1, 24, 16, 0.25, true}}) {
    const AttentionCase x = attention_case(rng, n, kLengths);
    const AttentionResult whole = forward(ctx, x);
    for (std::size_t s = 0; s < x.lengths.size(); ++s) {
      const AttentionResult alone = forward(ctx, only(x, s));
      EXPECT_TRUE(bytes_equal(alone.out_THK, whole.out_THK.view().rows(x.begin(s), x.lengths[s])));
      EXPECT_TRUE(bytes_equal(alone.lse2_TH, whole.lse2_TH.view().rows(x.begin(s), x.lengths[s])));
    }
    for (const std::int64_t page_size : {1, 16, 37, 512})
      EXPECT_TRUE(
          same(whole, forward_served(
                          ctx, x, page_size, [&] { return uniform_int(rng, 1, 150); }, rng)));
    EXPECT_TRUE(same(whole, forward_served(
                                ctx, x, 16, [] { return 1; }, rng)));
    EXPECT_TRUE(same(whole, forward_served(
                                ctx, x, 16, [] { return 300; }, rng)));
  }
}

TEST(Attention, BitsDoNotDependOnChunksAcrossSplits) {
  Rng rng(5);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  for (const std::int64_t length : {2047, 2048, 2049, 4100}) {
    const AttentionCase x = attention_case(rng, {2, 1, 16, 16, 0.25}, {length});
    const std::int64_t cached = length - 8;
    const AttentionResult one = forward_served(
        ctx, x, 64, [] { return 1; }, rng, cached);
    const AttentionResult all = forward_served(
        ctx, x, 16, [] { return 8; }, rng, cached);
    const AttentionResult some = forward_served(
        ctx, x, 100, [&] { return uniform_int(rng, 2, 4); }, rng, cached);
    EXPECT_TRUE(same(one, all));
    EXPECT_TRUE(same(one, some));
    const ContractSequence seq = contract_sequence(x, 0);
    std::vector<Bf16> out(16);
    for (const std::int64_t t : {length - 8, length - 1})
      for (std::int64_t h = 0; h < 2; ++h) {
        EXPECT_EQ(contract_forward(seq, t, h, out.data()),
                  one.lse2_TH.view().as<float>()[t * 2 + h]);
        EXPECT_EQ(std::memcmp(out.data(), one.out_THK.view().as<Bf16>() + (t * 2 + h) * 16, 32), 0);
      }
  }
}

TEST(Attention, BitsDoNotDependOnThreadsOrInstructionSet) {
  Rng rng(6);
  tensor::Arena arena;
  const AttentionCase x = attention_case(rng, {6, 3, 24, 40, 0.2}, {3, 0, 64, 131, 17});
  const AttentionResult first = forward(context(arena, Isa::kPortable, 1), x);
  for (const Isa isa : supported_isas())
    for (const int threads : {1, 2, 3}) {
      const Context ctx = context(arena, isa, threads);
      EXPECT_TRUE(same(first, forward(ctx, x))) << tensor::isa_name(isa) << ' ' << threads;
      EXPECT_TRUE(same(first, forward_served(
                                  ctx, x, 16, [] { return 50; }, rng)))
          << tensor::isa_name(isa) << ' ' << threads;
    }
}

TEST(Attention, LaterPositionsNeverLeakIntoEarlierOnes) {
  Rng rng(7);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  for (const std::int64_t from : {1, 5, 100, 128, 133}) {
    AttentionCase x = attention_case(rng, {4, 2, 16, 16, 0.25, from % 2 == 1}, {140});
    const AttentionResult clean = forward(ctx, x);
    for (std::int64_t i = from * 2 * 16; i < 140 * 2 * 16; ++i) {
      set_value(x.k_TJK, i, i % 2 == 0 ? NAN : INFINITY);
      set_value(x.v_TJK, i, i % 2 == 0 ? -INFINITY : NAN);
    }
    const AttentionResult poisoned = forward(ctx, x);
    EXPECT_TRUE(
        bytes_equal(clean.out_THK.view().rows(0, from), poisoned.out_THK.view().rows(0, from)));
    EXPECT_TRUE(
        bytes_equal(clean.lse2_TH.view().rows(0, from), poisoned.lse2_TH.view().rows(0, from)));
    EXPECT_TRUE(std::isnan(get_value(poisoned.out_THK, from * 4 * 16)));
  }
}

TEST(Attention, TakesEmptyBatchesAndNoLse) {
  Rng rng(8);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  forward(ctx, attention_case(rng, {}, {}));
  forward(ctx, attention_case(rng, {}, {0, 0}));
  const AttentionCase x = attention_case(rng, {}, {9});
  const AttentionResult r = forward(ctx, x);
  Poisoned out(DType::kBf16, r.out_THK.view().shape);
  attention(ctx, x.q_THK, x.k_TJK, x.v_TJK, x.batch(), x.sizes.scale, out, {});
  EXPECT_TRUE(bytes_equal(out, r.out_THK));
}

TEST(Attention, RefusesWhatDoesNotFit) {
  using base::ContractError;
  Rng rng(9);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  const AttentionCase x = attention_case(rng, {}, {4, 5});
  AttentionResult r(x);
  const auto run = [&](const AttentionBatch& batch, double scale, const TensorView& out) {
    attention(ctx, x.q_THK, x.k_TJK, x.v_TJK, batch, scale, out, r.lse2_TH);
  };
  const AttentionBatch good = x.batch();
  EXPECT_THROW(run(good, 0.0, r.out_THK), ContractError);
  EXPECT_THROW(run(good, NAN, r.out_THK), ContractError);
  EXPECT_THROW(run(good, 1.0, r.lse2_TH), ContractError);
  const Tensor short_lengths = int32_tensor({4, 4}), long_lengths = int32_tensor({4, 6});
  EXPECT_THROW(run({x.offsets_S1, short_lengths, {}, 0}, 1.0, r.out_THK), ContractError);
  EXPECT_THROW(run({x.offsets_S1, long_lengths, {}, 0}, 1.0, r.out_THK), ContractError);
  const Tensor backwards = int32_tensor({0, 5, 4}), outside = int32_tensor({0, 4, 10});
  EXPECT_THROW(run({backwards, x.lengths_S, {}, 0}, 1.0, r.out_THK), ContractError);
  EXPECT_THROW(run({outside, x.lengths_S, {}, 0}, 1.0, r.out_THK), ContractError);
  const auto paged = [&](const std::vector<std::int32_t>& pages, std::int64_t size) {
    const Tensor flat = int32_tensor(pages);
    run({x.offsets_S1, x.lengths_S,
         flat.view().reshape({2, static_cast<std::int64_t>(pages.size()) / 2}), size},
        1.0, r.out_THK);
  };
  EXPECT_NO_THROW(paged({0, -1, 1, 2}, 4));       // page 2 holds one row, the last of the cache
  EXPECT_THROW(paged({0, 1}, 4), ContractError);  // five keys need two pages
  EXPECT_THROW(paged({0, 1, -1, 1}, 4), ContractError);  // negative page
  EXPECT_THROW(paged({2, 1, 0, 1}, 4), ContractError);   // page past the cache
  EXPECT_THROW(paged({0, 1, 0, 1}, 0), ContractError);
  const Tensor wide = empty(DType::kBf16, {9, 4, 32});  // wider than the keys that hold the values
  EXPECT_THROW(attention(ctx, x.q_THK, x.k_TJK, {}, good, 1.0, wide, r.lse2_TH), ContractError);
  EXPECT_NO_THROW(attention(ctx, x.q_THK, x.k_TJK, {}, good, 1.0, r.out_THK, r.lse2_TH));
}

TEST(WriteKv, CopiesRowsToTheirSlots) {
  Rng rng(10);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  const Tensor k = random_normal(rng, DType::kBf16, {3, 2, 5});
  const Tensor v = random_normal(rng, DType::kBf16, {3, 2, 4});
  const Poisoned k_cache(DType::kBf16, {6, 2, 5}), v_cache(DType::kBf16, {6, 2, 4});
  EXPECT_THROW(write_kv(ctx, k, v, int32_tensor({0, 6, 1}), k_cache, v_cache), base::ContractError);
  EXPECT_THROW(write_kv(ctx, k, v, int32_tensor({0, -1, 1}), k_cache, v_cache),
               base::ContractError);
  EXPECT_THROW(write_kv(ctx, k, v, int32_tensor({0, 1}), k_cache, v_cache), base::ContractError);
  EXPECT_THROW(write_kv(ctx, k, v, int32_tensor({0, 1, 2}), v_cache, k_cache), base::ContractError);
  const std::vector<std::int32_t> slots{5, 0, 3};
  write_kv(ctx, k, v, int32_tensor(slots), k_cache, v_cache);
  for (std::int64_t t = 0; t < 3; ++t) {
    EXPECT_TRUE(bytes_equal(k.view().rows(t, 1),
                            k_cache.view().rows(slots[static_cast<std::size_t>(t)], 1)));
    EXPECT_TRUE(bytes_equal(v.view().rows(t, 1),
                            v_cache.view().rows(slots[static_cast<std::size_t>(t)], 1)));
  }
  for (const std::int64_t row : {1, 2, 4}) {
    EXPECT_EQ(k_cache.view().rows(row, 1).as<Bf16>()->bits, 0xFFFF);
    EXPECT_EQ(v_cache.view().rows(row, 1).as<Bf16>()->bits, 0xFFFF);
  }
  EXPECT_TRUE(k_cache.guards_intact() && v_cache.guards_intact());
  write_kv(ctx, k.view().rows(0, 0), v.view().rows(0, 0), int32_tensor({}), k_cache, v_cache);
  const Poisoned alone(DType::kBf16, {6, 2, 5});
  EXPECT_THROW(write_kv(ctx, k, {}, int32_tensor(slots), alone, v_cache), base::ContractError);
  EXPECT_THROW(write_kv(ctx, k, v, int32_tensor(slots), alone, {}), base::ContractError);
  write_kv(ctx, k, {}, int32_tensor(slots), alone, {});
  EXPECT_TRUE(bytes_equal(alone, k_cache) && alone.guards_intact());
}

}  // namespace
}  // namespace lockstep::ops::test
