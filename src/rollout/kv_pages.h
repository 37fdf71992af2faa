// Which pages of the key-value cache are free, and how many sequences hold each of the others.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep::rollout {

// Pages 0 .. count-1. Free pages are handed out lowest first at the start and last released first
// afterwards; with a shuffle seed other than 0 in a random order that the seed decides.
class KvPages {
 public:
  KvPages(std::int64_t count, std::uint64_t shuffle_seed);

  std::int32_t allocate();  // one holder; there must be a free page
  void share(std::int32_t page);
  void release(std::int32_t page);  // free again after its last holder

  int holders(std::int32_t page) const { return holders_[page]; }
  std::int64_t count() const { return static_cast<std::int64_t>(holders_.size()); }
  std::int64_t free_count() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t peak() const { return peak_; }

 private:
  void shuffle_last();

  std::vector<std::int32_t> free_;  // a stack
  std::vector<std::int32_t> holders_;
  std::uint64_t seed_, draws_ = 0;
  std::int64_t peak_ = 0;
};

}  // namespace lockstep::rollout
