#include "model/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "base/error.h"
#include "model/fp8_import.h"
#include "model/hf_config.h"
#include "model/strict_json.h"
#include "tensor/device.h"

namespace lockstep::model {

namespace fs = std::filesystem;
using base::fail;
using base::InputError;
using nlohmann::json;
using numerics::Bf16;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::TensorView;

static constexpr std::int64_t kStagingElements = std::int64_t{4} << 20;

namespace {

// The selection bias of a layer's router, under DeepSeek's name: "model.layers.3.mlp.gate" +
// ".e_score_correction_bias". Empty where the layer has no router.
std::string bias_name(const ParamTable& table, std::int64_t layer) {
  const int router = table.layers[static_cast<std::size_t>(layer)].router;
  if (router < 0) return "";
  return module_name(table.params[static_cast<std::size_t>(router)].parts[0].hf_name) +
         ".e_score_correction_bias";
}

// Either every layer with a router has a selection bias or none.
std::map<std::int64_t, StoredWeight> find_bias(const Checkpoint& c, std::set<std::string>& used) {
  std::map<std::int64_t, StoredWeight> bias;
  std::string missing;
  for (std::int64_t l = 0; l < c.config.num_layers; ++l) {
    const std::string name = bias_name(c.table, l);
    if (name.empty()) continue;
    if (!c.folder.tensors.count(name)) {
      missing = name;
      continue;
    }
    const StoredWeight& w = bias[l] =
        find_weight(c.folder, name, 1, c.config.num_experts, true, c.config.num_experts, used);
    if (w.fp8()) fail<InputError>("{}: tensor '{}' must be F32, BF16 or F16", w.file, name);
  }
  if (!bias.empty() && !missing.empty())
    fail<InputError>("{}: tensor '{}' is missing", c.folder.where, missing);
  return bias;
}

// Before the parameter table, which grows with the experts, is built: the files must hold that
// many.
void check_expert_count(const Checkpoint& c) {
  std::int64_t stored = static_cast<std::int64_t>(c.folder.tensors.size());
  for (const auto& [name, source] : c.folder.tensors)
    if (name.ends_with(".experts.gate_up_proj") && !source.tensor.shape.empty())
      stored +=
          std::min(source.tensor.shape[0], static_cast<std::int64_t>(source.tensor.bytes.size()));
  const std::int64_t experts = std::max<std::int64_t>(1, c.config.num_experts);
  if (experts > stored || c.config.num_layers > stored)
    fail<InputError>("{}: {} layers of {} experts in config.json, the files hold {} tensors",
                     c.folder.where, c.config.num_layers, c.config.num_experts,
                     c.folder.tensors.size());
}

// "model.layers.61.enorm.weight" of a model with 61 layers and one layer of multi-token prediction.
bool is_prediction_layer(const json& config, std::int64_t layers, const std::string& name) {
  const auto extra = config.find("num_nextn_predict_layers");
  if (extra == config.end() || !extra->is_number_integer()) return false;
  const std::int64_t count = std::min<std::int64_t>(extra->get<std::int64_t>(), 64);
  for (std::int64_t l = layers; l < layers + count; ++l)
    if (name.starts_with(fmt::format("model.layers.{}.", l))) return true;
  return false;
}

// "x.experts.3.up_proj.weight" -> "x.experts.*.up_proj.weight": a slab's experts share a precision.
std::string any_expert(const std::string& name) {
  const std::string mark = ".experts.";
  const std::size_t at = name.find(mark);
  if (at == std::string::npos) return name;
  const std::size_t number = at + mark.size();
  return name.substr(0, number) + "*" + name.substr(name.find('.', number));
}

void check_tied_head(const HfTensor& head, const HfTensor& embedding) {
  const FileTensor &a = head.tensor, &b = embedding.tensor;
  if (a.dtype == b.dtype && a.shape == b.shape &&
      std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0)
    return;
  fail<InputError>(
      "{}: tensor 'lm_head.weight' differs from the embedding, config.json ties the "
      "two",
      head.file);
}

void check_unused(const Checkpoint& c, const std::set<std::string>& used, const Log& log) {
  std::size_t passed_over = 0;
  for (const auto& [name, source] : c.folder.tensors) {
    if (used.count(name)) continue;
    if (is_prediction_layer(c.folder.config, c.config.num_layers, name)) {
      ++passed_over;
      continue;
    }
    if (c.config.tie_word_embeddings && name == "lm_head.weight")
      check_tied_head(source, c.folder.tensors.at("model.embed_tokens.weight"));
    else
      fail<InputError>("{}: tensor '{}' is no part of the model that config.json describes",
                       source.file, name);
  }
  if (passed_over > 0 && log)
    log(fmt::format(
        "{}: {} tensors of layers of multi-token prediction (model.layers.{} and behind) "
        "are passed over: they are not used, trained or written",
        c.folder.folder.string(), passed_over, c.config.num_layers));
}

// Rows of a part as they lie in the slab: padded columns, which stay zero.
void read_part(const Context& ctx, const StoredWeight& w, const Param& param, const ParamPart& part,
               const TensorView& slab, std::vector<Bf16>& staging) {
  const std::int64_t K = param.shape[param.shape.rank - 1];
  const std::int64_t most = std::max<std::int64_t>(1, kStagingElements / K);
  for (std::int64_t row = 0; row < part.rows; row += most) {
    const std::int64_t count = std::min(most, part.rows - row);
    staging.assign(static_cast<std::size_t>(count * K), Bf16{0});
    read_rows(w, row, count, staging.data(), K);
    tensor::copy(ctx, TensorView{staging.data(), DType::kBf16, Device::kCpu, {count * K}},
                 slab.rows(param.offset + part_row_offset(param, part, row), count * K));
  }
}

std::vector<std::byte> host_bytes(const Context& ctx, const TensorView& view) {
  std::vector<std::byte> bytes(view.bytes());
  tensor::download(ctx, view, bytes.data());
  return bytes;
}

// What save_checkpoint needs while it writes.
struct Saver {
  Context ctx;  // of the weights' device
  const Weights& weights;
  const SaveOptions& options;
  std::vector<TensorToWrite> tensors;

  void add_bf16(const Param& param, const ParamPart& part) {
    tensors.push_back(
        {part.hf_name, FileDtype::kBF16, part_shape(param, part), nullptr,
         [this, &param, &part](std::span<std::byte> to) {
           const std::int64_t K = param.shape[param.shape.rank - 1];
           const auto rows =
               host_bytes(ctx, weights.slab.view().rows(
                                   param.offset + part_row_offset(param, part, 0), part.rows * K));
           const auto bytes = static_cast<std::size_t>(part.columns) * 2;
           for (std::int64_t row = 0; row < part.rows; ++row)
             std::memcpy(to.data() + static_cast<std::size_t>(row) * bytes,
                         rows.data() + row * K * 2, bytes);
         }});
  }

  // The codes to write of parameter p, null where it is written in BF16.
  const ops::Fp8Weight* codes_of(std::size_t p) const {
    if (options.fp8 == nullptr) return nullptr;
    if (options.fp8->fp8[p]) return &options.fp8->forward[p];
    const bool stored = p < options.fp8->stored.size() && options.fp8->stored[p].codes_ENK;
    return stored ? &options.fp8->stored[p] : nullptr;
  }

  void add_fp8(const ops::Fp8Weight& w, const Param& param, const ParamPart& part) {
    LOCKSTEP_CHECK(w.scaling == ops::Scaling::kBlock, "only block scales can be saved");
    tensors.push_back({part.hf_name, FileDtype::kF8E4M3, part_shape(param, part), nullptr,
                       [this, &w, &part](std::span<std::byte> to) {
                         export_codes(ctx, w, part, reinterpret_cast<numerics::Fp8*>(to.data()));
                       }});
    const auto shape = scale_shape(part);
    tensors.push_back({scale_name(part.hf_name), options.scales, shape, nullptr,
                       [this, &w, &part](std::span<std::byte> to) {
                         std::vector<float> scales(to.size() / dtype_item_bytes(options.scales));
                         export_scales(ctx, w, part, scales.data());
                         store_scales(scales, options.scales, scale_name(part.hf_name), to);
                       }});
  }

  // Written only when the router has been balanced by it or the family always has it, so that
  // checkpoints keep the tensors of their family.
  void add_bias() {
    const std::int64_t E = weights.config.num_experts;
    const auto bytes = host_bytes(ctx, weights.router_bias);
    const auto bias_LE = std::make_shared<std::vector<float>>(bytes.size() / 4);
    std::memcpy(bias_LE->data(), bytes.data(), bytes.size());
    if (weights.config.family != Family::kDeepseekV3 &&
        std::all_of(bias_LE->begin(), bias_LE->end(), [](float b) { return b == 0; }))
      return;
    for (std::int64_t l = 0; l < weights.config.num_layers; ++l) {
      const std::string name = bias_name(weights.table, l);
      if (name.empty()) continue;
      const float* bias_E = bias_LE->data() + l * E;
      const bool bf16 = weights.router_bias_bf16 && std::all_of(bias_E, bias_E + E, [](float b) {
                          return numerics::to_float(numerics::to_bf16(b)) == b;
                        });
      tensors.push_back({name,
                         bf16 ? FileDtype::kBF16 : FileDtype::kF32,
                         {E},
                         nullptr,
                         [bias_LE, bias_E, bf16](std::span<std::byte> to) {
                           if (!bf16) return void(std::memcpy(to.data(), bias_E, to.size()));
                           for (std::size_t e = 0; e < to.size() / 2; ++e) {
                             const Bf16 b = numerics::to_bf16(bias_E[e]);
                             std::memcpy(to.data() + 2 * e, &b, 2);
                           }
                         }});
    }
  }
};

}  // namespace

std::vector<std::int64_t> part_shape(const Param& param, const ParamPart& part) {
  if (param.kind == ParamKind::kNorm) return {part.columns};
  if (param.kind == ParamKind::kBias) return {part.rows};
  return {part.rows, part.columns};
}

Checkpoint open_checkpoint(const fs::path& folder, const Log& log) {
  Checkpoint c;
  c.config = read_hf_config(folder);
  c.folder = open_hf_folder(folder);
  check_expert_count(c);
  c.table = build_param_table(c.config);
  std::set<std::string> used;
  for (const Param& param : c.table.params) {
    c.parts.emplace_back();
    for (const ParamPart& part : param.parts)
      c.parts.back().push_back(find_weight(c.folder, part.hf_name, part.rows, part.columns,
                                           part_shape(param, part).size() == 1,
                                           c.config.num_experts, used));
  }
  c.router_bias = find_bias(c, used);
  check_unused(c, used, log);
  return c;
}

bool has_fp8(const Checkpoint& c) {
  for (const auto& parts : c.parts)
    for (const StoredWeight& w : parts)
      if (w.fp8()) return true;
  return false;
}

Precision precision_of(const Checkpoint& c) {
  Precision precision;
  precision.fp8 = has_fp8(c);
  if (!precision.fp8) return precision;
  precision.weight_pow2 = c.folder.fp8->ue8m0;
  std::set<std::string> patterns;
  for (std::size_t p = 0; p < c.parts.size(); ++p) {
    const Param& param = c.table.params[p];
    if (param.kind != ParamKind::kLinear) continue;
    // Projections of one slab are one GEMM: it runs in FP8 when all of them can.
    const bool all = std::all_of(c.parts[p].begin(), c.parts[p].end(),
                                 [](const StoredWeight& w) { return w.fp8(); });
    if (all) continue;
    for (const ParamPart& part : param.parts) patterns.insert(any_expert(part.hf_name));
  }
  precision.ignored_layers.assign(patterns.begin(), patterns.end());
  return precision;
}

FileDtype scale_dtype(const Checkpoint& c) {
  for (const auto& parts : c.parts)
    for (const StoredWeight& w : parts) {
      if (!w.fp8()) continue;
      if (w.scales.type == StoredType::kBf16) return FileDtype::kBF16;
      if (w.scales.type == StoredType::kE8m0) return FileDtype::kF8E8M0;
      return FileDtype::kF32;
    }
  return FileDtype::kF32;
}

void read_weights(const Context& ctx, const Checkpoint& c, Weights& weights,
                  const Progress& progress) {
  const std::uint64_t total = weights.slab.view().bytes();
  std::uint64_t done = 0;
  std::vector<Bf16> staging;
  for (std::size_t p = 0; p < c.parts.size(); ++p) {
    const Param& param = c.table.params[p];
    for (std::size_t i = 0; i < param.parts.size(); ++i) {
      read_part(ctx, c.parts[p][i], param, param.parts[i], weights.slab, staging);
      done += static_cast<std::uint64_t>(param.parts[i].rows * param.parts[i].columns) * 2;
      if (progress) progress(done, total);
    }
  }
  const std::int64_t E = c.config.num_experts;
  std::vector<float> bias_E(static_cast<std::size_t>(E));
  weights.router_bias_bf16 =
      std::all_of(c.router_bias.begin(), c.router_bias.end(),
                  [](const auto& row) { return row.second.values.type == StoredType::kBf16; });
  for (const auto& [layer, w] : c.router_bias) {
    read_vector(w, bias_E.data());
    tensor::copy(ctx, TensorView{bias_E.data(), DType::kFp32, Device::kCpu, {1, E}},
                 weights.router_bias.view().rows(layer, 1));
  }
  if (progress) progress(total, total);
}

Weights load_checkpoint(const fs::path& folder, const Progress& progress, const Log& log) {
  const Checkpoint c = open_checkpoint(folder, log);
  Weights weights = make_weights(c.config);
  tensor::Arena workspace;
  read_weights(tensor::cpu_context(workspace), c, weights, progress);
  return weights;
}

void save_checkpoint(const Weights& weights, const Tokenizer* tokenizer, const fs::path& folder,
                     const SaveOptions& options) {
  tensor::Arena workspace;
  Saver saver{
      options.ctx != nullptr ? *options.ctx : tensor::cpu_context(workspace), weights, options, {}};
  json config = hf_config_json(weights.config);
  std::vector<std::string> bf16, codes;  // matrices by how they are stored
  for (std::size_t p = 0; p < weights.table.params.size(); ++p) {
    const Param& param = weights.table.params[p];
    const ops::Fp8Weight* fp8 = saver.codes_of(p);
    for (const ParamPart& part : param.parts) {
      if (fp8 != nullptr) {
        saver.add_fp8(*fp8, param, part);
        codes.push_back(part.hf_name);
      } else {
        saver.add_bf16(param, part);
        if (part_shape(param, part).size() > 1 && param.kind != ParamKind::kEmbedding)
          bf16.push_back(part.hf_name);
      }
    }
  }
  saver.add_bias();
  if (options.fp8 != nullptr && options.fp8->precision.fp8) {
    if (weights.config.tie_word_embeddings) bf16.push_back("lm_head.weight");
    const Fp8Format format{options.fp8->precision.weight_pow2, modules_in_bf16(bf16, codes)};
    config["quantization_config"] = fp8_format_json(format);
  }
  HfFolderToWrite out;
  out.files["config.json"] = json_text(config);
  out.files["generation_config.json"] = json_text(hf_generation_json(weights.config));
  if (tokenizer != nullptr)
    out.more_files = [tokenizer](const fs::path& at) { write_tokenizer(*tokenizer, at); };
  out.tensors = std::move(saver.tensors);
  out.max_shard_bytes = options.max_shard_bytes;
  out.progress = options.progress;
  write_hf_folder(out, folder);
}

}  // namespace lockstep::model
