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

// For a setting that a library reads before main: when the registered variable is unset, sets it
// and starts the program again in its place (same process id, same arguments). Goes on as it is
// where that cannot be done.
void restart_with_default(const std::string& name, const std::string& value, char** argv);

}  // namespace lockstep::base
