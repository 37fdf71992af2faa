#include "model/parameters.h"

#include "model/precision.h"

namespace lockstep::model {

using base::InputError;
using tensor::Shape;
using tensor::TensorView;

namespace {

std::int64_t padded(std::int64_t n) { return (n + 127) / 128 * 128; }

struct TableBuilder {
  ParamTable table;

  int add(const std::string& name, ParamKind kind, int layer, const Shape& shape,
          std::vector<std::int64_t> part_rows, std::vector<ParamPart> parts) {
    Param p;
    p.name = name;
    p.kind = kind;
    p.layer = layer;
    p.shape = shape;
    p.part_rows = std::move(part_rows);
    p.parts = std::move(parts);
    p.offset = table.count;
    table.count += padded(shape.count());
    table.params.push_back(std::move(p));
    return static_cast<int>(table.params.size()) - 1;
  }

  int norm(const std::string& name, const std::string& hf_name, int layer, std::int64_t n) {
    return add(name, ParamKind::kNorm, layer, {n}, {}, {{hf_name, 0, 0, 1, n}});
  }
};

void add_attention(TableBuilder& b, const ModelConfig& c, int l, LayerParams& p) {
  const std::string ours = fmt::format("layers.{}.", l), hf = fmt::format("model.layers.{}.", l);
  const std::int64_t D = c.hidden_size, q = c.num_heads * c.head_dim,
                     kv = c.num_kv_heads * c.head_dim;
  const ParamTable& t = b.table;
  p.qkv = b.add(ours + "qkv", ParamKind::kLinear, l, {1, t.qkv_rows, D},
                {padded(q), padded(kv), padded(kv)},
                {{hf + "self_attn.q_proj.weight", 0, t.q_column, q, D},
                 {hf + "self_attn.k_proj.weight", 0, t.k_column, kv, D},
                 {hf + "self_attn.v_proj.weight", 0, t.v_column, kv, D}});
  if (c.qkv_bias)
    p.qkv_bias = b.add(ours + "qkv_bias", ParamKind::kBias, l, {t.qkv_rows, 1}, {},
                       {{hf + "self_attn.q_proj.bias", 0, t.q_column, q, 1},
                        {hf + "self_attn.k_proj.bias", 0, t.k_column, kv, 1},
                        {hf + "self_attn.v_proj.bias", 0, t.v_column, kv, 1}});
  if (c.qk_norm) {
    p.q_norm = b.norm(ours + "q_norm", hf + "self_attn.q_norm.weight", l,
                      c.qk_norm_whole ? q : c.head_dim);
    p.k_norm = b.norm(ours + "k_norm", hf + "self_attn.k_norm.weight", l,
                      c.qk_norm_whole ? kv : c.head_dim);
  }
  p.o = b.add(ours + "o", ParamKind::kLinear, l, {1, D, q}, {D},
              {{hf + "self_attn.o_proj.weight", 0, 0, D, q}});
  if (c.output_bias)
    p.o_bias = b.add(ours + "o_bias", ParamKind::kBias, l, {D, 1}, {},
                     {{hf + "self_attn.o_proj.bias", 0, 0, D, 1}});
}

void add_latent_attention(TableBuilder& b, const ModelConfig& c, int l, LayerParams& p) {
  const std::string ours = fmt::format("layers.{}.", l),
                    hf = fmt::format("model.layers.{}.self_attn.", l);
  const LatentAttention& a = c.latent;
  const std::int64_t D = c.hidden_size, q = c.num_heads * (a.nope + c.head_dim),
                     kv = a.kv_rank + c.head_dim, heads = c.num_heads * (a.nope + a.value);
  const ParamTable& t = b.table;
  const bool lora = a.q_rank > 0;
  const std::int64_t first = lora ? a.q_rank : q;
  p.qkv =
      b.add(ours + "qkv_a", ParamKind::kLinear, l, {1, t.qkv_rows, D}, {padded(first), padded(kv)},
            {{hf + (lora ? "q_a_proj.weight" : "q_proj.weight"), 0, t.q_column, first, D},
             {hf + "kv_a_proj_with_mqa.weight", 0, t.k_column, kv, D}});
  if (lora) {
    p.q_norm = b.norm(ours + "q_a_norm", hf + "q_a_layernorm.weight", l, a.q_rank);
    p.q_b = b.add(ours + "q_b", ParamKind::kLinear, l, {1, q, a.q_rank}, {q},
                  {{hf + "q_b_proj.weight", 0, 0, q, a.q_rank}});
  }
  p.k_norm = b.norm(ours + "kv_a_norm", hf + "kv_a_layernorm.weight", l, a.kv_rank);
  p.kv_b = b.add(ours + "kv_b", ParamKind::kHeads, l, {1, heads, a.kv_rank}, {},
                 {{hf + "kv_b_proj.weight", 0, 0, heads, a.kv_rank}});
  p.o = b.add(ours + "o", ParamKind::kLinear, l, {1, D, c.num_heads * a.value}, {D},
              {{hf + "o_proj.weight", 0, 0, D, c.num_heads * a.value}});
}

// The experts of a layer, or one MLP (`which`) of width F.
MlpParams add_mlps(TableBuilder& b, const ModelConfig& c, int l, const std::string& ours,
                   std::int64_t E, std::int64_t which, std::int64_t F) {
  const std::int64_t D = c.hidden_size, width = padded(F);
  std::vector<ParamPart> gate_up, down;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t expert = which < 0 ? which : e;
    gate_up.push_back({mlp_name(c, l, expert, Projection::kGate), e, 0, F, D});
    gate_up.push_back({mlp_name(c, l, expert, Projection::kUp), e, width, F, D});
    down.push_back({mlp_name(c, l, expert, Projection::kDown), e, 0, D, F});
  }
  MlpParams p;
  p.gate_up = b.add(ours + "gate_up", ParamKind::kLinear, l, {E, 2 * width, D}, {width, width},
                    std::move(gate_up));
  p.down = b.add(ours + "down", ParamKind::kLinear, l, {E, D, width}, {D}, std::move(down));
  p.width = width;
  return p;
}

LayerParams add_layer(TableBuilder& b, const ModelConfig& c, int l) {
  const std::string ours = fmt::format("layers.{}.", l), hf = fmt::format("model.layers.{}.", l);
  const std::int64_t D = c.hidden_size, E = c.num_experts;
  const bool dense = is_dense(c, l);
  LayerParams p;
  p.input_norm = b.norm(ours + "input_norm", hf + "input_layernorm.weight", l, D);
  is_latent(c) ? add_latent_attention(b, c, l, p) : add_attention(b, c, l, p);
  p.post_norm = b.norm(ours + "post_norm", hf + "post_attention_layernorm.weight", l, D);
  p.router = dense ? -1
                   : b.add(ours + "router", ParamKind::kRouter, l, {1, E, D}, {},
                           {{router_name(c, l), 0, 0, E, D}});
  const MlpParams mlp = dense ? add_mlps(b, c, l, ours, 1, kDenseMlp, c.intermediate_size)
                              : add_mlps(b, c, l, ours, E, 0, c.moe_intermediate_size);
  p.gate_up = mlp.gate_up, p.down = mlp.down, p.width = mlp.width;
  if (!dense && c.num_shared_experts > 0)
    p.shared = add_mlps(b, c, l, ours + "shared_", 1, kSharedExperts,
                        c.num_shared_experts * c.moe_intermediate_size);
  return p;
}

// Shell-like match of the whole text: * any run, ? one character.
bool wildcard(const char* pattern, const char* text) {
  const char *star = nullptr, *retry = nullptr;
  while (*text != '\0') {
    if (*pattern == '?' || *pattern == *text) {
      ++pattern, ++text;
    } else if (*pattern == '*') {
      star = pattern++, retry = text;
    } else if (star != nullptr) {
      pattern = star + 1, text = ++retry;
    } else {
      return false;
    }
  }
  while (*pattern == '*') ++pattern;
  return *pattern == '\0';
}

bool matches(const std::string& pattern, const std::string& name) {
  if (pattern.find_first_of("*?") == std::string::npos)
    return name.find(pattern) != std::string::npos;
  return wildcard(pattern.c_str(), name.c_str());
}

}  // namespace

std::string router_name(const ModelConfig& c, std::int64_t layer) {
  const char* mlp = c.family == Family::kMixtral ? "block_sparse_moe" : "mlp";
  return fmt::format("model.layers.{}.{}.gate.weight", layer, mlp);
}

std::string mlp_name(const ModelConfig& c, std::int64_t layer, std::int64_t expert,
                     Projection projection) {
  const auto i = static_cast<std::size_t>(projection);
  constexpr const char* kNames[] = {"gate_proj", "up_proj", "down_proj"};
  constexpr const char* kMixtralNames[] = {"w1", "w3", "w2"};
  if (expert == kDenseMlp) return fmt::format("model.layers.{}.mlp.{}.weight", layer, kNames[i]);
  if (expert == kSharedExperts)
    return fmt::format("model.layers.{}.mlp.shared_experts.{}.weight", layer, kNames[i]);
  if (c.family == Family::kMixtral)
    return fmt::format("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", layer, expert,
                       kMixtralNames[i]);
  return fmt::format("model.layers.{}.mlp.experts.{}.{}.weight", layer, expert, kNames[i]);
}

ParamTable build_param_table(const ModelConfig& c) {
  TableBuilder b;
  ParamTable& t = b.table;
  if (is_latent(c)) {
    const std::int64_t q = c.num_heads * (c.latent.nope + c.head_dim);
    t.k_column = padded(c.latent.q_rank > 0 ? c.latent.q_rank : q);
    t.qkv_rows = t.v_column = t.k_column + padded(c.latent.kv_rank + c.head_dim);
  } else {
    t.k_column = padded(c.num_heads * c.head_dim);
    t.v_column = t.k_column + padded(c.num_kv_heads * c.head_dim);
    t.qkv_rows = t.v_column + padded(c.num_kv_heads * c.head_dim);
  }
  t.embedding = b.add("embedding", ParamKind::kEmbedding, -1, {c.vocab_size, c.hidden_size}, {},
                      {{"model.embed_tokens.weight", 0, 0, c.vocab_size, c.hidden_size}});
  for (int l = 0; l < c.num_layers; ++l) t.layers.push_back(add_layer(b, c, l));
  t.final_norm = b.norm("final_norm", "model.norm.weight", -1, c.hidden_size);
  t.head = c.tie_word_embeddings
               ? t.embedding
               : b.add("head", ParamKind::kHead, -1, {1, c.vocab_size, c.hidden_size}, {},
                       {{"lm_head.weight", 0, 0, c.vocab_size, c.hidden_size}});
  return std::move(b.table);
}

TensorView param_view(const ParamTable& table, const TensorView& slab, int p) {
  const Param& param = table.params[p];
  return slab.rows(param.offset, param.shape.count()).reshape(param.shape);
}

std::vector<bool> fp8_params(const ParamTable& table, const ModelConfig& config,
                             const Precision& precision) {
  std::vector<bool> fp8(table.params.size(), false);
  if (!precision.fp8) return fp8;
  const auto first = precision.num_first_layers_in_bf16, last = precision.num_last_layers_in_bf16;
  if (first < 0 || last < 0 || first + last > config.num_layers)
    base::fail<InputError>(
        "num_first_layers_in_bf16={} and num_last_layers_in_bf16={} do not fit a model of {} "
        "layers",
        first, last, config.num_layers);
  for (std::size_t i = 0; i < fp8.size(); ++i) {
    const Param& p = table.params[i];
    fp8[i] = p.kind == ParamKind::kLinear && p.layer >= first && p.layer < config.num_layers - last;
  }
  for (const std::string& pattern : precision.ignored_layers) {
    bool used = false;
    for (std::size_t i = 0; i < fp8.size(); ++i) {
      const Param& p = table.params[i];
      // Heads of latent attention run in BF16 anyway, so a pattern may name them.
      if (p.kind != ParamKind::kLinear && p.kind != ParamKind::kHeads) continue;
      const ParamPart *hit = nullptr, *miss = nullptr;
      for (const ParamPart& part : p.parts) (matches(pattern, part.hf_name) ? hit : miss) = &part;
      if (hit == nullptr) continue;
      used = true;
      // Projections of one slab are one GEMM, so they share a precision. Patterns may cover a slab
      // together.
      for (const ParamPart& part : p.parts) {
        bool covered = false;
        for (const std::string& other : precision.ignored_layers)
          covered = covered || matches(other, part.hf_name);
        if (!covered)
          base::fail<InputError>(
              "ignored_layers: '{}' matches {} but no pattern matches {}, and the two run as one "
              "GEMM; "
              "add a pattern for it",
              pattern, hit->hf_name, part.hf_name);
      }
      fp8[i] = false;
    }
    if (!used)
      base::fail<InputError>("ignored_layers: '{}' matches no linear layer of this model", pattern);
  }
  return fp8;
}

}  // namespace lockstep::model
