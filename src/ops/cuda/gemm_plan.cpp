#include "ops/cuda/gemm_plan.h"

#include <algorithm>

#include "base/env.h"

namespace lockstep::ops::cuda {

static constexpr std::int64_t kMultiprocessors = 132;

const std::vector<std::string>& gemm_plan_names() {
  static const std::vector<std::string> names = {"128x256", "128x128", "few"};
  return names;
}

GemmPlan plan_gemm(std::int64_t E, std::int64_t M, std::int64_t N, std::int64_t K) {
  const auto& names = gemm_plan_names();
  if (const auto forced = base::env_choice("LOCKSTEP_PLAN", names))
    return static_cast<GemmPlan>(std::find(names.begin(), names.end(), *forced) - names.begin());
  (void)K;
  const std::int64_t rows = M / E, row_tiles = E * ((rows + 127) / 128);
  if (rows <= 16) return GemmPlan::kFew;
  const auto waves = [&](std::int64_t columns) {
    const std::int64_t tiles = row_tiles * ((N + columns - 1) / columns);
    return (tiles + kMultiprocessors - 1) / kMultiprocessors;
  };
  // A wave of 128x128 tiles takes five eighths of the time of one of 128x256.
  if (8 * waves(256) <= 5 * waves(128)) return GemmPlan::k128x256;
  return rows <= 64 ? GemmPlan::kFew : GemmPlan::k128x128;
}

}  // namespace lockstep::ops::cuda
