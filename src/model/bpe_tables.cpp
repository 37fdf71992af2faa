// The hash tables of bpe.h.
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/error.h"
#include "model/bpe.h"

namespace lockstep::model {

namespace {

std::size_t power_of_two(std::size_t least) {
  std::size_t size = 16;
  while (size < least) size *= 2;
  return size;
}

std::uint64_t mixed(std::uint64_t x) {  // the finalizer of MurmurHash3
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ x >> 33;
}

std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
         static_cast<std::uint32_t>(right);
}

}  // namespace

StringTable::StringTable(std::size_t capacity) : slots_(power_of_two(2 * capacity)) {}

void StringTable::grow() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  for (const Slot& s : old)
    if (s.id >= 0) {
      std::size_t i = s.hash & (slots_.size() - 1);
      while (slots_[i].id >= 0) i = (i + 1) & (slots_.size() - 1);
      slots_[i] = s;
    }
}

bool StringTable::insert(std::string_view text, std::int32_t id) {
  if (find(text) >= 0) return false;
  if (2 * ++used_ > slots_.size()) grow();
  if (characters_.size() + text.size() > UINT32_MAX)
    base::fail<base::InputError>("a vocabulary of more than 4 GiB of text");
  const auto hash = static_cast<std::uint32_t>(XXH3_64bits(text.data(), text.size()));
  std::size_t i = hash & (slots_.size() - 1);
  while (slots_[i].id >= 0) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {hash, static_cast<std::uint32_t>(characters_.size()),
               static_cast<std::uint32_t>(text.size()), id};
  characters_ += text;
  return true;
}

std::int32_t StringTable::find(std::string_view text) const {
  const auto hash = static_cast<std::uint32_t>(XXH3_64bits(text.data(), text.size()));
  for (std::size_t i = hash & (slots_.size() - 1); slots_[i].id >= 0;
       i = (i + 1) & (slots_.size() - 1)) {
    const Slot& s = slots_[i];
    if (s.hash == hash && s.length == text.size() &&
        std::memcmp(characters_.data() + s.begin, text.data(), text.size()) == 0)
      return s.id;
  }
  return -1;
}

MergeTable::MergeTable(std::size_t merges) : slots_(power_of_two(2 * merges + 1)) {}

std::size_t MergeTable::slot_of(std::uint64_t pair) const {
  std::size_t i = mixed(pair) & (slots_.size() - 1);
  while (slots_[i].pair != pair && slots_[i].pair != ~std::uint64_t{0})
    i = (i + 1) & (slots_.size() - 1);
  return i;
}

void MergeTable::set(std::int32_t left, std::int32_t right, Merge merge) {
  const std::uint64_t pair = pair_of(left, right);
  slots_[slot_of(pair)] = {pair, merge};
}

Merge MergeTable::find(std::int32_t left, std::int32_t right) const {
  return slots_[slot_of(pair_of(left, right))].merge;
}

}  // namespace lockstep::model
