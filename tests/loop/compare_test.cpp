#include "loop/compare.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "loop/report_run.h"
#include "loop/temp_dir.h"

namespace lockstep::loop {
namespace {

using Compare = TempDirTest;

const FinalValue* find(const std::vector<FinalValue>& values, const std::string& part) {
  for (const FinalValue& v : values)
    if (v.name.find(part) != std::string::npos) return &v;
  return nullptr;
}

TEST_F(Compare, EqualRunsHaveNoDifference) {
  write_rl_run(dir / "a", 5);
  write_rl_run(dir / "b", 5);
  const auto runs = read_runs({dir / "a", dir / "b"});
  EXPECT_TRUE(first_differences(runs[0], runs[1]).empty());  // null against null included
  EXPECT_TRUE(config_differences_of(runs[0], runs[1]).empty());
}

TEST_F(Compare, TimingsAndSpeedsMayDiffer) {
  std::filesystem::create_directories(dir / "a");
  std::filesystem::create_directories(dir / "b");
  put("a/metrics.jsonl", "{\"step\": 1, \"timing/x\": 1.0, \"performance/y\": 1.0, \"z\": 1}\n");
  put("b/metrics.jsonl", "{\"step\": 1, \"timing/x\": 2.0, \"performance/y\": 3.0, \"z\": 1}\n");
  const auto runs = read_runs({dir / "a", dir / "b"});
  EXPECT_TRUE(first_differences(runs[0], runs[1]).empty());
}

TEST_F(Compare, OneBitAndOneTypeAndOneMissingRowAreFound) {
  std::filesystem::create_directories(dir / "a");
  std::filesystem::create_directories(dir / "b");
  put("a/metrics.jsonl",
      "{\"step\": 1, \"x\": 0.1, \"n\": 1, \"w\": \"aa\"}\n"
      "{\"step\": 2, \"x\": 0.1, \"n\": 1, \"w\": \"aa\"}\n"
      "{\"step\": 3, \"x\": 0.1, \"n\": 1, \"w\": \"aa\"}\n");
  put("b/metrics.jsonl",
      "{\"step\": 1, \"x\": 0.1, \"n\": 1.0, \"w\": \"aa\"}\n"
      "{\"step\": 2, \"x\": 0.10000000000000002, \"n\": 1, \"w\": \"ab\", \"new\": 0.0}\n");
  const auto runs = read_runs({dir / "a", dir / "b"});
  const auto d = first_differences(runs[0], runs[1]);
  ASSERT_EQ(d.size(), 5u);
  EXPECT_EQ(d[0].metric, "n");
  EXPECT_EQ(d[0].step, 1);
  EXPECT_EQ(d[1].metric, "new");
  EXPECT_EQ(d[1].a, "-");
  EXPECT_EQ(d[2].metric, "w");
  EXPECT_EQ(d[2].b, "ab");
  EXPECT_EQ(d[3].metric, "x");
  EXPECT_EQ(d[3].step, 2);
  EXPECT_EQ(d[3].b, "0.10000000000000002");
  EXPECT_EQ(d[4].metric, "step");
  EXPECT_EQ(d[4].step, 3);
}

TEST_F(Compare, FinalLossIsTheMeanOfTheLastTenth) {
  std::filesystem::create_directories(dir / "a");
  std::filesystem::create_directories(dir / "b");
  std::string a, b;
  for (int step = 1; step <= 20; ++step) {
    const std::string start = "{\"step\": " + std::to_string(step) + ", \"train/loss\": ";
    a += start + (step == 19 ? "3.0" : step == 20 ? "5.0" : "9.0") + "}\n";
    b += start + "4.5}\n";
  }
  put("a/metrics.jsonl", a);
  put("b/metrics.jsonl", b);
  const auto values = compare_final_values(read_runs({dir / "a", dir / "b"}));
  const FinalValue* loss = find(values, "train/loss");
  ASSERT_NE(loss, nullptr);
  EXPECT_EQ(loss->of_run[0], 4.0);
  EXPECT_EQ(loss->gap(1), 0.5);
  EXPECT_EQ(find(values, "validation/loss"), nullptr);
}

TEST_F(Compare, ValuesThatAreNotFiniteCountInNoMean) {
  put("metrics.jsonl",
      "{\"step\": 1, \"x\": 3.0, \"gone\": null}\n{\"step\": 2, \"x\": null}\n"
      "{\"step\": 3, \"x\": 5.0}\n{\"step\": 4, \"x\": null}\n");
  const RunData run = read_run(dir);
  EXPECT_EQ(mean_value(run, "x"), 4.0);
  EXPECT_EQ(sum_values(run, "x"), 8.0);
  EXPECT_EQ(last_value(run, "x"), 5.0);
  EXPECT_EQ(first_value(run, "gone"), std::nullopt);
  EXPECT_EQ(mean_value(run, "gone"), std::nullopt);
}

TEST_F(Compare, NamesConfigurationDifferences) {
  write_rl_run(dir / "a", 1);
  write_rl_run(dir / "b", 1);
  put("b/config.yaml", "grpo:\n  seed: 8\n");
  const auto runs = read_runs({dir / "a", dir / "b"});
  EXPECT_EQ(config_differences_of(runs[0], runs[1]), std::vector<std::string>{"grpo.seed: 7 -> 8"});
}

TEST_F(Compare, RunsOfOneNameAreToldApart) {
  write_rl_run(dir / "x" / "run", 1);
  write_rl_run(dir / "y" / "run", 1);
  const auto runs = read_runs({dir / "x" / "run", dir / "y" / "run"});
  EXPECT_NE(runs[0].name, runs[1].name);
  EXPECT_THROW(read_runs({dir / "x" / "run"}), base::InputError);
}

}  // namespace
}  // namespace lockstep::loop
