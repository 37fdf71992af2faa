#include "model/strict_json.h"

#include <set>
#include <vector>

#include "base/error.h"
#include "base/file_io.h"

namespace lockstep::model {

using base::fail;
using base::InputError;

static constexpr int kMaxDepth = 32;

nlohmann::json parse_strict_json(std::string_view text, const std::string& file) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kMaxDepth) fail<InputError>("{}: nested deeper than {} levels", file, kMaxDepth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) fail<InputError>("{}: key '{}' twice", file, key);
    }
    return true;
  };
  json document;
  try {
    document = json::parse(text, check);
  } catch (const json::exception& e) {
    fail<InputError>("{}: not valid JSON ({})", file, e.what());
  }
  if (!document.is_object())
    fail<InputError>("{}: expected a JSON object, found {}", file, document.type_name());
  return document;
}

nlohmann::json read_json_file(const std::filesystem::path& path, std::size_t limit) {
  return parse_strict_json(base::read_file(path, limit), path.string());
}

std::string json_text(const nlohmann::json& document) { return document.dump(2) + "\n"; }

}  // namespace lockstep::model
