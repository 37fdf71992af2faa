#include <set>

#include "base/error.h"
#include "model/model_source.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using nlohmann::json;

namespace {

// What the keys of an architecture say.
struct Sizes {
  std::int64_t layers, hidden, width, heads, kv_heads, head_dim, positions, vocab;
  std::int64_t experts = 0, used_experts = 0, expert_width = 0;
  double rope_theta = 10000, eps = 0;
  bool tied = false;
};

struct Architecture {
  const char* name;   // general.architecture
  const char* dense;  // Hugging Face's architecture and model_type; null: refused
  const char* dense_type;
  const char* moe;
  const char* moe_type;
  // llama.cpp stores query and key rows of this architecture with the rotary pairs side by side.
  bool interleaved;
  bool qk_norm;
};
constexpr Architecture kArchitectures[] = {
    {"llama", "LlamaForCausalLM", "llama", "MixtralForCausalLM", "mixtral", true, false},
    {"qwen3", "Qwen3ForCausalLM", "qwen3", nullptr, nullptr, false, true},
    {"qwen3moe", nullptr, nullptr, "Qwen3MoeForCausalLM", "qwen3_moe", false, true},
};

const Architecture& find_architecture(const GgufFile& f) {
  const std::string_view name = f.at("general.architecture", GgufKind::kText).text;
  std::string known;
  for (const Architecture& a : kArchitectures) {
    if (name == a.name) return a;
    known += fmt::format(" {}", a.name);
  }
  fail<InputError>("{}: key 'general.architecture': '{}' is not supported; supported:{}", f.file,
                   name, known);
}

double number(const GgufFile& f, const std::string& key, std::optional<double> fallback) {
  const GgufValue* value = f.find(key, GgufKind::kFloat);
  if (value == nullptr && fallback) return *fallback;
  const double x = f.at(key, GgufKind::kFloat).number;
  if (!(x > 0 && x < 1e30)) fail<InputError>("{}: key '{}': {} is not supported", f.file, key, x);
  return x;
}

std::int64_t size_of(const GgufFile& f, const std::string& key,
                     std::optional<std::int64_t> fallback = std::nullopt) {
  const std::int64_t n = fallback ? f.integer(key, *fallback) : f.integer(key);
  if (n < 1 || n >= std::int64_t{1} << 31)
    fail<InputError>("{}: key '{}': {} is not from 1 to 2^31 - 1", f.file, key, n);
  return n;
}

Sizes read_sizes(const GgufFile& f, const Architecture& a) {
  const std::string prefix = std::string(a.name) + ".";
  const auto key = [&](const char* name) { return prefix + name; };
  Sizes s{};
  s.layers = size_of(f, key("block_count"));
  s.hidden = size_of(f, key("embedding_length"));
  s.width = size_of(f, key("feed_forward_length"), 1);
  s.heads = size_of(f, key("attention.head_count"));
  s.kv_heads = size_of(f, key("attention.head_count_kv"), s.heads);
  s.positions = size_of(f, key("context_length"));
  s.head_dim =
      size_of(f, key("attention.key_length"), std::max<std::int64_t>(1, s.hidden / s.heads));
  s.eps = number(f, key("attention.layer_norm_rms_epsilon"), std::nullopt);
  s.rope_theta = number(f, key("rope.freq_base"), 10000.0);
  s.experts = f.integer(key("expert_count"), 0);
  if (s.experts != 0) {
    s.experts = size_of(f, key("expert_count"));
    s.used_experts = size_of(f, key("expert_used_count"));
    s.expert_width = size_of(f, key("expert_feed_forward_length"), s.width);
    if (s.used_experts > s.experts)
      fail<InputError>("{}: key '{}': {} of {} experts", f.file, key("expert_used_count"),
                       s.used_experts, s.experts);
  }
  const auto only = [&](const char* name, std::int64_t supported) {
    const std::int64_t n = f.integer(key(name), supported);
    if (n != supported)
      fail<InputError>("{}: key '{}': {} is not supported, only {}", f.file, key(name), n,
                       supported);
  };
  only("attention.value_length", s.head_dim);
  only("rope.dimension_count", s.head_dim);
  if (s.heads % s.kv_heads != 0 || s.head_dim % 2 != 0)
    fail<InputError>("{}: {} heads of {} with {} key heads are not supported", f.file, s.heads,
                     s.head_dim, s.kv_heads);
  if (const GgufValue* v = f.find(key("rope.scaling.type"), GgufKind::kText);
      v && v->text != "none")
    fail<InputError>("{}: key '{}': '{}' is not supported", f.file, key("rope.scaling.type"),
                     v->text);
  static const std::set<std::string> known = {"block_count",
                                              "embedding_length",
                                              "feed_forward_length",
                                              "attention.head_count",
                                              "attention.head_count_kv",
                                              "context_length",
                                              "attention.key_length",
                                              "attention.layer_norm_rms_epsilon",
                                              "rope.freq_base",
                                              "expert_count",
                                              "expert_used_count",
                                              "expert_feed_forward_length",
                                              "attention.value_length",
                                              "rope.dimension_count",
                                              "rope.scaling.type",
                                              "vocab_size"};
  for (const auto& [name, value] : f.keys)
    if (name.starts_with(prefix) && !known.count(name.substr(prefix.size())))
      fail<InputError>("{}: key '{}' is not known", f.file, name);
  return s;
}

json token(const GgufFile& f, const char* key, std::int64_t vocab) {
  const std::int64_t id = f.integer(key, -1);
  if (id >= vocab)
    fail<InputError>("{}: key '{}': token {} of a vocabulary of {}", f.file, key, id, vocab);
  return id < 0 ? json() : json(id);
}

// The shortest decimal that gives the file's FP32 value again.
double shortest(double x) { return std::stod(fmt::format("{}", static_cast<float>(x))); }

json config_of(const GgufFile& f, const Architecture& a, const Sizes& s) {
  const bool moe = s.experts != 0;
  json c = {{"architectures", {moe ? a.moe : a.dense}},
            {"model_type", moe ? a.moe_type : a.dense_type},
            {"torch_dtype", "bfloat16"},
            {"attention_dropout", 0.0},
            {"bos_token_id", token(f, "tokenizer.ggml.bos_token_id", s.vocab)},
            {"eos_token_id", token(f, "tokenizer.ggml.eos_token_id", s.vocab)},
            {"pad_token_id", token(f, "tokenizer.ggml.padding_token_id", s.vocab)},
            {"head_dim", s.head_dim},
            {"hidden_act", "silu"},
            {"hidden_size", s.hidden},
            {"initializer_range", 0.02},
            {"intermediate_size", s.width},
            {"max_position_embeddings", s.positions},
            {"num_attention_heads", s.heads},
            {"num_hidden_layers", s.layers},
            {"num_key_value_heads", s.kv_heads},
            {"rms_norm_eps", shortest(s.eps)},
            {"rope_theta", shortest(s.rope_theta)},
            {"tie_word_embeddings", s.tied},
            {"use_cache", true},
            {"vocab_size", s.vocab}};
  const std::string name = c["architectures"][0];
  if (name != "MixtralForCausalLM") c["attention_bias"] = false;
  if (name == "LlamaForCausalLM") c["mlp_bias"] = false;
  if (!moe) return c;
  c["num_experts_per_tok"] = s.used_experts;
  c["output_router_logits"] = false;
  c["router_aux_loss_coef"] = 0.001;
  c["sliding_window"] = nullptr;
  if (name == "MixtralForCausalLM") {
    c["num_local_experts"] = s.experts;
    c["intermediate_size"] = s.expert_width;
    c["router_jitter_noise"] = 0.0;
  } else {
    c["num_experts"] = s.experts;
    c["moe_intermediate_size"] = s.expert_width;
    c["norm_topk_prob"] = true;
    c["decoder_sparse_step"] = 1;
    c["mlp_only_layers"] = json::array();
    c["use_sliding_window"] = false;
  }
  return c;
}

json generation_of(const json& config) {
  json out = {{"_from_model_config", true}};
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (!config[key].is_null()) out[key] = config[key];
  return out;
}

// Collects the tensors of a file, each of which must be there with its shape.
struct Collector {
  const GgufFile& f;
  std::vector<SourceTensor> tensors;
  std::set<std::string> used;

  const GgufTensor& find(const std::string& name, const std::vector<std::int64_t>& shape) {
    const auto found = f.tensors.find(name);
    if (found == f.tensors.end()) fail<InputError>("{}: tensor '{}' is missing", f.file, name);
    if (found->second.shape != shape)
      fail<InputError>("{}: tensor '{}' has shape [{}], the keys ask for [{}]", f.file, name,
                       fmt::join(found->second.shape, ", "), fmt::join(shape, ", "));
    used.insert(name);
    return found->second;
  }
  void add(const std::string& hf_name, SourceTensor::Kind kind, const std::string& name,
           const GgufTensor& t, std::int64_t first_row, std::int64_t rows) {
    const std::int64_t columns = t.shape.back(), row_bytes = stored_bytes(t.type, columns);
    const bool blocks = t.type == StoredType::kQ4_1 || t.type == StoredType::kQ8_0;
    const StoredMatrix m{t.type,    rows,
                         columns,   t.data + first_row * row_bytes,
                         row_bytes, blocks ? 0 : stored_bytes(t.type, 1),
                         0};
    tensors.push_back({hf_name, kind, {m, {}, f.file, name}});
  }
  void vector(const std::string& hf_name, const std::string& name, std::int64_t n) {
    add(hf_name, SourceTensor::kVector, name, find(name, {n}), 0, 1);
  }
  void matrix(const std::string& hf_name, SourceTensor::Kind kind, const std::string& name,
              std::int64_t rows, std::int64_t columns, std::int64_t interleaved = 0) {
    add(hf_name, kind, name, find(name, {rows, columns}), 0, rows);
    tensors.back().weight.values.interleaved = interleaved;
  }
  void experts(const std::string& prefix, const std::string& suffix, const std::string& name,
               std::int64_t experts, std::int64_t rows, std::int64_t columns) {
    const GgufTensor& t = find(name, {experts, rows, columns});
    for (std::int64_t e = 0; e < experts; ++e)
      add(fmt::format("{}{}.{}.weight", prefix, e, suffix), SourceTensor::kLinear, name, t,
          e * rows, rows);
  }
};

void collect_layer(Collector& c, const Architecture& a, const Sizes& s, std::int64_t l) {
  const std::string hf = fmt::format("model.layers.{}.", l), from = fmt::format("blk.{}.", l);
  const std::int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  const std::int64_t interleaved = a.interleaved ? s.head_dim : 0;
  const auto linear = SourceTensor::kLinear;
  c.vector(hf + "input_layernorm.weight", from + "attn_norm.weight", s.hidden);
  c.matrix(hf + "self_attn.q_proj.weight", linear, from + "attn_q.weight", q, s.hidden,
           interleaved);
  c.matrix(hf + "self_attn.k_proj.weight", linear, from + "attn_k.weight", kv, s.hidden,
           interleaved);
  c.matrix(hf + "self_attn.v_proj.weight", linear, from + "attn_v.weight", kv, s.hidden);
  if (a.qk_norm) {
    c.vector(hf + "self_attn.q_norm.weight", from + "attn_q_norm.weight", s.head_dim);
    c.vector(hf + "self_attn.k_norm.weight", from + "attn_k_norm.weight", s.head_dim);
  }
  c.matrix(hf + "self_attn.o_proj.weight", linear, from + "attn_output.weight", s.hidden, q);
  c.vector(hf + "post_attention_layernorm.weight", from + "ffn_norm.weight", s.hidden);
  if (s.experts == 0) {
    c.matrix(hf + "mlp.gate_proj.weight", linear, from + "ffn_gate.weight", s.width, s.hidden);
    c.matrix(hf + "mlp.up_proj.weight", linear, from + "ffn_up.weight", s.width, s.hidden);
    c.matrix(hf + "mlp.down_proj.weight", linear, from + "ffn_down.weight", s.hidden, s.width);
    return;
  }
  const bool mixtral = std::string_view(a.moe_type) == "mixtral";
  const std::string block = hf + (mixtral ? "block_sparse_moe." : "mlp.");
  c.matrix(block + "gate.weight", SourceTensor::kMatrix, from + "ffn_gate_inp.weight", s.experts,
           s.hidden);
  const std::string experts = block + "experts.";
  c.experts(experts, mixtral ? "w1" : "gate_proj", from + "ffn_gate_exps.weight", s.experts,
            s.expert_width, s.hidden);
  c.experts(experts, mixtral ? "w3" : "up_proj", from + "ffn_up_exps.weight", s.experts,
            s.expert_width, s.hidden);
  c.experts(experts, mixtral ? "w2" : "down_proj", from + "ffn_down_exps.weight", s.experts,
            s.hidden, s.expert_width);
}

}  // namespace

ModelSource open_gguf_source(const std::filesystem::path& path) {
  const auto f = std::make_shared<const GgufFile>(open_gguf(path));
  const Architecture& a = find_architecture(*f);
  Sizes s = read_sizes(*f, a);
  if ((s.experts != 0 ? a.moe : a.dense) == nullptr)
    fail<InputError>("{}: architecture '{}' with {} experts is not supported", f->file, a.name,
                     s.experts);
  const auto embedding = f->tensors.find("token_embd.weight");
  if (embedding == f->tensors.end() || embedding->second.shape.size() != 2)
    fail<InputError>("{}: tensor 'token_embd.weight' is missing or not a matrix", f->file);
  s.vocab = embedding->second.shape[0];
  if (s.vocab >= std::int64_t{1} << 31 ||
      f->integer(std::string(a.name) + ".vocab_size", s.vocab) != s.vocab)
    fail<InputError>("{}: key '{}.vocab_size': the embedding has {} rows", f->file, a.name,
                     s.vocab);
  s.tied = !f->tensors.count("output.weight");

  Collector c{*f, {}, {}};
  c.matrix("model.embed_tokens.weight", SourceTensor::kMatrix, "token_embd.weight", s.vocab,
           s.hidden);
  for (std::int64_t l = 0; l < s.layers; ++l) collect_layer(c, a, s, l);
  c.vector("model.norm.weight", "output_norm.weight", s.hidden);
  if (!s.tied)
    c.matrix("lm_head.weight", SourceTensor::kMatrix, "output.weight", s.vocab, s.hidden);
  for (const auto& [name, t] : f->tensors)
    if (!c.used.count(name))
      fail<InputError>("{}: tensor '{}' is no part of the model that the keys describe", f->file,
                       name);

  ModelSource out;
  out.config = config_of(*f, a, s);
  out.generation = generation_of(out.config);
  out.tokenizer_files = gguf_tokenizer_files(*f);
  out.tensors = std::move(c.tensors);
  out.memory = f;
  return out;
}

}  // namespace lockstep::model
