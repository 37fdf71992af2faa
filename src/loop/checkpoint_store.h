// Checkpoints that survive kill -9, power loss, a full disk and flipped bits. A save is
//   1 write all files into DIR/tmp_step_N.<nonce>/     4 rename to DIR/step_N (exchange if it is
//   there) 2 fsync every file and folder                      5 fsync DIR 3 manifest.json with size
//   and hash of each, fsync  6 DIR/latest_checkpointed_iteration.txt
// and only after that are junk of earlier attempts and checkpoints beyond keep_top_k removed. At
// each moment the folders named step_N are whole. A reader trusts a manifest that verifies, never a
// name alone. One writer at a time (loop/run_folder.h locks the run).
//
// Failpoints (base/failpoint.h): save.begin, save.after_files, save.after_sync,
// save.after_manifest, save.after_rename, save.after_latest, save.in_retention.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "loop/checkpoint_manifest.h"

namespace lockstep::loop {

struct SaveRequest {
  std::filesystem::path dir;  // DIR above, made when absent
  std::int64_t step = 0;
  std::string contract_version;
  std::string config_hash;
  bool healthy = true;
  std::optional<double> metric;
  std::optional<std::int64_t> keep_top_k;  // nullopt: all
  bool higher_is_better = true;
};

struct SaveReport {
  std::filesystem::path folder;    // DIR/step_N
  std::vector<std::string> notes;  // removed junk and checkpoints; trouble after the rename
};

// Calls write_files with the empty temporary folder; it may create files and folders below and must
// throw when a write fails (base::OutputFile does, std::ofstream does not). When anything fails
// before the rename, the temporary folder is removed, older checkpoints are as they were, and the
// error is thrown with the step in front; disk trouble is a SystemError.
SaveReport save_checkpoint(const SaveRequest& request,
                           const std::function<void(const std::filesystem::path&)>& write_files);

// What is wrong with one checkpoint folder, naming the file; empty: every byte is as saved.
std::vector<std::string> verify_checkpoint(const std::filesystem::path& folder,
                                           Manifest* manifest = nullptr);

struct FoundCheckpoint {
  std::optional<std::filesystem::path> folder;  // the newest that verifies and is healthy
  Manifest manifest;
  std::vector<std::string> problems;  // why newer ones were passed over; junk that lies there
};

// Looks from the newest step down; deletes nothing. Without a valid folder but with problems, the
// caller should stop rather than start anew over damaged data.
FoundCheckpoint find_latest_valid(const std::filesystem::path& dir);

// The steps that have a folder, ascending, verified or not.
std::vector<std::int64_t> list_checkpoints(const std::filesystem::path& dir);

std::filesystem::path checkpoint_folder(const std::filesystem::path& dir, std::int64_t step);

}  // namespace lockstep::loop
