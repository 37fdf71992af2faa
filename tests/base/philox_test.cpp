#include "base/philox.h"

#include <gtest/gtest.h>

namespace lockstep::base {
namespace {

void expect_words(const PhiloxWords& found, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                  std::uint32_t d) {
  EXPECT_EQ(found.word[0], a);
  EXPECT_EQ(found.word[1], b);
  EXPECT_EQ(found.word[2], c);
  EXPECT_EQ(found.word[3], d);
}

// The vectors of Random123's kat_vectors for philox4x32-10.
TEST(Philox, KnownAnswers) {
  expect_words(philox4x32(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
  const std::uint64_t ones = ~std::uint64_t{0};
  expect_words(philox4x32(ones, ones, ones), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd);
  // key a4093822 299f31d0, counter 243f6a88 85a308d3 13198a2e 03707344, first word lowest.
  expect_words(philox4x32(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88), 0xd16cfe09,
               0x94fdcceb, 0x5001e420, 0x24126ea1);
}

TEST(Philox, EveryArgumentBitMatters) {
  const PhiloxWords zero = philox4x32(0, 0, 0);
  for (int bit = 0; bit < 64; ++bit) {
    const std::uint64_t x = std::uint64_t{1} << bit;
    for (const PhiloxWords& other : {philox4x32(x, 0, 0), philox4x32(0, x, 0), philox4x32(0, 0, x)})
      EXPECT_FALSE(other.word[0] == zero.word[0] && other.word[1] == zero.word[1] &&
                   other.word[2] == zero.word[2] && other.word[3] == zero.word[3]);
  }
}

}  // namespace
}  // namespace lockstep::base
