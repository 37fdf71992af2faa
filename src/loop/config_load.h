// Reading, printing and comparing run configurations.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "loop/config.h"

namespace lockstep::loop {

// Defaults, then each file in order, then each override "policy.optimizer.lr=1e-6" (the value is
// YAML: [0.9, 0.95], null, ...); later ones win key by key. A value may refer to another key as
// ${grpo.seed}, alone or inside a text; references are resolved after merging, and "$${" stands for
// a literal "${". Refused with an InputError that names file:line and the full key: unknown keys
// (with the nearest known one), a key twice in one file, a wrong type or range, references to
// nothing or in a circle, sections nested or aliased beyond reason, more than one document.
RunConfig load_config(const std::vector<std::filesystem::path>& files,
                      const std::vector<std::string>& overrides);

// Every key with its value, as YAML that load_config reads back to the same struct; with the
// meaning of each key as a comment when asked.
std::string config_to_yaml(const RunConfig& config, bool with_help = false);

// "key  default  meaning (what it takes)", one line a key, for `--help`; keys under `prefix` only.
std::string config_help(const std::string& prefix = "");

// A Markdown table of all keys, for docs/.
std::string config_markdown();

// The keys that decide what a step computes, with other values in `b` than in `a`:
// "policy.optimizer.lr: 0.001 -> 0.0001". A resumed run must give none.
std::vector<std::string> config_differences(const RunConfig& a, const RunConfig& b);

// XXH3-128 in hexadecimal over those keys and their values.
std::string config_hash(const RunConfig& config);

}  // namespace lockstep::loop
