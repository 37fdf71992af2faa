#include "loop/pretrain.h"

#include <algorithm>

#include "base/file_io.h"
#include "loop/config_load.h"
#include "loop/corpus.h"
#include "loop/headline.h"
#include "loop/interrupt.h"
#include "loop/log.h"
#include "loop/progress.h"
#include "loop/report.h"
#include "loop/setup.h"
#include "loop/tensorboard.h"
#include "model/fp8_import.h"
#include "sync/refit.h"

namespace lockstep::loop {

namespace {

using Sequences = std::vector<data::TrainSequence>;

double valid_tokens(const Sequences& sequences) {
  double n = 0;
  for (const data::TrainSequence& s : sequences)
    for (const float m : s.loss_mask) n += m;
  return n;
}

model::ModelConfig model_config(const RunConfig& config, const model::Tokenizer& tokenizer) {
  const ModelShapeConfig& s = config.pretrain.model;
  model::ModelConfig m;
  m.vocab_size = s.vocab_size;
  m.hidden_size = s.hidden_size;
  m.num_layers = s.num_hidden_layers;
  m.num_heads = s.num_attention_heads;
  m.num_kv_heads = s.num_key_value_heads;
  m.head_dim = s.head_dim;
  m.max_positions = s.max_position_embeddings;
  m.rope_theta = s.rope_theta;
  m.rms_eps = static_cast<float>(s.rms_norm_eps);
  m.qk_norm = true;
  m.tie_word_embeddings = s.tie_word_embeddings;
  m.num_experts = s.num_experts;
  m.moe_intermediate_size = s.moe_intermediate_size;
  m.router.top_k = static_cast<int>(s.num_experts_per_tok);
  m.router.normalize = s.norm_topk_prob;
  m.initializer_range = s.initializer_range;
  m.bos_token_id = tokenizer.bos_id;
  m.eos_token_ids = {tokenizer.eos_id};
  m.pad_token_id = tokenizer.pad_id;
  model::validate(m, "pretrain.model");
  if (m.vocab_size < tokenizer.vocab_size)
    base::fail<base::InputError>("pretrain.model.vocab_size is {}, but the tokenizer has {} tokens",
                                 m.vocab_size, tokenizer.vocab_size);
  return m;
}

// Mean cross-entropy over the held-out sequences.
double validation_loss(const RunConfig& config, policy::Policy& policy, const Corpus& corpus) {
  const std::int64_t n = std::min(config.pretrain.max_val_samples, corpus.validation_size());
  double sum = 0, tokens = 0;
  for (std::int64_t begin = 0; begin < n; begin += config.pretrain.micro_batch_size) {
    Sequences sequences;
    for (std::int64_t i = begin; i < std::min(n, begin + config.pretrain.micro_batch_size); ++i)
      sequences.push_back(corpus.validation(i));
    const policy::Logprobs logprobs = policy::score(policy.ctx, policy.view(), sequences, {});
    for (std::size_t s = 0; s < sequences.size(); ++s)
      for (std::size_t t = 0; t < logprobs[s].size(); ++t)
        if (sequences[s].loss_mask[t] > 0) sum -= static_cast<double>(logprobs[s][t]);
    tokens += valid_tokens(sequences);
  }
  return sum / std::max(1.0, tokens);
}

// One optimizer step of mean cross-entropy over the step's tokens.
policy::StepResult train_step(const RunConfig& config, policy::Policy& policy, const Corpus& corpus,
                              std::int64_t step, double lr) {
  const std::int64_t batch = config.pretrain.batch_size, first = (step - 1) * batch;
  Sequences sequences;
  for (std::int64_t i = 0; i < batch; ++i) sequences.push_back(corpus.train(first + i));
  const double total = valid_tokens(sequences);
  const std::span<const data::TrainSequence> all(sequences);
  const auto micro = static_cast<std::size_t>(config.pretrain.micro_batch_size);
  policy::begin_step(policy);
  for (std::size_t begin = 0; begin < all.size(); begin += micro) {
    const auto part = all.subspan(begin, std::min(micro, all.size() - begin));
    policy::accumulate(policy, part,
                       static_cast<double>(part.size()) / static_cast<double>(all.size()), {},
                       [&](const policy::Logprobs& logprobs, policy::Logprobs& d) {
                         double loss = 0;
                         for (std::size_t s = 0; s < part.size(); ++s)
                           for (std::size_t t = 0; t < logprobs[s].size(); ++t) {
                             if (!(part[s].loss_mask[t] > 0)) continue;
                             loss -= static_cast<double>(logprobs[s][t]) / total;
                             d[s][t] = static_cast<float>(-1.0 / total);
                           }
                         return loss;
                       });
  }
  return policy::finish_step(policy, lr);
}

}  // namespace

PretrainSummary run_pretrain(const RunConfig& config, const Resume& resume) {
  validate_pretrain(config);
  const double started = steady_time();
  catch_interrupts();
  const PretrainConfig& p = config.pretrain;
  const bool from_checkpoint = !config.policy.model_name.empty();
  if (from_checkpoint && !std::filesystem::is_directory(config.policy.model_name))
    base::fail<base::InputError>("policy.model_name: there is no folder '{}'",
                                 config.policy.model_name);
  const model::Tokenizer tokenizer =
      from_checkpoint || config.policy.tokenizer.name
          ? model::read_tokenizer(config.policy.tokenizer.name.value_or(config.policy.model_name))
          : model::byte_tokenizer();
  const model::Log log_line = [](const std::string& line) { stderr_log().warn(line); };
  auto weights = std::make_shared<model::Weights>(
      from_checkpoint
          ? model::load_checkpoint(config.policy.model_name, byte_bar("reading"), log_line)
          : model::make_weights(model_config(config, tokenizer)));
  if (!from_checkpoint) model::initialize(*weights, static_cast<std::uint64_t>(p.seed));
  if (p.sequence_length > weights->config.max_positions)
    base::fail<base::InputError>("pretrain.sequence_length is {}, but the model has {} positions",
                                 p.sequence_length, weights->config.max_positions);
  tensor::Arena workspace;
  const tensor::Context ctx = make_context(config, workspace);
  model::move_to(ctx, *weights);
  if (from_checkpoint)
    model::import_folder_fp8(ctx, config.policy.model_name, *weights, policy_precision(config),
                             log_line);
  policy::Policy policy = policy::make_policy(ctx, weights, policy_options(config));
  const Corpus corpus(config, tokenizer);
  const policy::Schedule lr = schedule(config, p.max_num_steps);

  TrainState state;
  const Session session = open_session(config, resume, policy, state);
  MetricsWriter metrics_file(session.folder.metrics());
  std::optional<TensorBoardWriter> tensorboard;
  if (config.logger.tensorboard_enabled)
    tensorboard.emplace(session.folder.tensorboard(), wall_time(), session.resumed_after);
  Progress progress(stdout, state.step, p.max_num_steps);
  std::vector<std::string> headlines = {
      model_headline(config, weights->config, parameter_count(weights->table)),
      "data     " + corpus.description(), machine_headline(config, policy.ctx),
      folder_headline(config)};
  policy::MemoryPlan plan;
  if (ctx.device == tensor::Device::kCuda) {
    // The token behind a sequence's last is only a target.
    plan =
        policy::plan_memory(policy, std::min(p.micro_batch_size, p.batch_size),
                            p.sequence_length + 1, std::min(p.micro_batch_size, p.max_val_samples));
    headlines.push_back(memory_headline(plan, 0, tensor::device_memory(ctx)));
  }
  for (const std::string& line : headlines) {
    session.log.info(line);
    progress.note(line);
  }
  PretrainSummary summary;
  summary.folder = session.folder.root;
  summary.steps = state.step;

  // Asked once a step, so that the step that ends the run is the one that was saved.
  bool stop = interrupted();
  for (std::int64_t step = state.step + 1; step <= p.max_num_steps && !stop; ++step) {
    const double start = steady_time();
    const policy::StepResult r =
        train_step(config, policy, corpus, step, policy::learning_rate(lr, step));
    const double seconds = steady_time() - start;
    state.step = step;
    state.total_valid_tokens += policy.tokens;
    Metrics metrics(r.metrics.begin(), r.metrics.end());
    metrics["train/loss"] = r.loss;
    metrics["train/grad_norm"] = r.grad_norm;
    metrics["train/lr"] = r.lr;
    metrics["train/total_num_tokens"] = policy.tokens;
    metrics["guard/skipped_steps"] = std::int64_t{r.skipped};
    if (r.skipped) metrics["guard/skip_reason"] = r.skip_reason;
    metrics["sync/weight_checksum"] = sync::weight_checksum(policy.view());
    metrics["timing/train/total_step_time"] = seconds;
    metrics["performance/tokens_per_sec"] =
        static_cast<double>(policy.tokens) / std::max(1e-9, seconds);
    const bool last = step == p.max_num_steps;
    if (last || (p.val_period > 0 && step % p.val_period == 0)) {
      summary.validation_loss = validation_loss(config, policy, corpus);
      metrics["validation/loss"] = *summary.validation_loss;
    }
    metrics_file.append(step, metrics);
    if (tensorboard) tensorboard->append(step, metrics, wall_time());
    if (summary.steps++ == 0 || summary.first_loss == 0) summary.first_loss = r.loss;
    summary.last_loss = r.loss;
    const bool due =
        config.checkpointing.save_period > 0 && step % config.checkpointing.save_period == 0;
    stop = interrupted();
    if (config.checkpointing.enabled && (due || last || stop)) {
      metrics_file.sync();
      save_session(config, session, policy, tokenizer, state, metrics);
    }
    progress.step(
        step,
        fmt::format("step {:4d}  loss {:.4f}{}  grad {:.3f}  {:.0f} tok/s", step, r.loss,
                    metrics.contains("validation/loss")
                        ? fmt::format("  held-out {:.4f}", *summary.validation_loss)
                        : std::string(),
                    r.grad_norm, static_cast<double>(policy.tokens) / std::max(1e-9, seconds)),
        steady_time() - started);
  }
  progress.clear();
  summary.interrupted = stop && state.step < p.max_num_steps;
  if (!summary.interrupted) {
    summary.output = p.output ? std::filesystem::path(*p.output) : session.folder.root / "model";
    model::save_checkpoint(model::on_host(*weights), &tokenizer, summary.output);
  }
  if (ctx.device == tensor::Device::kCuda) {
    summary.memory = peak_memory_text(plan, policy);
    session.log.info("peak memory against the plan: " + summary.memory);
  }
  summary.report = write_report(session.folder.root);
  summary.seconds = steady_time() - started;
  return summary;
}

}  // namespace lockstep::loop
