#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "base/error.h"
#include "loop/config_keys.h"
#include "loop/config_load.h"
#include "loop/config_value.h"
#include "loop/temp_dir.h"
#include "model/precision.h"
#include "policy/schedule.h"
#include "rl/loss.h"
#include "rl/presets.h"
#include "rl/rewards.h"
#include "rl/tasks.h"

namespace lockstep::loop {
namespace {

namespace fs = std::filesystem;

struct ConfigTest : TempDirTest {
  RunConfig load(const std::string& text, const std::vector<std::string>& overrides = {}) {
    return load_config({put("c.yaml", text)}, overrides);
  }
  // The refusal must hold every part.
  void refused(const std::string& text, const std::vector<std::string>& parts,
               const std::vector<std::string>& overrides = {}) {
    try {
      load(text, overrides);
      ADD_FAILURE() << "accepted: " << text.substr(0, 100);
    } catch (const base::InputError& e) {
      for (const std::string& part : parts)
        EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
            << "no '" << part << "' in: " << e.what();
    }
  }
};

TEST_F(ConfigTest, reads_types_merges_files_and_applies_overrides) {
  const fs::path a = put("a.yaml",
                         "grpo: {seed: 7, val_at_start: false}\n"
                         "policy:\n  optimizer: {lr: 1e-3, betas: [0.8, 0.9]}\n"
                         "  generation:\n    stop_strings: [\"\\n\", 'x: y']\n"
                         "pretrain: {mixture: {reverse: 2, sort: 0.5}}\n");
  const fs::path b = put("b.yaml", "grpo:\n  seed: 8\nloss_fn:\n  ratio_clip_min: 0.2\n");
  const RunConfig c = load_config(
      {a, b}, {"policy.optimizer.lr=1e-6", "loss_fn.ratio_clip_max=0.28",
               "policy.fp8_cfg={recipe: rowwise, ignored_layers: [\"*.q_proj\"]}",
               "checkpointing.keep_top_k=null", "env.command=[python3, \"-c\", \"print(1)\"]"});
  EXPECT_EQ(c.grpo.seed, 8);
  EXPECT_FALSE(c.grpo.val_at_start);
  EXPECT_EQ(c.policy.optimizer.lr, 1e-6);
  EXPECT_EQ(c.policy.optimizer.betas, (std::vector<double>{0.8, 0.9}));
  EXPECT_EQ(c.policy.generation.stop_strings, (std::vector<std::string>{"\n", "x: y"}));
  EXPECT_EQ(c.pretrain.mixture, (std::map<std::string, double>{{"reverse", 2}, {"sort", 0.5}}));
  EXPECT_EQ(c.loss_fn.ratio_clip_min, 0.2);
  EXPECT_EQ(c.loss_fn.ratio_clip_max, 0.28);
  EXPECT_EQ(c.loss_fn.ratio_clip_c, std::nullopt);
  EXPECT_EQ(c.policy.fp8_cfg.recipe, "rowwise");
  EXPECT_EQ(generation_fp8(c).recipe, "rowwise");
  EXPECT_EQ(generation_fp8(c).ignored_layers, (std::vector<std::string>{"*.q_proj"}));
  EXPECT_EQ(generation_precision(c), "fp8");
  EXPECT_EQ(c.checkpointing.keep_top_k, std::nullopt);
  EXPECT_EQ(c.env.command.back(), "print(1)");
  EXPECT_EQ(checkpoint_dir(c), "runs/default/checkpoints");
}

TEST_F(ConfigTest, empty_file_and_empty_sections_are_the_defaults) {
  for (const char* text : {"", "# nothing\n", "grpo:\npolicy:\n  optimizer:\n", "{}"})
    EXPECT_EQ(config_to_yaml(load(text)), config_to_yaml(RunConfig{})) << text;
}

TEST_F(ConfigTest, unknown_keys_name_line_key_and_the_nearest) {
  refused("grpo:\n  seed: 1\n  num_prompt_per_step: 3\n",
          {"c.yaml:3:", "unknown key grpo.num_prompt_per_step",
           "did you mean grpo.num_prompts_per_step"});
  refused("polcy:\n  precision: fp8\n", {"c.yaml:1:", "unknown key polcy", "did you mean policy?"});
  refused("loss_fn: {temperature: 1}\n", {"did you mean policy.generation.temperature"});
  refused("grpo: {seed: {a: 1}}\n", {"c.yaml:1:", "grpo.seed", "whole number"});
  refused("grpo: 3\n", {"c.yaml:1:", "grpo is a section"});
  refused("grpo:\n  xyzzyplugh: 3\n", {"unknown key grpo.xyzzyplugh"});
  refused("", {"override 'policy.optimizr.lr=1'", "did you mean policy.optimizer.lr"},
          {"policy.optimizr.lr=1"});
}

TEST_F(ConfigTest, duplicate_keys_are_refused) {
  refused("grpo:\n  seed: 1\n  val_period: 2\n  seed: 3\n",
          {"c.yaml:4:", "duplicate key grpo.seed"});
  refused("grpo: {seed: 1}\npolicy: {}\ngrpo: {val_period: 1}\n",
          {"c.yaml:3:", "duplicate key grpo"});
  refused("grpo: {seed: 1}\ngrpo.seed: 2\n", {"c.yaml:2:", "duplicate key grpo.seed"});
  refused("pretrain: {mixture: {sort: 1, sort: 2}}\n", {"pretrain.mixture", "twice"});
}

TEST_F(ConfigTest, wrong_values_say_what_is_expected) {
  refused("grpo:\n\n  seed: many\n", {"c.yaml:3:", "grpo.seed is many", "whole number"});
  refused("grpo: {seed: 1.5}", {"grpo.seed is 1.5"});
  refused("grpo: {seed: -1}", {"at least 0"});
  refused("grpo: {seed: 99999999999999999999}", {"grpo.seed"});
  refused("grpo: {seed: null}", {"grpo.seed is null"});
  refused("grpo: {seed: }", {"grpo.seed is null"});
  refused("grpo: {num_prompts_per_step: 0}", {"from 1 up to 2147483647"});
  refused("grpo: {num_prompts_per_step: 2147483648}", {"from 1 up to 2147483647"});
  refused("grpo: {val_at_start: maybe}", {"true or false"});
  refused("grpo: {val_at_start: 1}", {"true or false"});
  refused("policy: {precision: fp4}", {"policy.precision is fp4", "bf16, fp8"});
  refused("policy: {generation: {top_p: 0}}", {"above 0 up to 1"});
  refused("policy: {generation: {top_p: .nan}}", {"top_p"});
  refused("policy: {optimizer: {lr: inf}}", {"lr"});
  refused("policy: {optimizer: {lr: 1e400}}", {"lr"});
  refused("policy: {optimizer: {lr: 1e-3x}}", {"lr"});
  refused("policy: {optimizer: {betas: 0.9}}", {"list of numbers"});
  refused("policy: {optimizer: {betas: [0.9, [1]]}}", {"policy.optimizer.betas", "nested"});
  refused("pretrain: {mixture: {chess: 1}}", {"pretrain.mixture", "arithmetic"});
  refused("pretrain: {mixture: [sort]}", {"pretrain.mixture"});
}

TEST_F(ConfigTest, malformed_yaml_names_the_line) {
  refused("grpo:\n  seed: [1\n", {"c.yaml:"});
  refused("grpo:\n\tseed: 1\n", {"c.yaml:2"});
  refused("a: 1\n---\nb: 2\n", {"2 YAML documents"});
  refused("- 1\n", {"the document is a section"});
  refused("? [a]\n: 1\n", {"plain name"});
  refused("grpo: *nope\n", {"c.yaml:1"});
  refused("", {"expected key=value"}, {"policy.optimizer.lr"});
  refused("", {"expected key=value"}, {"=3"});
  refused("", {"override 'grpo.seed=[1'"}, {"grpo.seed=[1"});
  EXPECT_THROW(load_config({dir / "absent.yaml"}, {}), base::InputError);
  EXPECT_THROW(load_config({dir}, {}), base::InputError);
  refused(std::string(2 << 20, '#'), {"larger than the limit"});
}

TEST_F(ConfigTest, hostile_nesting_is_bounded) {
  refused(std::string(20000, '['), {"c.yaml"});
  refused("policy: " + std::string(3000, '{'), {"c.yaml"});
  std::string bomb = "policy: {ignored: &a0 [x,x,x,x,x,x,x,x,x,x]}\n";
  for (int i = 1; i < 12; ++i) {
    bomb += "x" + std::to_string(i) + ": &a" + std::to_string(i) + " [";
    for (int j = 0; j < 10; ++j) bomb += std::string(j ? "," : "") + "*a" + std::to_string(i - 1);
    bomb += "]\n";
  }
  refused(bomb, {"c.yaml"});
  std::string lists = "policy: {fp8_cfg: {ignored_layers: [";
  for (int i = 0; i < 30000; ++i) lists += "a,";
  refused(lists + "a]}}", {"too large"});
}

TEST_F(ConfigTest, references_resolve_after_merging) {
  const RunConfig c = load(
      "logger: {log_dir: runs/x}\n"
      "checkpointing: {checkpoint_dir: '${logger.log_dir}/ckpt-${grpo.seed}'}\n"
      "pretrain: {seed: '${grpo.seed}', output: \"$${not a key}\"}\n"
      "data: {train: {seed: '${pretrain.seed}'}}\n"
      "policy: {generation: {stop_strings: ['${logger.log_dir}'], num_blocks: "
      "'${policy.train_global_batch_size}'}}\n",
      {"grpo.seed=11"});
  EXPECT_EQ(c.checkpointing.checkpoint_dir, "runs/x/ckpt-11");
  EXPECT_EQ(c.pretrain.seed, 11);
  EXPECT_EQ(c.data.train.seed, 11);
  EXPECT_EQ(c.pretrain.output, "${not a key}");
  EXPECT_EQ(c.policy.generation.stop_strings, (std::vector<std::string>{"runs/x"}));
  EXPECT_EQ(c.policy.generation.num_blocks, std::nullopt);
  // A default is a value, too.
  EXPECT_EQ(load("pretrain: {seed: '${grpo.max_num_steps}'}").pretrain.seed, 100);

  refused("pretrain: {seed: '${grpo.sed}'}", {"c.yaml:1", "${grpo.sed}", "did you mean grpo.seed"});
  refused("pretrain: {seed: '${grpo}'}", {"refers to no key"});
  refused("pretrain: {seed: '${grpo.seed'}", {"closing"});
  refused("pretrain: {seed: '${grpo.seed}'}\ngrpo: {seed: '${pretrain.seed}'}", {"circle"});
  refused("logger: {log_dir: 'a${logger.log_dir}${logger.log_dir}'}", {"circle"});
  refused("logger: {log_dir: 'a${policy.optimizer.betas}'}", {"no plain text"});
}

TEST_F(ConfigTest, printed_config_reads_back_to_the_same) {
  RunConfig c;
  c.policy.optimizer.lr = 0.1 + 0.2;
  c.policy.generation.stop_strings = {
      "",  "null",         "~",     "a: b", "-",     "# no", "\"q\\", "\n\t\x01",
      "é", "${grpo.seed}", "$${x}", "[1",   " pad ", "true", "1e5",   "'"};
  c.policy.fp8_cfg.ignored_layers = {"*.q_proj", "&a", "*a"};
  c.policy.generation.fp8_cfg.ignored_layers = std::vector<std::string>{};
  c.loss_fn.ratio_clip_c = 3.0;
  c.loss_fn.loss_agg = "token-mean";
  c.pretrain.mixture = {{"sort", 1e-300}, {"reverse", 1.0 / 3}};
  c.logger.log_dir = "-weird dir";
  c.policy.model_name = "null";
  for (const bool help : {false, true}) {
    const std::string text = config_to_yaml(c, help);
    const RunConfig back = load(text);
    EXPECT_EQ(config_to_yaml(back, help), text);
    EXPECT_EQ(back.policy.generation.stop_strings, c.policy.generation.stop_strings);
    EXPECT_EQ(back.policy.optimizer.lr, c.policy.optimizer.lr);
    EXPECT_EQ(back.policy.generation.fp8_cfg.ignored_layers,
              c.policy.generation.fp8_cfg.ignored_layers);
    EXPECT_EQ(back.pretrain.mixture, c.pretrain.mixture);
    EXPECT_EQ(back.policy.model_name, "null");
    EXPECT_EQ(config_hash(back), config_hash(c));
  }
}

TEST_F(ConfigTest, table_is_sound) {
  RunConfig config;
  std::set<std::string> names;
  std::set<const void*> slots;
  for (const ConfigKey& key : config_keys(config)) {
    EXPECT_TRUE(names.insert(key.name).second) << key.name << " twice";
    const void* slot = std::visit([](auto* p) { return static_cast<const void*>(p); }, key.slot);
    EXPECT_TRUE(slots.insert(slot).second) << key.name << " shares its member";
    EXPECT_FALSE(key.help.empty()) << key.name;
    EXPECT_EQ(key.help.find('#'), std::string::npos) << key.name;
    // The default obeys its own row.
    EXPECT_NO_THROW(set_config_value(key, config_value(key), "default")) << key.name;
    EXPECT_NE(config_help().find(key.name), std::string::npos);
    EXPECT_NE(config_markdown().find("`" + key.name + "`"), std::string::npos);
  }
}

// The names that the table offers are the names that the rooms take.
TEST_F(ConfigTest, choices_are_those_of_the_rooms) {
  RunConfig config;
  for (const ConfigKey& key : config_keys(config))
    for (const std::string& name : key.choices) {
      SCOPED_TRACE(key.name + " " + name);
      const auto is = [&](const char* end) {
        return key.name.size() >= std::strlen(end) &&
               key.name.compare(key.name.size() - std::strlen(end), std::string::npos, end) == 0;
      };
      if (is("adv_estimator.name")) {
        EXPECT_NO_THROW(rl::preset(name, 8));
      }
      if (is("kl_type")) {
        EXPECT_NO_THROW(rl::kl_type_from(name));
      }
      if (is("loss_agg")) {
        EXPECT_NO_THROW(rl::loss_aggregation_from(name));
      }
      if (is("sampling_type")) {
        EXPECT_NO_THROW(rl::importance_truncation_from(name));
      }
      if (is(".task") || is("mixture")) {
        EXPECT_NO_THROW(rl::task_kind_from(name));
      }
      if (is("env.reward")) {
        EXPECT_NO_THROW(rl::reward_kind_from(name));
      }
      if (is("precision")) {
        EXPECT_NO_THROW(model::parse_precision(name, "k"));
      }
      if (is("recipe")) {
        EXPECT_NO_THROW(model::parse_recipe(name, "k"));
      }
      if (is("scheduler.name")) {
        EXPECT_NO_THROW(policy::parse_schedule(name, "k"));
      }
    }
}

TEST_F(ConfigTest, hash_and_differences_ignore_operational_keys) {
  RunConfig a, b;
  b.logger.log_dir = "elsewhere";
  b.grpo.max_num_steps += 5;
  b.num_threads = 1;
  EXPECT_EQ(config_hash(a), config_hash(b));
  EXPECT_TRUE(config_differences(a, b).empty());
  b.policy.scheduler.name = a.policy.scheduler.name = "cosine";  // decays towards the last step
  EXPECT_EQ(config_differences(a, b), (std::vector<std::string>{"grpo.max_num_steps: 100 -> 105"}));
  EXPECT_NE(config_hash(a), config_hash(b));
  b.policy.scheduler.total_steps = a.policy.scheduler.total_steps = 50;
  EXPECT_EQ(config_hash(a), config_hash(b));
  b.policy.optimizer.lr = 0.5;
  EXPECT_NE(config_hash(a), config_hash(b));
  EXPECT_EQ(config_differences(a, b),
            (std::vector<std::string>{"policy.optimizer.lr: 0.0001 -> 0.5"}));
}

TEST_F(ConfigTest, checks_between_keys_name_the_keys) {
  RunConfig good;
  good.policy.model_name = "m";
  good.data.train.task = "reverse";
  EXPECT_NO_THROW(validate_rl(good));
  const auto bad = [&](auto change, const std::string& part) {
    RunConfig c = good;
    change(c);
    try {
      validate_rl(c);
      ADD_FAILURE() << "accepted: " << part;
    } catch (const base::InputError& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  bad([](RunConfig& c) { c.policy.model_name = ""; }, "policy.model_name");
  bad([](RunConfig& c) { c.data.train.task.reset(); }, "data.train.task");
  bad([](RunConfig& c) { c.data.train.data_path = "x"; }, "both set");
  bad([](RunConfig& c) { c.policy.train_global_batch_size = 7; }, "policy.train_global_batch_size");
  bad([](RunConfig& c) { c.policy.generation.max_new_tokens = 256; }, "max_new_tokens");
  bad([](RunConfig& c) { c.policy.optimizer.betas = {0.9}; }, "betas");
  bad([](RunConfig& c) { c.policy.optimizer.betas = {0.9, 1.0}; }, "betas");
  bad([](RunConfig& c) { c.env.reward = "external"; }, "env.command");
  bad([](RunConfig& c) { c.env.reward = "regex"; }, "env.pattern");
  bad([](RunConfig& c) { c.policy.scheduler.min_lr = 1; }, "min_lr");
  bad([](RunConfig& c) { c.data.train.digits_min = 3; }, "digits_min");
  bad(
      [](RunConfig& c) {
        c.loss_fn.force_on_policy_ratio = true;
        c.policy.train_global_batch_size = c.grpo.num_generations_per_prompt;
      },
      "force_on_policy_ratio");
  RunConfig pre;
  EXPECT_THROW(validate_pretrain(pre), base::InputError);
  pre.pretrain.mixture = {{"sort", 1.0}};
  EXPECT_NO_THROW(validate_pretrain(pre));
  pre.pretrain.model.num_key_value_heads = 3;
  EXPECT_THROW(validate_pretrain(pre), base::InputError);
}

}  // namespace
}  // namespace lockstep::loop
