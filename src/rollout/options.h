// How the rollout runs. None of these values changes a token or a log-probability, only time and
// memory; max_model_len also says where a response is cut.
#pragma once

#include <cstdint>

namespace lockstep::rollout {

struct Options {
  int max_num_seqs = 256;       // sequences in one forward
  int block_size = 16;          // tokens a page
  std::int64_t num_blocks = 0;  // pages; 0: enough for max_num_seqs of max_model_len,
                                // within kv_cache_bytes, at least one whole sequence
  std::int64_t kv_cache_bytes = std::int64_t{1} << 30;  // bounds num_blocks = 0
  int max_num_batched_tokens = 2048;                    // tokens in one forward
  int prefill_chunk = 0;  // most prompt tokens of one sequence in a forward; 0: no bound
  bool enable_prefix_sharing = true;  // sequences of one prompt compute it once
  std::int64_t max_model_len = 0;     // prompt and response; 0: the model's max_positions
  bool enforce_eager = false;         // on a GPU: decode steps are launched op by op, not as graphs
  // For tests: other than 0, pages are handed out in an order shuffled by this seed and the cache
  // starts full of NaN.
  std::uint64_t shuffle_pages = 0;
};

}  // namespace lockstep::rollout
