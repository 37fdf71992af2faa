#include <fmt/format.h>

#include "apps/verbs.h"
#include "loop/rl_loop.h"

namespace lockstep::apps {

namespace {

void print_summary(const loop::RlSummary& s, bool saved) {
  fmt::print("\n{} after {} steps, {:.1f} s\n", end_of_run(s.interrupted, saved), s.steps,
             s.seconds);
  if (s.first_accuracy && s.last_accuracy)
    fmt::print("held-out accuracy: {:.3f} -> {:.3f}\n", *s.first_accuracy, *s.last_accuracy);
  fmt::print("policy against rollout: {} of {} log-probabilities differ\n", s.logprobs_different,
             s.logprobs_compared);
  if (!s.memory.empty()) fmt::print("peak memory against the plan: {}\n", s.memory);
  fmt::print("report: {}\n", s.report.string());
}

}  // namespace

void add_rl(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("rl", "reinforcement learning on a verifiable task");
  verb->footer(std::string("Example: lockstep rl --config configs/demo.yaml --resume auto\n\n") +
               kInterruptHelp);
  static RunOptions options;
  add_run_options(*verb, options);
  verb->callback([] {
    if (print_keys(options)) return;
    const loop::RunConfig config = read_config(options);
    loop::validate_rl(config);  // before anything is moved or printed
    if (print_config(options, config)) return;
    make_room(options, config);
    const loop::RlSummary summary = loop::run_rl(config, loop::parse_resume(options.resume));
    print_summary(summary, config.checkpointing.enabled);
    if (summary.interrupted) throw CLI::RuntimeError(kInterrupted);
  });
}

}  // namespace lockstep::apps
