#include "loop/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include "base/error.h"

namespace lockstep::loop {

void Log::info(const std::string& message) const { logger->info("{}", message); }
void Log::warn(const std::string& message) const { logger->warn("{}", message); }

static std::shared_ptr<spdlog::sinks::sink> stderr_sink() {
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  sink->set_level(spdlog::level::warn);
  // On a terminal a progress bar may stand on this line: wipe it first.
  sink->set_pattern(::isatty(STDERR_FILENO) == 1 ? "\r\x1b[K%l: %v" : "%l: %v");
  return sink;
}

Log stderr_log() { return {std::make_shared<spdlog::logger>("lockstep", stderr_sink())}; }

Log open_log(const std::filesystem::path& file) {
  Log log = stderr_log();
  try {
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(file.string());
    sink->set_pattern("%Y-%m-%d %H:%M:%S.%e %l %v");
    log.logger->sinks().push_back(sink);
  } catch (const spdlog::spdlog_ex& e) {
    base::fail<base::SystemError>("cannot open the log {}: {}", file.string(), e.what());
  }
  log.logger->set_level(spdlog::level::info);
  log.logger->flush_on(spdlog::level::info);
  log.logger->set_error_handler([](const std::string&) {});
  return log;
}

}  // namespace lockstep::loop
