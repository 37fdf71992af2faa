#include "base/content_hash.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "base/error.h"
#include "base/file_io.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace lockstep::base {

static std::string to_hex(const XXH128_hash_t& hash) {
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

std::string content_hash(std::string_view bytes) {
  return to_hex(XXH3_128bits(bytes.data(), bytes.size()));
}

FileHash hash_file(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail<SystemError>("cannot open {}: {}", path.string(), describe_errno(errno));
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  std::vector<char> buffer(1 << 20);
  std::uint64_t bytes = 0;
  int error = 0;
  for (;;) {
    const ssize_t got = ::read(fd, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) error = errno;
    if (got <= 0) break;
    XXH3_128bits_update(&state, buffer.data(), static_cast<std::size_t>(got));
    bytes += static_cast<std::uint64_t>(got);
  }
  ::close(fd);
  if (error != 0) fail<SystemError>("cannot read {}: {}", path.string(), describe_errno(error));
  return {bytes, to_hex(XXH3_128bits_digest(&state))};
}

}  // namespace lockstep::base
