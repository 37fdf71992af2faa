#include "model/hf_write.h"

#include <fcntl.h>
#include <stdio.h>  // renameat2

#include <cerrno>
#include <charconv>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file_io.h"
#include "model/hf_folder.h"
#include "model/strict_json.h"

namespace lockstep::model {

namespace fs = std::filesystem;
using base::fail;
using base::InputError;
using base::SystemError;
using nlohmann::json;

namespace {

// model-00002-of-00007.safetensors
bool is_shard_name(const std::string& name) {
  unsigned index = 0, count = 0;
  int end = 0;
  return std::sscanf(name.c_str(), "model-%5u-of-%5u.safetensors%n", &index, &count, &end) == 2 &&
         static_cast<std::size_t>(end) == name.size();
}

bool is_checkpoint_file(const std::string& name) {
  static const std::set<std::string> ours = {"config.json", "generation_config.json", kSingleFile,
                                             kIndexFile};
  return ours.count(name) != 0 || is_tokenizer_file(name) || is_shard_name(name);
}

// True when the folder is there. It may hold only what a checkpoint consists of.
bool check_replaceable(const fs::path& folder) {
  std::error_code error;
  if (!fs::exists(folder, error)) return false;
  if (!fs::is_directory(folder, error))
    fail<InputError>("{} is not a folder; choose another place for the checkpoint",
                     folder.string());
  fs::directory_iterator entries(folder, error);
  if (error) fail<SystemError>("cannot list {}: {}", folder.string(), error.message());
  for (const auto& entry : entries)
    if (!is_checkpoint_file(entry.path().filename()))
      fail<InputError>("{} holds {}, which is no part of a checkpoint; choose an empty folder",
                       folder.string(), entry.path().filename().string());
  return true;
}

// Some network file systems know no exchange; there the old folder steps aside first.
void put_in_place(const fs::path& temporary, const fs::path& folder, bool exchange) {
  const unsigned flags = exchange ? RENAME_EXCHANGE : RENAME_NOREPLACE;
  if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, folder.c_str(), flags) == 0) return;
  if (errno != EINVAL && errno != ENOSYS)
    fail<SystemError>("cannot rename {} to {}: {}", temporary.string(), folder.string(),
                      base::describe_errno(errno));
  const fs::path aside = temporary.string() + ".old";
  if (exchange) fs::rename(folder, aside);
  fs::rename(temporary, folder);
  if (exchange) fs::rename(aside, temporary);
}

std::uint64_t bytes_of(const TensorToWrite& t) {
  std::uint64_t bytes = dtype_item_bytes(t.dtype);
  for (const std::int64_t n : t.shape) bytes *= static_cast<std::uint64_t>(n);
  return bytes;
}

std::vector<std::vector<TensorToWrite>> cut_into_shards(const HfFolderToWrite& what) {
  std::vector<std::vector<TensorToWrite>> shards(1);
  std::uint64_t filled = 0;
  for (const TensorToWrite& t : what.tensors) {
    const std::uint64_t bytes = bytes_of(t);
    if (!shards.back().empty() && filled + bytes > what.max_shard_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    filled += bytes;
    shards.back().push_back(t);
  }
  return shards;
}

// Lets `progress` see each tensor after it has been written (after the next one's fill, in truth:
// the writer asks for the bytes and writes them).
void count_bytes(std::vector<TensorToWrite>& tensors, const Progress& progress,
                 std::uint64_t total) {
  const auto done = std::make_shared<std::uint64_t>(0);
  for (TensorToWrite& t : tensors) {
    if (t.fill == nullptr) continue;
    t.fill = [fill = t.fill, progress, done, total](std::span<std::byte> to) {
      fill(to);
      *done += to.size();
      progress(*done, total);
    };
  }
}

void write_tensors(HfFolderToWrite what, const fs::path& folder) {
  std::uint64_t total = 0;
  for (const TensorToWrite& t : what.tensors) total += bytes_of(t);
  if (what.progress) count_bytes(what.tensors, what.progress, total);
  auto shards = cut_into_shards(what);
  if (shards.size() == 1) return write_safetensors(folder / kSingleFile, std::move(shards[0]));
  if (shards.size() > 99999)
    fail<InputError>("a shard size of {} bytes makes {} files", what.max_shard_bytes,
                     shards.size());
  json map = json::object();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    for (const TensorToWrite& t : shards[i]) map[t.name] = name;
    write_safetensors(folder / name, std::move(shards[i]));
  }
  base::write_file_atomic(folder / kIndexFile, json_text({{"metadata", {{"total_size", total}}},
                                                          {"weight_map", std::move(map)}}));
}

}  // namespace

bool is_tokenizer_file(const std::string& name) {
  static const std::set<std::string> names = {"tokenizer.json",
                                              "tokenizer_config.json",
                                              "special_tokens_map.json",
                                              "added_tokens.json",
                                              "chat_template.jinja",
                                              "chat_template.json",
                                              "vocab.json",
                                              "merges.txt",
                                              "tokenizer.model"};
  return names.count(name) != 0;
}

void write_hf_folder(const HfFolderToWrite& what, const fs::path& folder) {
  const fs::path place = fs::absolute(folder / "").parent_path();  // without a trailing slash
  const bool exchange = check_replaceable(place);
  const fs::path temporary = place.string() + ".tmp-" + base::unique_suffix();
  try {
    fs::create_directories(temporary);
    for (const auto& [name, content] : what.files)
      base::write_file_atomic(temporary / name, content);
    if (what.more_files) what.more_files(temporary);
    write_tensors(what, temporary);
    base::failpoint("checkpoint_before_rename");
    put_in_place(temporary, place, exchange);
  } catch (const fs::filesystem_error& e) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    fail<SystemError>("cannot save a checkpoint at {}: {}", place.string(), e.code().message());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
  base::sync_path(place.parent_path());
  std::error_code ignored;
  if (exchange) fs::remove_all(temporary, ignored);  // now the old checkpoint
}

std::uint64_t parse_byte_size(const std::string& text, const std::string& key) {
  struct Unit {
    const char* name;
    std::uint64_t bytes;
  };
  static constexpr Unit kUnits[] = {{"", 1},
                                    {"B", 1},
                                    {"KB", 1'000},
                                    {"MB", 1'000'000},
                                    {"GB", 1'000'000'000},
                                    {"KiB", 1ull << 10},
                                    {"MiB", 1ull << 20},
                                    {"GiB", 1ull << 30}};
  std::uint64_t number = 0, bytes = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error == std::errc())
    for (const Unit& unit : kUnits)
      if (std::string_view(rest, static_cast<std::size_t>(end - rest)) == unit.name &&
          !__builtin_mul_overflow(number, unit.bytes, &bytes) && bytes > 0)
        return bytes;
  fail<InputError>("{}: '{}' is not a size; write for example 5GB, 500MB or 2GiB", key, text);
}

}  // namespace lockstep::model
