// A config.json to change, and what a refusal has to name.
#pragma once

#include "model/hf_config.h"
#include "model/strict_json.h"
#include "model/temp_folder.h"

namespace lockstep::model {

using nlohmann::json;

inline json golden(const char* family) {
  return read_json_file(std::filesystem::path(LOCKSTEP_TEST_DATA) / "hf" / family / "config.json");
}
inline json good() { return golden("qwen3_moe"); }

inline ModelConfig parse(const json& document) {
  return parse_hf_config(document, "c.json", {}, "");
}

inline json with(const char* key, const json& value) {
  json document = good();
  document[key] = value;
  return document;
}

inline void expect_key_refused(const char* key, const json& value) {
  SCOPED_TRACE(std::string(key) + " = " + value.dump());
  expect_refused([&] { parse(with(key, value)); }, {"c.json", key});
}

}  // namespace lockstep::model
