// A tokenizer.json of the Hugging Face `tokenizers` library with a BPE model, ready to run. The ids
// are those that `tokenizers` 0.23 gives. What is supported: docs/tokenizers.md.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "model/added_tokens.h"
#include "model/bpe.h"
#include "model/decoder.h"
#include "model/normalizer.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer.h"

namespace lockstep::model {

struct TokenizerPipeline {
  AddedTokens added;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  std::vector<std::int32_t> around;  // post-processor: ids, kTextItself where the text stands
  Decoder decoder;

  struct Text {
    std::string text;  // "" for ids that are not taken
    bool special = false;
  };
  std::vector<Text> texts;  // of all ids, added ones included
};

// InputError naming the file and the part that is malformed or not supported.
TokenizerPipeline read_pipeline(const nlohmann::json& document, const std::string& file);

// The text may be any bytes: what is not UTF-8 becomes U+FFFD first.
void encode_with(const TokenizerPipeline& pipeline, std::string_view text,
                 const EncodeOptions& options, std::vector<std::int32_t>& tokens);

}  // namespace lockstep::model
