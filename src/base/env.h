// The environment variables that Lockstep reads, all of them, in one place. A malformed value is an
// InputError.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace lockstep::base {

struct EnvVariable {
  const char* name;
  const char* values;   // what it accepts
  const char* meaning;  // one line, shown by `lockstep doctor`
};

// Every variable that may be passed to env_choice / env_int.
const std::vector<EnvVariable>& env_registry();

// The value of a registered variable, or nullopt when unset or empty. Must be one of `choices`
// unless that is empty.
std::optional<std::string> env_choice(const std::string& name,
                                      const std::vector<std::string>& choices);
std::optional<long> env_int(const std::string& name, long low, long high);

// Starts the program again with OMP_WAIT_POLICY=passive unless the user chose a way of waiting.
// libgomp reads the variable when it is loaded, and spins by default: beside other work on the
// machine each parallel region then costs milliseconds. Returns when there is nothing to do or the
// program cannot be started again.
void wait_passively(char** argv);

}  // namespace lockstep::base
