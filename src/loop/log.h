// The log of a run: everything to logs/lockstep.log with time and level, warnings and errors to
// stderr as well. Passed by value, no global.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

namespace spdlog {
class logger;
}

namespace lockstep::loop {

struct Log {
  std::shared_ptr<spdlog::logger> logger;
  void info(const std::string& message) const;
  void warn(const std::string& message) const;
};

// Appends to `file`. A disk that fills up later costs log lines, not the run.
Log open_log(const std::filesystem::path& file);

// Without a file.
Log stderr_log();

}  // namespace lockstep::loop
