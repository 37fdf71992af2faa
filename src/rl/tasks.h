// Built-in problems whose answers a program can check.
//
//   task        prompt                answer       label
//   arithmetic  "12+35="              "47"         the answer ("-9" for a negative difference)
//   reverse     "reverse abcd = "     "dcba"       the answer
//   sort        "sort dbca = "        "abcd"       the answer (letters may repeat)
//   countdown   "72 from 3 5 9 = "    "(3+5)*9"    "72 3 5 9": the target, then the numbers
//
// Problem i of a split is a pure function of (config, split, i), through base/philox.h; draws may
// repeat. A prompt text belongs to one split, whatever the seed: its hash falls into `validation`
// for validation_percent of all texts, and a draw that falls on the wrong side is drawn again. So
// no training problem and no demonstration of any seed is ever a validation problem.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::rl {

enum class TaskKind { kArithmetic, kReverse, kSort, kCountdown };
enum class Split { kTrain, kValidation };

TaskKind task_kind_from(std::string_view name);  // InputError naming the choices
std::string_view task_name(TaskKind kind);

struct TaskConfig {
  TaskKind kind = TaskKind::kReverse;
  std::uint64_t seed = 0;
  int validation_percent = 10;  // 1 .. 90
  int min_length = 3;           // letters of reverse and sort: 1 .. 64
  int max_length = 5;
  int alphabet = 26;   // the first letters of a .. z: 2 .. 26
  int min_digits = 1;  // digits of arithmetic: 1 .. 9
  int max_digits = 2;
  bool subtraction = true;
  int countdown_numbers = 3;      // 2 .. 6
  int countdown_max_number = 20;  // 2 .. 1000
  int countdown_max_target = 100;
  double noise = 0;  // share of wrong demonstrations, in [0, 1]
};

// Throws InputError naming the key.
void validate(const TaskConfig& config);

// id = i, text, label and task are set. InputError when no problem of the split can be found (too
// few distinct problems).
data::Prompt problem(const TaskConfig& config, Split split, std::int64_t i);

struct Demonstration {
  std::string prompt;
  std::string answer;   // without an end-of-sequence mark
  bool correct = true;  // false: a wrong answer in the right format
};

// A solved training problem for pretraining. With probability config.noise the answer is wrong: a
// word unreversed, unsorted or with two letters exchanged, a sum that is off by a little, an
// expression with another value. Its problems are drawn apart from problem(config, kTrain, i).
Demonstration demonstration(const TaskConfig& config, std::int64_t i);

// The order of `count` items in an epoch: a permutation, a pure function of its arguments.
std::vector<std::int64_t> epoch_order(std::int64_t count, std::uint64_t seed, std::uint64_t epoch);

}  // namespace lockstep::rl
