// Checksums of pieces: which bytes they are of, and in which order.
#include "ops/checksum.h"

#include <gtest/gtest.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "op_test_util.h"

namespace lockstep::ops::test {
namespace {

TEST(Checksum, PiecesAreThoseOfEachTensorInTurn) {
  Rng rng(1);
  std::vector<Tensor> tensors;
  std::vector<TensorView> views;
  std::vector<std::uint64_t> expected;
  for (const std::int64_t count : {0, 1, 70000, 32768, 32769, 5}) {
    tensors.push_back(random_normal(rng, DType::kBf16, {count}));
    views.push_back(tensors.back().view());
    const auto* bytes = static_cast<const char*>(views.back().data);
    const std::size_t size = views.back().bytes();
    for (std::size_t at = 0; at < size; at += 65536)
      expected.push_back(XXH3_64bits(bytes + at, std::min<std::size_t>(65536, size - at)));
  }
  ASSERT_EQ(expected.size(), 8u);
  EXPECT_EQ(piece_checksums(views), expected);
}

// What `xxhsum -H3` (0.8.1) gives for a file of 65,536 bytes of 7.
TEST(Checksum, IsXxh3) {
  const Tensor x(tensor::Device::kCpu, DType::kE4m3, {65536});
  std::memset(x.view().data, 7, 65536);
  const TensorView view = x.view();
  EXPECT_EQ(piece_checksums({&view, 1}), std::vector<std::uint64_t>{0x08BCC31A8C5DE30Cu});
}

}  // namespace
}  // namespace lockstep::ops::test
