// lockstep: one binary, one verb a job.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <exception>

#include "apps/verbs.h"
#include "base/error.h"

int main(int argc, char** argv) {
  CLI::App app(
      "Lockstep: reinforcement learning of mixture-of-experts models in FP8, policy and rollout "
      "bit for bit",
      "lockstep");
  app.require_subcommand(1);
  app.set_version_flag("--version", LOCKSTEP_VERSION);
  lockstep::apps::add_pretrain(app);
  lockstep::apps::add_rl(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& e) {
    return app.exit(e);
  } catch (const lockstep::base::InputError& e) {
    fmt::print(stderr, "lockstep: {}\n", e.what());
    return 2;
  } catch (const lockstep::base::SystemError& e) {
    fmt::print(stderr, "lockstep: {}\n", e.what());
    return 3;
  } catch (const std::exception& e) {
    fmt::print(stderr, "lockstep: internal error, please report it: {}\n", e.what());
    return 4;
  }
}
