#include "loop/report.h"

#include <fmt/format.h>

#include <algorithm>

#include "apps/verbs.h"
#include "base/error.h"

namespace lockstep::apps {

void add_report(CLI::App& app) {
  CLI::App* verb =
      app.add_subcommand("report", "write the HTML report of a run, or of several in one page");
  verb->footer(
      "Example: lockstep report runs/demo\n"
      "         lockstep report runs/fp8 runs/bf16 --output fp8_against_bf16.html");
  struct Options {
    std::vector<std::string> runs;
    std::string output;
  };
  static Options options;
  verb->add_option("runs", options.runs, "run folders")->required();
  verb->add_option("-o,--output", options.output,
                   "file to write with several runs; one run's report is always RUN/report.html");
  verb->callback([] {
    if (options.runs.size() == 1) {
      if (!options.output.empty())
        base::fail<base::InputError>(
            "--output goes with several runs; the report of one run is written to {}/report.html",
            options.runs[0]);
      fmt::print("report: {}\n", loop::write_report(options.runs[0]).string());
      return;
    }
    const std::string out = options.output.empty() ? "comparison.html" : options.output;
    loop::write_comparison({options.runs.begin(), options.runs.end()}, out);
    fmt::print("report: {}\n", out);
  });
}

}  // namespace lockstep::apps
