// YAML text to raw values by key. Internal to loop/config*.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "loop/config_value.h"

namespace lockstep::loop {

struct ConfigEntry {
  RawValue value;
  std::string where;  // "demo.yaml:12" or "override 'a.b=c'"
};
using ConfigEntries = std::map<std::string, ConfigEntry>;

// All keys of one document. `source` names it in errors; with `line_numbers` the line is added.
ConfigEntries read_config_yaml(const std::string& text, const std::string& source,
                               bool line_numbers, const std::vector<ConfigKey>& keys);

// "a.b.c=value" as the entries it sets.
ConfigEntries read_config_override(const std::string& text, const std::vector<ConfigKey>& keys);

// ", did you mean X?" for the nearest known key or section, or "" when nothing is near.
std::string did_you_mean(const std::string& key, const std::vector<ConfigKey>& keys);

}  // namespace lockstep::loop
