#include "base/failpoint.h"

#include <csignal>

#include "base/env.h"

namespace lockstep::base {

void failpoint(const char* name) {
  const auto wanted = env_choice("LOCKSTEP_FAILPOINT", {});
  if (wanted && *wanted == name) std::raise(SIGKILL);
}

}  // namespace lockstep::base
