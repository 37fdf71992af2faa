#pragma once

#include <cstdint>
#include <span>

namespace lockstep::ops::cuda {

// What XXH3 mixes in: the default secret's words; those of an input's last 64 bytes and of the end,
// which lie between words.
struct Xxh3Secret {
  std::uint64_t stripes[24], last[8], merge[8];
};

// Device memory, 16-byte aligned; bytes % 16 == 0, and its last piece has more than 240. Its
// checksums are number `first` on.
struct ChecksumRange {
  const void* data;
  std::size_t bytes, first;
};

// After all work of the device. sums: host memory; those that belong to no range become 0.
void piece_checksums(std::span<const ChecksumRange> ranges, const Xxh3Secret& secret,
                     std::span<std::uint64_t> sums);

}  // namespace lockstep::ops::cuda
