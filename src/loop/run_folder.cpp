#include "loop/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "base/error.h"
#include "base/file_io.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;
using base::SystemError;
namespace fs = std::filesystem;

static const std::string kRolloutPrefix = "train_data_step";

fs::path RunFolder::rollout_file(std::int64_t step) const {
  return rollouts() / fmt::format("{}{}.jsonl", kRolloutPrefix, step);
}

bool holds_run(const fs::path& root) { return fs::exists(root / "config.yaml"); }

static std::shared_ptr<const int> take_lock(const fs::path& path, const fs::path& root) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0)
    fail<SystemError>("cannot write to the run folder {}: {}", root.string(),
                      base::describe_errno(errno));
  std::shared_ptr<const int> lock(new int(fd), [](const int* p) {
    ::close(*p);
    delete p;
  });
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0)
    fail<SystemError>("the run folder {} is in use by another lockstep process", root.string());
  return lock;
}

RunFolder open_run_folder(const fs::path& root, bool resume) {
  RunFolder folder{root, nullptr};
  std::error_code error;
  for (const fs::path& path :
       {root, folder.tensorboard(), folder.rollouts(), folder.checkpoints(), folder.logs()}) {
    fs::create_directories(path, error);
    if (error)
      fail<SystemError>("cannot create the folder {}: {}", path.string(),
                        base::describe_errno(error.value()));
  }
  folder.lock = take_lock(root / ".lock", root);
  if (!resume && holds_run(root))
    fail<InputError>(
        "{} already holds a run: pass --resume auto to go on with it, --fresh to keep it aside and "
        "start anew, or set another logger.log_dir",
        root.string());
  return folder;
}

fs::path set_aside_run(const fs::path& root) {
  const fs::path clean = root.filename().empty() ? root.parent_path() : root;
  for (int i = 1;; ++i) {
    const fs::path target = clean.string() + "." + std::to_string(i);
    if (fs::exists(target)) continue;
    std::error_code error;
    fs::rename(clean, target, error);
    if (error)
      fail<SystemError>("cannot rename {} to {}: {}", clean.string(), target.string(),
                        base::describe_errno(error.value()));
    return target;
  }
}

void discard_rollouts_after(const RunFolder& folder, std::int64_t step) {
  std::vector<fs::path> later;
  for (const auto& entry : fs::directory_iterator(folder.rollouts())) {
    const std::string name = entry.path().filename().string();
    const std::size_t digits = name.find_first_not_of("0123456789", kRolloutPrefix.size());
    if (name.rfind(kRolloutPrefix, 0) != 0 || digits == kRolloutPrefix.size() ||
        digits == std::string::npos || name.substr(digits) != ".jsonl" ||
        digits - kRolloutPrefix.size() > 18)
      continue;
    if (std::stoll(name.substr(kRolloutPrefix.size())) > step) later.push_back(entry.path());
  }
  for (const fs::path& path : later) fs::remove(path);
}

}  // namespace lockstep::loop
