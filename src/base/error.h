// Error types. A broken contract between rooms throws ContractError, a failing world (disk, CUDA,
// network) throws SystemError, bad user input (config, files, data) throws InputError. All are
// caught in apps/ only; the message says what was wrong with both values, and for InputError what
// to do about it.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>

namespace lockstep::base {

struct ContractError : std::logic_error {
  using std::logic_error::logic_error;
};
struct SystemError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Error, typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace lockstep::base

// Throws ContractError with the condition's text and a message.
#define LOCKSTEP_CHECK(condition, ...)                                                             \
  do {                                                                                             \
    if (!(condition))                                                                              \
      throw ::lockstep::base::ContractError(::fmt::format("{}:{}: check failed: {}: {}", __FILE__, \
                                                          __LINE__, #condition,                    \
                                                          ::fmt::format(__VA_ARGS__)));            \
  } while (0)

// Throws ContractError that shows both values.
#define LOCKSTEP_CHECK_EQ(a, b, what)                                                              \
  do {                                                                                             \
    const auto check_a_ = (a);                                                                     \
    const auto check_b_ = (b);                                                                     \
    if (!(check_a_ == check_b_))                                                                   \
      throw ::lockstep::base::ContractError(::fmt::format(                                         \
          "{}:{}: {}: {} is {}, {} is {}", __FILE__, __LINE__, what, #a, check_a_, #b, check_b_)); \
  } while (0)
