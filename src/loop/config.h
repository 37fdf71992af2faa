// The configuration of a run as plain structs. Key names in YAML are the member paths
// (`policy.optimizer.lr`) and follow NeMo-RL; config_keys.h holds the table with type, range and
// meaning of each, config_load.h reads and writes YAML. Defaults are the initializers here.
// std::optional means: absent (null) takes the value that the help text of the key names.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace lockstep::loop {

struct RewardShapingConfig {
  std::optional<bool> enabled;  // null: preset of the estimator
  std::optional<std::int64_t> overlong_buffer_length;
  std::optional<double> overlong_buffer_penalty;
  std::optional<std::int64_t> max_response_length;
};

struct AdvEstimatorConfig {
  std::string name = "grpo";
};

struct GrpoConfig {
  std::int64_t num_prompts_per_step = 32;
  std::int64_t num_generations_per_prompt = 8;
  std::int64_t max_num_steps = 100;
  std::int64_t max_num_epochs = 1000000;
  std::int64_t val_period = 10;
  bool val_at_start = true;
  std::int64_t max_val_samples = 256;
  std::int64_t seed = 42;
  std::optional<bool> normalize_rewards;
  std::optional<bool> use_leave_one_out_baseline;
  std::optional<bool> use_dynamic_sampling;
  std::int64_t dynamic_sampling_max_gen_batches = 10;
  std::optional<bool> overlong_filtering;
  RewardShapingConfig reward_shaping;
  AdvEstimatorConfig adv_estimator;
  std::int64_t verify_every = 1;
};

struct LossConfig {
  double reference_policy_kl_penalty = 0.0;
  std::string reference_policy_kl_type = "k3";
  std::optional<double> ratio_clip_min;
  std::optional<double> ratio_clip_max;
  std::optional<double> ratio_clip_c;
  bool use_importance_sampling_correction = false;
  std::string truncated_importance_sampling_type = "tis";
  std::optional<double> truncated_importance_sampling_ratio;
  std::optional<double> truncated_importance_sampling_ratio_min;
  std::optional<bool> sequence_level_importance_ratios;
  std::optional<bool> use_cispo;
  std::optional<bool> token_level_loss;
  bool force_on_policy_ratio = false;
  std::optional<std::string> loss_agg;
};

struct Fp8Config {
  std::string recipe = "blockwise";
  std::int64_t num_first_layers_in_bf16 = 0;
  std::int64_t num_last_layers_in_bf16 = 0;
  std::vector<std::string> ignored_layers;
  bool use_weight_pow2_scale = false;
  bool use_activation_pow2_scale = false;
};

// The rollout's own FP8 settings; each null takes the policy's.
struct Fp8Override {
  std::optional<std::string> recipe;
  std::optional<std::int64_t> num_first_layers_in_bf16;
  std::optional<std::int64_t> num_last_layers_in_bf16;
  std::optional<std::vector<std::string>> ignored_layers;
  std::optional<bool> use_weight_pow2_scale;
  std::optional<bool> use_activation_pow2_scale;
};

struct TokenizerConfig {
  std::optional<std::string> name;
};

struct OptimizerConfig {
  double lr = 1e-4;
  double weight_decay = 0.0;
  std::vector<double> betas = {0.9, 0.95};
  double eps = 1e-8;
  std::string moment_dtype = "fp32";
};

struct SchedulerConfig {
  std::string name = "constant";
  std::int64_t warmup_steps = 0;
  std::optional<std::int64_t> total_steps;
  double min_lr = 0.0;
};

struct MoeConfig {
  double aux_loss_coeff = 0.0;
  double bias_update_rate = 0.0;
};

struct GuardConfig {
  std::string policy = "skip";
  std::int64_t max_consecutive = 3;
  std::int64_t max_total = 20;
};

struct GenerationConfig {
  std::optional<std::string> precision;
  Fp8Override fp8_cfg;
  std::int64_t max_new_tokens = 64;
  double temperature = 1.0;
  double top_p = 1.0;
  std::int64_t top_k = 0;
  double min_p = 0.0;
  std::vector<std::int64_t> stop_token_ids;
  std::vector<std::string> stop_strings;
  std::int64_t max_num_seqs = 64;
  std::int64_t block_size = 16;
  std::optional<std::int64_t> num_blocks;
  std::int64_t max_num_batched_tokens = 512;
  bool enable_prefix_sharing = true;
  bool enforce_eager = false;
};

struct PolicyConfig {
  std::string model_name;
  std::string load_format = "auto";
  TokenizerConfig tokenizer;
  std::optional<std::int64_t> train_global_batch_size;
  std::int64_t train_micro_batch_size = 32;
  std::int64_t logprob_batch_size = 32;
  std::int64_t max_total_sequence_length = 256;
  std::string precision = "fp8";
  double max_grad_norm = 1.0;
  bool activation_checkpointing = false;
  Fp8Config fp8_cfg;
  OptimizerConfig optimizer;
  SchedulerConfig scheduler;
  MoeConfig moe;
  GuardConfig guard;
  GenerationConfig generation;
};

struct DataSourceConfig {
  std::optional<std::string> task;
  std::optional<std::string> data_path;
  std::string input_key = "prompt";
  std::string output_key = "label";
  std::int64_t digits_min = 1, digits_max = 2;  // of each operand
  std::int64_t length_min = 3, length_max = 6;  // letters of a word, items of a list
  std::int64_t alphabet = 26;                   // the first letters of a .. z
  double noise = 0.0;
  std::optional<std::int64_t> num_samples;
  std::optional<std::int64_t> seed;
};

struct DataConfig {
  DataSourceConfig train;
  DataSourceConfig validation;
  std::optional<std::string> system_prompt;
  bool shuffle = true;
};

struct EnvConfig {
  std::string reward = "exact";
  std::vector<std::string> command;
  double timeout_s = 10.0;
  std::optional<std::string> pattern;
};

struct CheckpointingConfig {
  bool enabled = true;
  std::optional<std::string> checkpoint_dir;
  std::int64_t save_period = 10;
  std::optional<std::int64_t> keep_top_k = 3;
  std::optional<std::string> metric_name;
  bool higher_is_better = true;
};

struct LoggerConfig {
  std::string log_dir = "runs/default";
  bool tensorboard_enabled = true;
  bool log_rollouts = true;
  bool profile_ops = false;
  std::int64_t num_val_samples_to_print = 3;
};

// The shape of a model that `lockstep pretrain` starts from random weights (Qwen3-MoE names).
struct ModelShapeConfig {
  std::int64_t hidden_size = 128;
  std::int64_t num_hidden_layers = 4;
  std::int64_t num_attention_heads = 4;
  std::int64_t num_key_value_heads = 2;
  std::int64_t head_dim = 32;
  std::int64_t num_experts = 8;
  std::int64_t num_experts_per_tok = 2;
  std::int64_t moe_intermediate_size = 128;
  std::int64_t vocab_size = 260;
  std::int64_t max_position_embeddings = 2048;
  double rope_theta = 10000.0;
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool norm_topk_prob = true;
  bool tie_word_embeddings = false;
};

struct PretrainConfig {
  std::int64_t max_num_steps = 200;
  std::optional<std::string> data_path;
  std::string format = "text";
  std::map<std::string, double> mixture;
  std::optional<std::string> validation_path;
  std::int64_t sequence_length = 128;
  std::int64_t batch_size = 32;
  std::int64_t micro_batch_size = 8;
  std::int64_t val_period = 50;
  std::int64_t max_val_samples = 64;
  std::int64_t seed = 42;
  ModelShapeConfig model;
  std::optional<std::string> output;
};

struct RunConfig {
  std::string device = "auto";
  std::int64_t num_threads = 0;
  GrpoConfig grpo;
  LossConfig loss_fn;
  PolicyConfig policy;
  DataConfig data;
  EnvConfig env;
  CheckpointingConfig checkpointing;
  LoggerConfig logger;
  PretrainConfig pretrain;
};

// Nulls that other keys fill.
std::string generation_precision(const RunConfig& config);
Fp8Config generation_fp8(const RunConfig& config);
std::string checkpoint_dir(const RunConfig& config);            // default <log_dir>/checkpoints
std::int64_t train_global_batch_size(const RunConfig& config);  // default: all samples of a step

// Checks between keys that one row of the table cannot state; InputError names the keys. Only what
// the verb uses is asked for: `rl` needs a model and a data source, `pretrain` text or tasks.
void validate_rl(const RunConfig& config);
void validate_pretrain(const RunConfig& config);

}  // namespace lockstep::loop
