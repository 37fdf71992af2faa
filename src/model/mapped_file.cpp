#include "model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace lockstep::model {

using base::fail;
using base::InputError;

MappedFile map_file(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail<InputError>("cannot open {}: {}", path.string(), std::strerror(errno));
  struct stat info {};
  const bool regular = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  const std::size_t size = regular ? static_cast<std::size_t>(info.st_size) : 0;
  void* data = size > 0 ? ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0) : nullptr;
  const int error = errno;
  ::close(fd);
  if (!regular) fail<InputError>("{}: not a regular file", path.string());
  if (data == MAP_FAILED)
    fail<base::SystemError>("cannot map {}: {}", path.string(), std::strerror(error));
  if (data == nullptr) return {path, {}, nullptr};
  std::shared_ptr<const void> owner(
      data, [size](const void* p) { ::munmap(const_cast<void*>(p), size); });
  return {path, {static_cast<const std::byte*>(data), size}, std::move(owner)};
}

}  // namespace lockstep::model
