// Reports: one HTML file with curves and tables, that needs nothing from outside itself.
#pragma once

#include <filesystem>
#include <vector>

namespace lockstep::loop {

// Writes <run_folder>/report.html from metrics.jsonl, config.yaml and rollouts/, and returns its
// path. Sections whose metrics the run does not have are left out, so runs of pretraining, of
// reinforcement learning and of one step all give a whole page. InputError when the folder holds no
// run.
std::filesystem::path write_report(const std::filesystem::path& run_folder);

// The same curves of two or more runs on top of each other, with final values and their gaps to the
// first run, into the file `out`.
void write_comparison(const std::vector<std::filesystem::path>& runs,
                      const std::filesystem::path& out);

}  // namespace lockstep::loop
