#include "loop/interrupt.h"

#include <unistd.h>

#include <csignal>
#include <string_view>

namespace lockstep::loop {

namespace {
volatile std::sig_atomic_t interrupt_count =
    0;  // NOTE: a signal handler can reach nothing but a global

void on_signal(int signal) {
  interrupt_count = interrupt_count + 1;
  if (interrupt_count > 1) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  constexpr std::string_view kNotice =
      "\nfinishing this step; a second time ends the run at once, back to its last checkpoint\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kNotice.data(), kNotice.size());
}
}  // namespace

void catch_interrupts() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

bool interrupted() { return interrupt_count > 0; }

}  // namespace lockstep::loop
