// What the launch plans of latent attention share.
#pragma once

#include "ops/cuda/attention_latent_parts.cuh"
#include "ops/cuda/attention_launch.h"

namespace lockstep::ops::cuda {

// The largest power of two, up to what one warp loads of a block, that divides a page.
inline int latent_piece(const AttentionArgs& a) {
  int piece = kLoadRows;
  while (a.pages != nullptr && a.page_size % piece != 0) piece /= 2;
  return piece;
}

inline LatentShape latent_shape(const AttentionArgs& a) {
  const std::int64_t group = a.heads / a.kv_heads;
  const std::int64_t head_tiles = (group + kLatentRows - 1) / kLatentRows;
  return {static_cast<int>(head_tiles), static_cast<int>((a.width + 63) / 64), latent_piece(a),
          a.longest * a.sequences * a.kv_heads * head_tiles};
}

}  // namespace lockstep::ops::cuda
