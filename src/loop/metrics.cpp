#include "loop/metrics.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;
namespace fs = std::filesystem;

static constexpr std::size_t kMaxMetricsBytes = std::size_t{1} << 32;

static std::string json_value(const MetricValue& value) {
  if (const auto* integer = std::get_if<std::int64_t>(&value)) return fmt::format("{}", *integer);
  if (const auto* text = std::get_if<std::string>(&value))
    return nlohmann::json(*text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  const double x = std::get<double>(value);
  if (!std::isfinite(x)) return "null";
  std::string digits = fmt::format("{}", x);
  if (digits.find_first_of(".e") == std::string::npos) digits += ".0";
  return digits;
}

std::string metrics_line(std::int64_t step, const Metrics& values) {
  std::string line = fmt::format("{{\"step\": {}", step);
  for (const auto& [name, value] : values)
    line += ", " + json_value(name) + ": " + json_value(value);
  return line + "}\n";
}

std::vector<std::string> non_finite_metrics(const Metrics& values) {
  std::vector<std::string> names;
  for (const auto& [name, value] : values)
    if (const auto* x = std::get_if<double>(&value); x != nullptr && !std::isfinite(*x))
      names.push_back(name);
  return names;
}

std::optional<MetricsRow> parse_metrics_line(std::string_view line) {
  // Flat by construction: a callback that refuses depth keeps hostile nesting out of memory.
  const auto shallow = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > 2) throw std::invalid_argument("nested");
    return true;
  };
  MetricsRow row;
  try {
    const nlohmann::json json = nlohmann::json::parse(line, shallow);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer())
      return std::nullopt;
    row.step = json["step"].get<std::int64_t>();
    for (const auto& [name, value] : json.items()) {
      if (name == "step") continue;
      if (value.is_number_integer())
        row.values[name] = value.get<std::int64_t>();
      else if (value.is_number())
        row.values[name] = value.get<double>();
      else if (value.is_string())
        row.values[name] = value.get<std::string>();
      else if (value.is_null())
        row.values[name] = std::numeric_limits<double>::quiet_NaN();
      else
        return std::nullopt;
    }
  } catch (const std::exception&) {
    return std::nullopt;
  }
  return row;
}

// Calls `each(line_number, line)` for every line that ends in a newline, until it returns false;
// returns the offset behind the last line accepted.
template <typename Each>
static std::size_t for_each_line(std::string_view text, Each each) {
  std::size_t at = 0;
  for (std::size_t number = 1; at < text.size(); ++number) {
    const std::size_t end = text.find('\n', at);
    if (end == std::string_view::npos || !each(number, text.substr(at, end - at))) break;
    at = end + 1;
  }
  return at;
}

std::vector<MetricsRow> read_metrics(const fs::path& path) {
  const std::string text = base::read_file(path, kMaxMetricsBytes);
  std::vector<MetricsRow> rows;
  for_each_line(text, [&](std::size_t number, std::string_view line) {
    auto row = parse_metrics_line(line);
    if (!row) fail<InputError>("{}:{}: not a metrics row", path.string(), number);
    rows.push_back(std::move(*row));
    return true;
  });
  return rows;
}

std::vector<std::string> truncate_metrics(const fs::path& path, std::int64_t last_step) {
  std::vector<std::string> notes;
  const std::string text = fs::exists(path) ? base::read_file(path, kMaxMetricsBytes) : "";
  std::int64_t newest = -1;
  std::size_t malformed = 0;
  const std::size_t keep = for_each_line(text, [&](std::size_t number, std::string_view line) {
    const auto row = parse_metrics_line(line);
    if (!row) malformed = number;
    if (!row || row->step > last_step) return false;
    newest = row->step;
    return true;
  });
  if (malformed != 0 && newest < last_step)
    fail<InputError>(
        "{}:{}: not a metrics row, and step {} is still to come: repair or move the file",
        path.string(), malformed, last_step);
  if (newest < last_step && last_step > 0)
    notes.push_back(fmt::format("{}: ends at step {}, the checkpoint is at step {}", path.string(),
                                newest, last_step));
  if (keep < text.size())
    notes.push_back(fmt::format("{}: cut back to step {} ({} bytes)", path.string(), last_step,
                                text.size() - keep));
  base::write_file_atomic(path, std::string_view(text).substr(0, keep));
  return notes;
}

MetricsWriter::MetricsWriter(const fs::path& path) : file_(path, base::OutputFile::kAppend) {}

void MetricsWriter::append(std::int64_t step, const Metrics& values) {
  LOCKSTEP_CHECK(!last_step_ || step > *last_step_, "step {} after step {}", step, *last_step_);
  LOCKSTEP_CHECK(values.count("step") == 0, "'step' is no metric");
  const std::size_t before = file_.size();
  try {
    file_.write(metrics_line(step, values));
  } catch (const base::SystemError&) {
    try {
      file_.truncate(before);
    } catch (const base::SystemError&) {
      // Not a regular file; the first error is the one to report.
    }
    throw;
  }
  last_step_ = step;
}

}  // namespace lockstep::loop
