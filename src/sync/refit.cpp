#include "sync/refit.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <memory>

#include "tensor/device.h"

namespace lockstep::sync {

std::string weight_checksum(const model::ModelView& view) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       &XXH3_freeState);
  LOCKSTEP_CHECK(state != nullptr && XXH3_128bits_reset(state.get()) == XXH_OK, "xxhash state");
  const auto add = [&](const tensor::TensorView& t) {
    tensor::read_pieces(t, [&](std::span<const std::byte> piece) {
      XXH3_128bits_update(state.get(), piece.data(), piece.size());
    });
  };
  for (std::size_t p = 0; p < view.weights->table.params.size(); ++p) {
    if (view.quantized->fp8[p]) {
      add(view.quantized->forward[p].codes_ENK);
      add(view.quantized->forward[p].scales);
    } else {
      add(view.weights->view(static_cast<int>(p)));
    }
  }
  add(view.weights->router_bias);
  const XXH128_hash_t hash = XXH3_128bits_digest(state.get());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

RefitReport share(const model::ModelView& policy, const model::ModelView& rollout) {
  LOCKSTEP_CHECK(policy.weights == rollout.weights,
                 "policy and rollout hold different weights; share() needs one set");
  return {policy.weights->version, 0, weight_checksum(rollout)};
}

}  // namespace lockstep::sync
