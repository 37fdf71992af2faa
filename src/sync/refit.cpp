#include "sync/refit.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "ops/checksum.h"

namespace lockstep::sync {

std::string weight_checksum(const model::ModelView& view) {
  std::vector<tensor::TensorView> read;
  for (std::size_t p = 0; p < view.weights->table.params.size(); ++p) {
    if (view.quantized->fp8[p]) {
      read.push_back(view.quantized->forward[p].codes_ENK);
      read.push_back(view.quantized->forward[p].scales);
    } else {
      read.push_back(view.weights->view(static_cast<int>(p)));
    }
  }
  read.push_back(view.weights->router_bias);
  const std::vector<std::uint64_t> pieces = ops::piece_checksums(read);
  const XXH128_hash_t hash = XXH3_128bits(pieces.data(), pieces.size() * sizeof(pieces[0]));
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

RefitReport share(const model::ModelView& policy, const model::ModelView& rollout) {
  LOCKSTEP_CHECK(policy.weights == rollout.weights,
                 "policy and rollout hold different weights; share() needs one set");
  return {policy.weights->version, 0, weight_checksum(rollout)};
}

}  // namespace lockstep::sync
