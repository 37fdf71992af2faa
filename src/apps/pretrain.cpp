#include "loop/pretrain.h"

#include <fmt/format.h>

#include "apps/verbs.h"

namespace lockstep::apps {

void add_pretrain(CLI::App& app) {
  CLI::App* verb = app.add_subcommand(
      "pretrain", "next-token training on text, JSONL or built-in demonstrations");
  verb->footer(
      std::string(
          "Example: lockstep pretrain --config configs/demo_pretrain.yaml policy.precision=bf16\n"
          "\n") +
      kInterruptHelp);
  static RunOptions options;
  add_run_options(*verb, options);
  verb->callback([] {
    if (print_keys(options)) return;
    const loop::RunConfig config = read_config(options);
    loop::validate_pretrain(config);  // before anything is moved or printed
    if (print_config(options, config)) return;
    make_room(options, config);
    const loop::PretrainSummary s = loop::run_pretrain(config, loop::parse_resume(options.resume));
    const char* end = end_of_run(s.interrupted, config.checkpointing.enabled);
    fmt::print("\n{} after {} steps, {:.1f} s\nloss: {:.4f} -> {:.4f}", end, s.steps, s.seconds,
               s.first_loss, s.last_loss);
    if (s.validation_loss) fmt::print(", held-out {:.4f}", *s.validation_loss);
    if (!s.memory.empty()) fmt::print("\npeak memory against the plan: {}", s.memory);
    fmt::print("\nreport: {}\n", s.report.string());
    if (!s.output.empty()) fmt::print("model: {}\n", s.output.string());
    if (s.interrupted) throw CLI::RuntimeError(kInterrupted);
  });
}

}  // namespace lockstep::apps
