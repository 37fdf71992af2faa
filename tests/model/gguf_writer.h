// GGUF files built byte by byte, good and bad.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "base/philox.h"

namespace lockstep::model {

template <typename T>
std::string bytes_of(T value) {
  std::string out(sizeof value, '\0');
  std::memcpy(out.data(), &value, sizeof value);
  return out;
}

inline std::string gguf_text(const std::string& text) {
  return bytes_of<std::uint64_t>(text.size()) + text;
}

struct GgufWriter {
  struct Tensor {
    std::string name;
    std::vector<std::uint64_t> dimensions;  // contiguous axis first, as in the file
    std::uint32_t type = 0;
    std::string data;
    std::int64_t offset = -1;  // -1: behind the one before
  };
  std::string keys;
  std::uint64_t key_count = 0;
  std::vector<Tensor> tensors;
  std::uint64_t alignment = 32;

  void key(const std::string& name, std::uint32_t type, const std::string& value) {
    keys += gguf_text(name) + bytes_of(type) + value;
    ++key_count;
  }
  void integer(const std::string& name, std::uint32_t n) { key(name, 4, bytes_of(n)); }
  void number(const std::string& name, float x) { key(name, 6, bytes_of(x)); }
  void text(const std::string& name, const std::string& value) { key(name, 8, gguf_text(value)); }
  void texts(const std::string& name, const std::vector<std::string>& values) {
    std::string value = bytes_of<std::uint32_t>(8) + bytes_of<std::uint64_t>(values.size());
    for (const std::string& v : values) value += gguf_text(v);
    key(name, 9, value);
  }
  void integers(const std::string& name, const std::vector<std::int32_t>& values) {
    std::string value = bytes_of<std::uint32_t>(5) + bytes_of<std::uint64_t>(values.size());
    for (const std::int32_t v : values) value += bytes_of(v);
    key(name, 9, value);
  }
  std::string bytes() const {
    std::string head = "GGUF" + bytes_of<std::uint32_t>(3) +
                       bytes_of<std::uint64_t>(tensors.size()) + bytes_of(key_count) + keys;
    std::string data;
    for (const Tensor& t : tensors) {
      data.resize((data.size() + alignment - 1) / alignment * alignment);
      head += gguf_text(t.name) + bytes_of(static_cast<std::uint32_t>(t.dimensions.size()));
      for (const auto n : t.dimensions) head += bytes_of(n);
      head += bytes_of(t.type) +
              bytes_of(t.offset < 0 ? data.size() : static_cast<std::uint64_t>(t.offset));
      data += t.data;
    }
    head.resize((head.size() + alignment - 1) / alignment * alignment);
    return head + data;
  }
};

// Values of a tensor: Philox words as F32 in [-1, 1), or as blocks with an FP16 scale near 2^-4.
inline std::string gguf_data(std::uint32_t type, std::uint64_t values, std::uint64_t seed) {
  std::string out;
  std::uint64_t at = 0;
  const auto word = [&] { return base::philox4x32(seed, 0, at++).word[0]; };
  if (type == 0) {
    for (std::uint64_t i = 0; i < values; ++i)
      out += bytes_of(static_cast<float>(static_cast<std::int32_t>(word())) * 0x1p-31f);
  } else if (type == 1) {
    for (std::uint64_t i = 0; i < values; ++i)
      out += bytes_of(static_cast<std::uint16_t>(0x2C00 | (word() & 0x83FF)));
  } else {
    for (std::uint64_t i = 0; i < values / 32; ++i) {
      out += bytes_of(static_cast<std::uint16_t>(0x2C00 | (word() & 0x3FF)));
      if (type == 3) out += bytes_of(static_cast<std::uint16_t>(0xB800 | (word() & 0x3FF)));
      for (int b = 0; b < (type == 3 ? 16 : 32); ++b) out += static_cast<char>(word());
    }
  }
  return out;
}

// A model of two layers, hidden size 96, 6 heads of 16, 2 key heads, and a tokenizer of 270 tokens.
struct SmallGguf {
  GgufWriter w;
  std::string architecture;

  void add(const std::string& name, std::vector<std::uint64_t> dimensions, std::uint32_t type) {
    std::uint64_t values = 1;
    for (const auto n : dimensions) values *= n;
    w.tensors.push_back(
        {name, std::move(dimensions), type, gguf_data(type, values, w.tensors.size() + 1), -1});
  }
  explicit SmallGguf(const std::string& name = "llama", int experts = 0) : architecture(name) {
    w.text("general.architecture", name);
    const std::string p = name + ".";
    w.integer(p + "block_count", 2);
    w.integer(p + "context_length", 64);
    w.integer(p + "embedding_length", 96);
    w.integer(p + "feed_forward_length", 160);
    w.integer(p + "attention.head_count", 6);
    w.integer(p + "attention.head_count_kv", 2);
    w.number(p + "attention.layer_norm_rms_epsilon", 1e-5f);
    w.number(p + "rope.freq_base", 100000.0f);
    if (experts > 0) {
      w.integer(p + "expert_count", static_cast<std::uint32_t>(experts));
      w.integer(p + "expert_used_count", 2);
    }
    add_tokenizer();
    const bool qk_norm = name != "llama";
    add("token_embd.weight", {96, 270}, 8);
    for (const std::string l : {"blk.0.", "blk.1."}) {
      add(l + "attn_norm.weight", {96}, 0);
      add(l + "attn_q.weight", {96, 96}, 3);
      add(l + "attn_k.weight", {96, 32}, 3);
      add(l + "attn_v.weight", {96, 32}, 1);
      if (qk_norm) {
        add(l + "attn_q_norm.weight", {16}, 0);
        add(l + "attn_k_norm.weight", {16}, 0);
      }
      add(l + "attn_output.weight", {96, 96}, 8);
      add(l + "ffn_norm.weight", {96}, 0);
      if (experts == 0) {
        add(l + "ffn_gate.weight", {96, 160}, 3);
        add(l + "ffn_up.weight", {96, 160}, 3);
        add(l + "ffn_down.weight", {160, 96}, 3);
      } else {
        const auto e = static_cast<std::uint64_t>(experts);
        add(l + "ffn_gate_inp.weight", {96, e}, 0);
        add(l + "ffn_gate_exps.weight", {96, 160, e}, 3);
        add(l + "ffn_up_exps.weight", {96, 160, e}, 3);
        add(l + "ffn_down_exps.weight", {160, 96, e}, 3);
      }
    }
    add("output_norm.weight", {96}, 0);
  }
  void add_tokenizer() {
    std::vector<std::string> tokens = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
    std::vector<std::int32_t> types = {3, 3, 3};
    for (unsigned b = 0; b < 256; ++b) {  // GPT-2's characters for bytes
      const bool itself =
          (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
      const unsigned code = itself ? b : 0x100 + others_++;
      std::string text;
      if (code < 0x80) {
        text = static_cast<char>(code);
      } else {
        text += static_cast<char>(0xC0 | code >> 6);
        text += static_cast<char>(0x80 | (code & 0x3F));
      }
      tokens.push_back(text);
    }
    for (const char* t : {"he", "ll", "hell", "hello", "\xC4\xA0w"}) tokens.push_back(t);
    types.resize(tokens.size(), 1);
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "smollm");
    w.texts("tokenizer.ggml.tokens", tokens);
    w.integers("tokenizer.ggml.token_type", types);
    w.texts("tokenizer.ggml.merges", {"h e", "l l", "he ll", "hell o", "\xC4\xA0 w"});
    w.integer("tokenizer.ggml.bos_token_id", 1);
    w.integer("tokenizer.ggml.eos_token_id", 2);
    w.text("tokenizer.chat_template", "{{ messages }}");
  }

 private:
  unsigned others_ = 0;
};

}  // namespace lockstep::model
