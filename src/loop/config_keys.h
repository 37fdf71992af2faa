// The table of configuration keys: one row a key, binding its dotted name to a member of RunConfig
// with its type, range, choices and meaning. Reading, printing and help all walk this table.
#pragma once

#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "loop/config.h"

namespace lockstep::loop {

// Where a value lives; the alternative is its type.
using ConfigSlot =
    std::variant<bool*, std::int64_t*, double*, std::string*, std::optional<bool>*,
                 std::optional<std::int64_t>*, std::optional<double>*, std::optional<std::string>*,
                 std::vector<std::int64_t>*, std::vector<double>*, std::vector<std::string>*,
                 std::optional<std::vector<std::string>>*, std::map<std::string, double>*>;

// Allowed numbers: low <= x <= high, or low < x with open_low. Applies to each element of a list.
struct ConfigRange {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool open_low = false;
};

struct ConfigKey {
  std::string name;
  ConfigSlot slot;
  ConfigRange range;
  std::vector<std::string> choices;  // allowed strings (or map keys); empty: any
  std::string help;
  // True for keys that may differ when a run is resumed, because they do not change what a step
  // computes (where to log, how often to save, when to stop).
  bool operational = false;
};

// All rows, in the order in which they are printed. The slots point into `config`.
std::vector<ConfigKey> config_keys(RunConfig& config);

}  // namespace lockstep::loop
