// The GGUF reader, the model in it, its tokenizer, and the dequantization of its weights.
#include "fuzz/fuzz.h"
#include "model/gguf_writer.h"
#include "model/model_source.h"

using namespace lockstep;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::MemoryFile file(data, size);
  try {
    const model::ModelSource source = model::open_gguf_source(file.path());
    std::vector<numerics::Bf16> row;
    for (const model::SourceTensor& t : source.tensors) {
      row.resize(static_cast<std::size_t>(t.weight.values.columns));
      for (std::int64_t r = 0; r < t.weight.values.rows; ++r)
        model::read_rows(t.weight, r, 1, row.data(), t.weight.values.columns);
    }
  } catch (const base::InputError&) {
  }
  return 0;
}

// A small model of one layer: most of the input is header.
static std::string small(const std::string& architecture, std::uint64_t experts) {
  model::GgufWriter w;
  const std::string p = architecture + ".";
  w.text("general.architecture", architecture);
  w.integer(p + "block_count", 1);
  w.integer(p + "context_length", 8);
  w.integer(p + "embedding_length", 32);
  w.integer(p + "feed_forward_length", 32);
  w.integer(p + "attention.head_count", 2);
  w.integer(p + "attention.head_count_kv", 1);
  w.number(p + "attention.layer_norm_rms_epsilon", 1e-5f);
  if (experts > 0) {
    w.integer(p + "expert_count", static_cast<std::uint32_t>(experts));
    w.integer(p + "expert_used_count", 1);
  }
  w.text("tokenizer.ggml.model", "gpt2");
  w.text("tokenizer.ggml.pre", "llama-bpe");
  w.texts("tokenizer.ggml.tokens", {"a", "b", "ab", "<s>"});
  w.integers("tokenizer.ggml.token_type", {1, 1, 1, 3});
  w.texts("tokenizer.ggml.merges", {"a b"});
  w.integer("tokenizer.ggml.bos_token_id", 3);
  w.key("tokenizer.ggml.add_bos_token", 7, std::string(1, '\1'));
  std::uint64_t seed = 0;
  const auto add = [&](const std::string& name, std::vector<std::uint64_t> dimensions,
                       std::uint32_t type) {
    std::uint64_t values = 1;
    for (const auto n : dimensions) values *= n;
    w.tensors.push_back({name, dimensions, type, model::gguf_data(type, values, ++seed), -1});
  };
  add("token_embd.weight", {32, 4}, 8);
  add("blk.0.attn_norm.weight", {32}, 0);
  add("blk.0.attn_q.weight", {32, 32}, 3);
  add("blk.0.attn_k.weight", {32, 16}, 3);
  add("blk.0.attn_v.weight", {32, 16}, 1);
  add("blk.0.attn_output.weight", {32, 32}, 3);
  add("blk.0.ffn_norm.weight", {32}, 0);
  if (architecture != "llama") {
    add("blk.0.attn_q_norm.weight", {16}, 0);
    add("blk.0.attn_k_norm.weight", {16}, 0);
  }
  if (experts == 0) {
    for (const char* name :
         {"blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"})
      add(name, {32, 32}, 3);
  } else {
    add("blk.0.ffn_gate_inp.weight", {32, experts}, 0);
    for (const char* name :
         {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"})
      add(name, {32, 32, experts}, 3);
  }
  add("output_norm.weight", {32}, 0);
  return w.bytes();
}

std::vector<std::string> fuzz::seeds() {
  return {small("llama", 0), small("llama", 2), small("qwen3moe", 2), small("qwen3", 0)};
}

std::vector<std::string> fuzz::words() {
  using model::bytes_of;
  std::vector<std::string> out = {"llama",  "qwen3moe", "general.alignment",
                                  "blk.0.", "gpt2",     "\xff"};
  for (const std::uint64_t n : {0ull, 1ull, 31ull, 32ull, 33ull, 1ull << 31, 1ull << 61, ~0ull})
    out.push_back(bytes_of(n));
  for (const std::uint32_t n : {0u, 1u, 8u, 9u, 12u, 13u, 1u << 31, ~0u})
    out.push_back(bytes_of(n));
  return out;
}
