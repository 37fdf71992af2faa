// A part of a JSON document with its place, for messages: "FILE: model.merges[3]: ...".
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"
#include "model/unicode_text.h"

namespace lockstep::model {

// Text of a file within a message: not more than a line of it.
inline std::string shown(std::string_view text) {
  return text.size() <= 60 ? std::string(text) : valid_utf8(text.substr(0, 60)) + "...";
}

struct JsonPart {
  const nlohmann::json& value;
  const std::string& file;
  std::string path;  // "model.vocab"; "" at the top

  [[noreturn]] void fail(const std::string& what) const {
    base::fail<base::InputError>("{}: {}{}{}", file, path, path.empty() ? "" : ": ", what);
  }
  bool is_null() const { return value.is_null(); }

  // A member; a missing one is null.
  JsonPart operator[](std::string_view key) const {
    static const nlohmann::json kNull;
    const auto found = value.find(key);
    return {found == value.end() ? kNull : *found, file,
            path.empty() ? std::string(key) : path + "." + std::string(key)};
  }
  JsonPart at(std::size_t i) const { return {value[i], file, fmt::format("{}[{}]", path, i)}; }

  const JsonPart& object() const {
    if (!value.is_object()) fail(fmt::format("must be an object, is {}", value.type_name()));
    return *this;
  }
  const JsonPart& array() const {
    if (!value.is_array()) fail(fmt::format("must be an array, is {}", value.type_name()));
    return *this;
  }
  std::string text() const {
    if (!value.is_string()) fail(fmt::format("must be a string, is {}", value.type_name()));
    return value.get<std::string>();
  }
  std::string text_or(std::string_view missing) const {
    return is_null() ? std::string(missing) : text();
  }
  // A text of one character.
  std::string character() const {
    const std::string one = text();
    std::size_t end = 0;
    if (!one.empty()) next_code_point(one, end);
    if (end == 0 || end != one.size()) fail("must be one character");
    return one;
  }
  bool flag(bool missing) const {
    if (is_null()) return missing;
    if (!value.is_boolean()) fail(fmt::format("must be true or false, is {}", value.type_name()));
    return value.get<bool>();
  }
  std::int64_t integer(std::int64_t least, std::int64_t greatest) const {
    if (!value.is_number_integer())
      fail(fmt::format("must be an integer, is {}", shown(value.dump())));
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX)
      fail(fmt::format("{} is above {}", value.dump(), greatest));
    const auto n = value.get<std::int64_t>();
    if (n < least || n > greatest)
      fail(fmt::format("{} is not within {} .. {}", n, least, greatest));
    return n;
  }
  // Refuses keys that are not listed.
  void only(std::initializer_list<std::string_view> keys) const {
    for (const auto& [key, unused] : object().value.items())
      if (std::find(keys.begin(), keys.end(), key) == keys.end())
        fail(fmt::format("unknown key '{}'", shown(key)));
  }
};

}  // namespace lockstep::model
