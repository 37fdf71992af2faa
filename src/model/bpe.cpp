#include "model/bpe.h"

#include <algorithm>
#include <functional>

#include "base/error.h"
#include "model/unicode_text.h"

namespace lockstep::model {

namespace {

constexpr std::size_t kShortWord = 64;  // above, the heap is faster than looking at all pairs

// The symbols of a word that have no token of their own, in the order of `tokenizers`: a pending
// unk_token is added before the next known symbol, but not before bytes that stand in for one.
struct SymbolWriter {
  const Bpe& bpe;
  std::vector<std::int32_t>& symbols;
  bool pending = false;

  void flush() {
    if (pending) symbols.push_back(bpe.unknown);
    pending = false;
  }
  void known(std::int32_t id) {
    flush();
    symbols.push_back(id);
  }
  void missing(std::string_view character) {
    if (bpe.byte_fallback) {
      const auto token = [&](char c) { return bpe.byte_tokens[static_cast<unsigned char>(c)]; };
      if (std::all_of(character.begin(), character.end(), [&](char c) { return token(c) >= 0; })) {
        for (const char c : character) symbols.push_back(token(c));
        return;
      }
    }
    if (bpe.unknown_text.empty()) return;  // dropped
    if (bpe.unknown < 0)
      base::fail<base::InputError>(
          "{}: model.unk_token '{}' is not in the vocabulary, and the text needs it", bpe.where,
          bpe.unknown_text);
    if (!bpe.fuse_unknown) flush();
    pending = true;
  }
};

void write_symbols(const Bpe& bpe, std::string_view word, std::vector<std::int32_t>& symbols) {
  SymbolWriter writer{bpe, symbols};
  if (bpe.byte_words) {
    for (const char c : word) {
      const auto b = static_cast<unsigned char>(c);
      if (bpe.first_symbols[b] >= 0) {
        writer.known(bpe.first_symbols[b]);
      } else {
        writer.missing(byte_characters()[b]);
      }
    }
  } else {
    for (std::size_t i = 0; i < word.size();) {
      const std::size_t begin = i;
      next_code_point(word, i);
      const std::string_view character = word.substr(begin, i - begin);
      if (const std::int32_t id = bpe.ids.find(character); id >= 0) {
        writer.known(id);
      } else {
        writer.missing(character);
      }
    }
  }
  writer.flush();
}

// Merges in place; looks at all pairs for each merge.
void merge_short(const Bpe& bpe, BpeScratch& s) {
  auto& symbols = s.symbols;
  std::size_t n = symbols.size();
  Merge pairs[kShortWord];
  for (std::size_t i = 0; i + 1 < n; ++i) pairs[i] = bpe.merges.find(symbols[i], symbols[i + 1]);
  while (n > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < n; ++i)
      if (pairs[i].rank < pairs[best].rank) best = i;
    if (pairs[best].rank == Merge::kNone) break;
    symbols[best] = pairs[best].id;
    for (std::size_t i = best + 1; i + 1 < n; ++i) {
      symbols[i] = symbols[i + 1];
      pairs[i - 1] = pairs[i];
    }
    --n;
    if (best > 0) pairs[best - 1] = bpe.merges.find(symbols[best - 1], symbols[best]);
    if (best + 1 < n) pairs[best] = bpe.merges.find(symbols[best], symbols[best + 1]);
  }
  symbols.resize(n);
}

// The same with a heap of (rank, position); an entry whose pair has changed since is passed over.
void merge_long(const Bpe& bpe, BpeScratch& s) {
  const auto n = static_cast<std::int32_t>(s.symbols.size());
  auto& [symbols, ranks, merged, next, previous, heap] = s;
  ranks.assign(symbols.size(), Merge::kNone);
  merged.assign(symbols.size(), -1);
  next.resize(symbols.size());
  previous.resize(symbols.size());
  heap.clear();
  const auto look_up = [&](std::int32_t i) {
    const Merge m = next[i] < n ? bpe.merges.find(symbols[i], symbols[next[i]]) : Merge{};
    ranks[i] = m.rank;
    merged[i] = m.id;
    return m.rank != Merge::kNone;
  };
  const auto entry = [&](std::int32_t i) {
    return static_cast<std::uint64_t>(ranks[i]) << 32 | static_cast<std::uint32_t>(i);
  };
  for (std::int32_t i = 0; i < n; ++i) {
    next[i] = i + 1;
    previous[i] = i - 1;
    if (look_up(i)) heap.push_back(entry(i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto push = [&](std::int32_t i) {
    if (!look_up(i)) return;
    heap.push_back(entry(i));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const auto rank = static_cast<std::int32_t>(heap.back() >> 32);
    const auto i = static_cast<std::int32_t>(heap.back() & 0xFFFFFFFF);
    heap.pop_back();
    if (ranks[i] != rank) continue;
    symbols[i] = merged[i];
    const std::int32_t gone = next[i];
    ranks[gone] = Merge::kNone;
    symbols[gone] = -1;
    next[i] = next[gone];
    if (next[i] < n) previous[next[i]] = i;
    push(i);
    if (previous[i] >= 0) push(previous[i]);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
}

}  // namespace

void encode_word(const Bpe& bpe, std::string_view word, BpeScratch& scratch,
                 std::vector<std::int32_t>& tokens) {
  if (word.empty()) return;
  if (const std::int32_t id = bpe.whole_words.find(word); id >= 0) {
    tokens.push_back(id);
    return;
  }
  scratch.symbols.clear();
  write_symbols(bpe, word, scratch.symbols);
  if (scratch.symbols.size() <= kShortWord) {
    merge_short(bpe, scratch);
  } else {
    merge_long(bpe, scratch);
  }
  tokens.insert(tokens.end(), scratch.symbols.begin(), scratch.symbols.end());
}

}  // namespace lockstep::model
