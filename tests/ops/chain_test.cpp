// The tensor core's chain of BF16 steps on the CPU.
#include "ops/cpu/chain.h"

#include <fstream>
#include <iterator>

#include "gemm_model.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;

// c is carried on, whatever it holds; strides are free; bytes beside the tile stay.
TEST(Bf16Chain, CarriesOnFromC) {
  Rng rng(17);
  const std::int64_t M = 3, N = 37, K = 37, stride = 41;
  const Tensor a = wide(rng, DType::kBf16, {M, K}), b = wide(rng, DType::kBf16, {K, N});
  const Tensor start = wide(rng, DType::kFp32, {M, stride}, {0.2, -30, 20});
  const float specials[] = {-0.0f,
                            0x1p-149f,
                            -0x1p-140f,
                            0x1.fffffep127f,
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()};
  for (int i = 0; i < 7; ++i) start.as<float>()[5 * i] = specials[i];
  for (const Isa isa : supported_isas())
    for (const std::int64_t k : {std::int64_t{0}, std::int64_t{5}, K}) {
      Tensor c = empty(DType::kFp32, {M, stride});
      std::memcpy(c.view().data, start.view().data, start.view().bytes());
      const cpu::StridedBf16 sa{a.as<Bf16>(), K, 1}, sb{b.as<Bf16>(), 1, N};
      tensor::Arena arena;
      LOCKSTEP_CPU_CALL(context(arena, isa), bf16_chain, sa, sb, c.as<float>(), stride, M, N, k);
      for (std::int64_t m = 0; m < M; ++m)
        for (std::int64_t n = 0; n < stride; ++n) {
          const float from = start.as<float>()[m * stride + n],
                      found = c.as<float>()[m * stride + n];
          const float expected = n >= N ? from
                                        : model_chain(
                                              numerics::kBf16Step,
                                              [&](std::int64_t i) {
                                                return numerics::bf16_term(a.as<Bf16>()[m * K + i]);
                                              },
                                              [&](std::int64_t i) {
                                                return numerics::bf16_term(b.as<Bf16>()[i * N + n]);
                                              },
                                              0, k, from);
          if (std::isnan(expected))
            EXPECT_TRUE(std::isnan(found)) << m << " " << n;
          else
            EXPECT_EQ(numerics::float_bits(found), numerics::float_bits(expected))
                << tensor::isa_name(isa) << " " << m << " " << n << " k " << k;
        }
    }
}

// Single steps measured on an H200.
TEST(Bf16Chain, EqualsHardware) {
  std::ifstream in(std::string(LOCKSTEP_TEST_DATA) + "/tensor_core/bf16.bin", std::ios::binary);
  const std::vector<char> data{std::istreambuf_iterator<char>(in),
                               std::istreambuf_iterator<char>()};
  constexpr std::size_t kBlocks = 32, kA = 64 * 32, kB = 8 * 32, kC = 64 * 8 * 4;
  ASSERT_EQ(data.size(), kBlocks * (kA + kB + 2 * kC));
  for (const Isa isa : supported_isas())
    for (std::size_t block = 0; block < kBlocks; ++block) {
      Bf16 a[64 * 16], b[8 * 16];
      float c[64 * 8], d[64 * 8];
      std::memcpy(a, &data[block * kA], kA);
      std::memcpy(b, &data[kBlocks * kA + block * kB], kB);
      std::memcpy(c, &data[kBlocks * (kA + kB) + block * kC], kC);
      std::memcpy(d, &data[kBlocks * (kA + kB + kC) + block * kC], kC);
      const cpu::StridedBf16 sa{a, 16, 1}, sb{b, 16, 1};
      tensor::Arena arena;
      LOCKSTEP_CPU_CALL(context(arena, isa), bf16_chain, sa, sb, c, 8, 64, 8, 16);
      EXPECT_EQ(std::memcmp(c, d, sizeof(c)), 0) << tensor::isa_name(isa) << " block " << block;
    }
}

}  // namespace
}  // namespace lockstep::ops::test
