// Arithmetic expressions in a model's answer, evaluated exactly: + - * / and parentheses over
// non-negative integers, in 64-bit rationals. Nothing else is accepted (no sign, no decimal point).
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace lockstep::rl {

constexpr std::size_t kMaxExpressionLength = 256;
constexpr int kMaxExpressionDepth = 32;  // of parentheses

struct Expression {
  std::int64_t numerator = 0;  // of the value, in lowest terms
  std::int64_t denominator = 1;
  std::vector<std::int64_t> numbers;  // the integers written, in order
};

// nullopt for anything else than one whole expression: empty or too long, too deep, a stray
// character, a number above 10^9, division by zero, overflow.
std::optional<Expression> evaluate_expression(std::string_view text);

}  // namespace lockstep::rl
