// Learning-rate schedules, evaluated in double.
#pragma once

#include <cstdint>
#include <string>

namespace lockstep::policy {

enum class ScheduleKind { kConstant, kLinear, kCosine, kWsd };
ScheduleKind parse_schedule(const std::string& text,
                            const std::string& key);  // constant | linear | cosine | wsd

// Warm-up: lr * step / warmup_steps for steps 1 .. warmup_steps. Then, with x = progress from the
// warm-up's end to total_steps: constant: lr; linear: lr + (min - lr) x; cosine: min + (lr - min)
// (1 + cos(pi x)) / 2; wsd: lr until the last fifth, which falls linearly to min. Beyond
// total_steps: the last value.
struct Schedule {
  ScheduleKind kind = ScheduleKind::kConstant;
  double lr = 1e-3, min_lr = 0;
  std::int64_t warmup_steps = 0, total_steps = 0;
};

double learning_rate(const Schedule& schedule, std::int64_t step);  // step counts from 1

}  // namespace lockstep::policy
