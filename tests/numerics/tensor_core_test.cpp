// The scalar tensor-core step against results of single wgmma instructions measured on an H200
// (tests/data/tensor_core: 32 blocks a format; A 64 x 32 bytes, B 8 x 32 bytes, C and D 64 x 8
// FP32, each array whole).
#include "numerics/tensor_core.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

namespace lockstep::numerics {
namespace {

constexpr int kBlocks = 32, kRows = 64, kColumns = 8, kBytes = 32;

std::vector<char> read_file(const std::string& name) {
  std::ifstream in(std::string(LOCKSTEP_TEST_DATA) + "/tensor_core/" + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void decode(const StepKind& kind, bool e5m2, const char* bytes, Term* out) {
  for (int i = 0; i < kind.terms; ++i) {
    if (kind.terms == kBf16Step.terms) {
      Bf16 x;
      std::memcpy(&x, bytes + 2 * i, sizeof(x));
      out[i] = bf16_term(x);
    } else {
      const Fp8 code = static_cast<Fp8>(bytes[i]);
      out[i] = e5m2 ? e5m2_term(code) : e4m3_term(code);
    }
  }
}

void expect_file(const std::string& name, const StepKind& kind, bool a_e5m2) {
  const std::vector<char> data = read_file(name);
  const std::size_t a_at = 0, b_at = a_at + std::size_t{kBlocks} * kRows * kBytes,
                    c_at = b_at + std::size_t{kBlocks} * kColumns * kBytes,
                    d_at = c_at + std::size_t{kBlocks} * kRows * kColumns * sizeof(float),
                    end = d_at + std::size_t{kBlocks} * kRows * kColumns * sizeof(float);
  ASSERT_EQ(data.size(), end) << name;
  std::int64_t different = 0;
  for (int block = 0; block < kBlocks; ++block)
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kColumns; ++n) {
        Term a[32], b[32];
        decode(kind, a_e5m2, &data[a_at + std::size_t(block * kRows + m) * kBytes], a);
        decode(kind, false, &data[b_at + std::size_t(block * kColumns + n) * kBytes], b);
        const std::size_t i = std::size_t((block * kRows + m) * kColumns + n) * sizeof(float);
        float c, d;
        std::memcpy(&c, &data[c_at + i], sizeof(c));
        std::memcpy(&d, &data[d_at + i], sizeof(d));
        different += float_bits(tensor_core_step(kind, a, b, c)) != float_bits(d) ? 1 : 0;
      }
  EXPECT_EQ(different, 0) << name;
}

TEST(TensorCore, E4m3AgainstHardware) { expect_file("e4e4.bin", kE4m3Step, false); }
// Underflow, overflow, cancellation, subnormals, signed zeros.
TEST(TensorCore, Bf16AtTheEndsOfTheRangeAgainstHardware) {
  expect_file("bf16_ends.bin", kBf16Step, false);
}
TEST(TensorCore, E5m2E4m3AgainstHardware) { expect_file("e5e4.bin", kE5m2E4m3Step, true); }
TEST(TensorCore, Bf16AgainstHardware) { expect_file("bf16.bin", kBf16Step, false); }

// The alignment is what decides: with one fraction bit more or less the hardware is not reproduced.
TEST(TensorCore, DataTellsAlignmentsApart) {
  Term a[32], b[32];
  for (int i = 0; i < 32; ++i) a[i] = b[i] = {0, 0, false, true};
  a[0] = b[0] = e4m3_term(0x38);                   // 1 * 1
  a[1] = e4m3_term(0x08), b[1] = e4m3_term(0x08);  // 2^-12
  EXPECT_EQ(tensor_core_step(kE4m3Step, a, b, 0.0f), 1.0f + 0x1p-12f);
  a[1] = e4m3_term(0x02), b[1] = e4m3_term(0x10);  // 2^-8 * 2^-5 = 2^-13
  EXPECT_EQ(tensor_core_step(kE4m3Step, a, b, 0.0f), 1.0f + 0x1p-13f);
  b[1] = e4m3_term(0x08);  // 2^-14
  EXPECT_EQ(tensor_core_step(kE4m3Step, a, b, 0.0f), 1.0f);
}

TEST(TensorCore, ZeroAndNonfinite) {
  Term a[32], b[32];
  for (int i = 0; i < 32; ++i) a[i] = b[i] = {0, 0, false, true};
  EXPECT_EQ(float_bits(tensor_core_step(kE4m3Step, a, b, 0.0f)), 0u);
  EXPECT_EQ(float_bits(tensor_core_step(kBf16Step, a, b, -0.0f)), 0u);
  EXPECT_EQ(tensor_core_step(kBf16Step, a, b, -3.0f), -3.0f);
  EXPECT_EQ(tensor_core_step(kBf16Step, a, b, 0x1p-149f), 0x1p-149f);
  a[3] = e4m3_term(0x7F);
  EXPECT_TRUE(is_nan(tensor_core_step(kE4m3Step, a, b, 0.0f)));
  a[3] = bf16_term({0x7F80});
  EXPECT_TRUE(is_nan(tensor_core_step(kBf16Step, a, b, 0.0f)));
  a[3] = bf16_term({0});
  EXPECT_TRUE(is_nan(tensor_core_step(kBf16Step, a, b, std::numeric_limits<float>::infinity())));
}

}  // namespace
}  // namespace lockstep::numerics
