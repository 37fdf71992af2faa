#include "base/file_io.h"
#include "model/checkpoint.h"
#include "model/model_source.h"
#include "model/strict_json.h"

namespace lockstep::model {

namespace fs = std::filesystem;

static constexpr std::size_t kTokenizerFileLimit = 256 << 20;

namespace {

SourceTensor::Kind source_kind(ParamKind kind) {
  if (kind == ParamKind::kNorm || kind == ParamKind::kBias) return SourceTensor::kVector;
  return kind == ParamKind::kLinear ? SourceTensor::kLinear : SourceTensor::kMatrix;
}

}  // namespace

ModelSource open_hf_source(const fs::path& folder, const Log& log) {
  const auto c = std::make_shared<const Checkpoint>(open_checkpoint(folder, log));
  ModelSource out;
  out.config = c->folder.config;
  std::error_code error;
  if (fs::exists(folder / "generation_config.json", error))
    out.generation = read_json_file(folder / "generation_config.json");
  for (const auto& entry : fs::directory_iterator(folder, error))
    if (const std::string name = entry.path().filename(); is_tokenizer_file(name))
      out.tokenizer_files[name] = base::read_file(entry.path(), kTokenizerFileLimit);
  for (std::size_t p = 0; p < c->parts.size(); ++p)
    for (std::size_t i = 0; i < c->parts[p].size(); ++i)
      out.tensors.push_back({c->table.params[p].parts[i].hf_name,
                             source_kind(c->table.params[p].kind), c->parts[p][i]});
  for (const auto& [layer, bias] : c->router_bias)
    out.tensors.push_back({bias.name, SourceTensor::kBias, bias});
  if (has_fp8(*c)) out.fp8 = c->folder.fp8;
  out.memory = c;
  return out;
}

}  // namespace lockstep::model
