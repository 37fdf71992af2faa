// Keys of a config.json: each is read as what it must be, and what nobody read is refused.
#pragma once

#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"

namespace lockstep::model {

// Reads keys of one JSON object and remembers which, so that finish() can refuse the rest. A key
// that is null counts as absent, as transformers writes options that are off.
class KeyReader {
 public:
  KeyReader(const nlohmann::json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  const std::string& file() const { return file_; }
  bool has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }

  const nlohmann::json* find(const char* key) {
    used_.insert(key);
    return has(key) ? &object_.at(key) : nullptr;
  }

  template <typename... Args>
  [[noreturn]] void refuse(const char* key, fmt::format_string<Args...> format,
                           Args&&... args) const {
    base::fail<base::InputError>("{}: {}{}: {}", file_, prefix_, key,
                                 fmt::format(format, std::forward<Args>(args)...));
  }

  std::int64_t integer(const char* key) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) refuse(key, "missing, expected a whole number");
    return whole(key, *value);
  }
  std::int64_t integer(const char* key, std::int64_t fallback) {
    const nlohmann::json* value = find(key);
    return value == nullptr ? fallback : whole(key, *value);
  }
  // A value that a later check narrows to int.
  std::int32_t small_integer(const char* key, std::int64_t value) {
    if (value < std::numeric_limits<std::int32_t>::min() ||
        value > std::numeric_limits<std::int32_t>::max())
      refuse(key, "{} does not fit 32 bits", value);
    return static_cast<std::int32_t>(value);
  }
  double number(const char* key, double fallback) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number()) refuse(key, "expected a number, found {}", value->dump());
    return value->get<double>();
  }
  double number(const char* key) {
    if (!has(key)) refuse(key, "missing, expected a number");
    return number(key, 0.0);
  }
  bool boolean(const char* key, bool fallback) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) refuse(key, "expected true or false, found {}", value->dump());
    return value->get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) refuse(key, "expected a string, found {}", value->dump());
    return value->get<std::string>();
  }
  // One token or a list of them; empty when absent.
  std::vector<std::int32_t> tokens(const char* key) {
    std::vector<std::int32_t> ids;
    const nlohmann::json* value = find(key);
    if (value == nullptr) return ids;
    if (!value->is_array()) return {small_integer(key, whole(key, *value))};
    for (const nlohmann::json& id : *value) ids.push_back(small_integer(key, whole(key, id)));
    return ids;
  }
  // The key may be absent or hold `supported`, nothing else.
  void only(const char* key, const nlohmann::json& supported) {
    const nlohmann::json* value = find(key);
    if (value != nullptr && *value != supported)
      refuse(key, "{} is not supported, only {}", value->dump(), supported.dump());
  }
  void absent(const char* key) {
    if (find(key) != nullptr) refuse(key, "not supported");
  }
  void skip(std::initializer_list<const char*> keys) {
    for (const char* key : keys) used_.insert(key);
  }

  void finish() const {
    for (const auto& [key, value] : object_.items())
      if (!used_.count(key) && !key.starts_with('_') && !value.is_null())
        refuse(key.c_str(),
               "not a known key; if it does not change what the model computes, remove it");
  }

  std::int64_t whole(const char* key, const nlohmann::json& value) const {
    if (!value.is_number_integer()) refuse(key, "expected a whole number, found {}", value.dump());
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{1} << 62)
      refuse(key, "{} is too large", value.dump());
    return value.get<std::int64_t>();
  }

 private:
  const nlohmann::json& object_;
  std::string file_, prefix_;
  std::set<std::string, std::less<>> used_;
};

}  // namespace lockstep::model
