#include "rl/expression.h"

#include <numeric>

namespace lockstep::rl {
namespace {

constexpr std::int64_t kMaxNumber = 1'000'000'000;

struct Rational {
  std::int64_t n = 0;
  std::int64_t d = 1;  // positive
};

// nullopt when n or d does not fit 64 bits, or d is 0.
std::optional<Rational> reduced(__int128 n, __int128 d) {
  if (d == 0) return std::nullopt;
  if (d < 0) {
    n = -n;
    d = -d;
  }
  __int128 a = n < 0 ? -n : n, b = d;
  while (b != 0) {
    const __int128 rest = a % b;
    a = b;
    b = rest;
  }
  n /= a;
  d /= a;
  constexpr __int128 kLimit = INT64_MAX;
  if (n > kLimit || n < -kLimit || d > kLimit) return std::nullopt;
  return Rational{static_cast<std::int64_t>(n), static_cast<std::int64_t>(d)};
}

std::optional<Rational> apply(char op, Rational a, Rational b) {
  const __int128 an = a.n, ad = a.d, bn = b.n, bd = b.d;
  switch (op) {
    case '+':  // each product is below 2^126, so the sum fits
      return reduced(an * bd + bn * ad, ad * bd);
    case '-':
      return reduced(an * bd - bn * ad, ad * bd);
    case '*':
      return reduced(an * bn, ad * bd);
    default:
      return reduced(an * bd, ad * bn);
  }
}

// Recursive descent; every function returns nullopt on the first error.
struct Parser {
  std::string_view text;
  std::size_t at = 0;
  int depth = 0;
  std::vector<std::int64_t> numbers;

  char peek() {
    while (at < text.size() && text[at] == ' ') ++at;
    return at < text.size() ? text[at] : '\0';
  }

  std::optional<Rational> sum() { return chain(&Parser::product, '+', '-'); }
  std::optional<Rational> product() { return chain(&Parser::factor, '*', '/'); }

  std::optional<Rational> chain(std::optional<Rational> (Parser::*operand)(), char first,
                                char second) {
    std::optional<Rational> value = (this->*operand)();
    while (value && (peek() == first || peek() == second)) {
      const char op = text[at++];
      const std::optional<Rational> right = (this->*operand)();
      value = right ? apply(op, *value, *right) : std::nullopt;
    }
    return value;
  }

  std::optional<Rational> factor() {
    if (peek() == '(') {
      if (++depth > kMaxExpressionDepth) return std::nullopt;
      ++at;
      const std::optional<Rational> value = sum();
      if (!value || peek() != ')') return std::nullopt;
      ++at;
      --depth;
      return value;
    }
    if (peek() < '0' || peek() > '9') return std::nullopt;
    std::int64_t number = 0;
    for (; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at) {
      number = number * 10 + (text[at] - '0');
      if (number > kMaxNumber) return std::nullopt;
    }
    numbers.push_back(number);
    return Rational{number, 1};
  }
};

}  // namespace

std::optional<Expression> evaluate_expression(std::string_view text) {
  if (text.size() > kMaxExpressionLength) return std::nullopt;
  Parser parser{text, 0, 0, {}};
  const std::optional<Rational> value = parser.sum();
  if (!value || parser.peek() != '\0' || parser.at != text.size()) return std::nullopt;
  return Expression{value->n, value->d, std::move(parser.numbers)};
}

}  // namespace lockstep::rl
