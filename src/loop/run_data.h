// A finished or running run, read back from its folder for reports and comparisons.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "loop/chart.h"
#include "loop/config.h"
#include "loop/metrics.h"

namespace lockstep::loop {

struct RunData {
  std::filesystem::path folder;
  std::string name;  // last part of the folder's path
  std::vector<MetricsRow> rows;
  std::string config_text;          // config.yaml as it stands, "" when missing
  std::optional<RunConfig> config;  // when this version can read it
};

// InputError when the folder has no metrics.jsonl.
RunData read_run(const std::filesystem::path& folder);

// (step, value) of the rows that have this metric as a number.
Series metric_series(const RunData& run, const std::string& metric, const std::string& name);

// Every metric with at least one number, in alphabetical order.
std::vector<std::string> metric_names(const RunData& run);

std::optional<double> first_value(const RunData& run, const std::string& metric);
std::optional<double> last_value(const RunData& run, const std::string& metric);

// Over finite values; nullopt when there are none. `fraction` < 1: of the last rows only (at least
// one row), as the mean loss of the last tenth of a run.
std::optional<double> mean_value(const RunData& run, const std::string& metric,
                                 double fraction = 1);
double sum_values(const RunData& run, const std::string& metric);

}  // namespace lockstep::loop
