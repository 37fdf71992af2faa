#include "rollout/kv_pages.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "base/philox.h"

namespace lockstep::rollout {

KvPages::KvPages(std::int64_t count, std::uint64_t shuffle_seed) : seed_(shuffle_seed) {
  LOCKSTEP_CHECK(count >= 1 && count <= std::numeric_limits<std::int32_t>::max(), "{} pages",
                 count);
  holders_.assign(count, 0);
  free_.reserve(count);
  for (std::int64_t page = count; page-- > 0;) {
    free_.push_back(static_cast<std::int32_t>(page));
    shuffle_last();
  }
}

std::int32_t KvPages::allocate() {
  LOCKSTEP_CHECK(!free_.empty(), "no free page of {}", count());
  const std::int32_t page = free_.back();
  free_.pop_back();
  holders_[page] = 1;
  peak_ = std::max(peak_, count() - free_count());
  return page;
}

void KvPages::share(std::int32_t page) {
  LOCKSTEP_CHECK(holders_.at(page) > 0, "page {} is free and cannot be shared", page);
  ++holders_[page];
}

void KvPages::release(std::int32_t page) {
  LOCKSTEP_CHECK(holders_.at(page) > 0, "page {} is released but nobody holds it", page);
  if (--holders_[page] > 0) return;
  free_.push_back(page);
  shuffle_last();
}

// Swaps the newest free page to a random place.
void KvPages::shuffle_last() {
  if (seed_ == 0) return;
  const auto word = base::philox4x32(seed_, 0, draws_++).word[0];
  std::swap(free_.back(), free_[word % free_.size()]);
}

}  // namespace lockstep::rollout
