#include "loop/config.h"

#include <filesystem>

#include "base/error.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;

std::string generation_precision(const RunConfig& config) {
  return config.policy.generation.precision.value_or(config.policy.precision);
}

Fp8Config generation_fp8(const RunConfig& config) {
  const Fp8Override& over = config.policy.generation.fp8_cfg;
  Fp8Config out = config.policy.fp8_cfg;
  out.recipe = over.recipe.value_or(out.recipe);
  out.num_first_layers_in_bf16 =
      over.num_first_layers_in_bf16.value_or(out.num_first_layers_in_bf16);
  out.num_last_layers_in_bf16 = over.num_last_layers_in_bf16.value_or(out.num_last_layers_in_bf16);
  out.ignored_layers = over.ignored_layers.value_or(out.ignored_layers);
  out.use_weight_pow2_scale = over.use_weight_pow2_scale.value_or(out.use_weight_pow2_scale);
  out.use_activation_pow2_scale =
      over.use_activation_pow2_scale.value_or(out.use_activation_pow2_scale);
  return out;
}

std::string checkpoint_dir(const RunConfig& config) {
  return config.checkpointing.checkpoint_dir.value_or(
      (std::filesystem::path(config.logger.log_dir) / "checkpoints").string());
}

std::int64_t train_global_batch_size(const RunConfig& config) {
  return config.policy.train_global_batch_size.value_or(config.grpo.num_prompts_per_step *
                                                        config.grpo.num_generations_per_prompt);
}

static void validate_source(const DataSourceConfig& source, const std::string& key) {
  if (source.task && source.data_path)
    fail<InputError>("{}.task and {}.data_path are both set: keep one", key, key);
  if (source.digits_min > source.digits_max)
    fail<InputError>("{}.digits_min is {}, above {}.digits_max, which is {}", key,
                     source.digits_min, key, source.digits_max);
  if (source.length_min > source.length_max)
    fail<InputError>("{}.length_min is {}, above {}.length_max, which is {}", key,
                     source.length_min, key, source.length_max);
}

static void validate_shared(const RunConfig& config) {
  const PolicyConfig& policy = config.policy;
  if (policy.optimizer.betas.size() != 2)
    fail<InputError>("policy.optimizer.betas has {} values, expected 2 (such as [0.9, 0.95])",
                     policy.optimizer.betas.size());
  for (const double beta : policy.optimizer.betas)
    if (!(beta >= 0.0 && beta < 1.0))
      fail<InputError>("policy.optimizer.betas holds {}, expected values from 0 to below 1", beta);
  if (policy.scheduler.total_steps && *policy.scheduler.total_steps < policy.scheduler.warmup_steps)
    fail<InputError>("policy.scheduler.total_steps is {}, below policy.scheduler.warmup_steps, {}",
                     *policy.scheduler.total_steps, policy.scheduler.warmup_steps);
  if (policy.scheduler.min_lr > policy.optimizer.lr)
    fail<InputError>("policy.scheduler.min_lr is {}, above policy.optimizer.lr, which is {}",
                     policy.scheduler.min_lr, policy.optimizer.lr);
  validate_source(config.data.train, "data.train");
  validate_source(config.data.validation, "data.validation");
}

void validate_rl(const RunConfig& config) {
  validate_shared(config);
  const PolicyConfig& policy = config.policy;
  if (policy.model_name.empty())
    fail<InputError>("policy.model_name is missing: give the folder of a Hugging Face checkpoint");
  if (!config.data.train.task && !config.data.train.data_path)
    fail<InputError>("no training data: set data.train.task or data.train.data_path");
  constexpr std::int64_t kMostSamples = std::int64_t{1} << 24;
  if (config.grpo.num_prompts_per_step > kMostSamples / config.grpo.num_generations_per_prompt)
    fail<InputError>(
        "grpo.num_prompts_per_step {} x grpo.num_generations_per_prompt {} is above {} samples a "
        "step",
        config.grpo.num_prompts_per_step, config.grpo.num_generations_per_prompt, kMostSamples);
  const std::int64_t samples =
      config.grpo.num_prompts_per_step * config.grpo.num_generations_per_prompt;
  const std::int64_t global = train_global_batch_size(config);
  if (samples % global != 0)
    fail<InputError>(
        "policy.train_global_batch_size is {}, which does not divide the {} samples of a step "
        "(grpo.num_prompts_per_step {} x grpo.num_generations_per_prompt {})",
        global, samples, config.grpo.num_prompts_per_step, config.grpo.num_generations_per_prompt);
  if (policy.generation.max_new_tokens >= policy.max_total_sequence_length)
    fail<InputError>(
        "policy.generation.max_new_tokens is {}, which leaves no room for a prompt within "
        "policy.max_total_sequence_length, {}",
        policy.generation.max_new_tokens, policy.max_total_sequence_length);
  // The last token of a sequence is never computed.
  const std::int64_t block = policy.generation.block_size;
  const std::int64_t pages = (policy.max_total_sequence_length - 1 + block - 1) / block;
  if (policy.generation.num_blocks && *policy.generation.num_blocks < pages)
    fail<InputError>(
        "policy.generation.num_blocks is {}, but one sequence of "
        "policy.max_total_sequence_length {} takes {} pages of policy.generation.block_size {}",
        *policy.generation.num_blocks, policy.max_total_sequence_length, pages, block);
  const LossConfig& loss = config.loss_fn;
  if (loss.force_on_policy_ratio && global != samples)
    fail<InputError>(
        "loss_fn.force_on_policy_ratio needs one optimizer step a rollout, but "
        "policy.train_global_batch_size is {} of the step's {} samples; leave it out",
        global, samples);
  if (loss.truncated_importance_sampling_ratio && loss.truncated_importance_sampling_ratio_min &&
      *loss.truncated_importance_sampling_ratio_min > *loss.truncated_importance_sampling_ratio)
    fail<InputError>(
        "loss_fn.truncated_importance_sampling_ratio_min is {}, above "
        "loss_fn.truncated_importance_sampling_ratio, which is {}",
        *loss.truncated_importance_sampling_ratio_min, *loss.truncated_importance_sampling_ratio);
  if (config.env.reward == "external" && config.env.command.empty())
    fail<InputError>(
        "env.reward is 'external' but env.command is empty: give the command as a list");
  if (config.env.reward == "regex" && !config.env.pattern)
    fail<InputError>("env.reward is 'regex' but env.pattern is missing");
}

void validate_pretrain(const RunConfig& config) {
  validate_shared(config);
  const PretrainConfig& pretrain = config.pretrain;
  if (!pretrain.data_path && pretrain.mixture.empty())
    fail<InputError>("no training data: set pretrain.data_path or pretrain.mixture");
  if (pretrain.data_path && !pretrain.mixture.empty())
    fail<InputError>("pretrain.data_path and pretrain.mixture are both set: keep one");
  if (pretrain.batch_size % pretrain.micro_batch_size != 0)
    fail<InputError>("pretrain.batch_size is {}, not a multiple of pretrain.micro_batch_size, {}",
                     pretrain.batch_size, pretrain.micro_batch_size);
  const ModelShapeConfig& model = pretrain.model;
  if (model.num_attention_heads % model.num_key_value_heads != 0)
    fail<InputError>(
        "pretrain.model.num_attention_heads is {}, not a multiple of "
        "pretrain.model.num_key_value_heads, {}",
        model.num_attention_heads, model.num_key_value_heads);
  if (model.num_experts_per_tok > model.num_experts)
    fail<InputError>(
        "pretrain.model.num_experts_per_tok is {}, above pretrain.model.num_experts, {}",
        model.num_experts_per_tok, model.num_experts);
  if (model.head_dim % 2 != 0)
    fail<InputError>("pretrain.model.head_dim is {}, expected an even number", model.head_dim);
}

}  // namespace lockstep::loop
