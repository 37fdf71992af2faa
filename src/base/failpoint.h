// Named places where a test may kill the process, to prove that whatever is on disk at that moment
// can be resumed from. Off unless LOCKSTEP_FAILPOINT (base/env.h) names the place.
#pragma once

namespace lockstep::base {

// Raises SIGKILL when LOCKSTEP_FAILPOINT equals `name`; otherwise does nothing. Reads the
// environment every time: for slow paths (saving) only.
void failpoint(const char* name);

}  // namespace lockstep::base
