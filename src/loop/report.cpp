#include "loop/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/file_io.h"
#include "loop/report_charts.h"
#include "loop/report_page.h"
#include "loop/run_data.h"
#include "loop/transcripts.h"

namespace lockstep::loop {

namespace {

bool has(const RunData& run, const std::string& metric) {
  return !metric_series(run, metric, "").points.empty();
}

std::string fixed_text(std::optional<double> x) { return x ? fmt::format("{:.3f}", *x) : ""; }

// "0.250 → 0.912", or the one value there is.
std::string first_to_last(const RunData& run, const std::string& metric) {
  const Series s = metric_series(run, metric, "");
  if (s.points.size() < 2) return fixed_text(last_value(run, metric));
  const auto first = first_value(run, metric), last = last_value(run, metric);
  return first ? fmt::format("{:.3f} → {:.3f}", *first, *last) : "";
}

std::string seconds_text(double s) {
  if (s < 120) return fmt::format("{:.1f} s", s);
  if (s < 7200) return fmt::format("{:.0f} min {:02.0f} s", std::floor(s / 60), std::fmod(s, 60));
  return fmt::format("{:.1f} h", s / 3600);
}

std::string headlines(const RunData& run) {
  std::vector<Headline> h;
  const auto label = [&](const std::string& text, const std::string& metric) {
    return metric_series(run, metric, "").points.size() < 2 ? text : text + ", first to last";
  };
  h.push_back({first_to_last(run, "validation/accuracy"),
               label("held-out accuracy", "validation/accuracy")});
  h.push_back({first_to_last(run, "validation/loss"),
               label("held-out loss, nats a token", "validation/loss")});
  if (has(run, "train/logprobs_compared"))
    h.push_back({fmt::format("{} of {}", number_text(sum_values(run, "train/logprobs_different")),
                             number_text(sum_values(run, "train/logprobs_compared"))),
                 "log-probabilities differ between policy and rollout"});
  if (!has(run, "train/reward"))
    h.push_back({first_to_last(run, "train/loss"), label("training loss", "train/loss")});
  if (const auto speed = mean_value(run, "performance/tokens_per_sec"))
    h.push_back({number_text(std::round(*speed)), "tokens a second, mean over steps"});
  if (!run.rows.empty()) {
    const double seconds =
        sum_values(run, "timing/train/total_step_time") + sum_values(run, "timing/validation");
    h.push_back({number_text(static_cast<double>(run.rows.back().step)),
                 seconds > 0 ? "steps in " + seconds_text(seconds) : "steps"});
  }
  return html_headlines(h);
}

std::string precision_text(const std::string& precision, const Fp8Config& fp8) {
  return precision == "fp8" ? "fp8 " + fp8.recipe : precision;
}

std::string settings(const RunData& run) {
  if (!run.config) return "";
  const RunConfig& c = *run.config;
  const std::string policy = precision_text(c.policy.precision, c.policy.fp8_cfg);
  std::vector<Headline> s = {{c.policy.model_name, "model"}, {policy, "policy precision"}};
  if (has(run, "train/reward")) {
    const std::string rollout = precision_text(generation_precision(c), generation_fp8(c));
    s.push_back({rollout == policy ? "the same" : rollout, "rollout precision"});
    s.push_back({c.grpo.adv_estimator.name, "estimator"});
    s.push_back({c.data.train.task.value_or(c.data.train.data_path.value_or("")), "task"});
    s.push_back({fmt::format("{} prompts × {} samples", c.grpo.num_prompts_per_step,
                             c.grpo.num_generations_per_prompt),
                 "step"});
    s.push_back({fmt::format("{}", c.policy.generation.temperature), "temperature"});
    s.push_back({fmt::format("{}", c.grpo.seed), "seed"});
  } else {
    s.push_back({fmt::format("{} sequences of {} tokens", c.pretrain.batch_size,
                             c.pretrain.sequence_length),
                 "step"});
    s.push_back({c.pretrain.data_path.value_or(""), "data"});
    s.push_back({fmt::format("{}", c.pretrain.seed), "seed"});
  }
  s.push_back(
      {fmt::format("{:g}, {}", c.policy.optimizer.lr, c.policy.scheduler.name), "learning rate"});
  return html_settings(s);
}

std::string charts(const RunData& run, const std::string& section) {
  std::string out;
  for (const ChartPlan& plan : chart_plans()) {
    if (plan.section != section) continue;
    Chart chart{plan.title, plan.unit, plan.note, {}, plan.axis};
    for (const Curve& curve : plan.curves)
      if (has(run, curve.metric))
        chart.series.push_back(metric_series(run, curve.metric, curve.name));
    out += line_chart(chart);
  }
  return out.empty() ? "" : "<div class=\"charts\">\n" + out + "</div>\n";
}

// fp8/<group>/<what> for every group of the run.
std::string fp8_health(const RunData& run) {
  std::vector<std::string> groups;
  const std::string start = "fp8/", end = "/saturated";
  for (const std::string& name : metric_names(run))
    if (name.starts_with(start) && name.ends_with(end) && name.size() > start.size() + end.size())
      groups.push_back(name.substr(start.size(), name.size() - start.size() - end.size()));
  const auto chart = [&](const char* what, const char* title, const char* unit, const char* note) {
    Chart c{title, unit, note, {}, Axis::kLogWhenWide};
    for (const std::string& group : groups)
      c.series.push_back(metric_series(run, start + group + "/" + what, group));
    return line_chart(c);
  };
  if (groups.empty()) return "";
  std::vector<std::vector<std::string>> rows;
  const auto last = [&](const std::string& name) {
    const auto v = last_value(run, name);
    return v ? number_text(*v) : "–";
  };
  for (const std::string& group : groups) {
    const std::string at = start + group + "/";
    rows.push_back({group, last(at + "saturated"), last(at + "flushed_to_zero"),
                    last(at + "amax_min"), last(at + "amax_max"),
                    number_text(sum_values(run, at + "nonfinite_blocks"))});
  }
  return "<div class=\"charts\">\n" +
         chart("saturated", "Saturated", "share of values", "Values clipped at the format's end") +
         chart("flushed_to_zero", "Flushed to zero", "share of values",
               "Non-zero values that the format rounds to 0") +
         chart("amax_max", "Largest block maximum", "", "Before scaling") +
         chart("amax_min", "Least block maximum", "", "Before scaling") + "</div>\n" +
         html_table({"tensor group, last step", "saturated", "flushed to zero", "least amax",
                     "largest amax", "non-finite blocks in the run"},
                    rows);
}

std::string timing_name(const std::string& metric) {
  const std::string name = metric.substr(metric.rfind('/') + 1);
  std::string out = name;
  std::replace(out.begin(), out.end(), '_', ' ');
  return out;
}

// The parts of a step's time, what is left of the total as "other".
std::string timings(const RunData& run) {
  const std::string prefix = "timing/train/", total_name = prefix + "total_step_time";
  std::vector<std::string> parts;
  for (const std::string& name : metric_names(run))
    if (name.starts_with(prefix) && name != total_name) parts.push_back(name);
  Chart chart{"Time of a step", "s", "", {}, Axis::kLinear};
  for (const std::string& part : parts) chart.series.push_back({timing_name(part), {}});
  chart.series.push_back({parts.empty() ? "step" : "other", {}});
  std::vector<double> sums(chart.series.size(), 0.0);
  double total = 0, rows = 0;
  for (const MetricsRow& row : run.rows) {
    const auto seconds = [&](const std::string& name) {
      const auto found = row.values.find(name);
      const double* v = found == row.values.end() ? nullptr : std::get_if<double>(&found->second);
      return v != nullptr && std::isfinite(*v) ? std::max(0.0, *v) : 0.0;
    };
    const double all = seconds(total_name);
    if (all == 0) continue;
    double rest = all;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const double v = i < parts.size() ? seconds(parts[i]) : std::max(0.0, rest);
      rest -= v;
      chart.series[i].points.push_back({static_cast<double>(row.step), v});
      sums[i] += v;
    }
    total += all, ++rows;
  }
  if (rows == 0) return "";
  std::vector<std::vector<std::string>> table;
  for (std::size_t i = 0; i < sums.size(); ++i)
    table.push_back({chart.series[i].name, fmt::format("{:.3f}", sums[i] / rows),
                     total > 0 ? fmt::format("{:.1f} %", 100 * sums[i] / total) : "–"});
  table.push_back({"a step, all in all", fmt::format("{:.3f}", total / rows), ""});
  Chart speed{"Throughput",
              "tokens a second",
              "Prompt and response tokens over the step's time",
              {metric_series(run, "performance/tokens_per_sec", "tokens a second")},
              Axis::kLinear};
  return "<div class=\"charts\">\n" + stacked_chart(chart) + line_chart(speed) + "</div>\n" +
         html_table({"part", "mean seconds a step", "share"}, table);
}

}  // namespace

std::filesystem::path write_report(const std::filesystem::path& run_folder) {
  const RunData run = read_run(run_folder);
  const bool rl = has(run, "train/reward");
  std::string body =
      fmt::format("<header>\n<h1>{}</h1>\n<p>{}</p>\n{}{}</header>\n", escape_html(run.name),
                  rl ? "Reinforcement learning" : "Pretraining", headlines(run), settings(run));
  if (run.rows.empty()) body += "<p>No step has finished yet.</p>\n";
  for (const char* section : {"Learning", "Policy against rollout"})
    body += html_section(section, charts(run, section));
  body += html_section("FP8 health", fp8_health(run));
  body += html_section("Expert load", charts(run, "Expert load"));
  body += html_section("Timings", timings(run));
  body += html_section("Samples", transcripts_html(run_folder / "rollouts"));
  if (!run.config_text.empty())
    body += html_section("Configuration",
                         "<details><summary>config.yaml, every key as it was resolved</summary>"
                         "<pre>" +
                             escape_html(run.config_text) + "</pre></details>\n");
  const std::filesystem::path path = run_folder / "report.html";
  base::write_file_atomic(path, html_page(run.name + " · lockstep", body));
  return path;
}

}  // namespace lockstep::loop
