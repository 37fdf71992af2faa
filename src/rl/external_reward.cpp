#include "rl/external_reward.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"

extern char** environ;

namespace lockstep::rl {
namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kStderrTail = 2000;
constexpr std::size_t kMaxOutput = std::size_t{64} << 20;
constexpr int kPollMs = 5;  // how soon the exit of a command with an open pipe is noticed

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { close(); }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  int get() const { return fd_; }
  bool open() const { return fd_ >= 0; }

 private:
  int fd_;
};

struct Pipe {
  Fd read, write;
};

// Close-on-exec on both ends; our own end does not block.
Pipe make_pipe(bool we_read) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0)
    base::fail<base::SystemError>("external reward: pipe: {}", std::strerror(errno));
  Pipe pipe{Fd(ends[0]), Fd(ends[1])};
  const int ours = (we_read ? pipe.read : pipe.write).get();
  fcntl(ours, F_SETFL, fcntl(ours, F_GETFL) | O_NONBLOCK);
  return pipe;
}

// Writing to a closed pipe raises SIGPIPE in the writing thread: hold it back, and take a pending
// one away before the old mask returns.
class SigpipeBlocked {
 public:
  SigpipeBlocked() {
    sigemptyset(&pipe_only_);
    sigaddset(&pipe_only_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_only_, &old_);
  }
  SigpipeBlocked(const SigpipeBlocked&) = delete;
  SigpipeBlocked& operator=(const SigpipeBlocked&) = delete;
  ~SigpipeBlocked() {
    const timespec none{0, 0};
    while (!was_pending_ && sigtimedwait(&pipe_only_, nullptr, &none) < 0 && errno == EINTR) {
    }
    pthread_sigmask(SIG_SETMASK, &old_, nullptr);
  }
  const sigset_t& old_mask() const { return old_; }

 private:
  sigset_t pipe_only_, old_;
  bool was_pending_ = false;
};

// A running command in a process group of its own; killed and reaped when it goes out of scope.
class Child {
 public:
  explicit Child(pid_t pid) : pid_(pid) {}
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() { finish(); }

  // Not reaped yet, so that the group's id stays ours.
  bool exited() const {
    siginfo_t info{};
    return waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
           info.si_pid == pid_;
  }
  void kill_group() const { ::kill(-pid_, SIGKILL); }
  // Kills what is left of the group and reaps the command; its wait status.
  int finish() {
    if (pid_ < 0) return status_;
    kill_group();
    while (waitpid(pid_, &status_, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return status_;
  }

 private:
  pid_t pid_;
  int status_ = 0;
};

pid_t spawn(const std::vector<std::string>& command, const Pipe& in, const Pipe& out,
            const Pipe& err, const sigset_t& mask) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&files);
  posix_spawnattr_init(&attributes);
  posix_spawn_file_actions_adddup2(&files, in.read.get(), STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&files, out.write.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&files, err.write.get(), STDERR_FILENO);
  sigset_t defaults;
  sigemptyset(&defaults);
  for (const int signal : {SIGPIPE, SIGINT, SIGTERM}) sigaddset(&defaults, signal);
  posix_spawnattr_setsigdefault(&attributes, &defaults);
  posix_spawnattr_setsigmask(&attributes, &mask);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  pid_t pid = -1;
  const int error = posix_spawnp(&pid, argv[0], &files, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  if (error != 0)
    base::fail<base::SystemError>("external reward: cannot start '{}': {}", command[0],
                                  std::strerror(error));
  return pid;
}

// Reads what is there; closes the descriptor at the end of the stream.
void drain(Fd& fd, std::string& text) {
  char buffer[65536];
  for (;;) {
    const ssize_t got = ::read(fd.get(), buffer, sizeof buffer);
    if (got > 0) {
      text.append(buffer, static_cast<std::size_t>(got));
      if (text.size() > kMaxOutput) return;
      continue;
    }
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    fd.close();
    return;
  }
}

// Writes what fits; closes the descriptor when all is written or nobody reads any more.
void feed(Fd& fd, const std::string& text, std::size_t& written) {
  while (written < text.size()) {
    const ssize_t put = ::write(fd.get(), text.data() + written, text.size() - written);
    if (put > 0) {
      written += static_cast<std::size_t>(put);
      continue;
    }
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    break;
  }
  fd.close();
}

struct Output {
  std::string out, err;
  int status = 0;
  bool timed_out = false;
};

Output run(const RewardConfig& config, const std::string& input) {
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                           std::chrono::duration<double>(config.time_limit_s));
  const SigpipeBlocked blocked;
  Pipe in = make_pipe(false), out = make_pipe(true), err = make_pipe(true);
  Child child(spawn(config.command, in, out, err, blocked.old_mask()));
  in.read.close();
  out.write.close();
  err.write.close();
  Output result;
  std::size_t written = 0;
  bool gone = false;
  while (in.write.open() || out.read.open() || err.read.open() || !gone) {
    if (Clock::now() >= deadline) {
      result.timed_out = !gone || out.read.open();
      break;
    }
    pollfd fds[3] = {{in.write.get(), POLLOUT, 0},
                     {out.read.get(), POLLIN, 0},
                     {err.read.get(), POLLIN, 0}};  // poll skips descriptors below 0
    poll(fds, 3, kPollMs);
    if (fds[0].revents != 0) feed(in.write, input, written);
    if (fds[1].revents != 0) drain(out.read, result.out);
    if (fds[2].revents != 0) {
      drain(err.read, result.err);
      if (result.err.size() > 2 * kStderrTail) result.err.erase(0, result.err.size() - kStderrTail);
    }
    if (result.out.size() > kMaxOutput)
      base::fail<base::InputError>("external reward: '{}' wrote more than {} MiB",
                                   config.command[0], kMaxOutput >> 20);
    if (!gone && child.exited()) {
      gone = true;
      child.kill_group();  // what it left behind would hold the pipes open
      in.write.close();
    }
  }
  result.status = child.finish();
  if (result.err.size() > kStderrTail) result.err.erase(0, result.err.size() - kStderrTail);
  return result;
}

std::string complaint_of(const std::string& err) {
  return err.empty() ? std::string("; standard error is empty")
                     : fmt::format("; standard error ends:\n{}", err);
}

void check_end(const RewardConfig& config, const Output& output) {
  const std::string& program = config.command[0];
  if (output.timed_out)
    base::fail<base::SystemError>("external reward: '{}' exceeded its time limit of {} s{}",
                                  program, config.time_limit_s, complaint_of(output.err));
  if (WIFSIGNALED(output.status))
    base::fail<base::SystemError>("external reward: '{}' was killed by signal {}{}", program,
                                  WTERMSIG(output.status), complaint_of(output.err));
  if (WEXITSTATUS(output.status) != 0)
    base::fail<base::SystemError>("external reward: '{}' exited with status {}{}", program,
                                  WEXITSTATUS(output.status), complaint_of(output.err));
}

double score_of(const RewardConfig& config, std::string_view line, std::size_t number) {
  const auto fail = [&](std::string_view what) {
    base::fail<base::InputError>("external reward: line {} from '{}' {}: {}", number,
                                 config.command[0], what, line.substr(0, 200));
  };
  const Json row = Json::parse(line, nullptr, false);
  if (!row.is_object() || !row.contains("score")) fail("is not a JSON object with a key 'score'");
  if (!row["score"].is_number()) fail("has a score that is not a number");
  const double score = row["score"].get<double>();
  if (!std::isfinite(score)) fail("has a score that is not finite");
  return score;
}

}  // namespace

std::vector<double> external_scores(const RewardConfig& config,
                                    std::span<const RewardSample> samples) {
  validate(config);
  if (samples.empty()) return {};
  std::string input;
  for (const RewardSample& s : samples) {
    const Json row = {{"prompt", s.prompt}, {"response", s.response}, {"label", s.label}};
    input += row.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }
  const Output output = run(config, input);
  check_end(config, output);

  std::vector<double> out;
  std::size_t begin = 0;
  while (begin < output.out.size()) {
    const std::size_t end = std::min(output.out.find('\n', begin), output.out.size());
    const std::string_view line(output.out.data() + begin, end - begin);
    if (out.size() < samples.size()) {
      out.push_back(score_of(config, line, out.size() + 1));
    } else if (line.find_first_not_of(" \t\r") != std::string_view::npos) {
      base::fail<base::InputError>("external reward: '{}' wrote more than one line a sample ({})",
                                   config.command[0], samples.size());
    }
    begin = end + 1;
  }
  if (out.size() < samples.size())
    base::fail<base::InputError>("external reward: '{}' wrote {} lines for {} samples",
                                 config.command[0], out.size(), samples.size());
  return out;
}

}  // namespace lockstep::rl
