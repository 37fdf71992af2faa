#include "loop/doctor.h"

#include <fmt/format.h>

#include "apps/verbs.h"

namespace lockstep::apps {

void add_doctor(CLI::App& app) {
  CLI::App* verb = app.add_subcommand(
      "doctor", "what this machine offers, what this build has, and a check of its arithmetic");
  verb->footer("Example: lockstep doctor\nEnds with exit code 1 when something needs repair.");
  verb->callback([] {
    std::string section;
    int problems = 0;
    for (const loop::Finding& f : loop::diagnose(LOCKSTEP_VERSION)) {
      if (f.section != section) fmt::print("{}{}\n", section.empty() ? "" : "\n", f.section);
      section = f.section;
      fmt::print("  {:<28} {}{}\n", f.name, f.problem ? "PROBLEM: " : "", f.value);
      problems += f.problem;
    }
    if (problems == 0) {
      fmt::print("\nall well\n");
      return;
    }
    fmt::print("\n{} problem{} to repair, see above\n", problems, problems == 1 ? "" : "s");
    throw CLI::RuntimeError(1);
  });
}

}  // namespace lockstep::apps
