#include "model/gguf.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "model/checkpoint.h"
#include "model/convert.h"
#include "model/gguf_writer.h"
#include "model/strict_json.h"
#include "model/temp_folder.h"

namespace lockstep::model {
namespace {

using nlohmann::json;
using numerics::Bf16;

struct Gguf : TempFolderTest {
  std::filesystem::path file = folder / "m.gguf";
  std::filesystem::path out = folder / "out";

  void put(const std::string& bytes) { put_file(file, bytes); }
  void put(const SmallGguf& g) { put(g.w.bytes()); }
  void expect_open_refused(const std::string& bytes, std::initializer_list<std::string> parts) {
    put(bytes);
    const std::string message = expect_refused([&] { open_gguf(file); }, parts);
    EXPECT_NE(message.find(file.string()), std::string::npos) << message;
  }
  void expect_source_refused(const SmallGguf& g, std::initializer_list<std::string> parts) {
    put(g);
    const std::string message = expect_refused([&] { open_gguf_source(file); }, parts);
    EXPECT_NE(message.find(file.string()), std::string::npos) << message;
  }
  void convert_to(const std::filesystem::path& to, StoreAs as = StoreAs::kAsSource) {
    ConvertOptions options;
    options.to = as;
    convert(open_gguf_source(file), to, options);
  }
};

std::vector<std::uint16_t> bits_of(const FileTensor& t) {
  std::vector<std::uint16_t> out(t.bytes.size() / 2);
  std::memcpy(out.data(), t.bytes.data(), t.bytes.size());
  return out;
}

TEST_F(Gguf, keys_of_all_types) {
  GgufWriter w;
  w.key("u8", 0, bytes_of<std::uint8_t>(200));
  w.key("i8", 1, bytes_of<std::int8_t>(-3));
  w.key("u16", 2, bytes_of<std::uint16_t>(60000));
  w.key("i16", 3, bytes_of<std::int16_t>(-30000));
  w.key("i32", 5, bytes_of<std::int32_t>(-7));
  w.key("bool", 7, bytes_of<std::uint8_t>(1));
  w.key("u64", 10, bytes_of<std::uint64_t>(1ull << 40));
  w.key("i64", 11, bytes_of<std::int64_t>(-(1ll << 40)));
  w.key("f64", 12, bytes_of(2.5));
  w.number("f32", 1.5f);
  w.text("text", "x y");
  w.texts("texts", {"a", ""});
  w.integers("integers", {1, -2});
  put(w.bytes());
  const GgufFile f = open_gguf(file);
  EXPECT_EQ(f.integer("u8"), 200);
  EXPECT_EQ(f.integer("i8"), -3);
  EXPECT_EQ(f.integer("u16"), 60000);
  EXPECT_EQ(f.integer("i16"), -30000);
  EXPECT_EQ(f.integer("i32"), -7);
  EXPECT_EQ(f.at("bool", GgufKind::kBool).integer, 1);
  EXPECT_EQ(f.integer("u64"), std::int64_t{1} << 40);
  EXPECT_EQ(f.integer("i64"), -(std::int64_t{1} << 40));
  EXPECT_EQ(f.at("f64", GgufKind::kFloat).number, 2.5);
  EXPECT_EQ(f.at("f32", GgufKind::kFloat).number, 1.5);
  EXPECT_EQ(f.at("text", GgufKind::kText).text, "x y");
  EXPECT_EQ(f.at("texts", GgufKind::kTexts).texts, (std::vector<std::string_view>{"a", ""}));
  EXPECT_EQ(f.at("integers", GgufKind::kIntegers).integers, (std::vector<std::int64_t>{1, -2}));
  EXPECT_EQ(f.integer("absent", 5), 5);
  expect_refused([&] { f.integer("absent"); }, {"'absent'", "missing"});
  expect_refused([&] { f.integer("text"); }, {"'text'", "a text", "an integer"});
}

// The blocks' formulas, with numbers worked out by hand.
TEST_F(Gguf, blocks_are_dequantized_and_rounded_once) {
  GgufWriter w;
  std::string q4 = bytes_of<std::uint16_t>(0x3800) + bytes_of<std::uint16_t>(0xC000);  // 0.5, -2
  for (int i = 0; i < 16; ++i) q4 += static_cast<char>(i | (15 - i) << 4);
  std::string q8 = bytes_of<std::uint16_t>(0x2C00);  // 2^-4
  for (int i = 0; i < 32; ++i) q8 += static_cast<char>(i == 0 ? -128 : 4 * i - 1);
  w.tensors = {
      {"q4", {32, 1}, 3, q4, -1},
      {"q8", {32, 1}, 8, q8, -1},
      {"f16", {2}, 1, bytes_of<std::uint16_t>(0x3C04) + bytes_of<std::uint16_t>(0x3C0C), -1}};
  put(w.bytes());
  const GgufFile f = open_gguf(file);
  const auto read = [&](const char* name) {
    const GgufTensor& t = f.tensors.at(name);
    const std::int64_t n = t.shape.back();
    const StoredWeight s{{t.type, 1, n, t.data, stored_bytes(t.type, n), 2, 0}, {}, "f", name};
    std::vector<Bf16> out(static_cast<std::size_t>(n));
    read_rows(s, 0, 1, out.data(), n);
    return out;
  };
  const auto a = read("q4"), b = read("q8"), c = read("f16");
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(numerics::to_float(a[i]), 0.5f * i - 2);
    EXPECT_EQ(numerics::to_float(a[i + 16]), 0.5f * (15 - i) - 2);
  }
  EXPECT_EQ(numerics::to_float(b[0]), -8.0f);
  for (int i = 1; i < 32; ++i) EXPECT_EQ(numerics::to_float(b[i]), (4 * i - 1) / 16.0f);
  EXPECT_EQ(c[0].bits, 0x3F80);  // ties to even
  EXPECT_EQ(c[1].bits, 0x3F82);
}

TEST_F(Gguf, llama_becomes_a_hugging_face_folder) {
  const SmallGguf g;
  put(g);
  convert_to(out);
  const json config = read_json_file(out / "config.json");
  EXPECT_EQ(config["architectures"], json{"LlamaForCausalLM"});
  EXPECT_EQ(config["hidden_size"], 96);
  EXPECT_EQ(config["head_dim"], 16);
  EXPECT_EQ(config["num_key_value_heads"], 2);
  EXPECT_EQ(config["vocab_size"], 270);
  EXPECT_EQ(config["rms_norm_eps"], 1e-5);
  EXPECT_EQ(config["rope_theta"], 100000.0);
  EXPECT_EQ(config["tie_word_embeddings"], true);
  EXPECT_EQ(config["eos_token_id"], 2);
  EXPECT_EQ(read_json_file(out / "generation_config.json")["bos_token_id"], 1);
  const SafetensorsFile f = open_safetensors(out / "model.safetensors");
  EXPECT_EQ(f.tensors.size(), 2u + 2 * 9);
  EXPECT_EQ(f.at("model.layers.1.mlp.down_proj.weight").shape,
            (std::vector<std::int64_t>{96, 160}));

  // Query rows come back from pairs side by side to halves; value rows stay. Against the file's
  // own F16 and Q4_1 rows, dequantized here.
  const GgufFile from = open_gguf(file);
  const auto row_of = [&](const char* name, std::int64_t row) {
    const GgufTensor& t = from.tensors.at(name);
    const std::int64_t n = t.shape.back(), bytes = stored_bytes(t.type, n);
    const StoredWeight s{{t.type, t.shape[0], n, t.data, bytes, 2, 0}, {}, "f", name};
    std::vector<Bf16> out(static_cast<std::size_t>(n));
    read_rows(s, row, 1, out.data(), n);
    return out;
  };
  const auto q = bits_of(f.at("model.layers.0.self_attn.q_proj.weight"));
  const auto v = bits_of(f.at("model.layers.0.self_attn.v_proj.weight"));
  for (int head = 0; head < 6; ++head)
    for (int i = 0; i < 8; ++i)
      for (int half = 0; half < 2; ++half) {
        const auto row = row_of("blk.0.attn_q.weight", head * 16 + 2 * i + half);
        ASSERT_EQ(std::memcmp(&q[(head * 16 + half * 8 + i) * 96], row.data(), 192), 0)
            << head << " " << i << " " << half;
      }
  ASSERT_EQ(std::memcmp(&v[96 * 5], row_of("blk.0.attn_v.weight", 5).data(), 192), 0);
}

TEST_F(Gguf, tokenizer_and_chat_template_come_along) {
  put(SmallGguf());
  convert_to(out);
  const json t = read_json_file(out / "tokenizer.json", 1 << 20);
  EXPECT_EQ(t["model"]["type"], "BPE");
  EXPECT_EQ(t["model"]["vocab"].size(), 264u);
  EXPECT_EQ(t["model"]["vocab"]["hello"], 262);
  EXPECT_EQ(t["model"]["merges"][3], "hell o");
  ASSERT_EQ(t["added_tokens"].size(), 3u);
  EXPECT_EQ(t["added_tokens"][1]["content"], "<|im_start|>");
  EXPECT_EQ(t["added_tokens"][1]["special"], true);
  EXPECT_EQ(t["pre_tokenizer"]["pretokenizers"][0],
            json::parse(R"({"type": "Digits", "individual_digits": true})"));
  EXPECT_EQ(t["decoder"]["type"], "ByteLevel");
  EXPECT_TRUE(t["post_processor"].is_null());
  const json c = read_json_file(out / "tokenizer_config.json");
  EXPECT_EQ(c["chat_template"], "{{ messages }}");
  EXPECT_EQ(c["eos_token"], "<|im_end|>");
}

TEST_F(Gguf, qwen3moe_loads_into_the_engine) {
  put(SmallGguf("qwen3moe", 4));
  convert_to(out);
  const Weights w = load_checkpoint(out);
  EXPECT_EQ(w.config.num_experts, 4);
  EXPECT_EQ(w.config.router.top_k, 2);
  EXPECT_TRUE(w.config.router.normalize);
  EXPECT_TRUE(w.config.tie_word_embeddings);
  // No interleaving in this architecture: row 3 of expert 2 is row 3 of the file's slab.
  const GgufTensor t = open_gguf(file).tensors.at("blk.1.ffn_up_exps.weight");
  EXPECT_EQ(t.shape, (std::vector<std::int64_t>{4, 160, 96}));
  convert_to(folder / "fp8", StoreAs::kFp8);
  EXPECT_TRUE(has_fp8(open_checkpoint(folder / "fp8")));
}

TEST_F(Gguf, other_families) {
  put(SmallGguf("llama", 4));
  convert_to(folder / "mixtral");
  EXPECT_EQ(read_json_file(folder / "mixtral/config.json")["num_local_experts"], 4);
  EXPECT_EQ(open_safetensors(folder / "mixtral/model.safetensors")
                .at("model.layers.1.block_sparse_moe.experts.3.w2.weight")
                .shape,
            (std::vector<std::int64_t>{96, 160}));
  put(SmallGguf("qwen3"));
  convert_to(folder / "qwen3");
  EXPECT_EQ(read_json_file(folder / "qwen3/config.json")["architectures"],
            json{"Qwen3ForCausalLM"});
  expect_source_refused(SmallGguf("qwen3moe"), {"qwen3moe", "0 experts"});
  expect_source_refused(SmallGguf("qwen3", 4), {"qwen3", "4 experts"});
  expect_source_refused(SmallGguf("gemma"), {"general.architecture", "gemma", "llama"});
}

TEST_F(Gguf, conversion_is_deterministic) {
  put(SmallGguf());
  convert_to(out, StoreAs::kFp8);
  convert_to(folder / "again", StoreAs::kFp8);
  for (const auto& entry : std::filesystem::directory_iterator(out))
    EXPECT_EQ(file_bytes(entry.path()), file_bytes(folder / "again" / entry.path().filename()))
        << entry.path();
}

TEST_F(Gguf, a_cut_at_every_byte_of_the_header_is_refused) {
  SmallGguf g;
  g.w.keys.clear();
  g.w.key_count = 0;
  g.w.text("general.architecture", "llama");
  g.w.tensors.resize(3);
  const std::string whole = g.w.bytes();
  put(whole);
  open_gguf(file);
  for (std::size_t n = 0; n < whole.size(); n += n < 400 ? 1 : 997) {
    SCOPED_TRACE(n);
    expect_open_refused(whole.substr(0, n), {});
  }
}

TEST_F(Gguf, huge_counts_and_lengths_are_refused_before_memory_is_taken) {
  const std::string head = "GGUF" + bytes_of<std::uint32_t>(3);
  const auto u64 = [](std::uint64_t n) { return bytes_of(n); };
  for (const std::uint64_t n :
       {std::uint64_t{1} << 20, std::uint64_t{1} << 61, ~std::uint64_t{0}}) {
    SCOPED_TRACE(n);
    expect_open_refused(head + u64(n) + u64(0) + std::string(100, 'x'), {"tensors"});
    expect_open_refused(head + u64(0) + u64(n) + std::string(100, 'x'), {"keys"});
    expect_open_refused(head + u64(0) + u64(1) + u64(n) + std::string(100, 'x'), {"key 0"});
    GgufWriter w;
    w.key("k", 8, u64(n) + "abc");
    expect_open_refused(w.bytes(), {"'k'", "truncated"});
    for (const std::uint32_t item : {0, 4, 8, 12}) {
      w = {};
      w.key("k", 9, bytes_of<std::uint32_t>(item) + u64(n) + "abc");
      expect_open_refused(w.bytes(), {"'k'", "do not fit"});
    }
    w = {};
    w.tensors = {{"t", {n, n}, 0, "", -1}};
    expect_open_refused(w.bytes(), {"'t'"});
    w.tensors = {{"t", {n}, 0, "", -1}};
    expect_open_refused(w.bytes(), {"'t'"});
    w.tensors = {{"t", {4}, 0, std::string(16, 'x'), static_cast<std::int64_t>(n / 64 * 32)}};
    expect_open_refused(w.bytes(), {"'t'"});
  }
}

TEST_F(Gguf, malformed_headers_are_refused) {
  expect_open_refused("", {"header"});
  expect_open_refused("GGML" + std::string(60, '\0'), {"not a GGUF file"});
  expect_open_refused("GGUF" + bytes_of<std::uint32_t>(2) + std::string(60, '\0'), {"version 2"});
  expect_open_refused("GGUF" + bytes_of<std::uint32_t>(3u << 24) + std::string(60, '\0'),
                      {"version"});
  const auto with_key = [](std::uint32_t type, const std::string& value) {
    GgufWriter w;
    w.key("k", type, value);
    return w.bytes();
  };
  expect_open_refused(with_key(13, "abcdefgh"), {"'k'", "type 13"});
  expect_open_refused(with_key(7, "\2"), {"'k'", "truth"});
  expect_open_refused(with_key(10, bytes_of(~std::uint64_t{0})), {"'k'", "too large"});
  expect_open_refused(
      with_key(9, bytes_of<std::uint32_t>(9) + bytes_of<std::uint64_t>(1) + std::string(40, '\0')),
      {"'k'", "array of type 9"});
  GgufWriter w;
  w.integer("k", 1);
  w.integer("k", 1);
  expect_open_refused(w.bytes(), {"'k'", "twice"});
  w = {};
  w.integer("", 1);
  expect_open_refused(w.bytes(), {"name"});
  w = {};
  w.integer("general.alignment", 24);
  expect_open_refused(w.bytes(), {"general.alignment"});

  const auto with_tensors = [](std::vector<GgufWriter::Tensor> tensors) {
    GgufWriter v;
    v.tensors = std::move(tensors);
    return v.bytes();
  };
  const std::string data(128, '\0');
  expect_open_refused(with_tensors({{"t", {4}, 2, data, -1}}), {"'t'", "type 2"});
  expect_open_refused(with_tensors({{"t", {}, 0, data, -1}}), {"'t'", "0 axes"});
  expect_open_refused(with_tensors({{"t", {1, 1, 1, 1, 1}, 0, data, -1}}), {"'t'", "5 axes"});
  expect_open_refused(with_tensors({{"t", {0}, 0, data, -1}}), {"'t'", "dimension"});
  expect_open_refused(with_tensors({{"t", {33}, 3, data, -1}}), {"'t'", "blocks"});
  expect_open_refused(with_tensors({{"t", {4}, 0, data, 8}}), {"'t'", "multiple of 32"});
  expect_open_refused(with_tensors({{"t", {64}, 0, data, -1}}), {"'t'", "truncated"});
  expect_open_refused(with_tensors({{"t", {4}, 0, data, -1}, {"t", {4}, 0, data, -1}}),
                      {"'t'", "twice"});
  expect_open_refused(with_tensors({{"a", {32}, 0, data, 0}, {"t", {4}, 0, data, 96}}),
                      {"'t'", "overlaps"});
}

TEST_F(Gguf, models_that_do_not_fit_their_keys_are_refused) {
  const auto without = [](const std::string& name) {
    SmallGguf g;
    std::erase_if(g.w.tensors, [&](const auto& t) { return t.name == name; });
    return g;
  };
  expect_source_refused(without("blk.1.attn_k.weight"), {"'blk.1.attn_k.weight'", "missing"});
  expect_source_refused(without("token_embd.weight"), {"'token_embd.weight'"});
  SmallGguf g;
  g.add("rope_freqs.weight", {8}, 0);
  expect_source_refused(g, {"'rope_freqs.weight'", "no part"});
  g = SmallGguf();
  g.w.tensors[2].dimensions = {32, 96};
  g.w.tensors[2].data.resize(1920);
  expect_source_refused(g, {"'blk.0.attn_q.weight'", "[96, 32]", "[96, 96]"});
  g = SmallGguf();
  g.w.integer("llama.attention.sliding_window", 128);
  expect_source_refused(g, {"'llama.attention.sliding_window'"});
  g = SmallGguf();
  g.w.text("llama.rope.scaling.type", "yarn");
  expect_source_refused(g, {"'llama.rope.scaling.type'", "yarn"});
  g = SmallGguf();
  g.w.integer("llama.rope.dimension_count", 8);
  expect_source_refused(g, {"'llama.rope.dimension_count'"});
  g = SmallGguf();
  g.w.integer("llama.vocab_size", 12);
  expect_source_refused(g, {"'llama.vocab_size'", "270"});
  // 2^31 experts, none used, more used than there are.
  for (const auto& [experts, used] : std::vector<std::pair<std::uint32_t, std::uint32_t>>{
           {1u << 31, 2}, {4, 0}, {4, 5}, {1u << 30, 2}}) {
    g = SmallGguf();
    g.w.integer("llama.expert_count", experts);
    g.w.integer("llama.expert_used_count", used);
    expect_source_refused(g, {});
  }
  g = SmallGguf();  // a NaN among the scales of a block
  g.w.tensors[2].data[1] = '\x7e';
  put(g);
  expect_refused([&] { convert_to(out); }, {file.string(), "blk.0.attn_q.weight"});
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST_F(Gguf, tokenizers_that_cannot_be_carried_over_are_refused) {
  const auto with = [](const std::function<void(GgufWriter&)>& more, const std::string& leave_out) {
    SmallGguf g;
    GgufWriter w;
    w.tensors = g.w.tensors;
    for (const char* name :
         {"block_count", "context_length", "embedding_length", "feed_forward_length",
          "attention.head_count", "attention.head_count_kv"}) {
      const std::string key = std::string("llama.") + name;
      const std::size_t at = g.w.keys.find(key) + key.size() + 4;
      std::uint32_t n = 0;
      std::memcpy(&n, &g.w.keys[at], 4);
      w.integer(key, n);
    }
    w.text("general.architecture", "llama");
    w.number("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (leave_out != "model") w.text("tokenizer.ggml.model", "gpt2");
    if (leave_out != "tokens") w.texts("tokenizer.ggml.tokens", {"a", "b", "ab", "<s>"});
    if (leave_out != "merges") w.texts("tokenizer.ggml.merges", {"a b"});
    more(w);
    g.w = w;
    return g;
  };
  put(with([](GgufWriter&) {}, ""));
  open_gguf_source(file);
  const auto refused = [&](const std::string& leave_out, auto more,
                           std::initializer_list<std::string> parts) {
    expect_source_refused(with(more, leave_out), parts);
  };
  using W = GgufWriter&;
  refused("model", [](W w) { w.text("tokenizer.ggml.model", "llama"); }, {"'llama'", "gpt2"});
  refused("", [](W w) { w.text("tokenizer.ggml.pre", "chaos"); }, {"pre'", "'chaos'", "smollm"});
  refused("tokens",
          [](W w) {
            w.texts("tokenizer.ggml.tokens", {"a", "a"});
          },
          {"tokens'", "twice"});
  refused("tokens", [](W w) { w.texts("tokenizer.ggml.tokens", {"a", ""}); }, {"token 1", "empty"});
  refused("tokens",
          [](W w) {
            w.texts("tokenizer.ggml.tokens", {"a", "b", "ab", "\xff"});
          },
          {"JSON"});
  refused("tokens", [](W) {}, {"tokenizer.ggml.tokens", "missing"});
  for (const char* merge : {"a c", "b a", "ab", "", " ", "a "})
    refused("merges", [&](W w) { w.texts("tokenizer.ggml.merges", {merge}); }, {"merges'"});
  refused("", [](W w) { w.integers("tokenizer.ggml.token_type", {1, 1}); }, {"2 types"});
  refused("", [](W w) { w.integers("tokenizer.ggml.token_type", {1, 1, 1, 6}); }, {"type 6"});
  refused("", [](W w) { w.integer("tokenizer.ggml.bos_token_id", 4); }, {"bos_token_id", "4"});
  refused("", [](W w) { w.integer("tokenizer.ggml.eos_token_id", 400); }, {"eos_token_id"});
  refused("", [](W w) { w.text("tokenizer.ggml.eos_token_id", "x"); }, {"eos_token_id"});
}

}  // namespace
}  // namespace lockstep::model
