#include "policy/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace lockstep::policy {

ScheduleKind parse_schedule(const std::string& text, const std::string& key) {
  if (text == "constant") return ScheduleKind::kConstant;
  if (text == "linear") return ScheduleKind::kLinear;
  if (text == "cosine") return ScheduleKind::kCosine;
  if (text == "wsd") return ScheduleKind::kWsd;
  base::fail<base::InputError>("{}: '{}' is not a schedule; use constant, linear, cosine or wsd",
                               key, text);
}

double learning_rate(const Schedule& s, std::int64_t step) {
  if (step <= s.warmup_steps)
    return s.lr * static_cast<double>(step) / static_cast<double>(s.warmup_steps);
  const double span =
      static_cast<double>(std::max<std::int64_t>(1, s.total_steps - s.warmup_steps));
  const double x = std::min(1.0, static_cast<double>(step - s.warmup_steps) / span);
  switch (s.kind) {
    case ScheduleKind::kConstant:
      return s.lr;
    case ScheduleKind::kLinear:
      return s.lr + (s.min_lr - s.lr) * x;
    case ScheduleKind::kCosine:
      return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1.0 + std::cos(std::numbers::pi * x));
    case ScheduleKind::kWsd:
      return x <= 0.8 ? s.lr : s.lr + (s.min_lr - s.lr) * (x - 0.8) / 0.2;
  }
  return s.lr;
}

}  // namespace lockstep::policy
