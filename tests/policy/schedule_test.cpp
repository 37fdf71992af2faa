#include "policy/schedule.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace lockstep::policy {
namespace {

TEST(Schedule, Shapes) {
  Schedule s{ScheduleKind::kConstant, 1.0, 0.1, 4, 24};
  EXPECT_DOUBLE_EQ(learning_rate(s, 1), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate(s, 4), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(s, 100), 1.0);
  s.kind = ScheduleKind::kLinear;
  EXPECT_DOUBLE_EQ(learning_rate(s, 14), 0.55);
  EXPECT_DOUBLE_EQ(learning_rate(s, 1000), 0.1);
  s.kind = ScheduleKind::kCosine;
  EXPECT_NEAR(learning_rate(s, 14), 0.55, 1e-12);
  EXPECT_NEAR(learning_rate(s, 24), 0.1, 1e-12);
  s.kind = ScheduleKind::kWsd;
  EXPECT_DOUBLE_EQ(learning_rate(s, 20), 1.0);
  EXPECT_NEAR(learning_rate(s, 22), 0.55, 1e-12);
  EXPECT_NEAR(learning_rate(s, 24), 0.1, 1e-12);
}

TEST(Schedule, UnknownNamesAreRefused) {
  EXPECT_EQ(parse_schedule("wsd", "k"), ScheduleKind::kWsd);
  EXPECT_THROW(parse_schedule("exponential", "policy.scheduler.name"), base::InputError);
}

}  // namespace
}  // namespace lockstep::policy
