#include "base/file_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace lockstep::base {

namespace fs = std::filesystem;

std::string describe_errno(int error) {
  const std::string text = std::strerror(error);
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return text + ": the disk is full, free some space and resume";
    case EFBIG:
      return text + ": the file size limit (ulimit -f) is reached";
    case EROFS:
    case EACCES:
    case EPERM:
      return text + ": the folder must be writable";
    case EIO:
      return text + ": the disk reports a fault";
    default:
      return text;
  }
}

[[noreturn]] static void fail_errno(const char* action, const fs::path& path, int error) {
  fail<SystemError>("cannot {} {}: {}", action, path.string(), describe_errno(error));
}

OutputFile::OutputFile(fs::path path, Mode mode) : path_(std::move(path)) {
  const int flags = mode == kTruncate ? O_TRUNC : mode == kAppend ? O_APPEND : O_EXCL;
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644);
  if (fd_ < 0) fail_errno("open for writing", path_, errno);
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write(const void* data, std::size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, at, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_errno("write", path_, errno);
    at += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void OutputFile::sync() {
  if (::fsync(fd_) != 0) fail_errno("fsync", path_, errno);
}

void OutputFile::close() {
  if (fd_ >= 0 && ::close(std::exchange(fd_, -1)) != 0) fail_errno("close", path_, errno);
}

void OutputFile::truncate(std::size_t size) {
  if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) fail_errno("truncate", path_, errno);
}

std::size_t OutputFile::size() const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) fail_errno("stat", path_, errno);
  return static_cast<std::size_t>(info.st_size);
}

static fs::path temporary_beside(const fs::path& path) {
  return path.parent_path() / ("." + path.filename().string() + "." + unique_suffix() + ".tmp");
}

AtomicFile::AtomicFile(const fs::path& path)
    : path_(path), file_(temporary_beside(path), OutputFile::kCreateNew) {}

AtomicFile::~AtomicFile() {
  if (!committed_) ::unlink(file_.path().c_str());
}

void AtomicFile::commit() {
  file_.sync();
  file_.close();
  if (::rename(file_.path().c_str(), path_.c_str()) != 0) fail_errno("rename to", path_, errno);
  committed_ = true;
  sync_path(path_.parent_path().empty() ? fs::path(".") : path_.parent_path());
}

void write_file_atomic(const fs::path& path, std::string_view text) {
  AtomicFile out(path);
  out.file().write(text);
  out.commit();
}

std::string read_file(const fs::path& path, std::size_t limit) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail<InputError>("cannot open {}: {}", path.string(), std::strerror(errno));
  std::string text;
  char buffer[1 << 16];
  ssize_t got = 0;
  while ((got = ::read(fd, buffer, sizeof buffer)) != 0) {
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 || text.size() + static_cast<std::size_t>(got) > limit) break;
    text.append(buffer, static_cast<std::size_t>(got));
  }
  const int error = errno;
  ::close(fd);
  if (got < 0) fail<InputError>("cannot read {}: {}", path.string(), std::strerror(error));
  if (got > 0) fail<InputError>("{} is larger than the limit of {} bytes", path.string(), limit);
  return text;
}

void sync_path(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail_errno("open", path, errno);
  const int result = ::fsync(fd);
  const int error = errno;
  ::close(fd);
  if (result != 0) fail_errno("fsync", path, error);
}

std::string unique_suffix() {
  static std::atomic<unsigned> counter{0};
  return fmt::format("{}-{}", ::getpid(), counter++);
}

}  // namespace lockstep::base
