#include "loop/compare.h"

#include <fmt/format.h>

#include <algorithm>

#include "apps/verbs.h"
#include "loop/report.h"

namespace lockstep::apps {

namespace {

struct CompareOptions {
  std::vector<std::string> runs;
  std::string output = "comparison.html";
  bool require_equal = false;
};

std::string cell(const std::optional<double>& x) { return x ? fmt::format("{:.6g}", *x) : "-"; }

void print_final_values(const std::vector<loop::RunData>& runs) {
  const auto width = [](const std::string& name) { return std::max<std::size_t>(14, name.size()); };
  fmt::print("{:<58}", "");
  for (const loop::RunData& run : runs) fmt::print("  {:>{}}", run.name, width(run.name));
  for (std::size_t i = 1; i < runs.size(); ++i)
    fmt::print("  {:>{}}", "gap of " + runs[i].name, width(runs[i].name) + 7);
  fmt::print("\n");
  for (const loop::FinalValue& value : loop::compare_final_values(runs)) {
    fmt::print("{:<58}", value.name);
    for (std::size_t i = 0; i < runs.size(); ++i)
      fmt::print("  {:>{}}", cell(value.of_run[i]), width(runs[i].name));
    for (std::size_t i = 1; i < runs.size(); ++i) {
      const auto gap = value.gap(i);
      fmt::print("  {:>{}}", gap ? fmt::format("{:+.6g}", *gap) : "-", width(runs[i].name) + 7);
    }
    fmt::print("\n");
  }
}

// Metrics that one run recorded at a step where the other did not.
void print_missing(const std::string& has, const std::string& lacks,
                   const std::vector<std::string>& metrics) {
  constexpr std::size_t kNamed = 5;
  if (metrics.empty()) return;
  const std::size_t named = std::min(metrics.size(), kNamed);
  fmt::print("recorded by {} and not by {} at the same step: {}{}\n", has, lacks,
             fmt::join(metrics.begin(), metrics.begin() + static_cast<std::ptrdiff_t>(named), ", "),
             metrics.size() > named ? fmt::format(" and {} more", metrics.size() - named) : "");
}

// Returns whether the two runs are equal to the bit, timings aside.
bool print_differences(const loop::RunData& a, const loop::RunData& b) {
  const auto config = loop::config_differences_of(a, b);
  fmt::print("\nconfiguration, {} -> {}: {}\n", a.name, b.name,
             config.empty() ? "no difference that decides what a step computes" : "");
  for (const std::string& line : config) fmt::print("  {}\n", line);
  const auto metrics = loop::first_differences(a, b);
  if (metrics.empty()) {
    fmt::print("metrics of {} and {}: equal to the bit in all {} steps, timings aside\n", a.name,
               b.name, a.rows.size());
    return true;
  }
  const std::string checksum = "sync/weight_checksum";
  const auto weights = std::find_if(metrics.begin(), metrics.end(),
                                    [&](const auto& d) { return d.metric == checksum; });
  fmt::print("weights ({}): {}\n", checksum,
             weights == metrics.end()
                 ? "equal at every common step"
                 : fmt::format("first different after step {}", weights->step));
  std::vector<std::string> only_a, only_b;
  fmt::print("first step at which each metric differs in a bit:\n");
  for (const loop::MetricDifference& d : metrics) {
    if (d.a == "-" && d.metric != "step")
      only_b.push_back(d.metric);
    else if (d.b == "-" && d.metric != "step")
      only_a.push_back(d.metric);
    else
      fmt::print("  step {:<6} {:<44} {} | {}\n", d.step, d.metric, d.a, d.b);
  }
  print_missing(a.name, b.name, only_a);
  print_missing(b.name, a.name, only_b);
  return false;
}

}  // namespace

void add_compare(CLI::App& app) {
  CLI::App* verb = app.add_subcommand(
      "compare", "hold runs against each other: final values, gaps, first different bit");
  verb->footer(
      "Example: lockstep compare runs/fp8 runs/bf16 --output fp8_against_bf16.html\n"
      "         lockstep compare runs/whole runs/resumed --require-equal");
  static CompareOptions options;
  verb->add_option("runs", options.runs, "two run folders or more; the first is the base")
      ->required();
  verb->add_option("-o,--output", options.output, "HTML report with all curves overlaid")
      ->capture_default_str();
  verb->add_flag("--require-equal", options.require_equal,
                 "end with exit code 1 when any metric but timing/* and performance/* differs in "
                 "a bit; writes no report unless --output is given");
  verb->callback([verb] {
    const std::vector<std::filesystem::path> folders(options.runs.begin(), options.runs.end());
    const auto runs = loop::read_runs(folders);
    print_final_values(runs);
    bool equal = true;
    for (std::size_t i = 1; i < runs.size(); ++i)
      equal = print_differences(runs[0], runs[i]) && equal;
    if (!options.require_equal || verb->count("--output") > 0) {
      loop::write_comparison(folders, options.output);
      fmt::print("\nreport: {}\n", options.output);
    }
    if (options.require_equal && !equal) throw CLI::RuntimeError(1);
  });
}

}  // namespace lockstep::apps
