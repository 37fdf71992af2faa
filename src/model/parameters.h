// The parameter table: every weight of a model, its shape, and where it lies. Built from the config
// alone, in a fixed order. Projections that share an input are fused into one slab (q|k|v,
// gate|up; with latent attention q_a|kv_a, or q|kv_a where queries have no latent); each
// projection's rows are padded with zero rows to a multiple of 128, so that weight blocks of 128
// never cross a projection (docs/numerics.md, section 6).
#pragma once

#include <string>
#include <vector>

#include "model/config.h"
#include "model/precision.h"

namespace lockstep::model {

enum class ParamKind {
  kEmbedding,  // [V, D]
  kNorm,       // [n]
  kBias,       // [N, 1], of a linear's rows, always BF16; [N] in a file
  kRouter,     // [1, E, D], always BF16
  kLinear,     // [E, N, K] (dense: E = 1), FP8 where the precision says so
  kHeads,      // [1, N, K] of latent attention, a matrix a head (ADR 0008), always BF16
  kHead,       // [1, V, D], always BF16
};

// One tensor of a Hugging Face checkpoint inside a slab: rows [row, row + rows) and columns [0,
// columns) of expert `expert`.
struct ParamPart {
  std::string hf_name;  // "model.layers.0.mlp.experts.3.gate_proj.weight"
  std::int64_t expert = 0;
  std::int64_t row = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

struct Param {
  std::string name;  // "layers.0.gate_up"
  ParamKind kind = ParamKind::kNorm;
  int layer = -1;
  tensor::Shape shape;                  // padded
  std::vector<std::int64_t> part_rows;  // kLinear: padded rows of each projection in the slab
  std::vector<ParamPart> parts;
  std::int64_t offset = 0;  // first element in a slab of all parameters
};

// One SwiGLU MLP, or those of all experts of a layer.
struct MlpParams {
  int gate_up = -1, down = -1;
  std::int64_t width = 0;  // padded
};

// Indices of a layer's parameters; -1 where absent.
struct LayerParams {
  int input_norm = -1, qkv = -1, qkv_bias = -1, q_norm = -1, k_norm = -1, o = -1, o_bias = -1,
      post_norm = -1, router = -1;
  int gate_up = -1, down = -1;
  std::int64_t width = 0;  // padded width of an expert, or of the dense MLP
  MlpParams shared;        // of the experts that every token takes
  // Latent attention: its q|k|v slab is q_a|kv_a or q|kv_a; q_norm and q_b are there with a latent
  // of the queries, k_norm is that of the keys and values.
  int q_b = -1, kv_b = -1;
  bool dense() const { return router < 0; }
  MlpParams mlp() const { return {gate_up, down, width}; }
};

struct ParamTable {
  std::vector<Param> params;
  std::vector<LayerParams> layers;
  int embedding = -1, final_norm = -1, head = -1;  // head == embedding when tied
  std::int64_t count = 0;                          // elements of a slab (padded)
  // Columns of the fused q|k|v slab; with latent attention those of kv_a begin at k_column.
  std::int64_t q_column = 0, k_column = 0, v_column = 0, qkv_rows = 0;
};

ParamTable build_param_table(const ModelConfig& config);

// Checkpoint names in a layer's MLP: its router, and a projection of an expert, of the dense MLP or
// of the shared experts.
enum class Projection { kGate, kUp, kDown };
inline constexpr std::int64_t kDenseMlp = -1, kSharedExperts = -2;
std::string router_name(const ModelConfig& config, std::int64_t layer);
std::string mlp_name(const ModelConfig& config, std::int64_t layer, std::int64_t expert,
                     Projection projection);

// The view of parameter `p` in a slab (FP32 or BF16) laid out by the table.
tensor::TensorView param_view(const ParamTable& table, const tensor::TensorView& slab, int p);

// Where row `row` of a part begins, in elements from the beginning of its parameter; its columns
// follow.
inline std::int64_t part_row_offset(const Param& param, const ParamPart& part, std::int64_t row) {
  const tensor::Shape& s = param.shape;
  const std::int64_t rows = s.rank > 1 ? s[s.rank - 2] : 1;
  return (part.expert * rows + part.row + row) * s[s.rank - 1];
}

// For each parameter: does it run in FP8 under this precision? An ignored pattern that matches
// nothing is an InputError.
std::vector<bool> fp8_params(const ParamTable& table, const ModelConfig& config,
                             const Precision& precision);

}  // namespace lockstep::model
