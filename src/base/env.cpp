#include "base/env.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"

namespace lockstep::base {

const std::vector<EnvVariable>& env_registry() {
  static const std::vector<EnvVariable> registry = {
      {"LOCKSTEP_CPU_ISA", "avx512 | avx2 | portable",
       "force the CPU code path (all give the same bits)"},
      {"LOCKSTEP_FAILPOINT", "NAME",
       "tests: kill the process (SIGKILL) when the named failpoint is reached"},
      {"LOCKSTEP_PLAN", "128x256 | 128x128 | few",
       "force the tiles of FP8 GEMMs on a GPU (all give the same bits)"},
      {"LOCKSTEP_TEST_SIZES", "few",
       "tests on a GPU: a part of the sizes, for compute-sanitizer, which slows kernels a "
       "hundredfold"},
      {"OMP_NUM_THREADS", "NUMBER", "CPU threads where num_threads is 0; read by OpenMP"},
      {"OMP_WAIT_POLICY", "passive | active",
       "how threads wait for each other; lockstep takes passive when unset"},
  };
  return registry;
}

static std::optional<std::string> env_raw(const std::string& name) {
  const auto& all = env_registry();
  const bool known =
      std::any_of(all.begin(), all.end(), [&](const EnvVariable& v) { return name == v.name; });
  LOCKSTEP_CHECK(known, "environment variable {} is not registered", name);
  const char* value = std::getenv(name.c_str());
  if (value == nullptr || *value == '\0') return std::nullopt;
  return std::string(value);
}

std::optional<std::string> env_choice(const std::string& name,
                                      const std::vector<std::string>& choices) {
  auto value = env_raw(name);
  if (value && !choices.empty() &&
      std::find(choices.begin(), choices.end(), *value) == choices.end())
    fail<InputError>("environment variable {}={}: expected one of {}", name, *value,
                     fmt::join(choices, ", "));
  return value;
}

std::optional<long> env_int(const std::string& name, long low, long high) {
  auto value = env_raw(name);
  if (!value) return std::nullopt;
  char* end = nullptr;
  const long number = std::strtol(value->c_str(), &end, 10);
  if (*end != '\0' || number < low || number > high)
    fail<InputError>("environment variable {}={}: expected a whole number from {} to {}", name,
                     *value, low, high);
  return number;
}

void wait_passively(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  if (setenv("OMP_WAIT_POLICY", "passive", 1) == 0) execv("/proc/self/exe", argv);
}

}  // namespace lockstep::base
