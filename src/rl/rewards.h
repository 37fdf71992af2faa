// Scores of answers, 0 or 1 except for `external`.
//
//   exact      response equals label, both without blanks at their ends
//   number     the last number in the response equals the last number of the label. Two integers
//              are compared digit by digit; otherwise |a - b| <= 1e-6 max(|a|, |b|). A number is
//              digits with an optional sign, fraction, exponent and thousands commas; a '-' right
//              after a letter, digit or ')' is an operator, not a sign
//   regex      the pattern (or the label, where the pattern is empty) is found in the response.
//   POSIX
//              extended, without back-references and with repetition counts up to 255, on the first
//              max_response_bytes bytes (up to a zero byte): this keeps the time bounded
//   countdown  the response is an expression (rl/expression.h) with the value of the label's target
//              that uses each of the label's numbers at most as often as it is given (all of them
//              exactly, with countdown_use_all)
//   external   a command, see rl/external_reward.h
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep::rl {

enum class RewardKind { kExact, kNumber, kRegex, kCountdown, kExternal };

RewardKind reward_kind_from(std::string_view name);  // InputError naming the choices

struct RewardConfig {
  RewardKind kind = RewardKind::kExact;
  std::string pattern;  // regex; empty: each label is a pattern
  int max_response_bytes = 4096;
  bool countdown_use_all = true;
  std::vector<std::string> command;  // external: program and arguments, found in PATH, no shell
  double time_limit_s = 30;          // external: for one call of `scores`
};

// Throws InputError naming the key.
void validate(const RewardConfig& config);

struct RewardSample {
  std::string prompt;
  std::string response;
  std::string label;
};

// One finite score a sample, in order. A label that cannot be used (no number in it, not a pattern,
// not "target numbers ...") is an InputError showing it; no response is ever an error.
std::vector<double> scores(const RewardConfig& config, std::span<const RewardSample> samples);

bool exact_match(std::string_view response, std::string_view label);
bool number_match(std::string_view response, std::string_view label);
bool countdown_match(std::string_view response, std::string_view label, bool use_all);

}  // namespace lockstep::rl
