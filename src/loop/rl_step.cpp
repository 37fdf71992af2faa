#include "loop/rl_step.h"

#include <algorithm>
#include <numeric>

#include "loop/log.h"
#include "loop/progress.h"
#include "loop/session.h"
#include "model/fp8_import.h"
#include "model/hf_config.h"
#include "sync/refit.h"

namespace lockstep::loop {

using base::InputError;
using data::TrainSequence;

model::ModelView RlRun::rollout_view() const {
  return {weights.get(), rollout_weights.get(), policy.rope.cos_PK, policy.rope.sin_PK};
}

static void log_line(const std::string& line) { stderr_log().warn(line); }

static model::Weights initial_weights(const RunConfig& config) {
  const std::filesystem::path folder = config.policy.model_name;
  if (config.policy.load_format == "auto")
    return model::load_checkpoint(folder, byte_bar("reading"), log_line);
  model::Weights weights = model::make_weights(model::read_hf_config(folder));
  model::initialize(weights, static_cast<std::uint64_t>(config.grpo.seed));
  return weights;
}

// An FP8 checkpoint's codes serve as they are, until a training step changes the weights.
static void take_codes(const tensor::Context& ctx, const RunConfig& config, model::Weights& weights,
                       const model::Precision& precision) {
  if (config.policy.load_format != "auto") return;
  model::import_folder_fp8(ctx, config.policy.model_name, weights, precision, log_line);
}

std::unique_ptr<RlRun> make_rl_run(const RunConfig& config) {
  validate_rl(config);
  auto run = std::make_unique<RlRun>();
  run->config = config;
  tensor::Context ctx = make_context(config, run->workspace);
  if (config.logger.profile_ops && ctx.device == tensor::Device::kCuda)
    ctx.profile = (run->profile = std::make_unique<tensor::OpProfile>()).get();
  const std::filesystem::path model_folder = config.policy.model_name;
  if (!std::filesystem::is_directory(model_folder))
    base::fail<InputError>("policy.model_name: there is no folder '{}'", config.policy.model_name);
  run->tokenizer =
      model::read_tokenizer(config.policy.tokenizer.name.value_or(config.policy.model_name));
  run->weights = std::make_shared<model::Weights>(initial_weights(config));
  const model::ModelConfig& m = run->weights->config;
  if (run->tokenizer.vocab_size > m.vocab_size)
    base::fail<InputError>(
        "the tokenizer has {} tokens, but the model {}: they do not belong together",
        run->tokenizer.vocab_size, m.vocab_size);
  if (config.policy.max_total_sequence_length > m.max_positions)
    base::fail<InputError>("policy.max_total_sequence_length is {}, but the model has {} positions",
                           config.policy.max_total_sequence_length, m.max_positions);
  model::move_to(ctx, *run->weights);
  take_codes(ctx, config, *run->weights, policy_precision(config));
  if (rollout_precision(config) != policy_precision(config))
    take_codes(ctx, config, *run->weights, rollout_precision(config));
  run->policy = policy::make_policy(ctx, run->weights, policy_options(config));
  run->rollout_weights = model::quantized_for(ctx, *run->weights, rollout_precision(config));
  run->one_precision = run->rollout_weights == run->policy.quantized;
  run->preset = estimator(config);
  if (run->preset.loss.reference_policy_kl_penalty != 0) {
    run->reference = std::make_shared<model::Weights>(initial_weights(config));
    model::move_to(ctx, *run->reference);
    take_codes(ctx, config, *run->reference, policy_precision(config));
    run->reference_quantized = model::quantized_for(ctx, *run->reference, policy_precision(config));
    run->reference_checksum =
        sync::weight_checksum({run->reference.get(), run->reference_quantized.get(), {}, {}});
  }
  run->reward = reward_config(config);
  run->sampling = sampling_params(config, m);
  run->schedule = schedule(config, config.grpo.max_num_steps);
  run->train =
      std::make_unique<PromptSource>(config, config.data.train, rl::Split::kTrain, run->tokenizer);
  const DataSourceConfig& v = config.data.validation;
  run->validation =
      std::make_unique<PromptSource>(config, v.task || v.data_path ? v : config.data.train,
                                     rl::Split::kValidation, run->tokenizer);
  const model::Tokenizer* tokenizer = &run->tokenizer;
  run->engine = std::make_unique<rollout::Engine>(
      ctx, engine_options(config),
      [tokenizer](const std::vector<std::int32_t>& ids) { return model::decode(*tokenizer, ids); });
  run->engine->set_model(run->rollout_view(), run->weights->version);
  return run;
}

namespace {

// Samples `count` prompts in the data order, with their rewards.
void sample_prompts(RlRun& run, std::int64_t count, std::vector<data::Prompt>& prompts,
                    std::vector<data::Trajectory>& trajectories, Experience& e) {
  const double start = steady_time();
  std::vector<rollout::Request> requests;
  const auto first = prompts.size();
  for (std::int64_t i = 0; i < count; ++i) {
    prompts.push_back(run.train->prompt(run.next_prompt++));
    const data::Prompt& prompt = prompts.back();
    for (int sample = 0; sample < run.config.grpo.num_generations_per_prompt; ++sample) {
      rollout::Request r;
      r.seed = static_cast<std::uint64_t>(run.config.grpo.seed);
      r.stream = rollout::request_stream(prompt.id, sample);
      r.prompt_id = prompt.id;
      r.sample = sample;
      r.prompt = prompt.tokens;
      r.sampling = run.sampling;
      requests.push_back(std::move(r));
    }
  }
  std::vector<data::Trajectory> answers = run.engine->generate(std::move(requests));
  const double sampled = steady_time();
  std::vector<rl::RewardSample> samples;
  const auto group = static_cast<std::size_t>(run.config.grpo.num_generations_per_prompt);
  for (std::size_t i = 0; i < answers.size(); ++i) {
    const data::Prompt& prompt = prompts[first + i / group];
    samples.push_back({prompt.text, answers[i].text, prompt.label});
  }
  const std::vector<double> scores = rl::scores(run.reward, samples);
  for (std::size_t i = 0; i < answers.size(); ++i) answers[i].reward = scores[i];
  std::move(answers.begin(), answers.end(), std::back_inserter(trajectories));
  e.generation_seconds += sampled - start;
  e.reward_seconds += steady_time() - sampled;
}

bool rewards_differ(const data::Trajectory* group, std::size_t n) {
  return std::any_of(group, group + n,
                     [&](const data::Trajectory& t) { return t.reward != group[0].reward; });
}

}  // namespace

Experience gather(RlRun& run) {
  const GrpoConfig& g = run.config.grpo;
  const auto group = static_cast<std::size_t>(g.num_generations_per_prompt);
  Experience e;
  sample_prompts(run, g.num_prompts_per_step, e.prompts, e.trajectories, e);
  if (run.preset.advantages.use_dynamic_sampling) {
    // DAPO: keep groups whose rewards differ, and sample on until the step is full or the budget is
    // spent.
    std::vector<data::Prompt> kept_prompts;
    std::vector<data::Trajectory> kept;
    const auto wanted = static_cast<std::size_t>(g.num_prompts_per_step);
    for (;;) {
      for (std::size_t i = 0; i < e.prompts.size() && kept_prompts.size() < wanted; ++i) {
        if (!rewards_differ(&e.trajectories[i * group], group)) {
          ++e.groups_dropped;
          continue;
        }
        kept_prompts.push_back(e.prompts[i]);
        std::copy_n(e.trajectories.begin() + static_cast<std::ptrdiff_t>(i * group), group,
                    std::back_inserter(kept));
      }
      if (kept_prompts.size() == wanted ||
          e.generation_batches >= g.dynamic_sampling_max_gen_batches)
        break;
      e.prompts.clear(), e.trajectories.clear();
      sample_prompts(run, g.num_prompts_per_step, e.prompts, e.trajectories, e);
      ++e.generation_batches;
    }
    if (!kept_prompts.empty())
      e.prompts = std::move(kept_prompts), e.trajectories = std::move(kept);
  }
  e.advantages = rl::compute_advantages(run.preset.advantages, e.trajectories);
  return e;
}

namespace {

using Span = std::span<const TrainSequence>;

// Log-probabilities of all sequences, `logprob_batch_size` at a time.
policy::Logprobs score_all(RlRun& run, const model::ModelView& view, Span sequences) {
  const auto step = static_cast<std::size_t>(run.config.policy.logprob_batch_size);
  policy::Logprobs out;
  for (std::size_t i = 0; i < sequences.size(); i += step) {
    auto part = policy::score(run.policy.ctx, view,
                              sequences.subspan(i, std::min(step, sequences.size() - i)),
                              row_sampling(run.sampling));
    std::move(part.begin(), part.end(), std::back_inserter(out));
  }
  return out;
}

void compare(const RlRun& run, std::int64_t step, Span sequences, const policy::Logprobs& logprobs,
             rl::MismatchSums& sums) {
  const rl::LossConfig& l = run.preset.loss;
  const rl::ImportanceBounds bounds{l.truncated_importance_sampling_ratio_min.value_or(0.0),
                                    l.truncated_importance_sampling_ratio.value_or(1.0 / 0.0)};
  for (std::size_t i = 0; i < sequences.size(); ++i)
    rl::accumulate_mismatch(sequences[i], logprobs[i], bounds, sums);
  if (!run.one_precision || sums.logprobs_different == 0) return;
  const rl::FirstDifference d = rl::first_difference(sequences, logprobs);
  base::fail<base::SystemError>(
      "step {}: {} of {} log-probabilities of the policy differ from the rollout's, first in "
      "sequence {} at token {} ({:a} "
      "against {:a}). Both run the same precision, so this must not happen: the machine or the "
      "build is at fault. No weight was "
      "changed by this step",
      step, sums.logprobs_different, sums.logprobs_compared, d.sequence, d.position, d.trainer,
      d.rollout);
}

}  // namespace

std::int64_t scored_at_once(const RlRun& run) {
  const std::int64_t all =
      run.config.grpo.num_prompts_per_step * run.config.grpo.num_generations_per_prompt;
  const bool several_updates = all > train_global_batch_size(run.config);
  const bool scores = !run.one_precision || run.reference != nullptr ||
                      (run.config.grpo.verify_every > 0 && several_updates);
  return scores ? std::min(all, run.config.policy.logprob_batch_size) : 0;
}

void train(RlRun& run, std::int64_t step, const Experience& e, Metrics& metrics) {
  const double start = steady_time();
  data::TrainBatch batch = rl::make_train_batch(e.trajectories, e.advantages, run.one_precision);
  // A response without tokens has nothing to train on and no place in a forward batch.
  std::erase_if(batch.sequences, [](const TrainSequence& s) {
    return std::none_of(s.loss_mask.begin(), s.loss_mask.end(), [](float m) { return m > 0; });
  });
  std::vector<TrainSequence>& all = batch.sequences;
  const auto global = static_cast<std::size_t>(train_global_batch_size(run.config));
  const bool several_updates = all.size() > global;
  rl::MismatchSums mismatch;

  // 1. previous and reference log-probabilities, where they are not identities
  const bool verify = run.config.grpo.verify_every > 0 && step % run.config.grpo.verify_every == 0;
  if (!run.one_precision || (verify && several_updates)) {
    const policy::Logprobs prev = score_all(run, run.policy.view(), all);
    compare(run, step, all, prev, mismatch);
    for (std::size_t i = 0; i < all.size(); ++i) all[i].prev_logprobs = prev[i];
  }
  const bool compared = mismatch.logprobs_compared > 0;
  if (run.reference != nullptr) {
    const model::ModelView view{run.reference.get(), run.reference_quantized.get(),
                                run.policy.rope.cos_PK, run.policy.rope.sin_PK};
    const policy::Logprobs reference = score_all(run, view, all);
    for (std::size_t i = 0; i < all.size(); ++i) all[i].reference_logprobs = reference[i];
  }
  const double scored = steady_time();

  // 2. optimizer steps over global batches, each in micro-batches
  const double lr = policy::learning_rate(run.schedule, step);
  rl::LossSums sums;
  rl::LossDenominators valid;
  double loss = 0, grad_norm = 0;
  std::int64_t updates = 0, skipped = 0, trained_tokens = 0;
  for (std::size_t begin = 0; begin < all.size(); begin += global) {
    const Span part = Span(all).subspan(begin, std::min(global, all.size() - begin));
    const rl::LossDenominators denominators = rl::count_valid(part);
    policy::begin_step(run.policy);
    const auto micro = static_cast<std::size_t>(run.config.policy.train_micro_batch_size);
    for (std::size_t i = 0; i < part.size(); i += micro) {
      const Span sequences = part.subspan(i, std::min(micro, part.size() - i));
      const policy::Logprobs logprobs = policy::accumulate(
          run.policy, sequences,
          static_cast<double>(sequences.size()) / static_cast<double>(part.size()),
          row_sampling(run.sampling), [&](const policy::Logprobs& current, policy::Logprobs& d) {
            rl::MicroBatchLoss l =
                rl::micro_batch_loss(run.preset.loss, sequences, current, denominators);
            d = std::move(l.d_logprobs);
            sums += l.sums;
            return l.loss;
          });
      // The first update's weights are those that the rollout sampled with.
      if (begin == 0 && !compared) compare(run, step, sequences, logprobs, mismatch);
    }
    const policy::StepResult r = policy::finish_step(run.policy, lr);
    loss += r.loss, grad_norm += r.grad_norm;
    ++updates, skipped += r.skipped;
    valid.valid_tokens += denominators.valid_tokens,
        valid.valid_sequences += denominators.valid_sequences;
    trained_tokens += run.policy.tokens;
    for (const auto& [name, value] : r.metrics) metrics[name] = value;  // of the last update
    if (r.skipped) metrics["guard/skip_reason"] = r.skip_reason;
  }
  run.total_valid_tokens += static_cast<std::int64_t>(valid.valid_tokens);

  // 3. metrics
  const double n = static_cast<double>(std::max<std::int64_t>(1, updates));
  metrics["train/loss"] = loss / n;
  metrics["train/grad_norm"] = grad_norm / n;
  metrics["train/lr"] = lr;
  metrics["train/optimizer_steps"] = updates - skipped;
  metrics["guard/skipped_steps"] = skipped;
  for (const auto& [name, value] : rl::mismatch_metrics(mismatch)) metrics["train/" + name] = value;
  // approx_entropy and is_oob_ratio stand in both; the loss's own definition wins.
  for (const auto& [name, value] : rl::loss_metrics(run.preset.loss, sums, valid))
    metrics["train/" + name] = value;
  metrics["train/kl_penalty"] = sums.kl_penalty / n;  // a mean within each optimizer step
  metrics["train/logprobs_compared"] = mismatch.logprobs_compared;
  metrics["train/logprobs_different"] = mismatch.logprobs_different;
  metrics["train/trained_tokens"] = trained_tokens;
  metrics["timing/train/policy_and_reference_logprobs"] = scored - start;
  metrics["timing/train/policy_training"] = steady_time() - scored;
}

}  // namespace lockstep::loop
