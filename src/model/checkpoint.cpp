#include "model/checkpoint.h"

#include <fcntl.h>
#include <stdio.h>  // renameat2

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file_io.h"
#include "model/hf_config.h"
#include "model/safetensors.h"
#include "model/strict_json.h"

namespace lockstep::model {

namespace fs = std::filesystem;
using base::fail;
using base::InputError;
using base::SystemError;
using nlohmann::json;
using numerics::Bf16;

static constexpr const char* kSingleFile = "model.safetensors";
static constexpr const char* kIndexFile = "model.safetensors.index.json";
static constexpr std::size_t kIndexLimit = 64 << 20;

namespace {

struct Source {
  FileTensor tensor;
  std::string file;
};

// The tensors of all files by name, and the mappings that keep their bytes.
struct Sources {
  std::map<std::string, Source> tensors;
  std::vector<SafetensorsFile> files;
  std::string where;  // the file that lists the tensors
};

Sources open_single(const fs::path& path) {
  Sources s;
  s.where = path.string();
  s.files.push_back(open_safetensors(path));
  for (const auto& [name, tensor] : s.files[0].tensors)
    s.tensors.emplace(name, Source{tensor, s.where});
  return s;
}

// A shard is a file of the checkpoint's own folder.
void check_shard_name(const std::string& shard, const std::string& tensor,
                      const std::string& where) {
  const bool plain = shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (!plain || shard.starts_with('.') || !shard.ends_with(".safetensors"))
    fail<InputError>("{}: tensor '{}': '{}' is not the name of a .safetensors file in this folder",
                     where, tensor, shard);
}

Sources open_sharded(const fs::path& index_path) {
  Sources s;
  s.where = index_path.string();
  const json index = read_json_file(index_path, kIndexLimit);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object())
    fail<InputError>("{}: weight_map is missing or not an object", s.where);
  std::map<std::string, std::set<std::string>> names_of_shard;
  for (const auto& [name, shard] : map->items()) {
    if (!shard.is_string())
      fail<InputError>("{}: tensor '{}': expected a file name, found {}", s.where, name,
                       shard.dump());
    check_shard_name(shard, name, s.where);
    names_of_shard[shard].insert(name);
  }
  for (const auto& [shard, names] : names_of_shard) {
    s.files.push_back(open_safetensors(index_path.parent_path() / shard));
    const SafetensorsFile& file = s.files.back();
    for (const std::string& name : names)
      s.tensors.emplace(name, Source{file.at(name), file.path.string()});
    for (const auto& [name, tensor] : file.tensors)
      if (!names.count(name))
        fail<InputError>("{}: tensor '{}' is not listed for this file in {}", file.path.string(),
                         name, s.where);
  }
  return s;
}

Sources open_sources(const fs::path& folder) {
  std::error_code error;
  if (fs::exists(folder / kSingleFile, error)) return open_single(folder / kSingleFile);
  if (fs::exists(folder / kIndexFile, error)) return open_sharded(folder / kIndexFile);
  fail<InputError>("{}: there is neither {} nor {}", folder.string(), kSingleFile, kIndexFile);
}

std::vector<std::int64_t> part_shape(const Param& param, const ParamPart& part) {
  if (param.kind == ParamKind::kNorm) return {part.columns};
  return {part.rows, part.columns};
}

void check_part(const Param& param, const ParamPart& part, const Sources& sources) {
  const auto found = sources.tensors.find(part.hf_name);
  if (found == sources.tensors.end())
    fail<InputError>("{}: tensor '{}' is missing", sources.where, part.hf_name);
  const auto& [tensor, file] = found->second;
  if (tensor.dtype != FileDtype::kBF16 && tensor.dtype != FileDtype::kF32 &&
      tensor.dtype != FileDtype::kF16)
    fail<InputError>("{}: tensor '{}' is {}, only BF16, F32 and F16 are supported", file,
                     part.hf_name, dtype_name(tensor.dtype));
  const auto shape = part_shape(param, part);
  if (tensor.shape != shape)
    fail<InputError>("{}: tensor '{}' has shape [{}], config.json asks for [{}]", file,
                     part.hf_name, fmt::join(tensor.shape, ", "), fmt::join(shape, ", "));
}

// The selection bias of balanced routers, under DeepSeek's name.
std::string bias_name(std::int64_t layer) {
  return fmt::format("model.layers.{}.mlp.gate.e_score_correction_bias", layer);
}

// Either every layer has a selection bias or none.
void check_bias(const ModelConfig& config, const Sources& sources,
                std::set<std::string>& expected) {
  if (!sources.tensors.count(bias_name(0))) return;
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    const auto found = sources.tensors.find(bias_name(l));
    if (found == sources.tensors.end())
      fail<InputError>("{}: tensor '{}' is missing", sources.where, bias_name(l));
    const auto& [tensor, file] = found->second;
    if (tensor.dtype != FileDtype::kF32 ||
        tensor.shape != std::vector<std::int64_t>{config.num_experts})
      fail<InputError>("{}: tensor '{}' is {} [{}], expected F32 [{}]", file, bias_name(l),
                       dtype_name(tensor.dtype), fmt::join(tensor.shape, ", "), config.num_experts);
    expected.insert(bias_name(l));
  }
}

void check_names(const ModelConfig& config, const ParamTable& table, const Sources& sources) {
  std::set<std::string> expected;
  for (const Param& param : table.params)
    for (const ParamPart& part : param.parts) {
      check_part(param, part, sources);
      expected.insert(part.hf_name);
    }
  check_bias(config, sources, expected);
  for (const auto& [name, source] : sources.tensors) {
    if (expected.count(name)) continue;
    if (config.tie_word_embeddings && name == "lm_head.weight") {
      const FileTensor& embedding = sources.tensors.at("model.embed_tokens.weight").tensor;
      const FileTensor& head = source.tensor;
      if (head.dtype == embedding.dtype && head.shape == embedding.shape &&
          std::memcmp(head.bytes.data(), embedding.bytes.data(), head.bytes.size()) == 0)
        continue;
      fail<InputError>("{}: tensor '{}' differs from the embedding, config.json ties the two",
                       source.file, name);
    }
    fail<InputError>("{}: tensor '{}' is no part of the model that config.json describes",
                     source.file, name);
  }
}

float half_to_float(std::uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp(1024.0f + mantissa, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

// `count` values at `from`, which need not be aligned, as BF16.
void convert(FileDtype dtype, const std::byte* from, std::int64_t count, Bf16* to) {
  if (dtype == FileDtype::kBF16) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * 2);
  } else if (dtype == FileDtype::kF32) {
    for (std::int64_t i = 0; i < count; ++i) {
      float value;
      std::memcpy(&value, from + 4 * i, 4);
      to[i] = numerics::to_bf16(value);
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint16_t value;
      std::memcpy(&value, from + 2 * i, 2);
      to[i] = numerics::to_bf16(half_to_float(value));
    }
  }
}

void read_part(const Source& source, const Param& param, const ParamPart& part, Bf16* data) {
  const auto& [tensor, file] = source;
  const auto row_bytes = static_cast<std::int64_t>(dtype_item_bytes(tensor.dtype)) * part.columns;
  for (std::int64_t row = 0; row < part.rows; ++row) {
    Bf16* to = data + part_row_offset(param, part, row);
    convert(tensor.dtype, tensor.bytes.data() + row * row_bytes, part.columns, to);
    for (std::int64_t k = 0; k < part.columns; ++k)
      if ((to[k].bits & 0x7F80) == 0x7F80)
        fail<InputError>("{}: tensor '{}' holds {} at [{}, {}]", file, part.hf_name,
                         numerics::to_float(to[k]), row, k);
  }
}

void read_bias(const Sources& sources, Weights& weights) {
  const std::int64_t E = weights.config.num_experts;
  for (std::int64_t l = 0; l < weights.config.num_layers; ++l) {
    const auto found = sources.tensors.find(bias_name(l));
    if (found == sources.tensors.end()) continue;
    float* bias_E = weights.router_bias.as<float>() + l * E;
    std::memcpy(bias_E, found->second.tensor.bytes.data(), static_cast<std::size_t>(E) * 4);
    for (std::int64_t e = 0; e < E; ++e)
      if (!std::isfinite(bias_E[e]))
        fail<InputError>("{}: tensor '{}' holds {} at [{}]", found->second.file, bias_name(l),
                         bias_E[e], e);
  }
}

// Written only when the router has been balanced by it, so that other checkpoints keep the tensors
// of their family.
void add_bias(const Weights& weights, std::vector<TensorToWrite>& out) {
  const std::int64_t E = weights.config.num_experts, count = weights.router_bias.view().count();
  const float* bias_LE = weights.router_bias.as<float>();
  if (std::all_of(bias_LE, bias_LE + count, [](float b) { return b == 0; })) return;
  for (std::int64_t l = 0; l < weights.config.num_layers; ++l)
    out.push_back({bias_name(l), FileDtype::kF32, {E}, bias_LE + l * E});
}

std::vector<TensorToWrite> tensors_of(const Weights& weights) {
  std::vector<TensorToWrite> out;
  for (std::size_t p = 0; p < weights.table.params.size(); ++p) {
    const Param& param = weights.table.params[p];
    const Bf16* data = weights.view(static_cast<int>(p)).as<Bf16>();
    for (const ParamPart& part : param.parts)
      out.push_back({part.hf_name, FileDtype::kBF16, part_shape(param, part), nullptr,
                     [&param, &part, data](std::span<std::byte> to) {
                       const auto bytes = static_cast<std::size_t>(part.columns) * 2;
                       for (std::int64_t row = 0; row < part.rows; ++row)
                         std::memcpy(to.data() + static_cast<std::size_t>(row) * bytes,
                                     data + part_row_offset(param, part, row), bytes);
                     }});
  }
  add_bias(weights, out);
  return out;
}

// True when the folder is there. It may hold only what save_checkpoint writes.
bool check_replaceable(const fs::path& folder) {
  static const std::set<std::string> ours = {"config.json", "generation_config.json", kSingleFile,
                                             "tokenizer.json", "tokenizer_config.json"};
  std::error_code error;
  if (!fs::exists(folder, error)) return false;
  if (!fs::is_directory(folder, error))
    fail<InputError>("{} is not a folder; choose another place for the checkpoint",
                     folder.string());
  fs::directory_iterator entries(folder, error);
  if (error) fail<SystemError>("cannot list {}: {}", folder.string(), error.message());
  for (const auto& entry : entries)
    if (!ours.count(entry.path().filename()))
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

}  // namespace

Weights load_checkpoint(const fs::path& folder) {
  const ModelConfig config = read_hf_config(folder);
  const Sources sources = open_sources(folder);
  check_names(config, build_param_table(config), sources);
  Weights weights = make_weights(config);
  for (std::size_t p = 0; p < weights.table.params.size(); ++p) {
    const Param& param = weights.table.params[p];
    Bf16* data = weights.view(static_cast<int>(p)).as<Bf16>();
    for (const ParamPart& part : param.parts)
      read_part(sources.tensors.at(part.hf_name), param, part, data);
  }
  read_bias(sources, weights);
  return weights;
}

void save_checkpoint(const Weights& weights, const Tokenizer* tokenizer, const fs::path& folder) {
  const fs::path place = fs::absolute(folder / "").parent_path();  // without a trailing slash
  const bool exchange = check_replaceable(place);
  const fs::path temporary = place.string() + ".tmp-" + base::unique_suffix();
  try {
    fs::create_directories(temporary);
    base::write_file_atomic(temporary / "config.json", json_text(hf_config_json(weights.config)));
    base::write_file_atomic(temporary / "generation_config.json",
                            json_text(hf_generation_json(weights.config)));
    if (tokenizer != nullptr) write_tokenizer(*tokenizer, temporary);
    write_safetensors(temporary / kSingleFile, tensors_of(weights));
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

}  // namespace lockstep::model
