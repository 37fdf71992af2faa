// What this machine offers, what this build has, and whether its arithmetic is the contract's.
#pragma once

#include <string>
#include <vector>

namespace lockstep::loop {

struct Finding {
  std::string section;  // "processor", "memory", "GPU", "libraries", "build", "self-check", ...
  std::string name;
  std::string value;
  bool problem = false;  // something to repair before a run; what and how stands in `value`
};

// Reads /proc and /sys, loads driver libraries if they are there, and runs the self-checks (well
// under a second). Nothing that is absent is an error.
std::vector<Finding> diagnose(const std::string& version);

// Self-checks alone: worked answers of the tensor-core step (docs/numerics.md, section 4), and one
// small FP8 and one BF16 product on every instruction set and two threads, equal by bytes.
std::vector<Finding> self_check();

}  // namespace lockstep::loop
