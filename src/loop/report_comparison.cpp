#include <fmt/format.h>

#include <cmath>

#include "base/error.h"
#include "base/file_io.h"
#include "loop/compare.h"
#include "loop/report.h"
#include "loop/report_charts.h"
#include "loop/report_page.h"
#include "loop/run_data.h"

namespace lockstep::loop {

namespace {

// The curves of a comparison stand one metric to a chart, one colour to a run.
std::string charts(const std::vector<RunData>& runs, const std::string& section) {
  std::string out;
  for (const ChartPlan& plan : chart_plans()) {
    if (plan.section != section) continue;
    for (const Curve& curve : plan.curves) {
      const std::string title =
          plan.curves.size() == 1 ? plan.title : std::string(plan.title) + ": " + curve.name;
      Chart chart{title, plan.unit, plan.note, {}, plan.axis};
      bool any = false;
      for (const RunData& run : runs) {  // all runs, so that a run keeps its colour
        chart.series.push_back(metric_series(run, curve.metric, run.name));
        any = any || !chart.series.back().points.empty();
      }
      if (any) out += line_chart(chart);
    }
  }
  return out.empty() ? "" : "<div class=\"charts\">\n" + out + "</div>\n";
}

std::string final_values(const std::vector<RunData>& runs) {
  std::vector<std::string> head = {"value"};
  for (const RunData& run : runs) head.push_back(run.name);
  for (std::size_t i = 1; i < runs.size(); ++i) head.push_back("gap of " + runs[i].name);
  std::vector<std::vector<std::string>> rows;
  for (const FinalValue& value : compare_final_values(runs)) {
    std::vector<std::string> row = {value.name};
    for (const auto& v : value.of_run) row.push_back(v ? number_text(*v) : "–");
    for (std::size_t i = 1; i < runs.size(); ++i) {
      const auto gap = value.gap(i);
      row.push_back(gap ? fmt::format("{}{}", *gap > 0 ? "+" : "", number_text(*gap)) : "–");
    }
    rows.push_back(row);
  }
  return html_table(head, rows);
}

}  // namespace

void write_comparison(const std::vector<std::filesystem::path>& folders,
                      const std::filesystem::path& out) {
  const std::vector<RunData> runs = read_runs(folders);
  std::string names;
  for (const RunData& run : runs) names += (names.empty() ? "" : " · ") + run.name;
  std::string body = fmt::format(
      "<header>\n<h1>{}</h1>\n<p>Comparison of {} runs; gaps are to {}</p>\n</header>\n",
      escape_html(names), runs.size(), escape_html(runs.front().name));
  body += html_section("Final values", final_values(runs));
  for (const char* section : {"Learning", "Policy against rollout", "Expert load"})
    body += html_section(section, charts(runs, section));
  Chart speed{"Throughput", "tokens a second", "", {}, Axis::kLinear};
  for (const RunData& run : runs)
    speed.series.push_back(metric_series(run, "performance/tokens_per_sec", run.name));
  const std::string throughput = line_chart(speed);
  if (!throughput.empty())
    body += html_section("Speed", "<div class=\"charts\">\n" + throughput + "</div>\n");
  std::vector<std::vector<std::string>> differences;
  for (std::size_t i = 1; i < runs.size(); ++i)
    for (const std::string& line : config_differences_of(runs[0], runs[i]))
      differences.push_back({runs[i].name, line});
  body += html_section("Configuration differences",
                       html_table({"run", "key: first run -> this run"}, differences, 2));
  base::write_file_atomic(out, html_page(names + " · lockstep", body));
}

}  // namespace lockstep::loop
