// Which kernel an FP8 GEMM runs on. All plans give the same bytes (docs/numerics.md, section 6), so
// the choice is one of speed alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::ops::cuda {

enum class GemmPlan {
  k128x256,  // tiles of rows x columns
  k128x128,  // for products of few tiles
  kFew,      // up to 64 rows a tile, for decode
};

const std::vector<std::string>& gemm_plan_names();  // in the order of the enumeration

// For M rows spread over E experts; what LOCKSTEP_PLAN names, if set.
GemmPlan plan_gemm(std::int64_t E, std::int64_t M, std::int64_t N, std::int64_t K);

}  // namespace lockstep::ops::cuda
