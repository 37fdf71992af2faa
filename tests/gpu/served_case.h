// Batches of attention as a server has them.
#pragma once

#include "ops/attention_case.h"

namespace lockstep::ops::test {

// Queries and keys of one sequence: the last `queries` of its `keys` positions.
struct Part {
  std::int64_t queries, keys;
};

// A batch as a server has it: a paged cache whose free rows hold NaN, pages in random order, query
// rows of no sequence before and behind the sequences'.
struct ServedCase {
  AttentionSizes sizes;
  std::vector<Part> parts;
  std::int64_t page_size = 0, max_queries = 0, max_keys = 0;
  Tensor q_THK, k_RJK, v_RJK, offsets_S1, lengths_S, pages_SP;
};

inline ServedCase served_case(Rng& rng, const AttentionSizes& n, const std::vector<Part>& parts,
                              std::int64_t page_size) {
  ServedCase x{n, parts, page_size, 0, 0, {}, {}, {}, {}, {}, {}};
  std::vector<std::int32_t> offsets{2}, lengths, order, table;
  std::int64_t pages = 2, width = 1;
  for (const Part& p : parts) {
    offsets.push_back(offsets.back() + static_cast<std::int32_t>(p.queries));
    lengths.push_back(static_cast<std::int32_t>(p.keys));
    const std::int64_t used = (p.keys + page_size - 1) / page_size;
    pages += used;
    width = std::max(width, used);
    x.max_queries = std::max(x.max_queries, p.queries);
    x.max_keys = std::max(x.max_keys, p.keys);
  }
  for (std::int64_t i = 0; i < pages; ++i) order.push_back(static_cast<std::int32_t>(i));
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng() % i]);
  const std::int64_t T = offsets.back() + 3, R = pages * page_size;
  x.q_THK = random_normal(rng, DType::kBf16, {T, n.H, n.K});
  x.k_RJK = random_normal(rng, DType::kBf16, {R, n.J, n.K});
  x.v_RJK = random_normal(rng, DType::kBf16, {R, n.J, n.Kv});  // of no meaning where latent
  std::vector<bool> written(static_cast<std::size_t>(R), false);
  std::size_t next = 0;
  for (const Part& p : parts)
    for (std::int64_t i = 0; i < width; ++i) {
      if (i * page_size >= p.keys) {
        table.push_back(-1);
        continue;
      }
      const std::int64_t page = order[next++];
      table.push_back(static_cast<std::int32_t>(page));
      for (std::int64_t r = 0; r < page_size && i * page_size + r < p.keys; ++r)
        written[static_cast<std::size_t>(page * page_size + r)] = true;
    }
  for (std::int64_t r = 0; r < R; ++r) {
    if (written[static_cast<std::size_t>(r)]) continue;
    for (const Tensor* cache : {&x.k_RJK, &x.v_RJK}) {
      const TensorView row = cache->view().rows(r, 1);
      std::memset(row.data, r % 2 == 0 ? 0xFF : 0x7F, row.bytes());
    }
  }
  x.offsets_S1 = int32_tensor(offsets);
  x.lengths_S = int32_tensor(lengths);
  const auto S = static_cast<std::int64_t>(parts.size());
  x.pages_SP = Tensor(Device::kCpu, DType::kInt32, {S, width});
  std::memcpy(x.pages_SP.view().data, table.data(), table.size() * sizeof(std::int32_t));
  return x;
}

inline std::string text(const AttentionSizes& n) {
  return "H " + std::to_string(n.H) + " J " + std::to_string(n.J) + " K " + std::to_string(n.K) +
         " Kv " + std::to_string(n.Kv) + (n.latent ? " latent" : "");
}

}  // namespace lockstep::ops::test
