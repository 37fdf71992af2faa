#include "loop/config_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <type_traits>

#include "base/error.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;

namespace {

template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<std::optional<T>> : std::true_type {};
template <typename T>
struct IsVector : std::false_type {};
template <typename T>
struct IsVector<std::vector<T>> : std::true_type {};

bool in_range(const ConfigRange& r, double x) {
  return (r.open_low ? x > r.low : x >= r.low) && x <= r.high;
}

bool parse(const ConfigKey&, const std::string& text, bool* out) {
  const bool yes = text == "true" || text == "True" || text == "TRUE";
  const bool no = text == "false" || text == "False" || text == "FALSE";
  *out = yes;
  return yes || no;
}

template <typename Number>
bool parse_number(const std::string& text, Number* out) {
  const char* begin = text.data() + (text.size() > 1 && text[0] == '+' ? 1 : 0);
  const auto [end, error] = std::from_chars(begin, text.data() + text.size(), *out);
  return error == std::errc() && end == text.data() + text.size();
}

bool parse(const ConfigKey& key, const std::string& text, std::int64_t* out) {
  return parse_number(text, out) && in_range(key.range, static_cast<double>(*out));
}

bool parse(const ConfigKey& key, const std::string& text, double* out) {
  return parse_number(text, out) && std::isfinite(*out) && in_range(key.range, *out);
}

bool allowed(const ConfigKey& key, const std::string& text) {
  return key.choices.empty() ||
         std::find(key.choices.begin(), key.choices.end(), text) != key.choices.end();
}

bool parse(const ConfigKey& key, const std::string& text, std::string* out) {
  *out = text;
  return allowed(key, text);
}

// True when the value has the type and lies in the range.
template <typename T>
bool assign(const ConfigKey& key, const RawValue& value, T* out) {
  if constexpr (IsOptional<T>::value) {
    if (value.kind == RawValue::kNull) {
      out->reset();
      return true;
    }
    typename T::value_type inner{};
    if (!assign(key, value, &inner)) return false;
    *out = std::move(inner);
    return true;
  } else if constexpr (IsVector<T>::value) {
    if (value.kind != RawValue::kList) return false;
    out->clear();
    for (const std::string& item : value.items) {
      typename T::value_type element{};
      if (!parse(key, item, &element)) return false;
      out->push_back(element);
    }
    return true;
  } else if constexpr (std::is_same_v<T, std::map<std::string, double>>) {
    if (value.kind != RawValue::kMap) return false;
    out->clear();
    for (const auto& [name, text] : value.pairs) {
      double number = 0;
      if (!allowed(key, name) || !parse(key, text, &number)) return false;
      if (!out->emplace(name, number).second) return false;
    }
    return true;
  } else {
    return value.kind == RawValue::kScalar && parse(key, value.text, out);
  }
}

std::string scalar_text(bool x) { return x ? "true" : "false"; }
std::string scalar_text(std::int64_t x) { return fmt::format("{}", x); }
std::string scalar_text(double x) { return fmt::format("{}", x); }  // shortest that round-trips
std::string scalar_text(const std::string& x) { return x; }

template <typename T>
RawValue to_raw(const T& x) {
  RawValue out;
  if constexpr (IsOptional<T>::value) {
    if (x) out = to_raw(*x);
  } else if constexpr (IsVector<T>::value) {
    out.kind = RawValue::kList;
    for (const auto& element : x) out.items.push_back(scalar_text(element));
  } else if constexpr (std::is_same_v<T, std::map<std::string, double>>) {
    out.kind = RawValue::kMap;
    for (const auto& [name, number] : x) out.pairs.emplace_back(name, scalar_text(number));
  } else {
    out.kind = RawValue::kScalar;
    out.text = scalar_text(x);
  }
  return out;
}

// Plain when no reader could take it for anything but this text, otherwise in double quotes.
std::string yaml_scalar(const std::string& text) {
  const auto plain = [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '-' || c == '+' || c == '.' || c == '/';
  };
  const bool null_like = text.empty() || text == "null" || text == "Null" || text == "NULL";
  if (!null_like && text.front() != '-' && std::all_of(text.begin(), text.end(), plain))
    return text;
  double number = 0;
  if (!null_like && parse_number(text, &number)) return text;
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\')
      out += {'\\', c};
    else if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    else
      out += c;
  }
  return out + "\"";
}

// A literal "${" is written "$${", so that it is not taken for a reference when read back.
std::string escape_references(std::string text) {
  for (std::size_t at = 0; (at = text.find("${", at)) != std::string::npos; at += 3)
    text.insert(at, "$");
  return text;
}

const char* type_text(const ConfigSlot& slot) {
  static constexpr const char* kNames[] = {"true or false",
                                           "a whole number",
                                           "a number",
                                           "a text",
                                           "true, false or null",
                                           "a whole number or null",
                                           "a number or null",
                                           "a text or null",
                                           "a list of whole numbers",
                                           "a list of numbers",
                                           "a list of texts",
                                           "a list of texts or null",
                                           "a map from name to number"};
  static_assert(std::size(kNames) == std::variant_size_v<ConfigSlot>);
  return kNames[slot.index()];
}

std::string raw_text(const RawValue& value) {
  std::string text = raw_to_yaml(value);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

}  // namespace

std::string expected_value(const ConfigKey& key) {
  const ConfigRange& r = key.range;
  std::string text = type_text(key.slot);
  if (!key.choices.empty()) text += fmt::format(" (one of {})", fmt::join(key.choices, ", "));
  const bool low = std::isfinite(r.low), high = std::isfinite(r.high) && r.high < 1e15;
  if (low && high)
    text += fmt::format(" {} {} up to {}", r.open_low ? "above" : "from", r.low, r.high);
  else if (low)
    text += fmt::format(", {} {}", r.open_low ? "above" : "at least", r.low);
  return text;
}

void set_config_value(const ConfigKey& key, const RawValue& value, const std::string& where) {
  const bool good = std::visit([&](auto* slot) { return assign(key, value, slot); }, key.slot);
  if (!good)
    fail<InputError>("{}: {} is {}, expected {}", where, key.name, raw_text(value),
                     expected_value(key));
}

RawValue config_value(const ConfigKey& key) {
  return std::visit([](auto* slot) { return to_raw(*slot); }, key.slot);
}

std::string raw_to_yaml(const RawValue& value) {
  const auto one = [](const std::string& text) { return yaml_scalar(escape_references(text)); };
  std::vector<std::string> parts;
  switch (value.kind) {
    case RawValue::kNull:
      return "null";
    case RawValue::kScalar:
      return one(value.text);
    case RawValue::kList:
      for (const std::string& item : value.items) parts.push_back(one(item));
      return fmt::format("[{}]", fmt::join(parts, ", "));
    case RawValue::kMap:
      for (const auto& [name, text] : value.pairs) parts.push_back(one(name) + ": " + one(text));
      return fmt::format("{{{}}}", fmt::join(parts, ", "));
  }
  return "";
}

}  // namespace lockstep::loop
