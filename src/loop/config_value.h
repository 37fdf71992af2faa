// Text to typed value and back, for one row of the key table. Internal to loop/config*.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "loop/config_keys.h"

namespace lockstep::loop {

// A value as YAML has it, before a type is known.
struct RawValue {
  enum Kind { kNull, kScalar, kList, kMap };
  Kind kind = kNull;
  std::string text;                                        // kScalar
  std::vector<std::string> items;                          // kList, scalars only
  std::vector<std::pair<std::string, std::string>> pairs;  // kMap, scalars only
};

// Stores `value` in the key's slot. Wrong type, range or choice: InputError that starts with
// `where` ("file:line") and names the key and what it takes.
void set_config_value(const ConfigKey& key, const RawValue& value, const std::string& where);

RawValue config_value(const ConfigKey& key);

// On one line of YAML; reading it back gives the same RawValue (doubles round-trip).
std::string raw_to_yaml(const RawValue& value);

// "whole number from 1 to 4096", "one of bf16, fp8", ...
std::string expected_value(const ConfigKey& key);

}  // namespace lockstep::loop
