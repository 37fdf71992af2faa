#include "loop/setup.h"

#include <algorithm>
#include <limits>

#include "rl/jsonl.h"
#include "tensor/device.h"

namespace lockstep::loop {

using base::InputError;

tensor::Context make_context(const RunConfig& config, tensor::Arena& workspace) {
  const std::string problem = config.device == "cpu" ? "" : tensor::cuda_problem();
  if (config.device == "cuda" && !problem.empty())
    base::fail<InputError>("device: cuda was asked for, but {}; use device=auto or device=cpu",
                           problem);
  if (config.device == "cpu" || !problem.empty()) {
    workspace = tensor::Arena(tensor::Device::kCpu);
    return tensor::cpu_context(workspace, static_cast<int>(config.num_threads));
  }
  workspace = tensor::Arena(tensor::Device::kCuda);
  return tensor::cuda_context(workspace);
}

namespace {

model::Precision precision_of(const std::string& precision, const std::string& key,
                              const Fp8Config& fp8) {
  model::Precision p;
  p.fp8 = model::parse_precision(precision, key);
  if (!p.fp8) return p;
  p.recipe = model::parse_recipe(fp8.recipe, key + " (fp8_cfg.recipe)");
  p.num_first_layers_in_bf16 = static_cast<int>(fp8.num_first_layers_in_bf16);
  p.num_last_layers_in_bf16 = static_cast<int>(fp8.num_last_layers_in_bf16);
  p.ignored_layers = fp8.ignored_layers;
  p.weight_pow2 = fp8.use_weight_pow2_scale;
  p.activation_pow2 = fp8.use_activation_pow2_scale;
  return p;
}

}  // namespace

model::Precision policy_precision(const RunConfig& config) {
  return precision_of(config.policy.precision, "policy.precision", config.policy.fp8_cfg);
}

model::Precision rollout_precision(const RunConfig& config) {
  return precision_of(generation_precision(config), "policy.generation.precision",
                      generation_fp8(config));
}

policy::PolicyOptions policy_options(const RunConfig& config) {
  const PolicyConfig& p = config.policy;
  policy::PolicyOptions o;
  o.precision = policy_precision(config);
  o.adamw = {p.optimizer.lr,
             p.optimizer.betas[0],
             p.optimizer.betas[1],
             p.optimizer.eps,
             p.optimizer.weight_decay,
             1,
             1.0f};
  o.bf16_moments = p.optimizer.moment_dtype == "bf16";
  o.max_grad_norm = p.max_grad_norm;
  o.activation_checkpointing = p.activation_checkpointing;
  o.aux_loss_coeff = p.moe.aux_loss_coeff;
  o.bias_update_rate = p.moe.bias_update_rate;
  o.guard = {p.guard.policy == "abort", p.guard.max_consecutive, p.guard.max_total};
  return o;
}

policy::Schedule schedule(const RunConfig& config, std::int64_t total_steps) {
  const SchedulerConfig& s = config.policy.scheduler;
  return {policy::parse_schedule(s.name, "policy.scheduler.name"), config.policy.optimizer.lr,
          s.min_lr, s.warmup_steps, s.total_steps.value_or(total_steps)};
}

rl::Preset estimator(const RunConfig& config) {
  const GrpoConfig& g = config.grpo;
  const LossConfig& l = config.loss_fn;
  const auto max_new = static_cast<int>(config.policy.generation.max_new_tokens);
  rl::Preset p = rl::preset(g.adv_estimator.name, max_new);
  const auto set = [](const auto& from, auto& to) {
    if (from) to = static_cast<std::remove_reference_t<decltype(to)>>(*from);
  };
  set(g.normalize_rewards, p.advantages.normalize_rewards);
  set(g.use_leave_one_out_baseline, p.advantages.use_leave_one_out_baseline);
  set(g.use_dynamic_sampling, p.advantages.use_dynamic_sampling);
  set(g.overlong_filtering, p.advantages.overlong_filtering);
  rl::RewardShaping& shaping = p.advantages.reward_shaping;
  set(g.reward_shaping.enabled, shaping.enabled);
  shaping.max_response_length = max_new;
  set(g.reward_shaping.max_response_length, shaping.max_response_length);
  shaping.overlong_buffer_length = std::max(1, shaping.max_response_length / 5);
  set(g.reward_shaping.overlong_buffer_length, shaping.overlong_buffer_length);
  set(g.reward_shaping.overlong_buffer_penalty, shaping.overlong_buffer_penalty);

  p.loss.reference_policy_kl_penalty = l.reference_policy_kl_penalty;
  p.loss.reference_policy_kl_type = rl::kl_type_from(l.reference_policy_kl_type);
  set(l.ratio_clip_min, p.loss.ratio_clip_min);
  set(l.ratio_clip_max, p.loss.ratio_clip_max);
  set(l.ratio_clip_c, p.loss.ratio_clip_c);
  set(l.sequence_level_importance_ratios, p.loss.sequence_level_importance_ratios);
  set(l.use_cispo, p.loss.use_cispo);
  p.loss.force_on_policy_ratio = l.force_on_policy_ratio;
  p.loss.use_importance_sampling_correction = l.use_importance_sampling_correction;
  if (l.use_importance_sampling_correction)
    p.loss.truncated_importance_sampling_type =
        rl::importance_truncation_from(l.truncated_importance_sampling_type);
  p.loss.truncated_importance_sampling_ratio = l.truncated_importance_sampling_ratio;
  p.loss.truncated_importance_sampling_ratio_min = l.truncated_importance_sampling_ratio_min;
  if (l.token_level_loss && !l.loss_agg)
    p.loss.loss_agg =
        *l.token_level_loss ? rl::LossAggregation::kTokenMean : rl::LossAggregation::kSeqMean;
  if (l.loss_agg) p.loss.loss_agg = rl::loss_aggregation_from(*l.loss_agg);
  if (p.loss.loss_agg == rl::LossAggregation::kSeqSumConst) p.loss.loss_agg_length = max_new;
  rl::validate(p.advantages);
  rl::validate(p.loss);
  return p;
}

data::SamplingParams sampling_params(const RunConfig& config, const model::ModelConfig& model) {
  const GenerationConfig& g = config.policy.generation;
  data::SamplingParams s;
  s.temperature = static_cast<float>(g.temperature);
  s.top_k = static_cast<int>(g.top_k);
  s.top_p = static_cast<float>(g.top_p);
  s.min_p = static_cast<float>(g.min_p);
  s.max_new_tokens = static_cast<int>(g.max_new_tokens);
  for (const std::int64_t id : g.stop_token_ids) {
    if (id < 0 || id >= model.vocab_size)
      base::fail<InputError>("policy.generation.stop_token_ids: {} is outside the vocabulary of {}",
                             id, model.vocab_size);
    s.stop_token_ids.push_back(static_cast<std::int32_t>(id));
  }
  for (const std::int32_t id : model.eos_token_ids)
    if (std::find(s.stop_token_ids.begin(), s.stop_token_ids.end(), id) == s.stop_token_ids.end())
      s.stop_token_ids.push_back(id);
  s.stop_strings = g.stop_strings;
  return s;
}

ops::RowSampling row_sampling(const data::SamplingParams& params) {
  ops::RowSampling r;
  r.temperature = params.temperature;
  r.top_k = params.top_k;
  r.top_p = params.top_p;
  r.min_p = params.min_p;
  return r;
}

rollout::Options engine_options(const RunConfig& config) {
  const GenerationConfig& g = config.policy.generation;
  rollout::Options o;
  o.max_num_seqs = static_cast<int>(g.max_num_seqs);
  o.block_size = static_cast<int>(g.block_size);
  o.num_blocks = static_cast<int>(g.num_blocks.value_or(0));
  o.max_num_batched_tokens = static_cast<int>(g.max_num_batched_tokens);
  o.enable_prefix_sharing = g.enable_prefix_sharing;
  o.enforce_eager = g.enforce_eager;
  o.max_model_len = static_cast<int>(config.policy.max_total_sequence_length);
  return o;
}

rl::RewardConfig reward_config(const RunConfig& config) {
  rl::RewardConfig r;
  r.kind = rl::reward_kind_from(config.env.reward);
  r.pattern = config.env.pattern.value_or("");
  r.command = config.env.command;
  r.time_limit_s = config.env.timeout_s;
  rl::validate(r);
  return r;
}

rl::TaskConfig task_config(const RunConfig& config, const DataSourceConfig& source) {
  rl::TaskConfig t;
  t.kind = rl::task_kind_from(source.task.value_or("reverse"));
  t.seed = static_cast<std::uint64_t>(source.seed.value_or(config.grpo.seed));
  t.min_length = static_cast<int>(source.length_min);
  t.max_length = static_cast<int>(source.length_max);
  t.alphabet = static_cast<int>(source.alphabet);
  t.min_digits = static_cast<int>(source.digits_min);
  t.max_digits = static_cast<int>(source.digits_max);
  t.noise = source.noise;
  rl::validate(t);
  return t;
}

PromptSource::PromptSource(const RunConfig& config, const DataSourceConfig& source, rl::Split split,
                           const model::Tokenizer& tokenizer)
    : system_prompt_(config.data.system_prompt.value_or("")),
      max_length_(config.policy.max_total_sequence_length),
      num_samples_(source.num_samples.value_or(0)),
      split_(split),
      shuffle_(config.data.shuffle && split == rl::Split::kTrain),
      seed_(static_cast<std::uint64_t>(source.seed.value_or(config.grpo.seed))),
      tokenizer_(tokenizer) {
  if (source.data_path) {
    file_ = rl::load_jsonl(*source.data_path, {source.input_key, source.output_key});
    if (num_samples_ > 0 && num_samples_ < static_cast<std::int64_t>(file_.size()))
      file_.resize(num_samples_);
    // All of them now rather than one in the middle of the run.
    for (const data::Prompt& line : file_) {
      data::Prompt copy = line;
      encode(copy, fmt::format("{}, prompt {}", *source.data_path, line.id + 1));
    }
  } else {
    task_ = task_config(config, source);
    prompt(0);
  }
}

void encode_prompt(const model::Tokenizer& tokenizer, const std::string& system_prompt,
                   data::Prompt& prompt) {
  if (prompt.messages.empty() || tokenizer.chat_template.kind == model::ChatTemplate::kNone) {
    prompt.text = system_prompt + prompt.text;
    prompt.tokens = model::encode(tokenizer, prompt.text, {.special_in_text = false});
    return;
  }
  std::vector<data::Message> messages = prompt.messages;
  if (!system_prompt.empty() && messages[0].role != "system")
    messages.insert(messages.begin(), {"system", system_prompt});
  prompt.text = model::chat_text(tokenizer, messages);
  prompt.tokens = model::encode(tokenizer, prompt.text, {.add_special = false});
}

void PromptSource::encode(data::Prompt& prompt, const std::string& where) const {
  encode_prompt(tokenizer_, system_prompt_, prompt);
  const auto length = static_cast<std::int64_t>(prompt.tokens.size());
  if (length == 0) base::fail<InputError>("{}: the prompt is empty", where);
  if (length >= max_length_)
    base::fail<InputError>(
        "{}: the prompt has {} tokens, which leaves no room for a response within "
        "policy.max_total_sequence_length, {}",
        where, length, max_length_);
}

std::int64_t PromptSource::size() const {
  if (!file_.empty()) return static_cast<std::int64_t>(file_.size());
  return num_samples_ > 0 ? num_samples_ : std::numeric_limits<std::int64_t>::max();
}

data::Prompt PromptSource::prompt(std::int64_t index) const {
  data::Prompt p;
  if (file_.empty()) {
    p = rl::problem(task_, split_, num_samples_ > 0 ? index % num_samples_ : index);
  } else {
    const auto n = static_cast<std::int64_t>(file_.size());
    const std::int64_t epoch = index / n, at = index % n;
    if (shuffle_ && (epoch != order_epoch_ || order_.empty())) {
      order_ = rl::epoch_order(n, seed_, static_cast<std::uint64_t>(epoch));
      order_epoch_ = epoch;
    }
    p = file_[static_cast<std::size_t>(shuffle_ ? order_[static_cast<std::size_t>(at)] : at)];
  }
  p.id = index;
  encode(p, fmt::format("prompt {}", index));
  return p;
}

}  // namespace lockstep::loop
