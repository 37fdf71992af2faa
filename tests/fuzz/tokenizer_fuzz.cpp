// tokenizer.json: read, and used on a few texts, there and back.
#include "fuzz/fuzz.h"
#include "model/gguf_writer.h"
#include "model/model_source.h"
#include "model/tokenizer.h"

using namespace lockstep;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::MemoryFile file(data, size);
  try {
    const model::Tokenizer tokenizer = model::read_tokenizer(file.path());
    for (const char* text :
         {"", "hello hello w  \n\n 12345 don't", "\xE4\xB8\xAD<|im_end|>\xF0\x9F\x99\x82 e\xCC\x81",
          "\xff\xc0 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"}) {
      const std::vector<std::int32_t> tokens = model::encode(tokenizer, text);
      model::decode(tokenizer, tokens, false);
      model::encode_ordinary(tokenizer, text);
    }
    model::decode(tokenizer, {-1, 0, 1, 100, 1 << 30}, true);
  } catch (const base::InputError&) {
  }
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  std::vector<std::string> out;
  for (const char* pre : {"smollm", "gpt-2", "llama-bpe", "qwen2"}) {
    model::GgufWriter w;
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", pre);
    w.texts("tokenizer.ggml.tokens", {"h", "e", "l", "o", "he", "ll", "hell", "hello", "1", "2",
                                      "\xC4\xA0", "\xC3\xBF", "<|im_end|>", "<|user|>"});
    w.integers("tokenizer.ggml.token_type", {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 4});
    w.texts("tokenizer.ggml.merges", {"h e", "l l", "he ll", "hell o"});
    w.integer("tokenizer.ggml.bos_token_id", 12);
    if (pre[0] == 'l') w.key("tokenizer.ggml.add_bos_token", 7, std::string(1, '\1'));
    const std::string bytes = w.bytes();
    const MemoryFile file(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    out.push_back(model::gguf_tokenizer_files(model::open_gguf(file.path())).at("tokenizer.json"));
  }
  return out;
}

std::vector<std::string> fuzz::words() {
  return {"\"Regex\": \"(a+)+$\"",
          "\"Regex\": \"(?=(a|aa)*b)\"",
          "\"NFKC\"",
          "\"NFD\"",
          "\"Sequence\"",
          "\"WordPiece\"",
          "\"Replace\"",
          "\"Strip\"",
          "\"lstrip\": true",
          "\"rstrip\": true",
          "\"normalized\": true",
          "\"byte_fallback\": true",
          "\"ignore_merges\": true",
          "\"<0x41>\"",
          "\"<0x-1>\"",
          "\"MergedWithPrevious\"",
          "\"Removed\"",
          "\"String\": \" \"",
          "null",
          "true",
          "-1",
          "2147483648",
          "\"\"",
          "[",
          "]",
          "{",
          "}",
          "\\ud800",
          "\\u0000",
          "\xff",
          "h e",
          "\"invert\": true",
          "\"add_prefix_space\": true",
          "\"single_word\": true",
          std::string(300, '(')};
}
