#include "loop/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace lockstep::loop {

std::string format_duration(double seconds) {
  if (!(seconds >= 0) || seconds > 1e9) return "?";
  if (seconds < 0.9995) return fmt::format("{:.0f}ms", seconds * 1e3);
  if (seconds < 59.95) return fmt::format("{:.1f}s", seconds);
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  return fmt::format("{}h{:02}m", whole / 3600, whole / 60 % 60);
}

std::string render_bar(std::int64_t first, std::int64_t done, std::int64_t total, double elapsed_s,
                       int width) {
  done = std::clamp<std::int64_t>(done, 0, std::max<std::int64_t>(total, 0));
  std::string tail = fmt::format(" {}/{}", done, total);
  if (done > first && done < total)
    tail += fmt::format("  {} left", format_duration(elapsed_s / static_cast<double>(done - first) *
                                                     static_cast<double>(total - done)));
  const int room = std::min(40, width - 2 - static_cast<int>(tail.size()));
  if (room < 4) return tail.substr(0, static_cast<std::size_t>(std::max(width, 0)));
  const auto full = static_cast<std::size_t>(total > 0 ? done * room / total : room);
  return "[" + std::string(full, '#') + std::string(static_cast<std::size_t>(room) - full, '.') +
         "]" + tail;
}

model::Progress byte_bar(const char* what) {
  if (::isatty(STDERR_FILENO) != 1) return nullptr;
  using Clock = std::chrono::steady_clock;
  return [what, next = Clock::now() + std::chrono::milliseconds(333), drawn = false](
             std::uint64_t done, std::uint64_t total) mutable {
    if (done >= total) {
      if (drawn) std::fputs("\r\x1b[K", stderr);
      drawn = false;
      return;
    }
    if (Clock::now() < next) return;
    next = Clock::now() + std::chrono::milliseconds(100);
    fmt::print(stderr, "\r{} [{:.<40}] {:.2f} of {:.2f} GB", what,
               std::string(done * 40 / total, '#'), static_cast<double>(done) * 1e-9,
               static_cast<double>(total) * 1e-9);
    drawn = true;
  };
}

Progress::Progress(std::FILE* out, std::int64_t first, std::int64_t total)
    : out_(out),
      terminal_(::isatty(::fileno(out)) == 1),
      first_(first),
      done_(first),
      total_(total) {}

void Progress::clear() {
  if (drawn_) std::fputs("\r\x1b[K", out_);
  if (drawn_) std::fflush(out_);
  drawn_ = false;
}

void Progress::draw() {
  if (!terminal_) return;
  winsize size{};
  const bool known = ::ioctl(::fileno(out_), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  // One column stays free: a full line would wrap on some terminals.
  const std::string bar =
      render_bar(first_, done_, total_, elapsed_s_, (known ? size.ws_col : 80) - 1);
  std::fputs(bar.c_str(), out_);
  drawn_ = true;
}

void Progress::note(const std::string& line) {
  clear();
  std::fprintf(out_, "%s\n", line.c_str());
  draw();
  std::fflush(out_);
}

void Progress::step(std::int64_t done, const std::string& line, double elapsed_s) {
  done_ = done;
  elapsed_s_ = elapsed_s;
  note(line);
}

}  // namespace lockstep::loop
