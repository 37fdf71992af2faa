#include "loop/config_keys.h"

#include <utility>

namespace lockstep::loop {

namespace {

constexpr double kBig = 2147483647;  // counts fit an int everywhere
constexpr ConfigRange kAny{};
constexpr ConfigRange kCount{1, kBig};
constexpr ConfigRange kFromZero{0, kBig};
constexpr ConfigRange kSeed{0, 9007199254740992.0};  // 2^53: exact in a double
constexpr ConfigRange kPositive{0, std::numeric_limits<double>::max(), true};
constexpr ConfigRange kNotNegative{0, std::numeric_limits<double>::max()};
constexpr ConfigRange kFraction{0, 1};

using Keys = std::vector<ConfigKey>;
const char* const kPreset = "; null: preset of grpo.adv_estimator.name";

void add(Keys& keys, std::string name, ConfigSlot slot, ConfigRange range, std::string help,
         std::vector<std::string> choices = {}) {
  keys.push_back({std::move(name), slot, range, std::move(choices), std::move(help), false});
}
void add_operational(Keys& keys, std::string name, ConfigSlot slot, ConfigRange range,
                     std::string help, std::vector<std::string> choices = {}) {
  keys.push_back({std::move(name), slot, range, std::move(choices), std::move(help), true});
}

void add_grpo(Keys& keys, GrpoConfig& c) {
  add(keys, "grpo.num_prompts_per_step", &c.num_prompts_per_step, kCount, "prompts of one step");
  add(keys, "grpo.num_generations_per_prompt", &c.num_generations_per_prompt, kCount,
      "samples of each prompt (the group)");
  add_operational(keys, "grpo.max_num_steps", &c.max_num_steps, kFromZero,
                  "stop after this many steps, counted from the start of the run");
  add_operational(keys, "grpo.max_num_epochs", &c.max_num_epochs, kCount,
                  "stop after this many passes over the data");
  add_operational(keys, "grpo.val_period", &c.val_period, kFromZero,
                  "evaluate every so many steps; 0: only at the start");
  add_operational(keys, "grpo.val_at_start", &c.val_at_start, kAny,
                  "evaluate before the first step");
  add_operational(keys, "grpo.max_val_samples", &c.max_val_samples, kCount,
                  "held-out prompts of an evaluation");
  add(keys, "grpo.seed", &c.seed, kSeed, "seed of sampling and data order");
  add(keys, "grpo.normalize_rewards", &c.normalize_rewards, kAny,
      std::string("divide advantages by the group's standard deviation") + kPreset);
  add(keys, "grpo.use_leave_one_out_baseline", &c.use_leave_one_out_baseline, kAny,
      std::string("the baseline of a sample is the mean of the others") + kPreset);
  add(keys, "grpo.use_dynamic_sampling", &c.use_dynamic_sampling, kAny,
      std::string("drop groups of equal rewards and sample more") + kPreset);
  add(keys, "grpo.dynamic_sampling_max_gen_batches", &c.dynamic_sampling_max_gen_batches, kCount,
      "most rollout batches of one step under dynamic sampling");
  add(keys, "grpo.overlong_filtering", &c.overlong_filtering, kAny,
      std::string("leave samples that hit the length limit out of the loss") + kPreset);
  add(keys, "grpo.reward_shaping.enabled", &c.reward_shaping.enabled, kAny,
      std::string("penalise responses near the length limit") + kPreset);
  add(keys, "grpo.reward_shaping.overlong_buffer_length", &c.reward_shaping.overlong_buffer_length,
      kCount,
      "tokens before the limit over which the penalty grows; null: a fifth of the limit, at least "
      "1");
  add(keys, "grpo.reward_shaping.overlong_buffer_penalty",
      &c.reward_shaping.overlong_buffer_penalty, kNotNegative, "penalty at the limit; null: 1");
  add(keys, "grpo.reward_shaping.max_response_length", &c.reward_shaping.max_response_length,
      kCount, "the limit; null: policy.generation.max_new_tokens");
  add(keys, "grpo.adv_estimator.name", &c.adv_estimator.name, kAny,
      "algorithm, sets the presets of grpo.* and loss_fn.*",
      {"grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"});
  add_operational(keys, "grpo.verify_every", &c.verify_every, kFromZero,
                  "every so many steps recompute all log-probabilities of the rollout and compare "
                  "them to the bit; 0: never");
}

void add_loss(Keys& keys, LossConfig& c) {
  add(keys, "loss_fn.reference_policy_kl_penalty", &c.reference_policy_kl_penalty, kNotNegative,
      "weight of the KL term against the initial policy; 0: no reference pass");
  add(keys, "loss_fn.reference_policy_kl_type", &c.reference_policy_kl_type, kAny, "KL estimator",
      {"k1", "k2", "k3"});
  add(keys, "loss_fn.ratio_clip_min", &c.ratio_clip_min, kNotNegative,
      std::string("the ratio is clipped at 1 - this") + kPreset);
  add(keys, "loss_fn.ratio_clip_max", &c.ratio_clip_max, kNotNegative,
      std::string("the ratio is clipped at 1 + this") + kPreset);
  add(keys, "loss_fn.ratio_clip_c", &c.ratio_clip_c, {1, 1e6, true},
      "dual clip for negative advantages; null: off");
  add(keys, "loss_fn.use_importance_sampling_correction", &c.use_importance_sampling_correction,
      kAny, "weight the loss by policy over rollout probability");
  add(keys, "loss_fn.truncated_importance_sampling_type", &c.truncated_importance_sampling_type,
      kAny, "how those weights are bounded", {"off", "tis", "icepop", "seq-mask-tis"});
  add(keys, "loss_fn.truncated_importance_sampling_ratio", &c.truncated_importance_sampling_ratio,
      kPositive, "upper bound of the weights, asked for by every type but off");
  add(keys, "loss_fn.truncated_importance_sampling_ratio_min",
      &c.truncated_importance_sampling_ratio_min, kNotNegative,
      "lower bound of the weights, asked for by icepop and seq-mask-tis");
  add(keys, "loss_fn.sequence_level_importance_ratios", &c.sequence_level_importance_ratios, kAny,
      std::string("one ratio a sequence instead of one a token") + kPreset);
  add(keys, "loss_fn.use_cispo", &c.use_cispo, kAny,
      std::string("clipped weight times log-probability (CISPO)") + kPreset);
  add(keys, "loss_fn.token_level_loss", &c.token_level_loss, kAny,
      std::string("mean over tokens, not over sequences") + kPreset);
  add(keys, "loss_fn.force_on_policy_ratio", &c.force_on_policy_ratio, kAny,
      "the ratio is 1 by definition; asks for one optimizer step a rollout");
  add(keys, "loss_fn.loss_agg", &c.loss_agg, kAny,
      std::string("reduction of the loss, overrides token_level_loss") + kPreset,
      {"token-mean", "seq-mean", "seq-sum-const"});
}

const std::vector<std::string> kPrecisions = {"bf16", "fp8"};
const std::vector<std::string> kRecipes = {"blockwise", "rowwise", "tensorwise"};
const std::vector<std::string> kTasks = {"arithmetic", "reverse", "sort", "countdown"};

// For the policy's settings and for the rollout's overrides (members of the same names).
template <typename Fp8>
void add_fp8(Keys& keys, const std::string& prefix, Fp8& c, const std::string& if_null) {
  add(keys, prefix + "recipe", &c.recipe, kAny, "scale granularity of FP8" + if_null, kRecipes);
  add(keys, prefix + "num_first_layers_in_bf16", &c.num_first_layers_in_bf16, kFromZero,
      "layers at the bottom kept in BF16" + if_null);
  add(keys, prefix + "num_last_layers_in_bf16", &c.num_last_layers_in_bf16, kFromZero,
      "layers at the top kept in BF16" + if_null);
  add(keys, prefix + "ignored_layers", &c.ignored_layers, kAny,
      "name patterns of weights kept in BF16" + if_null);
  add(keys, prefix + "use_weight_pow2_scale", &c.use_weight_pow2_scale, kAny,
      "round weight scales to powers of two" + if_null);
  add(keys, prefix + "use_activation_pow2_scale", &c.use_activation_pow2_scale, kAny,
      "round activation scales to powers of two" + if_null);
}

void add_policy(Keys& keys, PolicyConfig& c) {
  add(keys, "policy.model_name", &c.model_name, kAny, "folder of the starting checkpoint");
  add(keys, "policy.load_format", &c.load_format, kAny,
      "auto: the weights in the folder; dummy: random ones of grpo.seed for the folder's "
      "config.json, "
      "to measure speed",
      {"auto", "dummy"});
  add(keys, "policy.tokenizer.name", &c.tokenizer.name, kAny,
      "folder of the tokenizer; null: policy.model_name");
  add(keys, "policy.train_global_batch_size", &c.train_global_batch_size, kCount,
      "samples of one optimizer step; null: all samples of the RL step");
  add(keys, "policy.train_micro_batch_size", &c.train_micro_batch_size, kCount,
      "sequences packed into one forward and backward");
  add_operational(keys, "policy.logprob_batch_size", &c.logprob_batch_size, kCount,
                  "sequences packed into one forward without backward");
  add(keys, "policy.max_total_sequence_length", &c.max_total_sequence_length, {2, kBig},
      "most tokens of prompt and response together");
  add(keys, "policy.precision", &c.precision, kAny, "of the linear layers in training",
      kPrecisions);
  add(keys, "policy.max_grad_norm", &c.max_grad_norm, kNotNegative,
      "clip gradients to this global norm; 0: off");
  add(keys, "policy.activation_checkpointing", &c.activation_checkpointing, kAny,
      "recompute activations in the backward instead of keeping them");
  add_fp8(keys, "policy.fp8_cfg.", c.fp8_cfg, "");
  add(keys, "policy.optimizer.lr", &c.optimizer.lr, kNotNegative, "peak learning rate of AdamW");
  add(keys, "policy.optimizer.weight_decay", &c.optimizer.weight_decay, kNotNegative,
      "decoupled weight decay");
  add(keys, "policy.optimizer.betas", &c.optimizer.betas, kFraction, "decay of the two moments");
  add(keys, "policy.optimizer.eps", &c.optimizer.eps, kPositive, "added to the denominator");
  add(keys, "policy.optimizer.moment_dtype", &c.optimizer.moment_dtype, kAny,
      "storage of the moments", {"fp32", "bf16"});
  add(keys, "policy.scheduler.name", &c.scheduler.name, kAny, "shape of the learning rate",
      {"constant", "linear", "cosine", "wsd"});
  add(keys, "policy.scheduler.warmup_steps", &c.scheduler.warmup_steps, kFromZero,
      "steps of linear warm-up");
  add(keys, "policy.scheduler.total_steps", &c.scheduler.total_steps, kCount,
      "step at which the decay ends; null: max_num_steps");
  add(keys, "policy.scheduler.min_lr", &c.scheduler.min_lr, kNotNegative, "end of the decay");
  add(keys, "policy.moe.aux_loss_coeff", &c.moe.aux_loss_coeff, kNotNegative,
      "weight of the load-balance loss; 0: off");
  add(keys, "policy.moe.bias_update_rate", &c.moe.bias_update_rate, kNotNegative,
      "step of the selection-bias balancing; 0: off");
  add(keys, "policy.guard.policy", &c.guard.policy, kAny,
      "what a non-finite loss or gradient does: skip the step or abort the run", {"skip", "abort"});
  add(keys, "policy.guard.max_consecutive", &c.guard.max_consecutive, kFromZero,
      "abort after more skipped steps in a row");
  add(keys, "policy.guard.max_total", &c.guard.max_total, kFromZero,
      "abort after more skipped steps in all");
}

void add_generation(Keys& keys, GenerationConfig& c) {
  const std::string prefix = "policy.generation.";
  add(keys, prefix + "precision", &c.precision, kAny,
      "of the linear layers in rollout; null: policy.precision", kPrecisions);
  add_fp8(keys, prefix + "fp8_cfg.", c.fp8_cfg, "; null: the policy's");
  add(keys, prefix + "max_new_tokens", &c.max_new_tokens, kCount, "longest response");
  add(keys, prefix + "temperature", &c.temperature, {0, 1e6}, "0: greedy");
  add(keys, prefix + "top_p", &c.top_p, {0, 1, true}, "nucleus sampling; 1: off");
  add(keys, prefix + "top_k", &c.top_k, kFromZero, "sample among the k likeliest; 0: off");
  add(keys, prefix + "min_p", &c.min_p, kFraction, "least probability relative to the top; 0: off");
  add(keys, prefix + "stop_token_ids", &c.stop_token_ids, kFromZero,
      "tokens that end a response, besides the model's own end tokens");
  add(keys, prefix + "stop_strings", &c.stop_strings, kAny, "texts that end a response");
  add_operational(keys, prefix + "max_num_seqs", &c.max_num_seqs, kCount,
                  "most sequences that run at once");
  add_operational(keys, prefix + "block_size", &c.block_size, kCount, "tokens of one page of keys");
  add_operational(keys, prefix + "num_blocks", &c.num_blocks, kCount,
                  "pages of keys and values; null: enough for max_num_seqs full sequences");
  add_operational(keys, prefix + "max_num_batched_tokens", &c.max_num_batched_tokens, kCount,
                  "most tokens of one forward; longer prompts are prefilled in chunks");
  add_operational(keys, prefix + "enable_prefix_sharing", &c.enable_prefix_sharing, kAny,
                  "samples of one prompt share its keys and values");
  add_operational(keys, prefix + "enforce_eager", &c.enforce_eager, kAny,
                  "on a GPU: no CUDA graphs for decode steps; changes time only");
}

void add_source(Keys& keys, const std::string& prefix, DataSourceConfig& c, bool validation) {
  const std::string also = validation ? " (task and data_path null: as data.train)" : "";
  add(keys, prefix + "task", &c.task, kAny, "built-in generator; null: none" + also, kTasks);
  add(keys, prefix + "data_path", &c.data_path, kAny, "JSONL file; null: none" + also);
  add(keys, prefix + "input_key", &c.input_key, kAny, "JSONL field of the prompt");
  add(keys, prefix + "output_key", &c.output_key, kAny, "JSONL field of the expected answer");
  add(keys, prefix + "digits_min", &c.digits_min, {1, 9}, "fewest digits of an operand");
  add(keys, prefix + "digits_max", &c.digits_max, {1, 9}, "most digits of an operand");
  add(keys, prefix + "length_min", &c.length_min, {1, 64}, "fewest letters or list items");
  add(keys, prefix + "length_max", &c.length_max, {1, 64}, "most letters or list items");
  add(keys, prefix + "alphabet", &c.alphabet, {2, 26},
      "words are made of the first so many letters");
  add(keys, prefix + "noise", &c.noise, kFraction, "share of wrong answers in demonstrations");
  add(keys, prefix + "num_samples", &c.num_samples, kCount,
      validation ? "examples used; null: grpo.max_val_samples"
                 : "examples of one pass; null: the whole file, or no end for a task");
  add(keys, prefix + "seed", &c.seed, kSeed, "seed of the generator; null: grpo.seed");
}

void add_pretrain(Keys& keys, PretrainConfig& c) {
  const std::string p = "pretrain.";
  add_operational(keys, p + "max_num_steps", &c.max_num_steps, kFromZero, "optimizer steps");
  add(keys, p + "data_path", &c.data_path, kAny, "text or JSONL file or folder; null: mixture");
  add(keys, p + "format", &c.format, kAny, "of data_path", {"text", "jsonl"});
  add(keys, p + "mixture", &c.mixture, kPositive, "built-in tasks and their weights", kTasks);
  add(keys, p + "validation_path", &c.validation_path, kAny,
      "held-out file; null: a held-out part of the training data");
  add(keys, p + "sequence_length", &c.sequence_length, {2, kBig}, "tokens of a training sequence");
  add(keys, p + "batch_size", &c.batch_size, kCount, "sequences of one optimizer step");
  add(keys, p + "micro_batch_size", &c.micro_batch_size, kCount, "sequences of one forward");
  add_operational(keys, p + "val_period", &c.val_period, kFromZero, "evaluate every so many steps");
  add_operational(keys, p + "max_val_samples", &c.max_val_samples, kCount, "sequences evaluated");
  add(keys, p + "seed", &c.seed, kSeed, "seed of initial weights and data order");
  ModelShapeConfig& m = c.model;
  const std::string q = "pretrain.model.";
  add(keys, q + "hidden_size", &m.hidden_size, {1, 1 << 20}, "model width");
  add(keys, q + "num_hidden_layers", &m.num_hidden_layers, {1, 4096}, "layers");
  add(keys, q + "num_attention_heads", &m.num_attention_heads, {1, 4096}, "query heads");
  add(keys, q + "num_key_value_heads", &m.num_key_value_heads, {1, 4096}, "key and value heads");
  add(keys, q + "head_dim", &m.head_dim, {2, 4096}, "width of a head");
  add(keys, q + "num_experts", &m.num_experts, {1, 65536}, "experts of a layer");
  add(keys, q + "num_experts_per_tok", &m.num_experts_per_tok, {1, 65536}, "experts a token uses");
  add(keys, q + "moe_intermediate_size", &m.moe_intermediate_size, {1, 1 << 20}, "expert width");
  add(keys, q + "vocab_size", &m.vocab_size, {2, 1 << 24}, "tokens of the vocabulary");
  add(keys, q + "max_position_embeddings", &m.max_position_embeddings, {2, kBig},
      "longest context");
  add(keys, q + "rope_theta", &m.rope_theta, kPositive, "base of the rotary embedding");
  add(keys, q + "rms_norm_eps", &m.rms_norm_eps, kPositive, "epsilon of RMSNorm");
  add(keys, q + "initializer_range", &m.initializer_range, kPositive, "deviation of fresh weights");
  add(keys, q + "norm_topk_prob", &m.norm_topk_prob, kAny, "chosen router weights sum to 1");
  add(keys, q + "tie_word_embeddings", &m.tie_word_embeddings, kAny, "LM head is the embedding");
  add_operational(keys, p + "output", &c.output, kAny,
                  "folder of the final Hugging Face checkpoint; null: <logger.log_dir>/model");
}

}  // namespace

std::vector<ConfigKey> config_keys(RunConfig& c) {
  Keys keys;
  add_operational(keys, "device", &c.device, kAny, "where to run; auto: a GPU where there is one",
                  {"auto", "cpu", "cuda"});
  add_operational(keys, "num_threads", &c.num_threads, {0, 4096},
                  "CPU threads; 0: OMP_NUM_THREADS, or else all cores");
  add_grpo(keys, c.grpo);
  add_loss(keys, c.loss_fn);
  add_policy(keys, c.policy);
  add_generation(keys, c.policy.generation);
  add_source(keys, "data.train.", c.data.train, false);
  add_source(keys, "data.validation.", c.data.validation, true);
  add(keys, "data.system_prompt", &c.data.system_prompt, kAny, "put before every prompt");
  add(keys, "data.shuffle", &c.data.shuffle, kAny, "visit JSONL lines in a seeded random order");
  add(keys, "env.reward", &c.env.reward, kAny, "how a response is scored",
      {"exact", "number", "regex", "countdown", "external"});
  add(keys, "env.command", &c.env.command, kAny, "external: program and arguments");
  add(keys, "env.timeout_s", &c.env.timeout_s, kPositive, "external: seconds for one batch");
  add(keys, "env.pattern", &c.env.pattern, kAny, "regex: what the response must match");
  add_operational(keys, "checkpointing.enabled", &c.checkpointing.enabled, kAny,
                  "save checkpoints");
  add_operational(keys, "checkpointing.checkpoint_dir", &c.checkpointing.checkpoint_dir, kAny,
                  "where; null: <logger.log_dir>/checkpoints");
  add_operational(keys, "checkpointing.save_period", &c.checkpointing.save_period, kCount,
                  "save every so many steps");
  add_operational(keys, "checkpointing.keep_top_k", &c.checkpointing.keep_top_k, kCount,
                  "checkpoints kept (the newest healthy one always is); null: all");
  add_operational(keys, "checkpointing.metric_name", &c.checkpointing.metric_name, kAny,
                  "metric that ranks checkpoints; null: the newest are kept");
  add_operational(keys, "checkpointing.higher_is_better", &c.checkpointing.higher_is_better, kAny,
                  "direction of that metric");
  add_operational(keys, "logger.log_dir", &c.logger.log_dir, kAny, "the run folder");
  add_operational(keys, "logger.tensorboard_enabled", &c.logger.tensorboard_enabled, kAny,
                  "write TensorBoard event files");
  add_operational(keys, "logger.profile_ops", &c.logger.profile_ops, kAny,
                  "on a GPU: metrics timing/ops/* by op; with policy.generation.enforce_eager the "
                  "rollout's decode steps, too");
  add_operational(keys, "logger.log_rollouts", &c.logger.log_rollouts, kAny,
                  "write the samples of every step as JSONL");
  add_operational(keys, "logger.num_val_samples_to_print", &c.logger.num_val_samples_to_print,
                  kFromZero, "transcripts kept of an evaluation");
  add_pretrain(keys, c.pretrain);
  return keys;
}

}  // namespace lockstep::loop
