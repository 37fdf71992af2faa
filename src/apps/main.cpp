// lockstep: one binary, one verb a job.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "apps/verbs.h"
#include "base/env.h"
#include "base/error.h"

// Exit codes: 0 done, 1 a verb's "no" (compare --require-equal, doctor), 2 bad input, 3 the world
// failed, 4 a defect, kInterrupted.
constexpr int kBadInput = 2;

// Keeps the message behind what was printed so far, also in a file.
static int fail(int code, const char* kind, const std::exception& e) {
  std::fflush(stdout);
  fmt::print(stderr, "lockstep: {}{}\n", kind, e.what());
  return code;
}

int main(int argc, char** argv) {
  lockstep::base::wait_passively(argv);
  CLI::App app(
      "Lockstep: reinforcement learning of mixture-of-experts models in FP8, policy and rollout "
      "bit for bit",
      "lockstep");
  app.require_subcommand(1);
  app.set_version_flag("--version", LOCKSTEP_VERSION);
  lockstep::apps::add_pretrain(app);
  lockstep::apps::add_rl(app);
  lockstep::apps::add_compare(app);
  lockstep::apps::add_report(app);
  lockstep::apps::add_convert(app);
  lockstep::apps::add_tokenize(app);
  lockstep::apps::add_score(app);
  lockstep::apps::add_generate(app);
  lockstep::apps::add_doctor(app);
  if (argc > 1 && argv[1][0] != '-' &&
      app.get_subcommands([&](CLI::App* v) { return v->check_name(argv[1]); }).empty()) {
    fmt::print(stderr, "lockstep: there is no verb '{}'; lockstep --help lists them\n", argv[1]);
    return kBadInput;
  }
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::RuntimeError& e) {  // a verb's own exit code
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kBadInput;  // 0: --help, --version
  } catch (const lockstep::base::InputError& e) {
    return fail(kBadInput, "", e);
  } catch (const lockstep::base::SystemError& e) {
    return fail(3, "", e);
  } catch (const std::exception& e) {
    return fail(4, "internal error, please report it: ", e);
  }
}
