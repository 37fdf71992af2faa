// A run's files: the locked folder, its log, resuming and saving. Shared by pretraining and
// reinforcement learning.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "loop/config.h"
#include "loop/log.h"
#include "loop/metrics.h"
#include "loop/run_folder.h"
#include "loop/train_state.h"

namespace lockstep::loop {

// Where a run starts: anew, after its newest valid checkpoint (anew when there is none), or after a
// given one.
struct Resume {
  enum Mode { kNever, kAuto, kPath } mode = kNever;
  std::filesystem::path path;
};
Resume parse_resume(const std::string& text);  // never | auto | a checkpoint folder

struct Session {
  RunFolder folder;
  std::filesystem::path checkpoints;
  Log log;
  std::optional<std::int64_t> resumed_after;
};

// Opens the run folder and, when resuming, restores policy and state; metrics and rollouts of later
// steps are cut off. InputError when the run was made with another configuration, or when it has
// checkpoints of which none is whole.
Session open_session(const RunConfig& config, const Resume& resume, policy::Policy& policy,
                     TrainState& state);

// Saves a checkpoint of `state.step` (metrics are durable by then), marked unhealthy, so that no
// resume starts from it, when a metric of the step or a master weight is not finite.
void save_session(const RunConfig& config, const Session& session, const policy::Policy& policy,
                  const model::Tokenizer& tokenizer, const TrainState& state,
                  const Metrics& metrics);

double wall_time();    // seconds since 1970
double steady_time();  // seconds, for differences

}  // namespace lockstep::loop
