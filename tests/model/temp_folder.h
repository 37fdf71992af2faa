// A folder of a test's own, and the message of a refusal.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "base/error.h"

namespace lockstep::model {

struct TempFolderTest : testing::Test {
  std::filesystem::path folder = std::filesystem::path(testing::TempDir()) /
                                 ("lockstep_model_" + std::to_string(::getpid()) + "_" +
                                  testing::UnitTest::GetInstance()->current_test_info()->name());
  void SetUp() override { std::filesystem::create_directories(folder); }
  void TearDown() override { std::filesystem::remove_all(folder); }
};

inline void put_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string file_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// The message of the InputError that `action` throws; fails the test when there is none or when it
// lacks one of `parts`.
template <typename Action>
std::string expect_refused(const Action& action, std::initializer_list<std::string> parts) {
  try {
    action();
  } catch (const base::InputError& e) {
    for (const std::string& part : parts)
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
          << "'" << part << "' is not in: " << e.what();
    return e.what();
  }
  ADD_FAILURE() << "accepted; expected a refusal naming " << *parts.begin();
  return "";
}

}  // namespace lockstep::model
