#include "loop/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"
#include "loop/config_load.h"

namespace lockstep::loop {

namespace fs = std::filesystem;

namespace {

bool measures_the_machine(const std::string& metric) {
  return metric.starts_with("timing/") || metric.starts_with("performance/");
}

// Equal type and bits; every null of a file is one NaN.
bool same(const MetricValue& a, const MetricValue& b) {
  const auto *x = std::get_if<double>(&a), *y = std::get_if<double>(&b);
  if (x != nullptr && y != nullptr)
    return std::bit_cast<std::uint64_t>(*x) == std::bit_cast<std::uint64_t>(*y);
  return a == b;
}

std::string value_text(const MetricValue& value) {
  if (const auto* integer = std::get_if<std::int64_t>(&value)) return fmt::format("{}", *integer);
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  const double x = std::get<double>(value);
  return std::isfinite(x) ? fmt::format("{}", x) : "null";
}

std::map<std::int64_t, const Metrics*> by_step(const RunData& run) {
  std::map<std::int64_t, const Metrics*> out;
  for (const MetricsRow& row : run.rows) out[row.step] = &row.values;
  return out;
}

}  // namespace

std::vector<RunData> read_runs(const std::vector<fs::path>& folders) {
  if (folders.size() < 2)
    base::fail<base::InputError>("a comparison needs two runs or more, {} named", folders.size());
  std::vector<RunData> runs;
  std::map<std::string, int> names;
  for (const fs::path& folder : folders) {
    runs.push_back(read_run(folder));
    ++names[runs.back().name];
  }
  for (RunData& run : runs)
    if (names[run.name] > 1) run.name = run.folder.string();
  return runs;
}

std::optional<double> FinalValue::gap(std::size_t i) const {
  if (!of_run[0] || !of_run[i]) return std::nullopt;
  return *of_run[i] - *of_run[0];
}

std::vector<FinalValue> compare_final_values(const std::vector<RunData>& runs) {
  using Pick = std::optional<double> (*)(const RunData&);
  const std::vector<std::pair<const char*, Pick>> picks = {
      {"steps",
       [](const RunData& r) -> std::optional<double> {
         if (r.rows.empty()) return std::nullopt;
         return static_cast<double>(r.rows.back().step);
       }},
      {"held-out loss, last (validation/loss)",
       [](const RunData& r) { return last_value(r, "validation/loss"); }},
      {"training loss, mean of the last tenth (train/loss)",
       [](const RunData& r) { return mean_value(r, "train/loss", 0.1); }},
      {"held-out accuracy, last (validation/accuracy)",
       [](const RunData& r) { return last_value(r, "validation/accuracy"); }},
      {"reward, mean of the last tenth (train/reward)",
       [](const RunData& r) { return mean_value(r, "train/reward", 0.1); }},
      {"gradient norm, mean of the last tenth (train/grad_norm)",
       [](const RunData& r) { return mean_value(r, "train/grad_norm", 0.1); }},
      {"entropy, last (train/approx_entropy)",
       [](const RunData& r) { return last_value(r, "train/approx_entropy"); }},
      {"log-probabilities compared (train/logprobs_compared)",
       [](const RunData& r) -> std::optional<double> {
         if (!last_value(r, "train/logprobs_compared")) return std::nullopt;
         return sum_values(r, "train/logprobs_compared");
       }},
      {"of these different in a bit (train/logprobs_different)",
       [](const RunData& r) -> std::optional<double> {
         if (!last_value(r, "train/logprobs_different")) return std::nullopt;
         return sum_values(r, "train/logprobs_different");
       }},
      {"probability error, mean (train/token_mult_prob_error)",
       [](const RunData& r) { return mean_value(r, "train/token_mult_prob_error"); }},
      {"divergence, mean (train/gen_kl_error)",
       [](const RunData& r) { return mean_value(r, "train/gen_kl_error"); }},
      {"divergence, mean (train/policy_kl_error)",
       [](const RunData& r) { return mean_value(r, "train/policy_kl_error"); }},
      {"steps skipped by the guard (guard/skipped_steps)",
       [](const RunData& r) -> std::optional<double> {
         if (!last_value(r, "guard/skipped_steps")) return std::nullopt;
         return sum_values(r, "guard/skipped_steps");
       }},
      {"tokens a second, mean (performance/tokens_per_sec)",
       [](const RunData& r) { return mean_value(r, "performance/tokens_per_sec"); }},
  };
  std::vector<FinalValue> out;
  for (const auto& [name, pick] : picks) {
    FinalValue value{name, {}};
    bool any = false;
    for (const RunData& run : runs) {
      value.of_run.push_back(pick(run));
      any = any || value.of_run.back();
    }
    if (any) out.push_back(std::move(value));
  }
  return out;
}

std::vector<MetricDifference> first_differences(const RunData& a, const RunData& b) {
  const auto rows_a = by_step(a), rows_b = by_step(b);
  std::set<std::int64_t> steps;
  for (const auto& [step, row] : rows_a) steps.insert(step);
  for (const auto& [step, row] : rows_b) steps.insert(step);
  std::vector<MetricDifference> out;
  std::set<std::string> found;
  const auto note = [&](const std::string& metric, std::int64_t step, std::string of_a,
                        std::string of_b) {
    if (found.insert(metric).second)
      out.push_back({metric, step, std::move(of_a), std::move(of_b)});
  };
  for (const std::int64_t step : steps) {
    const auto row_a = rows_a.find(step), row_b = rows_b.find(step);
    if (row_a == rows_a.end() || row_b == rows_b.end()) {
      note("step", step, row_a == rows_a.end() ? "-" : std::to_string(step),
           row_b == rows_b.end() ? "-" : std::to_string(step));
      continue;
    }
    std::set<std::string> names;
    for (const auto& [name, value] : *row_a->second) names.insert(name);
    for (const auto& [name, value] : *row_b->second) names.insert(name);
    for (const std::string& name : names) {
      if (measures_the_machine(name)) continue;
      const auto in_a = row_a->second->find(name), in_b = row_b->second->find(name);
      const bool missing_a = in_a == row_a->second->end(), missing_b = in_b == row_b->second->end();
      if (!missing_a && !missing_b && same(in_a->second, in_b->second)) continue;
      note(name, step, missing_a ? "-" : value_text(in_a->second),
           missing_b ? "-" : value_text(in_b->second));
    }
  }
  return out;
}

std::vector<std::string> config_differences_of(const RunData& a, const RunData& b) {
  if (!a.config || !b.config)
    return {
        fmt::format("{} has no config.yaml that this version reads", a.config ? b.name : a.name)};
  return config_differences(*a.config, *b.config);
}

}  // namespace lockstep::loop
