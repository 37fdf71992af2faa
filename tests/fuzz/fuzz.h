// What a fuzz target provides (fuzz_main.cpp drives it): LLVMFuzzerTestOneInput, as libFuzzer wants
// it, and seeds. An input may be refused by an InputError; everything else is a defect.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace lockstep::fuzz {

// Good inputs to start from, and texts that are worth inserting.
std::vector<std::string> seeds();
std::vector<std::string> words();

// A file in memory that holds the input.
class MemoryFile {
 public:
  MemoryFile(const std::uint8_t* data, std::size_t size) : fd_(::memfd_create("fuzz", 0)) {
    if (fd_ < 0 || ::write(fd_, data, size) != static_cast<ssize_t>(size))
      base::fail<base::SystemError>("cannot write {} bytes to memory", size);
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

}  // namespace lockstep::fuzz
