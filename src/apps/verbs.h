// The verbs of the command line, one file each. A verb adds its subcommand with options and returns
// nothing; what it does runs in the callback. Errors are thrown and reported in main.cpp.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "loop/config.h"
#include "loop/loaded_model.h"

namespace lockstep::apps {

void add_pretrain(CLI::App& app);
void add_rl(CLI::App& app);
void add_compare(CLI::App& app);
void add_report(CLI::App& app);
void add_score(CLI::App& app);
void add_generate(CLI::App& app);
void add_doctor(CLI::App& app);
void add_convert(CLI::App& app);
void add_tokenize(CLI::App& app);

// Exit code of a run that SIGINT or SIGTERM ended before its last step.
constexpr int kInterrupted = 130;
// What --help says about it.
constexpr const char* kInterruptHelp =
    "Ctrl-C (or SIGTERM) ends the run after the current step with a checkpoint and exit code 130;\n"
    "the same command with --resume auto goes on to the same bits. A second Ctrl-C ends it at "
    "once,\n"
    "back to the last checkpoint. Exit codes: 0 done, 2 bad input, 3 the machine failed (disk,\n"
    "another program), 4 a defect of lockstep, 130 interrupted.";

// --model, --precision, --device and --threads.
void add_model_options(CLI::App& verb, loop::ModelOptions& options);

// --config, dotted overrides, --resume, --fresh, --keys and --print-config of a verb that runs
// something.
struct RunOptions {
  std::vector<std::string> configs, overrides;
  std::string resume = "never";
  bool fresh = false;
  bool keys = false, markdown = false;
  bool print_config = false;
};
void add_run_options(CLI::App& verb, RunOptions& options);

// True when --keys was asked for: the keys have been printed and there is nothing to run.
bool print_keys(const RunOptions& options);

// The configuration of these options.
loop::RunConfig read_config(const RunOptions& options);

// True when --print-config was asked for: the configuration has been printed as YAML and there is
// nothing to run.
bool print_config(const RunOptions& options, const loop::RunConfig& config);

// The first words of a run's summary: "done", or "interrupted, ..." with what can be done next.
const char* end_of_run(bool interrupted, bool saved);

// With --fresh: a run that stands in logger.log_dir is renamed to log_dir.1, .2, ... and named on
// standard output. SystemError while another process has it.
void make_room(const RunOptions& options, const loop::RunConfig& config);

}  // namespace lockstep::apps
