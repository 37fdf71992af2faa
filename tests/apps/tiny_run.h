// Tests of the built binary: starting it, stopping it, and looking at the run that it left.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "loop/compare.h"
#include "loop/run_data.h"
#include "loop/temp_dir.h"

namespace lockstep {

struct Outcome {
  int code = -1;     // 128 + number when a signal ended it
  std::string text;  // standard output and error together
};

inline std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& w : words) out += " " + w;
  return out;
}

inline bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A started lockstep, killed when it goes out of scope.
class Process {
 public:
  Process(std::vector<std::string> arguments, std::filesystem::path output,
          const std::vector<std::string>& environment = {}, rlim_t file_bytes = RLIM_INFINITY)
      : output_(std::move(output)) {
    arguments.insert(arguments.begin(), LOCKSTEP_BINARY);
    std::vector<char*> argv;
    for (std::string& a : arguments) argv.push_back(a.data());
    argv.push_back(nullptr);
    std::vector<std::string> variables = environment;
    variables.push_back("OMP_WAIT_POLICY=passive");
    pid_ = ::fork();
    if (pid_ != 0) return;
    const int out = ::open(output_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const int in = ::open("/dev/null", O_RDONLY);
    ::dup2(in, 0), ::dup2(out, 1), ::dup2(out, 2);
    for (std::string& v : variables) ::putenv(v.data());
    if (file_bytes != RLIM_INFINITY) {
      const rlimit limit{file_bytes, file_bytes};
      ::setrlimit(RLIMIT_FSIZE, &limit);
      ::signal(SIGXFSZ, SIG_IGN);  // as under a shell's `trap '' XFSZ`: write then returns EFBIG
    }
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (pid_ > 0) ::kill(pid_, SIGKILL), wait();
  }

  void send(int signal) const { ::kill(pid_, signal); }

  bool running() {
    if (pid_ > 0 && ::waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = -1;
    return pid_ > 0;
  }

  // Waits for the end; a run that outlasts `seconds` is killed and counts as hanging (code 137).
  Outcome wait(double seconds = 300) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (running()) {
      if (std::chrono::steady_clock::now() > end) ::kill(pid_, SIGKILL);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return {WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_),
            TempDirTest::slurp(output_)};
  }

 private:
  std::filesystem::path output_;
  pid_t pid_ = -1;
  int status_ = 0;
};

struct TinyRunTest : TempDirTest {
  using Words = std::vector<std::string>;

  // lockstep rl on tests/data/apps/tiny.yaml with the run folder dir/name.
  Words rl(const std::string& name, const Words& more = {}) const {
    Words out = {"rl", "--config", LOCKSTEP_TEST_DATA "/apps/tiny.yaml",
                 "policy.model_name=" LOCKSTEP_SOURCE_DIR "/models/demo",
                 "logger.log_dir=" + (dir / name).string()};
    out.insert(out.end(), more.begin(), more.end());
    return out;
  }

  Outcome run(const Words& arguments, const Words& environment = {},
              rlim_t file_bytes = RLIM_INFINITY) const {
    return Process(arguments, dir / "output.txt", environment, file_bytes).wait();
  }

  // The same, expected to succeed.
  loop::RunData done(const std::string& name, const Words& more = {},
                     const Words& environment = {}) const {
    const Outcome out = run(rl(name, more), environment);
    EXPECT_EQ(out.code, 0) << joined(more) << "\n" << out.text;
    return out.code == 0 ? loop::read_run(dir / name) : loop::RunData{};
  }

  static std::vector<double> values(const loop::RunData& run, const std::string& metric) {
    std::vector<double> out;
    for (const loop::Point& p : loop::metric_series(run, metric, "").points) out.push_back(p.y);
    return out;
  }

  static std::vector<std::string> checksums(const loop::RunData& run) {
    std::vector<std::string> out;
    for (const loop::MetricsRow& row : run.rows)
      out.push_back(std::get<std::string>(row.values.at("sync/weight_checksum")));
    return out;
  }

  // All metrics of all steps agree to the bit, but for timings and, on request, a prefix of names.
  static void expect_equal(const loop::RunData& a, const loop::RunData& b,
                           const std::string& but_for = "no such metric") {
    ASSERT_FALSE(a.rows.empty());
    ASSERT_EQ(a.rows.size(), b.rows.size()) << a.name << " " << b.name;
    for (const loop::MetricDifference& d : loop::first_differences(a, b))
      if (d.metric.rfind(but_for, 0) != 0)
        ADD_FAILURE() << a.name << " against " << b.name << ": " << d.metric << " at step "
                      << d.step << ": " << d.a << " against " << d.b;
    EXPECT_EQ(checksums(a), checksums(b));
  }

  // Policy and rollout agreed to the bit in every step, and the weights moved.
  static void expect_lockstep(const loop::RunData& run) {
    ASSERT_FALSE(run.rows.empty());
    const std::size_t n = run.rows.size();
    EXPECT_EQ(values(run, "train/logprobs_different"), std::vector<double>(n, 0.0)) << run.name;
    EXPECT_EQ(values(run, "train/token_mult_prob_error"), std::vector<double>(n, 1.0)) << run.name;
    EXPECT_EQ(values(run, "train/gen_kl_error"), std::vector<double>(n, 0.0)) << run.name;
    for (const double compared : values(run, "train/logprobs_compared")) EXPECT_GE(compared, 16);
  }
};

}  // namespace lockstep
