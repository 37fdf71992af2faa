#include "ops/cuda/gemm_plan.h"

#include <algorithm>

#include "base/env.h"

namespace lockstep::ops::cuda {

const std::vector<std::string>& gemm_plan_names() {
  static const std::vector<std::string> names = {"256x128",  "256x128c", "128x128",
                                                 "128x128c", "128x160",  "128x192",
                                                 "192x128",  "192x128c", "few"};
  return names;
}

GemmPlan plan_gemm(std::int64_t E, std::int64_t M, std::int64_t N, std::int64_t K) {
  const auto& names = gemm_plan_names();
  if (const auto forced = base::env_choice("LOCKSTEP_PLAN", names))
    return static_cast<GemmPlan>(std::find(names.begin(), names.end(), *forced) - names.begin());
  (void)N, (void)K;
  const std::int64_t rows = M / E;
  if (rows <= 64) return GemmPlan::kFew;
  if (rows <= 128) return GemmPlan::k128x128;
  return GemmPlan::k256x128;
}

}  // namespace lockstep::ops::cuda
