#include "loop/rl_loop.h"

#include <nlohmann/json.hpp>

#include "base/file_io.h"
#include "loop/headline.h"
#include "loop/interrupt.h"
#include "loop/progress.h"
#include "loop/report.h"
#include "loop/rl_step.h"
#include "loop/tensorboard.h"
#include "sync/refit.h"
#include "tensor/device.h"

namespace lockstep::loop {

namespace {

const char* finish_name(data::FinishReason reason) {
  switch (reason) {
    case data::FinishReason::kStop:
      return "stop";
    case data::FinishReason::kLength:
      return "length";
    case data::FinishReason::kAbort:
      return "abort";
  }
  return "unknown";
}

// rollouts/train_data_stepN.jsonl: every sample of the step with its tokens, log-probabilities and
// reward.
void write_rollouts(const RunFolder& folder, std::int64_t step, const Experience& e) {
  std::string text;
  const std::size_t group = e.trajectories.size() / std::max<std::size_t>(1, e.prompts.size());
  for (std::size_t i = 0; i < e.trajectories.size(); ++i) {
    const data::Trajectory& t = e.trajectories[i];
    const data::Prompt& prompt = e.prompts[i / group];
    const nlohmann::ordered_json line = {{"prompt_id", t.prompt_id},
                                         {"sample", t.sample},
                                         {"prompt", prompt.text},
                                         {"response", t.text},
                                         {"label", prompt.label},
                                         {"reward", t.reward},
                                         {"advantage", e.advantages.advantage[i]},
                                         {"finish_reason", finish_name(t.finish)},
                                         {"weight_version", t.weight_version},
                                         {"contract_version", numerics::kContractVersion},
                                         {"response_tokens", t.response},
                                         {"logprobs", t.logprobs}};
    text += line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  }
  base::write_file_atomic(folder.rollout_file(step), text);
}

// Sums and means over the step's samples.
void sample_metrics(const Experience& e, Metrics& metrics) {
  double reward = 0, shaped = 0, tokens = 0, truncated = 0, prompt_tokens = 0;
  const double n = static_cast<double>(std::max<std::size_t>(1, e.trajectories.size()));
  for (std::size_t i = 0; i < e.trajectories.size(); ++i) {
    reward += e.trajectories[i].reward;
    shaped += e.advantages.shaped_reward[i];
    tokens += static_cast<double>(e.trajectories[i].response.size());
    prompt_tokens += static_cast<double>(e.trajectories[i].prompt.size());
    truncated += e.trajectories[i].finish != data::FinishReason::kStop;
  }
  metrics["train/reward"] = reward / n;
  metrics["train/mean_total_reward"] = shaped / n;
  metrics["train/mean_gen_tokens_per_sample"] = tokens / n;
  metrics["train/truncation_rate"] = truncated / n;
  metrics["train/total_num_tokens"] = tokens + prompt_tokens;
  metrics["train/generation_batches"] = e.generation_batches;
  metrics["train/groups_dropped"] = e.groups_dropped;
}

// Speed and memory of the step; with logger.profile_ops the GPU's time by op.
void machine_metrics(RlRun& run, std::int64_t generated, double generation_seconds,
                     Metrics& metrics) {
  metrics["performance/generation_tokens_per_sec"] =
      static_cast<double>(generated) / std::max(1e-9, generation_seconds);
  metrics["performance/policy_training_tokens_per_sec"] =
      static_cast<double>(std::get<std::int64_t>(metrics["train/trained_tokens"])) /
      std::max(1e-9, std::get<double>(metrics["timing/train/policy_training"]));
  metrics["performance/workspace_gib"] = static_cast<double>(run.workspace.peak_bytes()) / 0x1p30;
  metrics["performance/activations_gib"] =
      static_cast<double>(run.policy.saved.peak_bytes()) / 0x1p30;
  const tensor::DeviceMemory memory = tensor::device_memory(run.policy.ctx);
  if (memory.total > 0)
    metrics["performance/gpu_memory_gib"] =
        static_cast<double>(memory.total - memory.free) / 0x1p30;
  if (run.profile == nullptr) return;
  for (const auto& [op, time] : run.profile->collect(run.policy.ctx))
    metrics["timing/ops/" + op] = time.seconds;
}

std::string step_line(std::int64_t step, const Metrics& m) {
  const auto number = [&](const char* key) { return std::get<double>(m.at(key)); };
  const auto count = [&](const char* key) { return std::get<std::int64_t>(m.at(key)); };
  std::string line = fmt::format("step {:4d}  reward {:.3f}", step, number("train/reward"));
  if (const auto v = m.find("validation/accuracy"); v != m.end())
    line += fmt::format("  held-out {:.3f}", std::get<double>(v->second));
  else
    line += "                ";
  return line + fmt::format("  mismatch {}/{}  loss {:+.4f}  grad {:.3f}  {:.0f} tok/s  {:.2f} s",
                            count("train/logprobs_different"), count("train/logprobs_compared"),
                            number("train/loss"), number("train/grad_norm"),
                            number("performance/tokens_per_sec"),
                            number("timing/train/total_step_time"));
}

// The figures of all steps, also of those before a resume.
void sum_up(const std::vector<MetricsRow>& rows, RlSummary& summary) {
  for (const MetricsRow& row : rows) {
    if (const auto v = row.values.find("validation/accuracy"); v != row.values.end()) {
      const double accuracy = std::get<double>(v->second);
      if (!summary.first_accuracy) summary.first_accuracy = accuracy;
      summary.last_accuracy = accuracy;
    }
    summary.logprobs_compared += std::get<std::int64_t>(row.values.at("train/logprobs_compared"));
    summary.logprobs_different += std::get<std::int64_t>(row.values.at("train/logprobs_different"));
  }
}

}  // namespace

RlSummary run_rl(const RunConfig& config, const Resume& resume) {
  const double started = steady_time();
  catch_interrupts();
  std::unique_ptr<RlRun> run_owner = make_rl_run(config);
  RlRun& run = *run_owner;
  TrainState state;
  const Session session = open_session(config, resume, run.policy, state);
  if (state.step > 0 && state.reference_checksum != run.reference_checksum)
    base::fail<base::InputError>(
        "policy.model_name: {} holds other weights than when the run started, and they are the "
        "reference of its KL penalty; put the first ones back to resume",
        config.policy.model_name);
  run.next_prompt = state.next_prompt;
  run.total_valid_tokens = state.total_valid_tokens;
  run.engine->set_model(run.rollout_view(), run.weights->version);
  MetricsWriter metrics_file(session.folder.metrics());
  std::optional<TensorBoardWriter> tensorboard;
  if (config.logger.tensorboard_enabled)
    tensorboard.emplace(session.folder.tensorboard(), wall_time(), session.resumed_after);
  const std::int64_t last = config.grpo.max_num_steps;
  Progress progress(stdout, state.step, last);
  std::vector<std::string> headlines = rl_headlines(
      config, run.weights->config, parameter_count(run.weights->table), run.policy.ctx);
  policy::MemoryPlan plan;
  if (run.policy.ctx.device == tensor::Device::kCuda) {
    plan = policy::plan_memory(run.policy, config.policy.train_micro_batch_size,
                               config.policy.max_total_sequence_length, scored_at_once(run));
    headlines.push_back(
        memory_headline(plan, run.engine->cache_bytes(), tensor::device_memory(run.policy.ctx)));
  }
  for (const std::string& line : headlines) {
    session.log.info(line);
    progress.note(line);
  }
  RlSummary summary;
  summary.folder = session.folder.root;
  summary.steps = state.step;
  const auto held_out = [&] {
    return evaluate(*run.engine, *run.validation,
                    config.data.validation.num_samples.value_or(config.grpo.max_val_samples),
                    run.sampling, run.reward, static_cast<std::uint64_t>(config.grpo.seed),
                    config.logger.num_val_samples_to_print);
  };

  // Finite data ends the run with the step that uses up its last pass.
  const auto data_used_up = [&] {
    return run.next_prompt / run.train->size() >= config.grpo.max_num_epochs;
  };
  bool finished = state.step >= last || data_used_up();
  // Asked once a step, so that the step that ends the run is the one that was saved.
  bool stop = interrupted();
  for (std::int64_t step = state.step + 1; !finished && !stop; ++step) {
    const double step_start = steady_time();
    Metrics metrics;
    std::optional<EvalResult> evaluation;
    if (step == 1 && config.grpo.val_at_start) evaluation = held_out();

    const double train_start = steady_time();
    const rollout::EngineStats before = run.engine->stats();
    Experience e = gather(run);
    const rollout::EngineStats after = run.engine->stats();
    finished = step == last || data_used_up();
    sample_metrics(e, metrics);
    train(run, step, e, metrics);
    const double sync_start = steady_time();
    const sync::RefitReport refit = sync::share(run.policy.view(), run.rollout_view());
    run.engine->set_model(run.rollout_view(), refit.version);
    metrics["sync/weight_checksum"] = refit.checksum;
    metrics["sync/weight_version"] = static_cast<std::int64_t>(refit.version);
    metrics["sync/bytes_copied"] = refit.bytes_copied;
    const double trained = steady_time();

    if (config.grpo.val_period > 0 && (step % config.grpo.val_period == 0 || finished))
      evaluation = held_out();
    if (evaluation) {
      metrics["validation/accuracy"] = evaluation->accuracy;
      metrics["validation/samples"] = evaluation->samples;
      metrics["validation/mean_gen_tokens_per_sample"] = evaluation->mean_tokens;
      for (const EvalSample& s : evaluation->examples)
        session.log.info(fmt::format("step {} held-out: {}{} (label {}, reward {})", step, s.prompt,
                                     s.response, s.label, s.reward));
    }
    metrics["rollout/preemptions"] = after.preemptions - before.preemptions;
    metrics["rollout/shared_prefix_tokens"] =
        after.shared_prefix_tokens - before.shared_prefix_tokens;
    metrics["timing/train/generation"] = e.generation_seconds;
    metrics["timing/train/reward_calculation"] = e.reward_seconds;
    metrics["timing/train/prepare_for_generation/transfer_and_update_weights"] =
        trained - sync_start;
    metrics["timing/train/total_step_time"] = trained - train_start;
    metrics["timing/validation"] = steady_time() - trained + (train_start - step_start);
    metrics["performance/tokens_per_sec"] =
        std::get<double>(metrics["train/total_num_tokens"]) / std::max(1e-9, trained - train_start);

    machine_metrics(run, after.generated_tokens - before.generated_tokens, e.generation_seconds,
                    metrics);

    if (config.logger.log_rollouts) write_rollouts(session.folder, step, e);
    metrics_file.append(step, metrics);
    if (tensorboard) tensorboard->append(step, metrics, wall_time());
    summary.steps = step;
    const bool due =
        config.checkpointing.save_period > 0 && step % config.checkpointing.save_period == 0;
    stop = interrupted();
    if (config.checkpointing.enabled && (due || finished || stop)) {
      metrics_file.sync();
      save_session(config, session, run.policy, run.tokenizer,
                   {step, run.next_prompt, run.total_valid_tokens, run.reference_checksum},
                   metrics);
    }
    progress.step(step, step_line(step, metrics), steady_time() - started);
  }
  progress.clear();
  summary.interrupted = !finished;
  if (run.policy.ctx.device == tensor::Device::kCuda) {
    summary.memory = peak_memory_text(plan, run.policy);
    session.log.info("peak memory against the plan: " + summary.memory);
  }
  summary.seconds = steady_time() - started;
  sum_up(read_metrics(session.folder.metrics()), summary);
  summary.report = write_report(session.folder.root);
  return summary;
}

}  // namespace lockstep::loop
