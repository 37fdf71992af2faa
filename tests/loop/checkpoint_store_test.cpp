#include "loop/checkpoint_store.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <cstdlib>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file_io.h"
#include "loop/temp_dir.h"

namespace lockstep::loop {
namespace {

namespace fs = std::filesystem;

void write_text(const fs::path& path, const std::string& text) {
  base::OutputFile out(path, base::OutputFile::kCreateNew);
  out.write(text);
  out.close();
}

struct CheckpointStoreTest : TempDirTest {
  fs::path store() const { return dir / "checkpoints"; }

  static std::string weights(std::int64_t step) {
    return std::string(3000, static_cast<char>('a' + step % 26)) + std::to_string(step);
  }
  static void write_model(const fs::path& folder, std::int64_t step) {
    fs::create_directories(folder / "policy" / "weights");
    write_text(folder / "policy" / "weights" / "model.safetensors", weights(step));
    base::failpoint("test.between_files");
    write_text(folder / "rng.json", "{\"step\": " + std::to_string(step) + "}");
    write_text(folder / "empty", "");
  }
  SaveReport save(std::int64_t step, std::optional<std::int64_t> keep = std::nullopt,
                  std::optional<double> metric = std::nullopt, bool healthy = true) const {
    SaveRequest request{store(), step, "1", "c0ffee", healthy, metric, keep, true};
    return save_checkpoint(request, [&](const fs::path& f) { write_model(f, step); });
  }
  void expect_newest(std::int64_t step) const {
    const FoundCheckpoint found = find_latest_valid(store());
    ASSERT_TRUE(found.folder);
    EXPECT_EQ(*found.folder, store() / ("step_" + std::to_string(step)));
    EXPECT_EQ(found.manifest.step, step);
    EXPECT_EQ(slurp(*found.folder / "policy/weights/model.safetensors"), weights(step));
  }
  // Runs `body` in a child; returns the wait status.
  template <typename Body>
  static int in_child(Body body) {
    const pid_t child = ::fork();
    if (child == 0) {
      body();
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return status;
  }
};

std::string joined(const std::vector<std::string>& lines) {
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  return all;
}

TEST_F(CheckpointStoreTest, saves_and_finds) {
  EXPECT_FALSE(find_latest_valid(store()).folder);
  save(5);
  const SaveReport report = save(10, std::nullopt, 0.5);
  EXPECT_EQ(report.folder, store() / "step_10");
  EXPECT_TRUE(verify_checkpoint(report.folder / "").empty());  // with a slash at the end
  EXPECT_TRUE(report.notes.empty()) << joined(report.notes);
  expect_newest(10);
  const FoundCheckpoint found = find_latest_valid(store());
  EXPECT_TRUE(found.problems.empty()) << joined(found.problems);
  EXPECT_EQ(found.manifest.contract_version, "1");
  EXPECT_EQ(found.manifest.config_hash, "c0ffee");
  EXPECT_EQ(found.manifest.metric, 0.5);
  ASSERT_EQ(found.manifest.files.size(), 3u);
  EXPECT_EQ(found.manifest.files[1].file, "policy/weights/model.safetensors");
  EXPECT_EQ(slurp(store() / "latest_checkpointed_iteration.txt"), "10\n");
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{5, 10}));
  fs::create_directory(store() / "step_007");
  fs::create_directory(store() / "step_x");
  fs::create_directory(store() / "step_99999999999999999999");
  EXPECT_EQ(list_checkpoints(store()).size(), 2u);
}

// kill -9 at every stage: the newest whole checkpoint loads, and the next save succeeds.
TEST_F(CheckpointStoreTest, survives_a_kill_at_every_failpoint) {
  struct Case {
    const char* failpoint;
    std::int64_t newest;  // after the kill
    bool junk;
  };
  for (const Case& c :
       {Case{"save.begin", 5, true}, Case{"test.between_files", 5, true},
        Case{"save.after_files", 5, true}, Case{"save.after_sync", 5, true},
        Case{"save.after_manifest", 5, true}, Case{"save.after_rename", 10, false},
        Case{"save.after_latest", 10, false}, Case{"save.in_retention", 10, true}}) {
    SCOPED_TRACE(c.failpoint);
    fs::remove_all(store());
    save(4);
    save(5);
    const int status = in_child([&] {
      ::setenv("LOCKSTEP_FAILPOINT", c.failpoint, 1);
      save(10, 2);
    });
    ASSERT_TRUE(WIFSIGNALED(status));
    ASSERT_EQ(WTERMSIG(status), SIGKILL);
    expect_newest(c.newest);
    EXPECT_TRUE(verify_checkpoint(store() / "step_5").empty());
    const FoundCheckpoint found = find_latest_valid(store());
    EXPECT_EQ(found.problems.size(), c.junk ? 1u : 0u) << joined(found.problems);
    if (c.junk) {
      EXPECT_NE(found.problems[0].find("/tmp_"), std::string::npos);
    }
    // The resumed run comes to the same step again, and cleans up.
    save(10, 2);
    expect_newest(10);
    EXPECT_TRUE(find_latest_valid(store()).problems.empty());
    EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{5, 10}));
    EXPECT_EQ(slurp(store() / "latest_checkpointed_iteration.txt"), "10\n");
  }
}

TEST_F(CheckpointStoreTest, saving_a_step_again_exchanges_it_whole) {
  save(10);
  for (const char* failpoint : {"save.after_manifest", "save.after_rename"}) {
    const int status = in_child([&] {
      ::setenv("LOCKSTEP_FAILPOINT", failpoint, 1);
      save(10);
    });
    ASSERT_TRUE(WIFSIGNALED(status));
    expect_newest(10);
  }
}

TEST_F(CheckpointStoreTest, damage_to_any_file_is_named_and_the_older_one_taken) {
  save(5);
  save(10);
  const fs::path folder = store() / "step_10";
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files.push_back(entry.path());
  ASSERT_EQ(files.size(), 4u);
  const auto expect_named = [&](const fs::path& file, const std::string& what) {
    const FoundCheckpoint found = find_latest_valid(store());
    ASSERT_TRUE(found.folder) << what;
    EXPECT_EQ(found.manifest.step, 5) << file << " " << what;
    EXPECT_NE(joined(found.problems).find(file.string() + ":"), std::string::npos)
        << what << ": " << joined(found.problems);
    EXPECT_TRUE(fs::exists(folder)) << "nothing is deleted while resuming";
  };
  for (const fs::path& file : files) {
    const std::string good = slurp(file);
    const std::size_t stride = file.filename() == kManifestName ? 1 : 97;
    for (std::size_t i = 0; i < good.size(); i += stride) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << (i % 8)));
      std::ofstream(file, std::ios::binary) << bad;
      expect_named(file, "flipped " + std::to_string(i));
      std::ofstream(file, std::ios::binary) << good.substr(0, i);
      expect_named(file, "cut to " + std::to_string(i));
      if (HasFailure()) return;
    }
    std::ofstream(file, std::ios::binary) << good << "x";
    expect_named(file, "longer");
    fs::remove(file);
    expect_named(file, "removed");
    fs::create_symlink(dir / "elsewhere", file);
    put("elsewhere", good);
    if (file.filename() != kManifestName) expect_named(file, "a link");
    fs::remove(file);
    std::ofstream(file, std::ios::binary) << good;
    EXPECT_TRUE(verify_checkpoint(folder).empty());
  }
  fs::rename(folder, store() / "step_11");
  EXPECT_NE(joined(find_latest_valid(store()).problems).find("of step 10"), std::string::npos);
  expect_newest(5);
}

TEST_F(CheckpointStoreTest, manifest_names_may_not_leave_the_folder) {
  for (const char* name : {"../x", "/etc/passwd", "a/../../x", "", "a//../b", "./x"}) {
    Manifest m;
    m.files = {{name, 0, ""}};
    EXPECT_THROW(parse_manifest(manifest_text(m), "m"), base::InputError) << name;
  }
  Manifest twice;
  twice.files = {{"a", 0, ""}, {"a", 0, ""}};
  EXPECT_THROW(parse_manifest(manifest_text(twice), "m"), base::InputError);
}

TEST_F(CheckpointStoreTest, nothing_valid_is_told_apart_from_nothing_there) {
  save(5);
  fs::remove(store() / "step_5" / "rng.json");
  const FoundCheckpoint found = find_latest_valid(store());
  EXPECT_FALSE(found.folder);
  EXPECT_NE(joined(found.problems).find("rng.json: missing"), std::string::npos);
}

TEST_F(CheckpointStoreTest, retention_keeps_the_best_and_the_newest_healthy) {
  save(1, 2, 0.9);
  save(2, 2, 0.1);
  save(3, 2, 0.5);
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{1, 3}));
  save(4, 2, 0.2);  // newest, though not among the best two
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{1, 3, 4}));
  // Unhealthy saves must not push the healthy ones out.
  save(5, 1, 9.0, false);
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{1, 4, 5}));
  save(6, 1, 9.0, false);
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{1, 4, 6}));
  expect_newest(4);
  // A newest healthy one that is damaged protects nothing: the next whole one is kept.
  std::ofstream(store() / "step_4" / "rng.json") << "x";
  save(7, 1, 9.5, false);
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{1, 7}));
  expect_newest(1);
}

TEST_F(CheckpointStoreTest, without_metric_the_newest_are_kept) {
  for (int s = 1; s <= 5; ++s) save(s, 2);
  EXPECT_EQ(list_checkpoints(store()), (std::vector<std::int64_t>{4, 5}));
}

// Exit code of a child that must see a SystemError about step 10 with `part` in it.
int save_must_fail(const std::function<void()>& save, const std::string& part) {
  try {
    save();
    return 1;
  } catch (const base::SystemError& e) {
    const std::string text = e.what();
    if (text.find(part) == std::string::npos || text.find("step 10") == std::string::npos) {
      std::fprintf(stderr, "%s\n", text.c_str());
      return 2;
    }
    return 0;
  }
}

TEST_F(CheckpointStoreTest, a_write_that_fails_leaves_the_old_one_intact) {
  save(5);
  const int status = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::_exit(save_must_fail([&] { save(10); }, "model.safetensors: File too large"));
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  expect_newest(5);
  EXPECT_TRUE(find_latest_valid(store()).problems.empty()) << "junk was left";
}

// A real full disk: a tmpfs of 16 pages in a mount namespace of the child. The first checkpoint
// takes 4 of them, so the second meets the end at its first, second or third file, or just after
// the rename, where it must stand.
TEST_F(CheckpointStoreTest, a_full_disk_leaves_the_old_one_intact) {
  fs::create_directory(store());
  const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  for (const std::size_t free_pages : {0, 1, 2, 3}) {
    SCOPED_TRACE(free_pages);
    const int status = in_child([&] {
      if (::unshare(CLONE_NEWNS | (::geteuid() == 0 ? 0 : CLONE_NEWUSER)) != 0) ::_exit(77);
      ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
      const std::string size = "size=" + std::to_string(16 * page);
      if (::mount("tmpfs", store().c_str(), "tmpfs", 0, size.c_str()) != 0) ::_exit(77);
      save(5);
      write_text(store() / "ballast", std::string((12 - free_pages) * page, 'x'));
      if (free_pages == 3) {
        const std::string notes = joined(save(10).notes);
        const bool told = notes.find("step 10 is saved, but") != std::string::npos;
        ::_exit(told && find_latest_valid(store()).manifest.step == 10 ? 0 : 4);
      }
      const int code = save_must_fail([&] { save(10); }, "the disk is full");
      const FoundCheckpoint found = find_latest_valid(store());
      ::_exit(code != 0 ? code : found.folder && found.manifest.step == 5 ? 0 : 3);
    });
    ASSERT_TRUE(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "may not mount a tmpfs here";
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
}

TEST_F(CheckpointStoreTest, a_read_only_folder_is_a_clear_error) {
  save(5);
  fs::permissions(store(), fs::perms::owner_read | fs::perms::owner_exec | fs::perms::others_read |
                               fs::perms::others_exec);
  const int status = in_child([&] {
    if (::geteuid() == 0 && ::setuid(65534) != 0) ::_exit(77);
    ::_exit(save_must_fail([&] { save(10); }, "must be writable"));
  });
  fs::permissions(store(), fs::perms::owner_all);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "cannot drop root";
  EXPECT_EQ(WEXITSTATUS(status), 0);
  expect_newest(5);
}

TEST_F(CheckpointStoreTest, an_error_of_the_caller_passes_through_and_leaves_no_junk) {
  SaveRequest request{store(), 3, "1", "", true, {}, {}, true};
  EXPECT_THROW(save_checkpoint(request, [](const fs::path&) { throw std::logic_error("x"); }),
               std::logic_error);
  EXPECT_THROW(
      save_checkpoint(request, [](const fs::path& f) { fs::create_symlink("/etc", f / "link"); }),
      base::ContractError);
  EXPECT_TRUE(fs::is_empty(store()));
}

}  // namespace
}  // namespace lockstep::loop
