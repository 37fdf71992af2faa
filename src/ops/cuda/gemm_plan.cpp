#include "ops/cuda/gemm_plan.h"

#include <algorithm>

#include "base/env.h"

namespace lockstep::ops::cuda {

static constexpr std::int64_t kMultiprocessors = 132;

const std::vector<std::string>& gemm_plan_names() {
  static const std::vector<std::string> names = {
      "256x128", "256x128-pair", "128x256", "128x256-pair", "v1", "v2", "v3", "v4", "v5", "128x128", "128x192", "192x128", "few"};
  return names;
}

GemmPlan plan_gemm(std::int64_t E, std::int64_t M, std::int64_t N, std::int64_t K) {
  const auto& names = gemm_plan_names();
  if (const auto forced = base::env_choice("LOCKSTEP_PLAN", names))
    return static_cast<GemmPlan>(std::find(names.begin(), names.end(), *forced) - names.begin());
  (void)K;
  const std::int64_t rows = M / E;
  if (rows <= 64) return GemmPlan::kFew;
  if (rows <= 160) return GemmPlan::k128x192;
  const std::int64_t tiles = E * ((rows + 255) / 256) * ((N + 127) / 128);
  if (tiles < kMultiprocessors) return GemmPlan::k128x128;
  return GemmPlan::k256x128Pair;
}

}  // namespace lockstep::ops::cuda
