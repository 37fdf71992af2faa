#include "loop/session.h"

#include <chrono>

#include "base/file_io.h"
#include "loop/checkpoint_store.h"
#include "loop/config_load.h"
#include "ops/optimizer.h"

namespace lockstep::loop {

double wall_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

double steady_time() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Resume parse_resume(const std::string& text) {
  if (text == "never" || text.empty()) return {};
  if (text == "auto") return {Resume::kAuto, {}};
  return {Resume::kPath, text};
}

Session open_session(const RunConfig& config, const Resume& resume, policy::Policy& policy,
                     TrainState& state) {
  const std::filesystem::path root = config.logger.log_dir;
  const bool resuming = resume.mode != Resume::kNever && holds_run(root);
  if (resume.mode == Resume::kPath && !resuming)
    base::fail<base::InputError>("--resume {}: {} holds no run to go on with", resume.path.string(),
                                 root.string());
  Session s{open_run_folder(root, resume.mode != Resume::kNever),
            checkpoint_dir(config),
            {},
            std::nullopt};
  if (config.checkpointing.enabled) {
    std::error_code error;
    std::filesystem::create_directories(s.checkpoints, error);
    if (error)
      base::fail<base::SystemError>(
          "cannot create the folder {} (checkpointing.checkpoint_dir): {}", s.checkpoints.string(),
          base::describe_errno(error.value()));
  }
  s.log = open_log(s.folder.logs() / "lockstep.log");
  if (resuming) {
    const RunConfig before = load_config({s.folder.config()}, {});
    const auto differences = config_differences(before, config);
    if (!differences.empty())
      base::fail<base::InputError>(
          "{} was run with another configuration and cannot be resumed to the same bits: {}",
          root.string(), fmt::join(differences, "; "));
    FoundCheckpoint found;
    if (resume.mode == Resume::kPath) {
      found.problems = verify_checkpoint(resume.path, &found.manifest);
      if (!found.problems.empty())
        base::fail<base::InputError>("--resume {}: {}", resume.path.string(),
                                     fmt::join(found.problems, "; "));
      found.folder = resume.path;
    } else {
      found = find_latest_valid(s.checkpoints);
      for (const std::string& problem : found.problems) s.log.warn(problem);
    }
    if (found.folder) {
      state = read_train_state(*found.folder, policy);
      s.log.warn(fmt::format("resuming after step {} from {}", state.step, found.folder->string()));
    } else if (!list_checkpoints(s.checkpoints).empty()) {
      base::fail<base::InputError>(
          "{}: no checkpoint verifies ({}); remove the folder to start anew",
          s.checkpoints.string(), fmt::join(found.problems, "; "));
    }
    s.resumed_after = state.step;
    for (const std::string& note : truncate_metrics(s.folder.metrics(), state.step))
      s.log.warn(note);
    discard_rollouts_after(s.folder, state.step);
  }
  base::write_file_atomic(s.folder.config(), config_to_yaml(config));
  return s;
}

void save_session(const RunConfig& config, const Session& session, const policy::Policy& policy,
                  const model::Tokenizer& tokenizer, const TrainState& state,
                  const Metrics& metrics) {
  SaveRequest request;
  request.dir = session.checkpoints;
  request.step = state.step;
  request.contract_version = std::to_string(numerics::kContractVersion);
  request.config_hash = config_hash(config);
  request.healthy =
      non_finite_metrics(metrics).empty() && ops::count_nonfinite(policy.ctx, policy.master) == 0;
  if (config.checkpointing.metric_name)
    if (const auto m = metrics.find(*config.checkpointing.metric_name); m != metrics.end())
      if (const double* value = std::get_if<double>(&m->second)) request.metric = *value;
  request.keep_top_k = config.checkpointing.keep_top_k;
  request.higher_is_better = config.checkpointing.higher_is_better;
  const SaveReport report = save_checkpoint(request, [&](const std::filesystem::path& folder) {
    write_train_state(folder, policy, tokenizer, state);
  });
  for (const std::string& note : report.notes) session.log.info(note);
}

}  // namespace lockstep::loop
