// What the launch plans of latent attention share.
#pragma once

#include <algorithm>

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
  // Tokens share a tile where their rows of q are neighbours.
  const std::int64_t tokens = a.kv_heads == 1 ? std::max<std::int64_t>(1, kLatentRows / group) : 1;
  return {static_cast<int>(head_tiles),
          static_cast<int>((a.width + 63) / 64),
          latent_piece(a),
          static_cast<int>(tokens),
          1,
          (a.longest + tokens - 1) / tokens * a.sequences * a.kv_heads * head_tiles};
}

}  // namespace lockstep::ops::cuda
