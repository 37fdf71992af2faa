#include "rl/rewards.h"

#include <regex.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <memory>
#include <optional>
#include <sstream>

#include "base/error.h"
#include "rl/expression.h"
#include "rl/external_reward.h"

namespace lockstep::rl {
namespace {

constexpr std::string_view kBlanks = " \t\r\n";
constexpr double kRelativeTolerance = 1e-6;
constexpr long kMaxRepetition = 255;

std::string_view trimmed(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

bool digit(char c) { return c >= '0' && c <= '9'; }

struct Number {
  bool negative = false;
  bool integer = true;
  std::string text;  // without sign, commas and, for an integer, leading zeros
};

// The number that starts at text[at], and where it ends; nullopt if none does.
std::optional<Number> number_at(std::string_view text, std::size_t at, std::size_t& end) {
  const auto peek = [&](std::size_t i) { return i < text.size() ? text[i] : '\0'; };
  Number number;
  std::size_t i = at;
  for (; digit(peek(i)); ++i) {
    number.text += text[i];
    // A comma belongs to the number when exactly three digits follow it.
    if (peek(i + 1) == ',' && digit(peek(i + 2)) && digit(peek(i + 3)) && digit(peek(i + 4)) &&
        !digit(peek(i + 5)))
      ++i;
  }
  if (peek(i) == '.' && digit(peek(i + 1))) {
    number.integer = false;
    number.text += number.text.empty() ? "0." : ".";
    for (++i; digit(peek(i)); ++i) number.text += text[i];
  }
  if (number.text.empty()) return std::nullopt;
  if (peek(i) == 'e' || peek(i) == 'E') {
    const std::size_t sign = peek(i + 1) == '-' || peek(i + 1) == '+' ? 1 : 0;
    if (digit(peek(i + 1 + sign))) {
      number.integer = false;
      number.text += peek(i + 1) == '-' ? "e-" : "e";
      for (i += 1 + sign; digit(peek(i)); ++i) number.text += text[i];
    }
  }
  end = i;
  if (number.integer)
    number.text.erase(0, std::min(number.text.find_first_not_of('0'), number.text.size() - 1));
  if (at > 0 && (text[at - 1] == '-' || text[at - 1] == '+')) {
    const char before = at > 1 ? text[at - 2] : ' ';
    const bool is_operator = std::isalnum(static_cast<unsigned char>(before)) || before == ')';
    number.negative = text[at - 1] == '-' && !is_operator;
  }
  return number;
}

std::optional<Number> last_number(std::string_view text) {
  std::optional<Number> last;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + 1;
    const bool starts =
        digit(text[at]) || (text[at] == '.' && at + 1 < text.size() && digit(text[at + 1]));
    if (starts) {
      const std::optional<Number> number = number_at(text, at, end);
      if (number) last = number;
    }
    at = end;
  }
  return last;
}

double value_of(const Number& number) {
  double value = 0;
  const auto result =
      std::from_chars(number.text.data(), number.text.data() + number.text.size(), value);
  if (result.ec ==
      std::errc::result_out_of_range)  // from_chars leaves the value; strtod gives 0/inf
    value = std::strtod(number.text.c_str(), nullptr);
  return number.negative ? -value : value;
}

bool equal_numbers(const Number& a, const Number& b) {
  if (a.integer && b.integer)
    return a.text == b.text && (a.negative == b.negative || a.text == "0");
  const double x = value_of(a), y = value_of(b);
  return std::isfinite(x) && std::isfinite(y) &&
         std::fabs(x - y) <= kRelativeTolerance * std::max(std::fabs(x), std::fabs(y));
}

// Refuses what makes POSIX matching or compiling exponential.
void check_pattern(const std::string& pattern) {
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '\\') {
      if (i + 1 < pattern.size() && digit(pattern[i + 1]))
        base::fail<base::InputError>(
            "regex reward: '{}' has a back-reference, which is not allowed", pattern);
      ++i;
    } else if (pattern[i] == '{' || pattern[i] == ',') {
      if (std::strtol(pattern.c_str() + i + 1, nullptr, 10) > kMaxRepetition)
        base::fail<base::InputError>("regex reward: '{}' repeats more than {} times", pattern,
                                     kMaxRepetition);
    }
  }
}

struct RegexFree {
  void operator()(regex_t* regex) const {
    regfree(regex);
    delete regex;
  }
};
using Regex = std::unique_ptr<regex_t, RegexFree>;

Regex compile(const std::string& pattern) {
  check_pattern(pattern);
  auto raw = std::make_unique<regex_t>();
  const int error = regcomp(raw.get(), pattern.c_str(), REG_EXTENDED | REG_NOSUB);
  if (error != 0) {
    char message[256];
    regerror(error, raw.get(), message, sizeof message);
    base::fail<base::InputError>("regex reward: '{}' is not a POSIX extended pattern: {}", pattern,
                                 message);
  }
  return Regex(raw.release());
}

std::vector<double> regex_scores(const RewardConfig& config,
                                 std::span<const RewardSample> samples) {
  std::vector<double> out;
  Regex shared = config.pattern.empty() ? nullptr : compile(config.pattern);
  for (const RewardSample& sample : samples) {
    if (!shared && sample.label.empty())
      base::fail<base::InputError>("regex reward: no pattern, and the label of '{}' is empty",
                                   sample.prompt);
    const Regex own = shared ? nullptr : compile(sample.label);
    const std::string text =
        sample.response.substr(0, static_cast<std::size_t>(config.max_response_bytes));
    out.push_back(regexec((shared ? shared : own).get(), text.c_str(), 0, nullptr, 0) == 0);
  }
  return out;
}

}  // namespace

RewardKind reward_kind_from(std::string_view name) {
  if (name == "exact") return RewardKind::kExact;
  if (name == "number") return RewardKind::kNumber;
  if (name == "regex") return RewardKind::kRegex;
  if (name == "countdown") return RewardKind::kCountdown;
  if (name == "external") return RewardKind::kExternal;
  base::fail<base::InputError>(
      "unknown reward '{}', must be exact, number, regex, countdown or external", name);
}

void validate(const RewardConfig& config) {
  if (config.max_response_bytes < 1 || config.max_response_bytes > 1 << 20)
    base::fail<base::InputError>("reward key 'max_response_bytes' is {}, must be in 1 .. {}",
                                 config.max_response_bytes, 1 << 20);
  if (config.kind == RewardKind::kRegex && !config.pattern.empty()) compile(config.pattern);
  if (config.kind == RewardKind::kExternal) {
    if (config.command.empty() || config.command[0].empty())
      base::fail<base::InputError>(
          "reward key 'command' is empty; reward external needs a program");
    if (!(config.time_limit_s > 0 && config.time_limit_s <= 86400))
      base::fail<base::InputError>("reward key 'time_limit_s' is {}, must be in (0, 86400]",
                                   config.time_limit_s);
  }
}

bool exact_match(std::string_view response, std::string_view label) {
  return trimmed(response) == trimmed(label);
}

bool number_match(std::string_view response, std::string_view label) {
  const std::optional<Number> wanted = last_number(label);
  if (!wanted) base::fail<base::InputError>("number reward: the label '{}' has no number", label);
  const std::optional<Number> given = last_number(response);
  return given && equal_numbers(*given, *wanted);
}

bool countdown_match(std::string_view response, std::string_view label, bool use_all) {
  std::istringstream stream{std::string(label)};
  std::vector<std::int64_t> given;
  for (std::int64_t number = 0; stream >> number;) given.push_back(number);
  if (given.size() < 2 || !stream.eof())
    base::fail<base::InputError>(
        "countdown reward: the label '{}' is not a target followed by numbers", label);
  const std::int64_t target = given[0];
  given.erase(given.begin());
  const std::optional<Expression> value = evaluate_expression(trimmed(response));
  if (!value || value->denominator != 1 || value->numerator != target) return false;
  std::vector<std::int64_t> used = value->numbers;
  std::sort(given.begin(), given.end());
  std::sort(used.begin(), used.end());
  if (use_all) return used == given;
  return std::includes(given.begin(), given.end(), used.begin(), used.end());
}

std::vector<double> scores(const RewardConfig& config, std::span<const RewardSample> samples) {
  validate(config);
  if (config.kind == RewardKind::kRegex) return regex_scores(config, samples);
  if (config.kind == RewardKind::kExternal) return external_scores(config, samples);
  std::vector<double> out;
  for (const RewardSample& s : samples) {
    switch (config.kind) {
      case RewardKind::kExact:
        out.push_back(exact_match(s.response, s.label));
        break;
      case RewardKind::kNumber:
        out.push_back(number_match(s.response, s.label));
        break;
      default:
        out.push_back(countdown_match(s.response, s.label, config.countdown_use_all));
    }
  }
  return out;
}

}  // namespace lockstep::rl
