// metrics.jsonl: one JSON object a step, the primary record of a run. "step" comes first, then the
// names in alphabetical order, so that equal runs give equal bytes (timings aside). Doubles are
// printed with the fewest digits that read back to the same bits, always with a point or an
// exponent; NaN and infinity become null.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/file_io.h"

namespace lockstep::loop {

using MetricValue = std::variant<std::int64_t, double, std::string>;
using Metrics = std::map<std::string, MetricValue>;

struct MetricsRow {
  std::int64_t step = 0;
  Metrics values;
};

// The line with its newline.
std::string metrics_line(std::int64_t step, const Metrics& values);

// The names whose value is NaN or infinite.
std::vector<std::string> non_finite_metrics(const Metrics& values);

// One line without its newline; nullopt unless it is a whole row. null reads as NaN.
std::optional<MetricsRow> parse_metrics_line(std::string_view line);

// All rows. A last line without newline (a process died while writing it) is left out; any other
// malformed line is an InputError that names file and line.
std::vector<MetricsRow> read_metrics(const std::filesystem::path& path);

// Cuts the file back to the rows of steps <= last_step by an atomic rewrite, so that a resumed run
// continues it as if never stopped. Returns what was unusual, for the log. InputError when a
// malformed line stands before the row of last_step. A missing file is made empty.
std::vector<std::string> truncate_metrics(const std::filesystem::path& path,
                                          std::int64_t last_step);

// Appends rows to the file. Steps must rise.
class MetricsWriter {
 public:
  explicit MetricsWriter(const std::filesystem::path& path);

  // Hands the whole line to the kernel before it returns. SystemError when that fails (disk full);
  // the part that got through is taken back, so the file still ends with a whole line.
  void append(std::int64_t step, const Metrics& values);

  void sync() { file_.sync(); }  // to the disk; call before saving a checkpoint

 private:
  base::OutputFile file_;
  std::optional<std::int64_t> last_step_;
};

}  // namespace lockstep::loop
