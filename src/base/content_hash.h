// XXH3-128 as 32 hexadecimal digits: finds damage (a flipped bit, a cut file), not malice.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace lockstep::base {

std::string content_hash(std::string_view bytes);

struct FileHash {
  std::uint64_t bytes;
  std::string hash;
};

// Reads the whole file; SystemError names it when that fails.
FileHash hash_file(const std::filesystem::path& path);

}  // namespace lockstep::base
