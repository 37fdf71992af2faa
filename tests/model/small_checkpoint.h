// Small checkpoints for tests, and their tensors as rows that a test may change.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/safetensors.h"
#include "model/temp_folder.h"

namespace lockstep::model {

// Widths that are no multiples of 128, so that every slab has padding.
inline ModelConfig small_config() {
  ModelConfig c;
  c.vocab_size = 20;
  c.hidden_size = 24;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 6;
  c.max_positions = 32;
  c.qk_norm = true;
  c.num_experts = 3;
  c.moe_intermediate_size = 10;
  c.router.top_k = 2;
  c.eos_token_ids = {1};
  return c;
}

inline Weights small_weights(bool tied = false) {
  ModelConfig c = small_config();
  c.tie_word_embeddings = tied;
  Weights w = make_weights(c);
  initialize(w, 7);
  return w;
}

inline bool same_bytes(const Weights& a, const Weights& b) {
  return a.slab.view().bytes() == b.slab.view().bytes() &&
         std::memcmp(a.slab.view().data, b.slab.view().data, a.slab.view().bytes()) == 0;
}

// The tensors of a saved checkpoint as rows that a test may change before it writes them again.
struct Tensors {
  std::map<std::string, TensorToWrite> rows;
  std::vector<std::shared_ptr<std::vector<char>>> memory;

  explicit Tensors(const std::filesystem::path& file) {
    const SafetensorsFile opened = open_safetensors(file);
    for (const auto& [name, t] : opened.tensors) {
      const char* at = reinterpret_cast<const char*>(t.bytes.data());
      put(name, t.dtype, t.shape, std::vector<char>(at, at + t.bytes.size()));
    }
  }
  void put(const std::string& name, FileDtype dtype, std::vector<std::int64_t> shape,
           std::vector<char> bytes) {
    memory.push_back(std::make_shared<std::vector<char>>(std::move(bytes)));
    rows[name] = {name, dtype, std::move(shape), memory.back()->data()};
  }
  void write(const std::filesystem::path& file, const std::string& contains = "") const {
    std::vector<TensorToWrite> list;
    for (const auto& [name, row] : rows)
      if (name.find(contains) != std::string::npos) list.push_back(row);
    write_safetensors(file, list);
  }
};

}  // namespace lockstep::model
