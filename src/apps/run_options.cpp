#include <fmt/format.h>

#include "apps/verbs.h"
#include "base/error.h"
#include "loop/config_load.h"
#include "loop/run_folder.h"

namespace lockstep::apps {

void add_run_options(CLI::App& verb, RunOptions& options) {
  verb.add_option("-c,--config", options.configs, "YAML file; several are merged in order")
      ->allow_extra_args(false);
  verb.add_option("--resume", options.resume,
                  "auto: go on after the newest valid checkpoint of logger.log_dir; never; or a "
                  "checkpoint folder")
      ->capture_default_str();
  verb.add_flag("--fresh", options.fresh,
                "start anew: a run that stands in logger.log_dir is kept as log_dir.1, .2, ...");
  verb.add_flag("--markdown", options.markdown,
                "with --keys: as the Markdown table of docs/configuration.md");
  verb.add_flag("--keys", options.keys, "list all configuration keys with their defaults, and end");
  verb.add_option("overrides", options.overrides,
                  "dotted overrides, for example policy.optimizer.lr=1e-6");
}

bool print_keys(const RunOptions& options) {
  if (options.markdown && !options.keys)
    base::fail<base::InputError>("--markdown goes with --keys");
  if (options.keys)
    fmt::print("{}", options.markdown ? loop::config_markdown() : loop::config_help());
  return options.keys;
}

loop::RunConfig read_config(const RunOptions& options) {
  if (options.fresh && options.resume != "never")
    base::fail<base::InputError>("--fresh starts anew and --resume {} goes on: give one of them",
                                 options.resume);
  return loop::load_config({options.configs.begin(), options.configs.end()}, options.overrides);
}

void make_room(const RunOptions& options, const loop::RunConfig& config) {
  if (!options.fresh) return;
  const std::filesystem::path folder = config.logger.log_dir;
  if (!loop::holds_run(folder)) return;
  const loop::RunFolder held = loop::open_run_folder(folder, true);  // nobody else may be in it
  fmt::print("the run in {} is kept as {}\n", folder.string(),
             loop::set_aside_run(folder).string());
}

}  // namespace lockstep::apps
