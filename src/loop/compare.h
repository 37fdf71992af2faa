// Two or more runs held against each other: final values and their gaps, and the first step at
// which each metric of two runs differs in a bit.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "loop/run_data.h"

namespace lockstep::loop {

// Reads the folders; InputError for fewer than two. Runs of one folder name get their path as name.
std::vector<RunData> read_runs(const std::vector<std::filesystem::path>& folders);

struct FinalValue {
  std::string name;
  std::vector<std::optional<double>> of_run;

  // Run i minus run 0, when both have it.
  std::optional<double> gap(std::size_t i) const;
};

// Final losses (last validation/loss, mean train/loss of the last tenth of the steps), last
// accuracy and reward, mismatch and speed; rows that no run has are left out.
std::vector<FinalValue> compare_final_values(const std::vector<RunData>& runs);

struct MetricDifference {
  std::string metric;  // "step" when one run lacks the row
  std::int64_t step = 0;
  std::string a, b;  // values in the shortest form that reads back to the same bits; "-" missing
};

// For each metric the first step where the two runs differ in a bit, by step and then by name.
// timing/* and performance/* are left out: they measure the machine.
std::vector<MetricDifference> first_differences(const RunData& a, const RunData& b);

// config_differences (loop/config_load.h) of the two, or one line that says why they cannot be
// compared.
std::vector<std::string> config_differences_of(const RunData& a, const RunData& b);

}  // namespace lockstep::loop
