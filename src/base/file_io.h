// Durable files. Everything that Lockstep must not lose goes to disk through these: full writes (no
// silent short write), fsync, and replacement by rename, so that a reader sees the old file or the
// new one and never half of it. All failures are SystemErrors that name the path and the reason.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace lockstep::base {

// A file opened for writing. Closed by the destructor without fsync unless close() ran.
class OutputFile {
 public:
  enum Mode { kTruncate, kAppend, kCreateNew };
  OutputFile(std::filesystem::path path, Mode mode);
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  ~OutputFile();

  // Writes all bytes or throws; after a throw the file may end with a part of them.
  void write(const void* data, std::size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void sync();   // fsync
  void close();  // close, reporting errors that the kernel kept until now
  void truncate(std::size_t size);
  std::size_t size() const;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

// Writes next to `path` under a temporary name; commit() makes it durable (fsync, rename, fsync of
// the folder) under the real one. Without commit() the destructor removes the temporary file and
// `path` is untouched. A file of that name that someone has mapped keeps its old bytes.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  OutputFile& file() { return file_; }
  void commit();

 private:
  std::filesystem::path path_;
  OutputFile file_;
  bool committed_ = false;
};

void write_file_atomic(const std::filesystem::path& path, std::string_view text);

// The whole file; InputError when it cannot be opened or is larger than `limit` bytes.
std::string read_file(const std::filesystem::path& path, std::size_t limit);

// fsync of an existing file or folder.
void sync_path(const std::filesystem::path& path);

// A short name part that no other process uses: process id and a counter.
std::string unique_suffix();

// "No space left on device: free some and resume", for an errno.
std::string describe_errno(int error);

}  // namespace lockstep::base
