#include "model/hf_folder.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "model/strict_json.h"

namespace lockstep::model {

namespace fs = std::filesystem;
using base::fail;
using base::InputError;
using nlohmann::json;

static constexpr std::size_t kIndexLimit = 64 << 20;
static constexpr std::int64_t kScaleBlock = 128;

namespace {

void open_single(HfFolder& f, const fs::path& path) {
  f.where = path.string();
  f.files.push_back(open_safetensors(path));
  for (const auto& [name, tensor] : f.files[0].tensors)
    f.tensors.emplace(name, HfTensor{tensor, f.where});
}

// A shard is a file of the checkpoint's own folder.
void check_shard_name(const std::string& shard, const std::string& tensor,
                      const std::string& where) {
  const bool plain = shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (!plain || shard.starts_with('.') || !shard.ends_with(".safetensors"))
    fail<InputError>("{}: tensor '{}': '{}' is not the name of a .safetensors file in this folder",
                     where, tensor, shard);
}

void open_sharded(HfFolder& f, const fs::path& index_path) {
  f.where = index_path.string();
  const json index = read_json_file(index_path, kIndexLimit);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object())
    fail<InputError>("{}: weight_map is missing or not an object", f.where);
  std::map<std::string, std::set<std::string>> names_of_shard;
  for (const auto& [name, shard] : map->items()) {
    if (!shard.is_string())
      fail<InputError>("{}: tensor '{}': expected a file name, found {}", f.where, name,
                       shard.dump());
    check_shard_name(shard, name, f.where);
    names_of_shard[shard].insert(name);
  }
  for (const auto& [shard, names] : names_of_shard) {
    f.files.push_back(open_safetensors(index_path.parent_path() / shard));
    const SafetensorsFile& file = f.files.back();
    for (const std::string& name : names)
      f.tensors.emplace(name, HfTensor{file.at(name), file.path.string()});
    for (const auto& [name, tensor] : file.tensors)
      if (!names.count(name))
        fail<InputError>("{}: tensor '{}' is not listed for this file in {}", file.path.string(),
                         name, f.where);
  }
}

StoredType stored_type(const HfTensor& source, const std::string& name) {
  switch (source.tensor.dtype) {
    case FileDtype::kBF16:
      return StoredType::kBf16;
    case FileDtype::kF16:
      return StoredType::kF16;
    case FileDtype::kF32:
      return StoredType::kF32;
    case FileDtype::kF8E4M3:
      return StoredType::kE4m3;
    default:
      fail<InputError>("{}: tensor '{}' is {}, only BF16, F32, F16 and F8_E4M3 are supported",
                       source.file, name, dtype_name(source.tensor.dtype));
  }
}

[[noreturn]] void wrong_shape(const HfTensor& source, const std::string& name,
                              const std::vector<std::int64_t>& shape) {
  fail<InputError>("{}: tensor '{}' has shape [{}], config.json asks for [{}]", source.file, name,
                   fmt::join(source.tensor.shape, ", "), fmt::join(shape, ", "));
}

// A row-major matrix that begins `offset` values into the tensor.
StoredMatrix matrix(const HfTensor& source, StoredType type, std::int64_t rows,
                    std::int64_t columns, std::int64_t offset) {
  const std::int64_t item = stored_bytes(type, 1);
  return {type, rows, columns, source.tensor.bytes.data() + offset * item, columns * item, item, 0};
}

StoredType scale_type(const HfTensor& source, const std::string& name) {
  switch (source.tensor.dtype) {
    case FileDtype::kF32:
      return StoredType::kF32;
    case FileDtype::kBF16:
      return StoredType::kBf16;
    case FileDtype::kF8E8M0:
      return StoredType::kE8m0;
    default:
      fail<InputError>("{}: tensor '{}' is {}; scales are F32, BF16 or F8_E8M0", source.file, name,
                       dtype_name(source.tensor.dtype));
  }
}

const HfTensor& find_scales(const HfFolder& folder, const std::string& hf_name,
                            const HfTensor& codes) {
  if (!folder.fp8)
    fail<InputError>(
        "{}: tensor '{}' is F8_E4M3, but config.json has no quantization_config that says how",
        codes.file, hf_name);
  if (names_module(folder.fp8->not_converted, hf_name))
    fail<InputError>(
        "{}: tensor '{}' is F8_E4M3, but quantization_config lists it as not converted", codes.file,
        hf_name);
  const auto found = folder.tensors.find(scale_name(hf_name));
  if (found == folder.tensors.end())
    fail<InputError>("{}: tensor '{}' is F8_E4M3 and its scales '{}' are missing", codes.file,
                     hf_name, scale_name(hf_name));
  return found->second;
}

StoredWeight own_weight(const HfFolder& folder, const std::string& name, const HfTensor& source,
                        std::int64_t rows, std::int64_t columns, bool vector,
                        std::set<std::string>& used) {
  const StoredType type = stored_type(source, name);
  const auto shape =
      vector ? std::vector<std::int64_t>{rows * columns} : std::vector<std::int64_t>{rows, columns};
  if (source.tensor.shape != shape) wrong_shape(source, name, shape);
  used.insert(name);
  StoredWeight out{matrix(source, type, rows, columns, 0), {}, source.file, name};
  if (type != StoredType::kE4m3) return out;
  if (vector)
    fail<InputError>("{}: tensor '{}' is F8_E4M3, a vector must not be", source.file, name);
  const HfTensor& scales = find_scales(folder, name, source);
  const std::int64_t scale_rows = (rows + kScaleBlock - 1) / kScaleBlock;
  const std::int64_t scale_columns = (columns + kScaleBlock - 1) / kScaleBlock;
  if (scales.tensor.shape != std::vector<std::int64_t>{scale_rows, scale_columns})
    wrong_shape(scales, scale_name(name), {scale_rows, scale_columns});
  out.scales = matrix(scales, scale_type(scales, scale_name(name)), scale_rows, scale_columns, 0);
  used.insert(scale_name(name));
  return out;
}

// "P.experts.3.gate_proj.weight" -> {"P.experts.", 3, kGate}.
struct ExpertName {
  enum Which { kGate, kUp, kDown };
  std::string prefix;
  std::int64_t expert = 0;
  Which which = kGate;
};
std::optional<ExpertName> parse_expert_name(const std::string& name) {
  const std::string mark = ".experts.";
  const std::size_t at = name.find(mark);
  if (at == std::string::npos) return std::nullopt;
  ExpertName out;
  out.prefix = name.substr(0, at + mark.size());
  const char *begin = name.data() + out.prefix.size(), *end = name.data() + name.size();
  const auto [rest, error] = std::from_chars(begin, end, out.expert);
  if (error != std::errc()) return std::nullopt;
  const std::string_view tail(rest, static_cast<std::size_t>(end - rest));
  if (tail == ".gate_proj.weight" || tail == ".w1.weight") {
    out.which = ExpertName::kGate;
  } else if (tail == ".up_proj.weight" || tail == ".w3.weight") {
    out.which = ExpertName::kUp;
  } else if (tail == ".down_proj.weight" || tail == ".w2.weight") {
    out.which = ExpertName::kDown;
  } else {
    return std::nullopt;
  }
  return out;
}

// The two slabs of a layer's experts. Swapped: the contraction runs along the middle axis.
struct FusedSlabs {
  const HfTensor *gate_up = nullptr, *down = nullptr;
  std::string gate_up_name, down_name;
  bool swapped = false;
};

std::optional<FusedSlabs> find_slabs(const HfFolder& folder, std::string prefix, std::int64_t E,
                                     std::int64_t F, std::int64_t D) {
  FusedSlabs s;
  const auto look = [&](const char* name, std::string& full) -> const HfTensor* {
    full = prefix + name;
    const auto found = folder.tensors.find(full);
    return found == folder.tensors.end() ? nullptr : &found->second;
  };
  s.gate_up = look("gate_up_proj", s.gate_up_name);
  if (s.gate_up == nullptr) {  // transformers calls Mixtral's block `mlp` in memory
    const std::string mixtral = "block_sparse_moe.experts.";
    if (!prefix.ends_with(mixtral)) return std::nullopt;
    prefix = prefix.substr(0, prefix.size() - mixtral.size()) + "mlp.experts.";
    s.gate_up = look("gate_up_proj", s.gate_up_name);
  }
  s.down = look("down_proj", s.down_name);
  if (s.gate_up == nullptr) return std::nullopt;
  if (s.down == nullptr)
    fail<InputError>("{}: tensor '{}' is missing beside '{}'", folder.where, s.down_name,
                     s.gate_up_name);
  using Axes = std::vector<std::int64_t>;
  const Axes &gate_up = s.gate_up->tensor.shape, &down = s.down->tensor.shape;
  s.swapped = gate_up == Axes{E, D, 2 * F} && down == Axes{E, F, D};
  if (!s.swapped && !(gate_up == Axes{E, 2 * F, D} && down == Axes{E, D, F}))
    fail<InputError>(
        "{}: tensors '{}' [{}] and '{}' [{}]: config.json asks for [{}, {}, {}] and [{}, {}, {}], "
        "or both with the last two axes swapped",
        s.gate_up->file, s.gate_up_name, fmt::join(gate_up, ", "), s.down_name,
        fmt::join(down, ", "), E, 2 * F, D, E, D, F);
  return s;
}

// Rows [row, row + rows) and all columns of one expert in a slab of [E, slab_rows, columns] (axes
// as if not swapped).
StoredMatrix slab_slice(const HfTensor& slab, StoredType type, bool swapped, std::int64_t expert,
                        std::int64_t slab_rows, std::int64_t row, std::int64_t rows,
                        std::int64_t columns) {
  const std::int64_t item = stored_bytes(type, 1), offset = expert * slab_rows * columns;
  if (!swapped) return matrix(slab, type, rows, columns, offset + row * columns);
  return {
      type, rows, columns, slab.tensor.bytes.data() + (offset + row) * item, item, slab_rows * item,
      0};
}

StoredWeight fused_weight(const HfFolder& folder, const ExpertName& name, const FusedSlabs& slabs,
                          std::int64_t rows, std::int64_t columns, std::int64_t experts,
                          std::set<std::string>& used) {
  const bool down = name.which == ExpertName::kDown;
  const HfTensor& slab = down ? *slabs.down : *slabs.gate_up;
  const std::string& slab_name = down ? slabs.down_name : slabs.gate_up_name;
  const StoredType type = stored_type(slab, slab_name);
  const std::int64_t slab_rows = down ? rows : 2 * rows;
  const std::int64_t row = name.which == ExpertName::kUp ? rows : 0;
  used.insert(slab_name);
  StoredWeight out{
      slab_slice(slab, type, slabs.swapped, name.expert, slab_rows, row, rows, columns),
      {},
      slab.file,
      fmt::format("{}[{}]", slab_name, name.expert)};
  if (type != StoredType::kE4m3) return out;
  const HfTensor& scales = find_scales(folder, slab_name, slab);
  const std::int64_t F = down ? columns : rows;
  if (F % kScaleBlock != 0)
    fail<InputError>(
        "{}: tensor '{}': in a fused slab of F8_E4M3 an expert's width must be a multiple of 128, "
        "it is {}; store the experts apart",
        slab.file, slab_name, F);
  const std::int64_t grid_rows = (slab_rows + kScaleBlock - 1) / kScaleBlock;
  const std::int64_t grid_columns = (columns + kScaleBlock - 1) / kScaleBlock;
  const auto shape = slabs.swapped ? std::vector<std::int64_t>{experts, grid_columns, grid_rows}
                                   : std::vector<std::int64_t>{experts, grid_rows, grid_columns};
  if (scales.tensor.shape != shape) wrong_shape(scales, scale_name(slab_name), shape);
  out.scales = slab_slice(scales, scale_type(scales, scale_name(slab_name)), slabs.swapped,
                          name.expert, grid_rows, row / kScaleBlock,
                          (rows + kScaleBlock - 1) / kScaleBlock, grid_columns);
  used.insert(scale_name(slab_name));
  return out;
}

}  // namespace

HfFolder open_hf_folder(const fs::path& folder) {
  HfFolder f;
  f.folder = folder;
  f.config = read_json_file(folder / "config.json");
  f.fp8 = parse_fp8_format(f.config, (folder / "config.json").string());
  std::error_code error;
  if (fs::exists(folder / kSingleFile, error)) {
    open_single(f, folder / kSingleFile);
  } else if (fs::exists(folder / kIndexFile, error)) {
    open_sharded(f, folder / kIndexFile);
  } else {
    fail<InputError>("{}: there is neither {} nor {}", folder.string(), kSingleFile, kIndexFile);
  }
  return f;
}

StoredWeight find_weight(const HfFolder& folder, const std::string& hf_name, std::int64_t rows,
                         std::int64_t columns, bool vector, std::int64_t experts,
                         std::set<std::string>& used) {
  const auto found = folder.tensors.find(hf_name);
  if (found != folder.tensors.end())
    return own_weight(folder, hf_name, found->second, rows, columns, vector, used);
  if (const auto name = parse_expert_name(hf_name)) {
    const bool down = name->which == ExpertName::kDown;
    const auto slabs =
        find_slabs(folder, name->prefix, experts, down ? columns : rows, down ? rows : columns);
    if (slabs) return fused_weight(folder, *name, *slabs, rows, columns, experts, used);
  }
  fail<InputError>("{}: tensor '{}' is missing", folder.where, hf_name);
}

}  // namespace lockstep::model
