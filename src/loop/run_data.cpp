#include "loop/run_data.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "base/file_io.h"
#include "loop/config_load.h"

namespace lockstep::loop {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMaxConfigBytes = 1 << 20;

std::optional<double> number(const MetricValue& value) {
  if (const auto* integer = std::get_if<std::int64_t>(&value)) return static_cast<double>(*integer);
  if (const auto* real = std::get_if<double>(&value)) return *real;
  return std::nullopt;
}

}  // namespace

RunData read_run(const fs::path& folder) {
  RunData run;
  run.folder = folder;
  const fs::path clean = fs::weakly_canonical(folder);
  run.name = clean.filename().string();
  if (!fs::exists(folder / "metrics.jsonl"))
    base::fail<base::InputError>(
        "{} holds no run: metrics.jsonl is missing. Name the folder that logger.log_dir gave",
        folder.string());
  run.rows = read_metrics(folder / "metrics.jsonl");
  const fs::path config = folder / "config.yaml";
  if (!fs::exists(config)) return run;
  run.config_text = base::read_file(config, kMaxConfigBytes);
  try {
    run.config = load_config({config}, {});
  } catch (const base::InputError&) {
    // Written by another version: the text is shown, the settings are not picked from it.
  }
  return run;
}

Series metric_series(const RunData& run, const std::string& metric, const std::string& name) {
  Series series{name, {}};
  for (const MetricsRow& row : run.rows)
    if (const auto found = row.values.find(metric); found != row.values.end())
      if (const auto y = number(found->second))
        series.points.push_back({static_cast<double>(row.step), *y});
  return series;
}

std::vector<std::string> metric_names(const RunData& run) {
  std::set<std::string> names;
  for (const MetricsRow& row : run.rows)
    for (const auto& [name, value] : row.values)
      if (number(value)) names.insert(name);
  return {names.begin(), names.end()};
}

std::optional<double> first_value(const RunData& run, const std::string& metric) {
  for (const Point& p : metric_series(run, metric, "").points)
    if (std::isfinite(p.y)) return p.y;
  return std::nullopt;
}

std::optional<double> last_value(const RunData& run, const std::string& metric) {
  const Series series = metric_series(run, metric, "");
  for (auto p = series.points.rbegin(); p != series.points.rend(); ++p)
    if (std::isfinite(p->y)) return p->y;
  return std::nullopt;
}

std::optional<double> mean_value(const RunData& run, const std::string& metric, double fraction) {
  const std::vector<Point> points = metric_series(run, metric, "").points;
  const auto wanted =
      static_cast<std::size_t>(std::ceil(fraction * static_cast<double>(points.size())));
  double sum = 0, n = 0;
  for (std::size_t i = points.size() - std::min(points.size(), wanted); i < points.size(); ++i)
    if (std::isfinite(points[i].y)) sum += points[i].y, ++n;
  if (n == 0) return std::nullopt;
  return sum / n;
}

double sum_values(const RunData& run, const std::string& metric) {
  double sum = 0;
  for (const Point& p : metric_series(run, metric, "").points)
    if (std::isfinite(p.y)) sum += p.y;
  return sum;
}

}  // namespace lockstep::loop
