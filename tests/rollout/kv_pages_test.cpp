#include "rollout/kv_pages.h"

#include <gtest/gtest.h>

#include <set>

#include "base/error.h"

namespace lockstep::rollout {
namespace {

TEST(KvPages, HandsOutLowestFirstAndLastReleasedNext) {
  KvPages pages(4, 0);
  EXPECT_EQ(pages.allocate(), 0);
  EXPECT_EQ(pages.allocate(), 1);
  EXPECT_EQ(pages.allocate(), 2);
  pages.release(1);
  pages.release(0);
  EXPECT_EQ(pages.allocate(), 0);
  EXPECT_EQ(pages.allocate(), 1);
  EXPECT_EQ(pages.allocate(), 3);
  EXPECT_EQ(pages.free_count(), 0);
  EXPECT_EQ(pages.peak(), 4);
  EXPECT_THROW(pages.allocate(), base::ContractError);
}

TEST(KvPages, IsFreeAfterItsLastHolder) {
  KvPages pages(2, 0);
  const auto page = pages.allocate();
  pages.share(page);
  pages.release(page);
  EXPECT_EQ(pages.holders(page), 1);
  EXPECT_EQ(pages.free_count(), 1);
  pages.release(page);
  EXPECT_EQ(pages.free_count(), 2);
  EXPECT_THROW(pages.release(page), base::ContractError);
  EXPECT_THROW(pages.share(page), base::ContractError);
}

TEST(KvPages, ShuffledOrderIsDecidedByTheSeed) {
  KvPages plain(64, 0), a(64, 5), b(64, 5);
  std::set<std::int32_t> seen;
  bool differs = false;
  for (int i = 0; i < 64; ++i) {
    const auto page = a.allocate();
    EXPECT_EQ(page, b.allocate());
    differs = differs || page != plain.allocate();
    seen.insert(page);
  }
  EXPECT_TRUE(differs);
  EXPECT_EQ(seen.size(), 64u);
}

}  // namespace
}  // namespace lockstep::rollout
