#include <fmt/format.h>

#include "apps/verbs.h"
#include "loop/config_load.h"

namespace lockstep::apps {

void add_run_options(CLI::App& verb, RunOptions& options) {
  verb.add_option("-c,--config", options.configs, "YAML file; several are merged in order")
      ->allow_extra_args(false);
  verb.add_option("--resume", options.resume,
                  "auto: go on after the newest valid checkpoint of logger.log_dir; never; or a "
                  "checkpoint folder")
      ->capture_default_str();
  verb.add_flag("--keys", options.keys, "list all configuration keys with their defaults, and end");
  verb.add_option("overrides", options.overrides,
                  "dotted overrides, for example policy.optimizer.lr=1e-6");
}

bool print_keys(const RunOptions& options) {
  if (options.keys) fmt::print("{}", loop::config_help());
  return options.keys;
}

loop::RunConfig read_config(const RunOptions& options) {
  return loop::load_config({options.configs.begin(), options.configs.end()}, options.overrides);
}

}  // namespace lockstep::apps
