#include "model/convert.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <numbers>

#include "base/error.h"
#include "base/philox.h"
#include "model/fp8_import.h"
#include "model/strict_json.h"
#include "ops/quantize.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using nlohmann::json;
using numerics::Bf16;
using numerics::Fp8;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;

static constexpr std::int64_t kBlock = 128;
static constexpr double kRouterDeviation = 0.02;

namespace {

std::int64_t blocks(std::int64_t n) { return (n + kBlock - 1) / kBlock; }

// Codes and scales of a projection, by the engine's own quantizer.
struct Quantized {
  Tensor codes, scales;
  explicit Quantized(const StoredWeight& w, bool pow2) {
    const std::int64_t N = w.values.rows, K = w.values.columns;
    const Tensor w_ENK(Device::kCpu, DType::kBf16, {1, N, K});
    read_rows(w, 0, N, w_ENK.as<Bf16>(), K);
    codes = Tensor(Device::kCpu, DType::kE4m3, {1, N, K});
    scales = Tensor(Device::kCpu, DType::kFp32, {1, blocks(N), blocks(K)});
    tensor::Arena workspace;
    ops::quantize_weight(tensor::cpu_context(workspace), w_ENK, ops::WeightScales::kBlock128, pow2,
                         {}, {codes, scales, ops::Scaling::kBlock}, {}, nullptr);
  }
};

FileDtype scale_dtype(const StoredMatrix& scales) {
  if (scales.type == StoredType::kBf16) return FileDtype::kBF16;
  return scales.type == StoredType::kE8m0 ? FileDtype::kF8E8M0 : FileDtype::kF32;
}

// Builds the list of tensors to write; the functions in it read the source when they are called.
struct Writer {
  bool keep_codes = false, quantize = false, pow2 = false;
  std::vector<TensorToWrite> tensors;
  std::vector<std::string> bf16, fp8;  // matrices by how they are written

  static std::vector<std::int64_t> shape_of(const SourceTensor& t) {
    const StoredMatrix& m = t.weight.values;
    if (t.kind == SourceTensor::kVector || t.kind == SourceTensor::kBias)
      return {m.rows * m.columns};
    return {m.rows, m.columns};
  }

  void add_bf16(const SourceTensor& t) {
    tensors.push_back(
        {t.name, FileDtype::kBF16, shape_of(t), nullptr, [w = t.weight](std::span<std::byte> to) {
           read_rows(w, 0, w.values.rows, reinterpret_cast<Bf16*>(to.data()), w.values.columns);
         }});
  }
  void add_bias(const SourceTensor& t) {
    const bool bf16 = t.weight.values.type == StoredType::kBf16;
    tensors.push_back({t.name, bf16 ? FileDtype::kBF16 : FileDtype::kF32, shape_of(t), nullptr,
                       [w = t.weight, bf16](std::span<std::byte> to) {
                         if (bf16)
                           read_rows(w, 0, 1, reinterpret_cast<Bf16*>(to.data()), w.values.columns);
                         else
                           read_vector(w, reinterpret_cast<float*>(to.data()));
                       }});
  }
  void add_codes(const SourceTensor& t) {  // as they are
    const StoredMatrix& grid = t.weight.scales;
    const FileDtype dtype = scale_dtype(grid);
    tensors.push_back(
        {t.name, FileDtype::kF8E4M3, shape_of(t), nullptr, [w = t.weight](std::span<std::byte> to) {
           read_codes(w, 0, w.values.rows, reinterpret_cast<Fp8*>(to.data()), w.values.columns);
         }});
    tensors.push_back({scale_name(t.name),
                       dtype,
                       {grid.rows, grid.columns},
                       nullptr,
                       [w = t.weight, dtype](std::span<std::byte> to) {
                         std::vector<float> scales(to.size() / dtype_item_bytes(dtype));
                         read_scales(w, scales.data());
                         store_scales(scales, dtype, w.name, to);
                       }});
    fp8.push_back(t.name);
  }
  // Quantized once for the codes and once for the scales: they lie far apart in the file, and
  // keeping either would take memory that grows with the model.
  void add_quantized(const SourceTensor& t) {
    tensors.push_back({t.name, FileDtype::kF8E4M3, shape_of(t), nullptr,
                       [w = t.weight, p = pow2](std::span<std::byte> to) {
                         std::memcpy(to.data(), Quantized(w, p).codes.view().data, to.size());
                       }});
    tensors.push_back({scale_name(t.name),
                       FileDtype::kF32,
                       {blocks(t.weight.values.rows), blocks(t.weight.values.columns)},
                       nullptr,
                       [w = t.weight, p = pow2](std::span<std::byte> to) {
                         std::memcpy(to.data(), Quantized(w, p).scales.view().data, to.size());
                       }});
    fp8.push_back(t.name);
  }

  void add(const SourceTensor& t, const std::vector<std::string>& kept) {
    if (t.kind == SourceTensor::kBias) return add_bias(t);
    if (keep_codes && t.weight.fp8()) return add_codes(t);
    if (quantize && t.kind == SourceTensor::kLinear && !names_module(kept, t.name))
      return add_quantized(t);
    add_bf16(t);
    const bool linear = t.kind == SourceTensor::kLinear || t.kind == SourceTensor::kMatrix;
    if (linear && t.name != "model.embed_tokens.weight") bf16.push_back(t.name);
  }
};

std::int64_t parse_number(const std::string& text, const std::string& key) {
  std::int64_t n = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, n);
  if (error != std::errc() || rest != end)
    fail<InputError>("{}: '{}' is not a whole number", key, text);
  return n;
}

// Random routers, kept in memory as BF16.
using RouterBytes = std::vector<Bf16>;
RouterBytes random_router(std::uint64_t seed, std::uint64_t layer, std::int64_t count) {
  RouterBytes w(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < w.size(); ++i) {
    const auto words = base::philox4x32(seed, layer, i);
    const double u1 = (words.word[0] + 0.5) * 0x1p-32, u2 = (words.word[1] + 0.5) * 0x1p-32;
    const double normal = std::sqrt(-2.0 * std::log(u1)) * std::cos(2.0 * std::numbers::pi * u2);
    w[i] = numerics::to_bf16(static_cast<float>(kRouterDeviation * normal));
  }
  return w;
}

}  // namespace

Upcycle parse_upcycle(const std::string& text, const std::string& key) {
  Upcycle out;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string item = text.substr(at, end - at);
    const std::size_t equals = std::min(item.find('='), item.size());
    const std::string name = item.substr(0, equals);
    const std::int64_t value =
        parse_number(item.substr(std::min(equals + 1, item.size())), key + " " + name);
    if (name == "experts") {
      out.experts = value;
    } else if (name == "top_k") {
      out.top_k = value;
    } else if (name == "seed") {
      out.seed = static_cast<std::uint64_t>(value);
    } else {
      fail<InputError>("{}: '{}' is not known; write experts=8,top_k=2", key, name);
    }
    at = end + 1;
  }
  if (out.experts < 1 || out.experts > 4096 || out.top_k < 1 || out.top_k > out.experts)
    fail<InputError>("{}: experts={}, top_k={}: experts go from 1 to 4096, top_k from 1 to experts",
                     key, out.experts, out.top_k);
  return out;
}

void upcycle(ModelSource& source, const Upcycle& options) {
  json& config = source.config;
  if (config.value("architectures", json()) != json{"LlamaForCausalLM"})
    fail<InputError>("upcycling needs a dense LlamaForCausalLM, this model is {}",
                     config.value("architectures", json()).dump());
  const std::int64_t hidden = config.at("hidden_size");
  const auto memory =
      std::make_shared<std::pair<std::shared_ptr<const void>, std::vector<RouterBytes>>>();
  memory->first = source.memory;
  std::vector<SourceTensor> out;
  for (SourceTensor& t : source.tensors) {
    const std::size_t at = t.name.find(".mlp.");
    if (at == std::string::npos) {
      out.push_back(std::move(t));
      continue;
    }
    const std::string block = t.name.substr(0, at) + ".block_sparse_moe.";
    const std::string which = t.name.substr(at);
    const bool gate = which == ".mlp.gate_proj.weight";
    if (gate) {  // the first of the three
      memory->second.push_back(
          random_router(options.seed, memory->second.size(), options.experts * hidden));
      const StoredMatrix m{StoredType::kBf16,
                           options.experts,
                           hidden,
                           reinterpret_cast<const std::byte*>(memory->second.back().data()),
                           hidden * 2,
                           2,
                           0};
      out.push_back({block + "gate.weight", SourceTensor::kMatrix, {m, {}, "upcycling", "router"}});
    }
    const char* name = gate ? "w1" : which == ".mlp.up_proj.weight" ? "w3" : "w2";
    for (std::int64_t e = 0; e < options.experts; ++e)
      out.push_back({fmt::format("{}experts.{}.{}.weight", block, e, name), t.kind, t.weight});
  }
  source.tensors = std::move(out);
  source.memory = memory;
  for (const char* key : {"attention_bias", "mlp_bias", "pretraining_tp"}) config.erase(key);
  config["architectures"] = {"MixtralForCausalLM"};
  config["model_type"] = "mixtral";
  config["num_local_experts"] = options.experts;
  config["num_experts_per_tok"] = options.top_k;
  config["output_router_logits"] = false;
  config["router_aux_loss_coef"] = 0.001;
  config["router_jitter_noise"] = 0.0;
  config["sliding_window"] = nullptr;
}

void convert(const ModelSource& source, const std::filesystem::path& output,
             const ConvertOptions& options) {
  Writer writer;
  writer.keep_codes = options.to != StoreAs::kBf16;
  writer.quantize = options.to == StoreAs::kFp8;
  writer.pow2 = options.ue8m0 || (source.fp8 && source.fp8->ue8m0);
  if (options.ue8m0 && source.fp8 && !source.fp8->ue8m0 && writer.keep_codes)
    fail<InputError>(
        "the source's FP8 scales are no powers of two (scale_fmt ue8m0), and its codes stay as "
        "they are");
  const std::vector<std::string> kept =
      source.fp8 ? source.fp8->not_converted : std::vector<std::string>();
  for (const SourceTensor& t : source.tensors) writer.add(t, kept);

  json config = source.config;
  config.erase("quantization_config");
  if (!writer.fp8.empty()) {
    if (config.value("tie_word_embeddings", false)) writer.bf16.push_back("lm_head.weight");
    config["quantization_config"] =
        fp8_format_json({writer.pow2, modules_in_bf16(writer.bf16, writer.fp8)});
  }
  // Their weights have not been read.
  if (config.value("num_nextn_predict_layers", json()).is_number())
    config["num_nextn_predict_layers"] = 0;
  for (const char* key : {"dtype", "torch_dtype"})
    if (config.contains(key)) config[key] = "bfloat16";

  HfFolderToWrite out;
  out.files = source.tokenizer_files;
  out.files["config.json"] = json_text(config);
  if (!source.generation.is_null())
    out.files["generation_config.json"] = json_text(source.generation);
  out.tensors = std::move(writer.tensors);
  out.max_shard_bytes = options.max_shard_bytes;
  out.progress = options.progress;
  write_hf_folder(out, output);
}

}  // namespace lockstep::model
