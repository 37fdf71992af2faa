// The folder of one run:
//   config.yaml metrics.jsonl tb/ rollouts/train_data_stepN.jsonl checkpoints/step_N/ report.html
//   logs/
// One process at a time: the folder is locked while it is open (the kernel frees the lock when the
// process ends, however it ends).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace lockstep::loop {

struct RunFolder {
  std::filesystem::path root;
  std::shared_ptr<const int> lock;

  std::filesystem::path config() const { return root / "config.yaml"; }
  std::filesystem::path metrics() const { return root / "metrics.jsonl"; }
  std::filesystem::path tensorboard() const { return root / "tb"; }
  std::filesystem::path rollouts() const { return root / "rollouts"; }
  std::filesystem::path rollout_file(std::int64_t step) const;
  std::filesystem::path checkpoints() const { return root / "checkpoints"; }
  std::filesystem::path report() const { return root / "report.html"; }
  std::filesystem::path logs() const { return root / "logs"; }
};

// True when the folder holds a run (its config.yaml, which is written first).
bool holds_run(const std::filesystem::path& root);

// Creates what is missing and takes the lock. SystemError when the folder cannot be written or
// another process has it; InputError when it holds a run and `resume` is false.
RunFolder open_run_folder(const std::filesystem::path& root, bool resume);

// Renames a finished run to the first free of ROOT.1, ROOT.2, ... and returns the new name, for a
// caller that wants to start anew under the old name.
std::filesystem::path set_aside_run(const std::filesystem::path& root);

// Removes rollout files of steps after `step`; a resumed run writes them again.
void discard_rollouts_after(const RunFolder& folder, std::int64_t step);

}  // namespace lockstep::loop
