#include "rl/tasks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "rl/expression.h"
#include "rl/rewards.h"

namespace lockstep::rl {
namespace {

const std::vector<TaskKind> kKinds = {TaskKind::kArithmetic, TaskKind::kReverse, TaskKind::kSort,
                                      TaskKind::kCountdown};

RewardKind reward_of(TaskKind kind) {
  return kind == TaskKind::kCountdown ? RewardKind::kCountdown : RewardKind::kExact;
}

// What the reward of the task says of an answer to a prompt of its own.
double score(TaskKind kind, const std::string& answer, const std::string& label) {
  RewardConfig config;
  config.kind = reward_of(kind);
  const RewardSample sample{"", answer, label};
  return scores(config, std::span(&sample, 1))[0];
}

// The label that belongs to a demonstration's prompt: its right answer, or target and numbers.
std::string label_of_prompt(TaskKind kind, const std::string& prompt) {
  std::string text = prompt.substr(0, prompt.find('='));
  if (kind == TaskKind::kArithmetic) {
    const std::size_t op = text.find_first_of("+-");
    const long a = std::stol(text.substr(0, op)), b = std::stol(text.substr(op + 1));
    return std::to_string(text[op] == '+' ? a + b : a - b);
  }
  if (kind == TaskKind::kCountdown) return text.replace(text.find(" from"), 5, "");
  std::string word = text.substr(text.find(' ') + 1);
  word.pop_back();  // the blank before '='
  if (kind == TaskKind::kSort) {
    std::sort(word.begin(), word.end());
    return word;
  }
  return {word.rbegin(), word.rend()};
}

TEST(Tasks, ProblemsAreAFunctionOfSeedSplitAndIndex) {
  for (const TaskKind kind : kKinds) {
    TaskConfig config;
    config.kind = kind;
    std::set<std::string> texts;
    for (int i = 0; i < 50; ++i) {
      const data::Prompt a = problem(config, Split::kTrain, i),
                         b = problem(config, Split::kTrain, i);
      EXPECT_EQ(a.text, b.text);
      EXPECT_EQ(a.label, b.label);
      EXPECT_EQ(a.id, i);
      EXPECT_EQ(a.task, task_name(kind));
      texts.insert(a.text);
    }
    EXPECT_GT(texts.size(), 40u) << task_name(kind);
    TaskConfig other = config;
    other.seed = 1;
    EXPECT_NE(problem(config, Split::kTrain, 3).text, problem(other, Split::kTrain, 3).text);
  }
}

// The exact texts: a change of the generator would change every recorded run.
TEST(Tasks, TextsStayTheSame) {
  TaskConfig config;
  config.seed = 7;
  std::string all;
  for (const TaskKind kind : kKinds) {
    config.kind = kind;
    const data::Prompt p = problem(config, Split::kValidation, 2);
    all += p.text + "|" + p.label + "\n";
  }
  EXPECT_EQ(all,
            "2-2=|0\nreverse wvyyu = |uyyvw\nsort tsgm = |gmst\n15 from 15 2 2 = |15 15 2 2\n");
}

TEST(Tasks, TrainAndValidationAreDisjointForEverySeed) {
  for (const TaskKind kind : kKinds) {
    TaskConfig config;
    config.kind = kind;
    config.max_length = 3;  // small spaces, so that collisions would be common
    config.alphabet = 6;
    config.max_digits = 1;
    config.countdown_numbers = 2;
    config.countdown_max_number = 9;
    std::set<std::string> train, validation;
    for (const std::uint64_t seed : {0, 1, 2}) {
      config.seed = seed;
      for (int i = 0; i < 300; ++i) {
        train.insert(problem(config, Split::kTrain, i).text);
        train.insert(demonstration(config, i).prompt);
        validation.insert(problem(config, Split::kValidation, i).text);
      }
    }
    std::vector<std::string> both;
    std::set_intersection(train.begin(), train.end(), validation.begin(), validation.end(),
                          std::back_inserter(both));
    EXPECT_TRUE(both.empty()) << task_name(kind) << " " << both[0];
    EXPECT_GT(validation.size(), 5u) << task_name(kind);
    EXPECT_GT(train.size(), validation.size());
  }
}

TEST(Tasks, DemonstrationsAreRightWithoutNoise) {
  for (const TaskKind kind : kKinds) {
    TaskConfig config;
    config.kind = kind;
    for (int i = 0; i < 200; ++i) {
      const Demonstration d = demonstration(config, i);
      EXPECT_TRUE(d.correct);
      EXPECT_EQ(score(kind, d.answer, label_of_prompt(kind, d.prompt)), 1) << d.prompt << d.answer;
    }
  }
}

TEST(Tasks, LabelsFitThePrompts) {
  for (const TaskKind kind : kKinds) {
    TaskConfig config;
    config.kind = kind;
    for (const Split split : {Split::kTrain, Split::kValidation}) {
      for (int i = 0; i < 50; ++i) {
        const data::Prompt p = problem(config, split, i);
        std::string label = label_of_prompt(kind, p.text);
        label.erase(label.find_last_not_of(' ') + 1);
        EXPECT_EQ(p.label, label) << p.text;
      }
    }
  }
}

TEST(Tasks, NoiseIsWrongAsOftenAsAskedAndSoMarked) {
  for (const TaskKind kind : kKinds) {
    TaskConfig config;
    config.kind = kind;
    config.noise = 0.3;
    int wrong = 0;
    for (int i = 0; i < 1000; ++i) {
      const Demonstration d = demonstration(config, i);
      EXPECT_EQ(score(kind, d.answer, label_of_prompt(kind, d.prompt)), d.correct)
          << d.prompt << d.answer;
      wrong += !d.correct;
      config.noise = 0;  // noise changes answers, not problems
      EXPECT_EQ(demonstration(config, i).prompt, d.prompt);
      config.noise = 0.3;
    }
    // Six standard deviations of a binomial(1000, 0.3) are 87.
    EXPECT_LE(std::abs(wrong - 300), 87) << task_name(kind);
  }
}

TEST(Tasks, AWordOfEqualLettersStillGetsAWrongAnswer) {
  TaskConfig config;
  config.min_length = 1;
  config.max_length = 1;
  config.alphabet = 26;
  config.noise = 1;
  for (int i = 0; i < 50; ++i) EXPECT_FALSE(demonstration(config, i).correct);
}

TEST(Tasks, LengthsAndDigitsAreHonoured) {
  TaskConfig config;
  config.min_length = 4;
  config.max_length = 6;
  config.alphabet = 3;
  std::set<std::size_t> lengths;
  for (int i = 0; i < 200; ++i) {
    const std::string label = problem(config, Split::kTrain, i).label;
    lengths.insert(label.size());
    EXPECT_EQ(label.find_first_not_of("abc"), std::string::npos);
  }
  EXPECT_EQ(lengths, (std::set<std::size_t>{4, 5, 6}));
  config.kind = TaskKind::kArithmetic;
  config.min_digits = config.max_digits = 3;
  config.subtraction = false;
  for (int i = 0; i < 100; ++i) {
    const std::string text = problem(config, Split::kTrain, i).text;
    EXPECT_EQ(text.size(), 8u) << text;
    EXPECT_EQ(text[3], '+');
  }
}

TEST(Tasks, BadConfigsNameTheKey) {
  const auto refused = [](const char* key, auto change) {
    TaskConfig config;
    change(config);
    try {
      problem(config, Split::kTrain, 0);
      FAIL() << key;
    } catch (const base::InputError& error) {
      EXPECT_NE(std::string(error.what()).find(key), std::string::npos) << error.what();
    }
  };
  refused("min_length", [](TaskConfig& c) { c.min_length = 9; });
  refused("alphabet", [](TaskConfig& c) { c.alphabet = 27; });
  refused("min_digits", [](TaskConfig& c) { c.max_digits = 10; });
  refused("noise", [](TaskConfig& c) { c.noise = 1.5; });
  refused("noise", [](TaskConfig& c) { c.noise = std::nan(""); });
  refused("validation_percent", [](TaskConfig& c) { c.validation_percent = 0; });
  EXPECT_THROW(task_kind_from("chess"), base::InputError);
  EXPECT_EQ(task_kind_from("sort"), TaskKind::kSort);
}

TEST(Tasks, TooFewProblemsIsAnErrorNotAHang) {
  TaskConfig config;
  config.min_length = config.max_length = 1;
  config.alphabet = 2;
  config.validation_percent = 1;
  EXPECT_THROW(problem(config, Split::kValidation, 0), base::InputError);
}

TEST(EpochOrder, IsADifferentPermutationEachEpoch) {
  const auto a = epoch_order(100, 1, 0);
  EXPECT_EQ(a, epoch_order(100, 1, 0));
  EXPECT_NE(a, epoch_order(100, 1, 1));
  EXPECT_NE(a, epoch_order(100, 2, 0));
  EXPECT_EQ(std::set<std::int64_t>(a.begin(), a.end()).size(), 100u);
  EXPECT_EQ(*std::max_element(a.begin(), a.end()), 99);
  EXPECT_TRUE(epoch_order(0, 1, 0).empty());
}

TEST(Expression, Values) {
  const auto value = [](const char* text) {
    const auto e = evaluate_expression(text);
    return e ? std::to_string(e->numerator) + "/" + std::to_string(e->denominator) : "none";
  };
  EXPECT_EQ(value("(3+5)*9"), "72/1");
  EXPECT_EQ(value("2-3-4"), "-5/1");
  EXPECT_EQ(value("2+3*4"), "14/1");
  EXPECT_EQ(value("8/3/(4/3)"), "2/1");
  EXPECT_EQ(value("1/3"), "1/3");
  EXPECT_EQ(value("1/(1-3)"), "-1/2");
  EXPECT_EQ(value(" 7 * ( 1 + 1 ) "), "14/1");
  for (const char* bad : {"", " ", "1+", "+1", "-1", "1 2", "1/0", "1/(2-2)", "(1", "1)", "()",
                          "2^3", "1.5", "a", "1=1", "1e3", "9999999999"})
    EXPECT_EQ(value(bad), "none") << bad;
  EXPECT_EQ(value(std::string(std::string(40, '(') + "1" + std::string(40, ')')).c_str()), "none");
  EXPECT_EQ(value(std::string(std::string(32, '(') + "1" + std::string(32, ')')).c_str()), "1/1");
  EXPECT_EQ(value(std::string(300, '1').c_str()), "none");
  EXPECT_EQ(value("1000000000*1000000000*1000000000"), "none");  // does not fit 64 bits
  EXPECT_FALSE(evaluate_expression(std::string_view("1\0", 2)));
  EXPECT_EQ(evaluate_expression("(3+5)*3")->numbers, (std::vector<std::int64_t>{3, 5, 3}));
}

}  // namespace
}  // namespace lockstep::rl
