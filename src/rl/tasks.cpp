#include "rl/tasks.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/philox.h"
#include "rl/expression.h"

namespace lockstep::rl {
namespace {

constexpr int kMaxAttempts = 10000;                  // of a draw, until it lies in its split
constexpr std::uint64_t kTaskKey = 0x7461736b73ull;  // "tasks": keeps these streams off others

enum class Purpose : std::uint64_t { kProblem = 1, kDemonstration = 2, kNoise = 3, kOrder = 4 };

// Random words that depend on nothing but its arguments: purpose, index and attempt choose the
// stream, blocks of four words follow each other in it.
struct Stream {
  std::uint64_t key, high, low;
  std::uint32_t next_word = 0;
  base::PhiloxWords words{};

  Stream(std::uint64_t seed, Purpose purpose, int attempt, std::uint64_t index)
      : key(seed ^ kTaskKey),
        high(static_cast<std::uint64_t>(purpose) << 56 | static_cast<std::uint64_t>(attempt) << 32),
        low(index) {}

  std::uint32_t word() {
    if (next_word % 4 == 0) words = base::philox4x32(key, high | next_word / 4, low);
    return words.word[next_word++ % 4];
  }
  // In 0 .. n-1, n < 2^32.
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(std::uint64_t{word()} * static_cast<std::uint64_t>(n) >> 32);
  }
  std::int64_t between(std::int64_t low_value, std::int64_t high_value) {
    return low_value + below(high_value - low_value + 1);
  }
  double uniform() { return word() * 0x1p-32; }
};

struct Problem {
  std::string prompt;
  std::string answer;
  std::string label;
};

// FNV-1a, then a final mix, so that short texts spread over all percents.
std::uint64_t hash_of(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
  h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
  return h ^ h >> 33;
}

Split split_of(const TaskConfig& config, std::string_view prompt) {
  return hash_of(prompt) % 100 < static_cast<std::uint64_t>(config.validation_percent)
             ? Split::kValidation
             : Split::kTrain;
}

std::int64_t number_with_digits(Stream& random, int digits) {
  std::int64_t high = 1;
  for (int i = 0; i < digits; ++i) high *= 10;
  return random.between(digits == 1 ? 0 : high / 10, high - 1);
}

Problem draw_arithmetic(const TaskConfig& config, Stream& random) {
  const auto digits = [&] {
    return static_cast<int>(random.between(config.min_digits, config.max_digits));
  };
  const std::int64_t a = number_with_digits(random, digits());
  const std::int64_t b = number_with_digits(random, digits());
  const bool minus = config.subtraction && random.below(2) == 1;
  const std::string answer = fmt::format("{}", minus ? a - b : a + b);
  return {fmt::format("{}{}{}=", a, minus ? '-' : '+', b), answer, answer};
}

std::string draw_word(const TaskConfig& config, Stream& random) {
  std::string word(static_cast<std::size_t>(random.between(config.min_length, config.max_length)),
                   ' ');
  for (char& c : word) c = static_cast<char>('a' + random.below(config.alphabet));
  return word;
}

Problem draw_reverse(const TaskConfig& config, Stream& random) {
  const std::string word = draw_word(config, random);
  const std::string answer(word.rbegin(), word.rend());
  return {fmt::format("reverse {} = ", word), answer, answer};
}

Problem draw_sort(const TaskConfig& config, Stream& random) {
  const std::string word = draw_word(config, random);
  std::string answer = word;
  std::sort(answer.begin(), answer.end());
  return {fmt::format("sort {} = ", word), answer, answer};
}

template <typename T>
void shuffle(std::vector<T>& items, Stream& random) {
  for (std::size_t i = items.size(); i > 1; --i)
    std::swap(items[i - 1],
              items[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
}

// Joins all numbers, left to right, into one expression of random operators: "(3+5)*9".
std::string draw_expression(const std::vector<std::int64_t>& numbers, Stream& random) {
  std::vector<std::int64_t> order = numbers;
  shuffle(order, random);
  std::string text = fmt::format("{}", order[0]);
  bool is_sum = false;
  for (std::size_t i = 1; i < order.size(); ++i) {
    const char op = "+-*/"[random.below(4)];
    const bool binds_tighter = op == '*' || op == '/';
    if (binds_tighter && is_sum) text = "(" + text + ")";
    text += fmt::format("{}{}", op, order[i]);
    is_sum = !binds_tighter;
  }
  return text;
}

std::optional<Problem> draw_countdown(const TaskConfig& config, Stream& random) {
  std::vector<std::int64_t> numbers;
  for (int i = 0; i < config.countdown_numbers; ++i)
    numbers.push_back(random.between(1, config.countdown_max_number));
  const std::string answer = draw_expression(numbers, random);
  const std::optional<Expression> value = evaluate_expression(answer);
  if (!value || value->denominator != 1 || value->numerator < 1 ||
      value->numerator > config.countdown_max_target)
    return std::nullopt;
  const std::string list = fmt::format("{}", fmt::join(numbers, " "));
  return Problem{fmt::format("{} from {} = ", value->numerator, list), answer,
                 fmt::format("{} {}", value->numerator, list)};
}

std::optional<Problem> draw(const TaskConfig& config, Stream& random) {
  switch (config.kind) {
    case TaskKind::kArithmetic:
      return draw_arithmetic(config, random);
    case TaskKind::kReverse:
      return draw_reverse(config, random);
    case TaskKind::kSort:
      return draw_sort(config, random);
    case TaskKind::kCountdown:
      return draw_countdown(config, random);
  }
  return std::nullopt;
}

Problem draw_in_split(const TaskConfig& config, Split split, Purpose purpose, std::int64_t i) {
  LOCKSTEP_CHECK(i >= 0, "problem index {}", i);
  // Each split has its own half of the index space.
  const std::uint64_t index =
      static_cast<std::uint64_t>(i) | (split == Split::kValidation ? 1ull << 63 : 0);
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    Stream random(config.seed, purpose, attempt, index);
    std::optional<Problem> drawn = draw(config, random);
    if (drawn && split_of(config, drawn->prompt) == split) return std::move(*drawn);
  }
  base::fail<base::InputError>(
      "task '{}' has too few distinct problems for a {} split: allow longer words, more digits or "
      "larger numbers",
      task_name(config.kind), split == Split::kTrain ? "train" : "validation");
}

std::string exchange_two_letters(std::string word, Stream& random) {
  const std::int64_t n = static_cast<std::int64_t>(word.size());
  const std::size_t at = static_cast<std::size_t>(random.below(n));
  std::swap(word[at], word[(at + 1) % word.size()]);
  return word;
}

// One candidate; it may happen to be right.
std::string wrong_candidate(const TaskConfig& config, const Problem& right, Stream& random) {
  switch (config.kind) {
    case TaskKind::kArithmetic: {
      const std::int64_t off = random.between(1, 9) * (random.below(4) == 0 ? 10 : 1);
      return fmt::format("{}", std::stoll(right.answer) + (random.below(2) == 1 ? off : -off));
    }
    case TaskKind::kReverse:
    case TaskKind::kSort: {
      if (random.below(2) == 1) return exchange_two_letters(right.answer, random);
      const std::size_t begin = right.prompt.find(' ') + 1;  // the word as it was given
      return right.prompt.substr(begin, right.answer.size());
    }
    case TaskKind::kCountdown: {
      std::vector<std::int64_t> numbers = evaluate_expression(right.answer)->numbers;
      return draw_expression(numbers, random);
    }
  }
  return {};
}

bool is_right(const TaskConfig& config, const Problem& right, const std::string& answer) {
  if (config.kind != TaskKind::kCountdown) return answer == right.answer;
  const std::optional<Expression> value = evaluate_expression(answer);
  return value && value->denominator == 1 && value->numerator == std::stoll(right.label);
}

// A word of equal letters has no wrong order: then one letter is changed.
std::string wrong_answer(const TaskConfig& config, const Problem& right, Stream& random) {
  for (int attempt = 0; attempt < 32; ++attempt) {
    std::string candidate = wrong_candidate(config, right, random);
    if (!is_right(config, right, candidate)) return candidate;
  }
  if (config.kind == TaskKind::kCountdown) return right.answer + "+1";
  std::string changed = right.answer;
  changed.back() = changed.back() == 'a' ? 'b' : 'a';
  return changed;
}

void require(bool good, std::string_view key, std::string_view rule) {
  if (!good) base::fail<base::InputError>("task key '{}': {}", key, rule);
}

}  // namespace

TaskKind task_kind_from(std::string_view name) {
  for (const TaskKind kind :
       {TaskKind::kArithmetic, TaskKind::kReverse, TaskKind::kSort, TaskKind::kCountdown})
    if (name == task_name(kind)) return kind;
  base::fail<base::InputError>("unknown task '{}', must be arithmetic, reverse, sort or countdown",
                               name);
}

std::string_view task_name(TaskKind kind) {
  switch (kind) {
    case TaskKind::kArithmetic:
      return "arithmetic";
    case TaskKind::kReverse:
      return "reverse";
    case TaskKind::kSort:
      return "sort";
    case TaskKind::kCountdown:
      return "countdown";
  }
  return "?";
}

void validate(const TaskConfig& c) {
  require(c.validation_percent >= 1 && c.validation_percent <= 90, "validation_percent",
          "must be in 1 .. 90");
  require(c.min_length >= 1 && c.max_length <= 64 && c.min_length <= c.max_length, "min_length",
          "needs 1 <= min_length <= max_length <= 64");
  require(c.alphabet >= 2 && c.alphabet <= 26, "alphabet", "must be in 2 .. 26");
  require(c.min_digits >= 1 && c.max_digits <= 9 && c.min_digits <= c.max_digits, "min_digits",
          "needs 1 <= min_digits <= max_digits <= 9");
  require(c.countdown_numbers >= 2 && c.countdown_numbers <= 6, "countdown_numbers",
          "must be in 2 .. 6");
  require(c.countdown_max_number >= 2 && c.countdown_max_number <= 1000, "countdown_max_number",
          "must be in 2 .. 1000");
  require(c.countdown_max_target >= 1 && c.countdown_max_target <= 1000000, "countdown_max_target",
          "must be in 1 .. 1000000");
  require(c.noise >= 0 && c.noise <= 1, "noise", "must be in [0, 1]");
}

data::Prompt problem(const TaskConfig& config, Split split, std::int64_t i) {
  validate(config);
  const Problem drawn = draw_in_split(config, split, Purpose::kProblem, i);
  data::Prompt prompt;
  prompt.id = i;
  prompt.text = drawn.prompt;
  prompt.label = drawn.label;
  prompt.task = std::string(task_name(config.kind));
  return prompt;
}

Demonstration demonstration(const TaskConfig& config, std::int64_t i) {
  validate(config);
  const Problem right = draw_in_split(config, Split::kTrain, Purpose::kDemonstration, i);
  Stream random(config.seed, Purpose::kNoise, 0, static_cast<std::uint64_t>(i));
  if (random.uniform() >= config.noise) return {right.prompt, right.answer, true};
  return {right.prompt, wrong_answer(config, right, random), false};
}

std::vector<std::int64_t> epoch_order(std::int64_t count, std::uint64_t seed, std::uint64_t epoch) {
  LOCKSTEP_CHECK(count >= 0 && count < (std::int64_t{1} << 32), "epoch of {} items", count);
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  Stream random(seed, Purpose::kOrder, 0, epoch);
  shuffle(order, random);
  return order;
}

}  // namespace lockstep::rl
