#include "loop/checkpoint_store.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <set>

#include "base/content_hash.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "base/file_io.h"

namespace lockstep::loop {

using base::fail;
using base::failpoint;
using base::InputError;
using base::SystemError;
namespace fs = std::filesystem;

namespace {

constexpr const char* kLatestName = "latest_checkpointed_iteration.txt";
constexpr std::size_t kMaxManifestBytes = 64 << 20;

void make_folder(const fs::path& path, bool parents) {
  std::error_code error;
  parents ? fs::create_directories(path, error) : fs::create_directory(path, error);
  if (error)
    fail<SystemError>("cannot create the folder {}: {}", path.string(),
                      base::describe_errno(error.value()));
}

// Makes everything below durable and returns the regular files, hashed, in order of name.
std::vector<ManifestFile> sync_and_hash(const fs::path& folder) {
  std::vector<ManifestFile> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const auto type = entry.symlink_status().type();
    LOCKSTEP_CHECK(type == fs::file_type::regular || type == fs::file_type::directory,
                   "{}: a checkpoint holds files and folders only", entry.path().string());
    base::sync_path(entry.path());
    if (type == fs::file_type::directory) continue;
    const base::FileHash hash = base::hash_file(entry.path());
    files.push_back(
        {entry.path().lexically_relative(folder).generic_string(), hash.bytes, hash.hash});
  }
  std::sort(files.begin(), files.end(),
            [](const ManifestFile& a, const ManifestFile& b) { return a.file < b.file; });
  return files;
}

// `target` becomes `temporary` in one step of the file system. What stood there before, if
// anything, is under the temporary name afterwards.
void move_into_place(const fs::path& temporary, const fs::path& target) {
  const auto rename_with = [&](unsigned flags) {
    return ::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, target.c_str(), flags) == 0;
  };
  if (!fs::exists(target)) {
    if (::rename(temporary.c_str(), target.c_str()) == 0) return;
  } else if (rename_with(RENAME_EXCHANGE)) {
    return;
  } else if (errno == EINVAL) {
    // A file system without exchange: the old one steps aside first.
    const fs::path aside = temporary.string() + ".old";
    if (::rename(target.c_str(), aside.c_str()) == 0 &&
        ::rename(temporary.c_str(), target.c_str()) == 0)
      return;
  }
  fail<SystemError>("cannot rename {} to {}: {}", temporary.string(), target.string(),
                    base::describe_errno(errno));
}

bool is_junk(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.rfind("tmp_", 0) == 0 || name.rfind(std::string(".") + kLatestName + ".", 0) == 0;
}

std::vector<fs::path> list_junk(const fs::path& dir) {
  std::vector<fs::path> junk;
  for (const auto& entry : fs::directory_iterator(dir))
    if (is_junk(entry.path())) junk.push_back(entry.path());
  std::sort(junk.begin(), junk.end());
  return junk;
}

// The manifest without a look at the files; nullopt when it does not parse.
std::optional<Manifest> read_manifest(const fs::path& folder) {
  try {
    const fs::path path = folder / kManifestName;
    return parse_manifest(base::read_file(path, kMaxManifestBytes), path.string());
  } catch (const InputError&) {
    return std::nullopt;
  }
}

void remove_checkpoint(const fs::path& dir, std::int64_t step) {
  // First the name, so that a half removed one is junk and not a damaged checkpoint.
  const fs::path doomed = dir / fmt::format("tmp_removed_step_{}.{}", step, base::unique_suffix());
  fs::rename(checkpoint_folder(dir, step), doomed);
  failpoint("save.in_retention");
  fs::remove_all(doomed);
}

// Folders that do not verify count for nothing and stay: their data may be worth a look.
void apply_retention(const SaveRequest& request, std::vector<std::string>* notes) {
  struct Candidate {
    std::int64_t step;
    Manifest manifest;
  };
  std::vector<Candidate> ranked;
  for (const std::int64_t step : list_checkpoints(request.dir))
    if (auto manifest = read_manifest(checkpoint_folder(request.dir, step)))
      ranked.push_back({step, std::move(*manifest)});

  std::set<std::int64_t> keep = {request.step};
  for (auto c = ranked.rbegin(); c != ranked.rend(); ++c)
    if (c->manifest.healthy &&
        (c->step == request.step ||
         verify_checkpoint(checkpoint_folder(request.dir, c->step)).empty())) {
      keep.insert(c->step);  // the newest healthy one
      break;
    }
  const double sign = request.higher_is_better ? 1.0 : -1.0;
  std::stable_sort(ranked.begin(), ranked.end(), [sign](const Candidate& a, const Candidate& b) {
    const Manifest &m = a.manifest, &n = b.manifest;
    if (m.healthy != n.healthy) return m.healthy;
    if (m.metric.has_value() != n.metric.has_value()) return m.metric.has_value();
    if (m.metric && *m.metric != *n.metric) return sign * *m.metric > sign * *n.metric;
    return a.step > b.step;
  });
  for (std::size_t i = 0; i < ranked.size(); ++i) {
    const std::int64_t step = ranked[i].step;
    if (static_cast<std::int64_t>(i) < *request.keep_top_k || keep.count(step)) continue;
    remove_checkpoint(request.dir, step);
    notes->push_back(
        fmt::format("removed checkpoint step_{} (keep_top_k {})", step, *request.keep_top_k));
  }
}

// What follows a good save; trouble here is told, the checkpoint stands.
void finish_save(const SaveRequest& request, std::vector<std::string>* notes) {
  try {
    base::write_file_atomic(request.dir / kLatestName, fmt::format("{}\n", request.step));
    failpoint("save.after_latest");
    for (const fs::path& junk : list_junk(request.dir)) {
      fs::remove_all(junk);
      notes->push_back(fmt::format("removed {}, left by an earlier save", junk.string()));
    }
    if (request.keep_top_k) apply_retention(request, notes);
  } catch (const SystemError& e) {
    notes->push_back(fmt::format("step {} is saved, but: {}", request.step, e.what()));
  } catch (const fs::filesystem_error& e) {
    notes->push_back(fmt::format("step {} is saved, but: {}", request.step, e.what()));
  }
}

}  // namespace

fs::path checkpoint_folder(const fs::path& dir, std::int64_t step) {
  return dir / fmt::format("step_{}", step);
}

std::vector<std::int64_t> list_checkpoints(const fs::path& dir) {
  std::vector<std::int64_t> steps;
  if (!fs::is_directory(dir)) return steps;
  for (const auto& entry : fs::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("step_", 0) != 0 || name.size() == 5 || name.size() > 5 + 18 ||
        name.find_first_not_of("0123456789", 5) != std::string::npos || !entry.is_directory())
      continue;
    const std::int64_t step = std::stoll(name.substr(5));
    if (name == fmt::format("step_{}", step)) steps.push_back(step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

SaveReport save_checkpoint(const SaveRequest& request,
                           const std::function<void(const fs::path&)>& write_files) {
  LOCKSTEP_CHECK(request.step >= 0, "step {}", request.step);
  LOCKSTEP_CHECK(!request.keep_top_k || *request.keep_top_k >= 1, "keep_top_k below 1");
  const fs::path temporary =
      request.dir / fmt::format("tmp_step_{}.{}", request.step, base::unique_suffix());
  SaveReport report{checkpoint_folder(request.dir, request.step), {}};
  const auto give_up = [&](const char* what) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    return fmt::format("checkpoint of step {} was not saved (older ones are untouched): {}",
                       request.step, what);
  };
  try {
    make_folder(request.dir, true);
    std::error_code ignored;
    fs::remove_all(temporary, ignored);  // of a process with our number in an earlier life
    make_folder(temporary, false);
    failpoint("save.begin");
    write_files(temporary);
    failpoint("save.after_files");
    Manifest manifest{request.step,    request.contract_version, request.config_hash,
                      request.healthy, request.metric,           sync_and_hash(temporary)};
    failpoint("save.after_sync");
    base::OutputFile out(temporary / kManifestName, base::OutputFile::kCreateNew);
    out.write(manifest_text(manifest));
    out.sync();
    out.close();
    base::sync_path(temporary);
    failpoint("save.after_manifest");
    move_into_place(temporary, report.folder);
    failpoint("save.after_rename");
    base::sync_path(request.dir);
  } catch (const SystemError& e) {
    throw SystemError(give_up(e.what()));
  } catch (const fs::filesystem_error& e) {
    throw SystemError(give_up(e.what()));
  } catch (...) {
    give_up("");
    throw;
  }
  finish_save(request, &report.notes);
  return report;
}

std::vector<std::string> verify_checkpoint(const fs::path& path_given, Manifest* manifest_out) {
  const fs::path folder =  // "step_5/" is step_5
      path_given.has_filename() ? path_given : path_given.parent_path();
  Manifest manifest;
  std::vector<std::string> problems;
  try {
    const fs::path path = folder / kManifestName;
    manifest = parse_manifest(base::read_file(path, kMaxManifestBytes), path.string());
  } catch (const InputError& e) {
    return {e.what()};
  }
  if (folder.filename() != fmt::format("step_{}", manifest.step))
    problems.push_back(
        fmt::format("{}: its manifest is of step {}", folder.string(), manifest.step));
  for (const ManifestFile& expected : manifest.files) {
    const fs::path path = folder / expected.file;
    std::error_code error;
    if (!fs::is_regular_file(fs::symlink_status(path, error))) {
      problems.push_back(fmt::format("{}: missing", path.string()));
      continue;
    }
    try {
      const base::FileHash found = base::hash_file(path);
      if (found.bytes != expected.bytes)
        problems.push_back(fmt::format("{}: {} bytes, the manifest says {}", path.string(),
                                       found.bytes, expected.bytes));
      else if (found.hash != expected.xxh3_128)
        problems.push_back(fmt::format("{}: damaged (hash {}, the manifest says {})", path.string(),
                                       found.hash, expected.xxh3_128));
    } catch (const SystemError& e) {
      problems.push_back(e.what());
    }
  }
  if (manifest_out != nullptr) *manifest_out = std::move(manifest);
  return problems;
}

FoundCheckpoint find_latest_valid(const fs::path& dir) {
  FoundCheckpoint found;
  if (!fs::is_directory(dir)) return found;
  for (const fs::path& junk : list_junk(dir))
    found.problems.push_back(fmt::format("{}: left by an unfinished save, ignored", junk.string()));
  const std::vector<std::int64_t> steps = list_checkpoints(dir);
  for (auto step = steps.rbegin(); step != steps.rend() && !found.folder; ++step) {
    const fs::path folder = checkpoint_folder(dir, *step);
    Manifest manifest;
    const std::vector<std::string> wrong = verify_checkpoint(folder, &manifest);
    found.problems.insert(found.problems.end(), wrong.begin(), wrong.end());
    if (!wrong.empty()) continue;
    if (!manifest.healthy) {
      found.problems.push_back(
          fmt::format("{}: saved as unhealthy (non-finite values), passed over", folder.string()));
      continue;
    }
    found.folder = folder;
    found.manifest = std::move(manifest);
  }
  return found;
}

}  // namespace lockstep::loop
