#include "loop/transcripts.h"

#include <fmt/format.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "loop/chart.h"
#include "loop/report_page.h"

namespace lockstep::loop {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kPrompts = 4, kSamplesOfPrompt = 2, kMaxText = 600;

// Step number of "train_data_step12.jsonl", or -1.
std::int64_t step_of(const std::string& name) {
  static const std::string kStart = "train_data_step", kEnd = ".jsonl";
  if (!name.starts_with(kStart) || !name.ends_with(kEnd)) return -1;
  const std::string digits = name.substr(kStart.size(), name.size() - kStart.size() - kEnd.size());
  if (digits.empty() || digits.size() > 18 ||
      digits.find_first_not_of("0123456789") != std::string::npos)
    return -1;
  return std::stoll(digits);
}

// Cut at kMaxText bytes, on a character's edge.
std::string shortened(const std::string& text) {
  if (text.size() <= kMaxText) return text;
  std::size_t end = kMaxText;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + " …";
}

struct Samples {
  std::vector<std::vector<std::string>> rows;
  std::int64_t malformed = 0;
};

Samples read_samples(const fs::path& path) {
  Samples out;
  std::map<std::int64_t, std::size_t> taken;  // samples of each prompt
  std::ifstream in(path);
  for (std::string line; out.rows.size() < kPrompts * kSamplesOfPrompt && std::getline(in, line);) {
    try {
      const nlohmann::json json = nlohmann::json::parse(line);
      const auto prompt = json.at("prompt_id").get<std::int64_t>();
      if (!taken.contains(prompt) && taken.size() == kPrompts) continue;
      if (taken[prompt]++ >= kSamplesOfPrompt) continue;
      const auto tokens = json.value("response_tokens", nlohmann::json::array()).size();
      out.rows.push_back({shortened(json.at("prompt").get<std::string>()),
                          shortened(json.at("response").get<std::string>()),
                          shortened(json.at("label").get<std::string>()),
                          json.value("finish_reason", std::string()),
                          number_text(json.at("reward").get<double>()),
                          fmt::format("{:+.3f}", json.value("advantage", 0.0)),
                          number_text(static_cast<double>(tokens))});
    } catch (const nlohmann::json::exception&) {
      ++out.malformed;
    }
  }
  return out;
}

std::string samples_of_step(const fs::path& path, std::int64_t step) {
  const Samples samples = read_samples(path);
  std::string note;
  if (samples.malformed > 0)
    note = fmt::format("<p>{} malformed lines left out</p>\n", samples.malformed);
  return fmt::format("<h3>Step {}</h3>\n", step) + note +
         html_table({"prompt", "response", "label", "finish", "reward", "advantage", "tokens"},
                    samples.rows, 4);
}

}  // namespace

std::string transcripts_html(const fs::path& rollouts) {
  std::map<std::int64_t, fs::path> steps;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(rollouts, error))
    if (const auto step = step_of(entry.path().filename().string()); step >= 0)
      steps[step] = entry.path();
  if (steps.empty()) return "";
  std::string out = samples_of_step(steps.begin()->second, steps.begin()->first);
  if (steps.size() > 1)
    out += "<br>\n" + samples_of_step(steps.rbegin()->second, steps.rbegin()->first);
  return out;
}

}  // namespace lockstep::loop
