// A whole file mapped read-only: the bytes of a checkpoint are read where they lie.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

namespace lockstep::model {

struct MappedFile {
  std::filesystem::path path;
  std::span<const std::byte> bytes;   // empty for an empty file
  std::shared_ptr<const void> owner;  // keeps the bytes alive
};

// InputError when the file cannot be opened or is not a regular file. The size is taken now: a file
// that another process truncates while it is mapped raises SIGBUS on access, as for every mmap.
MappedFile map_file(const std::filesystem::path& path);

}  // namespace lockstep::model
