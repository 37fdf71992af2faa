#include "rl/rewards.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>

#include "base/error.h"

namespace lockstep::rl {
namespace {

TEST(Rewards, Exact) {
  EXPECT_TRUE(exact_match(" dcba\n", "dcba"));
  EXPECT_TRUE(exact_match("", ""));
  EXPECT_FALSE(exact_match("dcbaa", "dcba"));
  EXPECT_FALSE(exact_match("", "dcba"));
  EXPECT_FALSE(exact_match("d cba", "dcba"));
}

TEST(Rewards, Number) {
  EXPECT_TRUE(number_match("the answer is 47.", "47"));
  EXPECT_TRUE(number_match("1, 2, then 47", "47"));
  EXPECT_TRUE(number_match("0047", "47"));
  EXPECT_TRUE(number_match("$1,234,567", "1234567"));
  EXPECT_TRUE(number_match("-9", "-9"));
  EXPECT_TRUE(number_match("x=-9", "-9"));
  EXPECT_TRUE(number_match("12-9", "9"));
  EXPECT_TRUE(number_match("-0", "0"));
  EXPECT_TRUE(number_match("0.5", ".5"));
  EXPECT_TRUE(number_match("5e-1", "0.5"));
  EXPECT_TRUE(number_match("7.0", "7"));
  EXPECT_TRUE(number_match("3.1415927", "3.1415926"));
  EXPECT_FALSE(number_match("3.14160", "3.14159"));
  EXPECT_FALSE(number_match("1000001", "1000000"));  // integers have no tolerance
  EXPECT_FALSE(number_match("12345678901234567890123", "12345678901234567890124"));
  EXPECT_FALSE(number_match("9", "-9"));
  EXPECT_FALSE(number_match("", "1"));
  EXPECT_FALSE(number_match("forty", "40"));
  EXPECT_FALSE(number_match("1e999", "1e998"));
  EXPECT_FALSE(number_match("47 and 48", "47"));
  EXPECT_THROW(number_match("1", "none"), base::InputError);
}

TEST(Rewards, Countdown) {
  EXPECT_TRUE(countdown_match("(3+5)*9", "72 3 5 9", true));
  EXPECT_TRUE(countdown_match(" 9*(5+3)\n", "72 3 5 9", true));
  EXPECT_FALSE(countdown_match("(3+5)*9", "73 3 5 9", true));
  EXPECT_FALSE(countdown_match("8*9", "72 3 5 9", true));
  EXPECT_FALSE(countdown_match("72", "72 3 5 9", true));
  EXPECT_FALSE(countdown_match("3*9+5*9", "72 3 5 9", true));  // 9 twice
  EXPECT_FALSE(countdown_match("3+5", "8 3 5 9", true));       // 9 left over
  EXPECT_TRUE(countdown_match("3+5", "8 3 5 9", false));
  EXPECT_FALSE(countdown_match("5+5", "10 3 5 9", false));
  EXPECT_FALSE(countdown_match("system(1)", "8 3 5 9", false));
  EXPECT_THROW(countdown_match("1", "x 1", true), base::InputError);
  EXPECT_THROW(countdown_match("1", "1", true), base::InputError);
}

RewardConfig regex(const std::string& pattern) {
  RewardConfig config;
  config.kind = RewardKind::kRegex;
  config.pattern = pattern;
  return config;
}

TEST(Rewards, Regex) {
  const std::vector<RewardSample> samples = {{"", "abc 12", ""}, {"", "abc", ""}, {"", "", ""}};
  EXPECT_EQ(scores(regex("^[a-z]+ [0-9]{2}$"), samples), (std::vector<double>{1, 0, 0}));
  const std::vector<RewardSample> labelled = {{"", "aab", "a+b"}, {"", "b", "a+b"}};
  EXPECT_EQ(scores(regex(""), labelled), (std::vector<double>{1, 0}));
  EXPECT_THROW(scores(regex("("), samples), base::InputError);
  EXPECT_THROW(scores(regex("(a)\\1"), samples), base::InputError);
  EXPECT_THROW(scores(regex("a{1000}"), samples), base::InputError);
  EXPECT_THROW(scores(regex(""), samples), base::InputError);
}

double seconds(const std::chrono::steady_clock::time_point& start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Backtracking matchers need 2^n steps here.
TEST(Rewards, RegexTimeIsBounded) {
  const auto start = std::chrono::steady_clock::now();
  const RewardSample sample{"", std::string(100000, 'a'), ""};
  EXPECT_EQ(scores(regex("^(a|aa)+$|^(a*)*b$"), std::span(&sample, 1))[0], 1);
  EXPECT_LE(seconds(start), 5);
}

RewardConfig shell(const std::string& line, double time_limit_s = 20) {
  RewardConfig config;
  config.kind = RewardKind::kExternal;
  config.command = {"/bin/sh", "-c", line};
  config.time_limit_s = time_limit_s;
  return config;
}

const std::vector<RewardSample> kTwo = {{"p \"1\"\n", "r1", "l1"}, {"p2", "r2", "l2"}};

template <typename Error>
void expect_failure(const RewardConfig& config, const std::string& part,
                    std::span<const RewardSample> samples = kTwo) {
  try {
    scores(config, samples);
    ADD_FAILURE() << "accepted; expected " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";  // no zombie
}

int open_files() {
  int count = 0;
  DIR* folder = opendir("/proc/self/fd");
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

TEST(ExternalReward, ScoresEachSample) {
  const int before = open_files();
  EXPECT_EQ(scores(shell("while read -r l; do case \"$l\" in *r2*) echo '{\"score\": 0.5}';; "
                         "*) echo '{\"score\": -1, \"why\": \"x\"}';; esac; done"),
                   kTwo),
            (std::vector<double>{-1, 0.5}));
  EXPECT_EQ(open_files(), before);
}

TEST(ExternalReward, WritesTheDocumentedLines) {
  const std::string path = testing::TempDir() + "lockstep_reward_input";
  scores(shell("cat > " + path + "; echo '{\"score\":1}'; echo '{\"score\":1}'"), kTwo);
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  EXPECT_EQ(line, "{\"label\":\"l1\",\"prompt\":\"p \\\"1\\\"\\n\",\"response\":\"r1\"}");
  std::remove(path.c_str());
}

TEST(ExternalReward, BytesThatAreNotUtf8AreReplaced) {
  const std::vector<RewardSample> samples = {{"p", "\xff\xfe", "l"}};
  EXPECT_EQ(scores(shell("read -r l; echo '{\"score\":1}'"), samples)[0], 1);
}

TEST(ExternalReward, NoSamplesStartNothing) { EXPECT_TRUE(scores(shell("exit 3"), {}).empty()); }

// More in and out than a pipe holds, with the command writing before it has read all.
TEST(ExternalReward, LargeBatchesDoNotDeadlock) {
  const std::vector<RewardSample> samples(3000, {"p", std::string(500, 'x'), "l"});
  RewardConfig config = shell("");
  config.command = {"awk", "{printf \"{\\\"score\\\": %d}%200s\\n\", NR, \"\"}"};
  const auto got = scores(config, samples);
  ASSERT_EQ(got.size(), 3000u);
  EXPECT_EQ(got[2999], 3000);
}

TEST(ExternalReward, ACommandThatDoesNotReadIsNoSigpipe) {
  const std::vector<RewardSample> samples(1000, {"p", std::string(1000, 'x'), "l"});
  expect_failure<base::InputError>(shell("exec <&-; sleep 0.2; exit 0"), "wrote 0 lines for 1000",
                                   samples);
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  EXPECT_EQ(sigismember(&mask, SIGPIPE), 0);
}

TEST(ExternalReward, TimeOutKillsTheWholeGroup) {
  const std::string path = testing::TempDir() + "lockstep_reward_pid";
  const auto start = std::chrono::steady_clock::now();
  expect_failure<base::SystemError>(
      shell("echo thinking >&2; sleep 60 & echo $! > " + path + "; wait", 0.3), "thinking");
  EXPECT_LE(seconds(start), 5);
  std::ifstream file(path);
  pid_t grandchild = 0;
  file >> grandchild;
  ASSERT_GT(grandchild, 0);
  // Killed; it may linger as a zombie of whoever adopts it, which cannot be told from here.
  bool gone = false;
  for (int i = 0; i < 100 && !gone; ++i) {
    std::ifstream stat("/proc/" + std::to_string(grandchild) + "/stat");
    std::string text;
    std::getline(stat, text);
    gone = text.empty() || text.find(") Z") != std::string::npos;
    if (!gone) usleep(10000);
  }
  EXPECT_TRUE(gone);
  std::remove(path.c_str());
}

TEST(ExternalReward, ABackgroundProcessDoesNotHoldTheCallUp) {
  const auto start = std::chrono::steady_clock::now();
  const RewardConfig config =
      shell("sleep 60 & echo '{\"score\":1}'; echo '{\"score\":2}'; cat > /dev/null");
  EXPECT_EQ(scores(config, kTwo), (std::vector<double>{1, 2}));
  EXPECT_LE(seconds(start), 5);
}

TEST(ExternalReward, IgnoredTermSignalsDoNotHelpTheCommand) {
  expect_failure<base::SystemError>(shell("trap '' TERM INT; while :; do sleep 1; done", 0.3),
                                    "time limit");
}

TEST(ExternalReward, FailuresSayWhatHappened) {
  expect_failure<base::SystemError>(shell("echo oops >&2; exit 3"), "status 3");
  expect_failure<base::SystemError>(shell("echo oops >&2; exit 3"), "oops");
  expect_failure<base::SystemError>(shell("kill -SEGV $$"), "signal 11");
  RewardConfig missing = shell("");
  missing.command = {"/nonexistent/reward"};
  expect_failure<base::SystemError>(missing, "cannot start '/nonexistent/reward'");
  expect_failure<base::InputError>(shell("cat > /dev/null"), "wrote 0 lines for 2");
  expect_failure<base::InputError>(shell("cat > /dev/null; echo '{\"score\":1}'"), "wrote 1 lines");
  expect_failure<base::InputError>(shell("cat > /dev/null; echo hello"), "line 1");
  expect_failure<base::InputError>(shell("cat > /dev/null; echo '{\"score\":1}'; echo '{}'"),
                                   "line 2");
  expect_failure<base::InputError>(shell("cat > /dev/null; echo '{\"score\":\"1\"}'"),
                                   "not a number");
  expect_failure<base::InputError>(shell("cat > /dev/null; echo '{\"score\":1e999}'"), "line 1");
  expect_failure<base::InputError>(shell("cat > /dev/null; echo '{\"score\":NaN}'"), "line 1");
  expect_failure<base::InputError>(
      shell("cat > /dev/null; for i in 1 2 3; do echo '{\"score\":1}'; done"),
      "more than one line");
}

TEST(ExternalReward, EndlessOutputIsCutOff) {
  expect_failure<base::InputError>(shell("yes"), "MiB");
  expect_failure<base::SystemError>(shell("yes >&2", 0.3), "time limit");
}

TEST(Rewards, BadConfigsAreRefused) {
  EXPECT_THROW(reward_kind_from("magic"), base::InputError);
  EXPECT_EQ(reward_kind_from("number"), RewardKind::kNumber);
  RewardConfig config = shell("true", -1);
  EXPECT_THROW(scores(config, kTwo), base::InputError);
  config.command.clear();
  EXPECT_THROW(scores(config, kTwo), base::InputError);
}

}  // namespace
}  // namespace lockstep::rl
