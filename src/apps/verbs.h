// The verbs of the command line, one file each. A verb adds its subcommand with options and returns
// nothing; what it does runs in the callback. Errors are thrown and reported in main.cpp.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "loop/config.h"

namespace lockstep::apps {

void add_pretrain(CLI::App& app);
void add_rl(CLI::App& app);
void add_compare(CLI::App& app);
void add_report(CLI::App& app);
void add_doctor(CLI::App& app);

// --config, dotted overrides, --resume and --keys of a verb that runs something.
struct RunOptions {
  std::vector<std::string> configs, overrides;
  std::string resume = "never";
  bool keys = false;
};
void add_run_options(CLI::App& verb, RunOptions& options);

// True when --keys was asked for: the keys have been printed and there is nothing to run.
bool print_keys(const RunOptions& options);

// The configuration of these options; prints it in full to standard output when `print`.
loop::RunConfig read_config(const RunOptions& options);

}  // namespace lockstep::apps
