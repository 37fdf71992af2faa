#include "model/tokenizer_json.h"

#include "model/json_part.h"
#include "model/post_processor.h"
#include "model/unicode_text.h"

namespace lockstep::model {

namespace {

std::vector<TokenizerPipeline::Text> all_texts(const Bpe& bpe, const AddedTokens& added) {
  std::vector<TokenizerPipeline::Text> texts(bpe.texts.size());
  for (std::size_t id = 0; id < bpe.texts.size(); ++id) texts[id].text = bpe.texts[id];
  for (const AddedToken& t : added.tokens) {
    const auto id = static_cast<std::size_t>(t.id);
    if (id >= texts.size()) texts.resize(id + 1);
    // A special token whose normalized text is another one is not left out, as in `tokenizers`.
    texts[id] = {t.text, t.special && t.text == t.content};
  }
  return texts;
}

}  // namespace

TokenizerPipeline read_pipeline(const nlohmann::json& document, const std::string& file) {
  const JsonPart top{document, file, ""};
  if (top["model"].is_null()) top.fail("model is missing");
  check_model_type(top["model"].value, file);  // first: it says most about what the file is
  top.only({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
            "post_processor", "decoder", "model"});
  if (const std::string version = top["version"].text_or("1.0"); version != "1.0")
    top["version"].fail(fmt::format("'{}' is not supported, only 1.0", shown(version)));
  for (const char* key : {"truncation", "padding"})
    if (!top[key].is_null()) top[key].fail("is not supported; set it to null");
  TokenizerPipeline p;
  p.normalizer = read_normalizer(top["normalizer"]);
  p.pre_tokenizer = read_pre_tokenizer(top["pre_tokenizer"]);
  // Where a text begins is followed through all but these, which may take its first characters.
  for (const NormalizerStep& s : p.normalizer.steps)
    if (asks_for_first(p.pre_tokenizer) &&
        ((s.kind == NormalizerStep::kStrip && s.left) ||
         (s.kind == NormalizerStep::kReplace && s.content.empty())))
      top["normalizer"].fail(
          "a Strip, or a Replace by nothing, is not supported together with a Metaspace of "
          "prepend_scheme 'first'");
  p.bpe = read_bpe(top["model"].value, p.pre_tokenizer.byte_words(), file);
  p.added = read_added_tokens(top["added_tokens"], p.bpe, p.normalizer);
  p.around = read_post_processor(top["post_processor"]);
  p.decoder = read_decoder(top["decoder"]);
  p.texts = all_texts(p.bpe, p.added);
  return p;
}

void encode_with(const TokenizerPipeline& p, std::string_view text, const EncodeOptions& options,
                 std::vector<std::int32_t>& tokens) {
  std::string lossy, storage;
  if (!is_valid_utf8(text)) text = lossy = valid_utf8(text);
  RegexScratch regex;
  BpeScratch bpe;
  const auto token = [&](std::int32_t id) { tokens.push_back(id); };
  const std::function<void(std::string_view)> word = [&](std::string_view w) {
    encode_word(p.bpe, w, bpe, tokens);
  };
  const auto raw = [&](std::string_view t) {
    const bool first = t.data() == text.data();
    const std::string_view normalized = normalize(p.normalizer, t, storage, regex);
    const auto piece = [&](std::string_view part) {
      pre_tokenize(p.pre_tokenizer, part, first && part.data() == normalized.data(), regex, word);
    };
    split_at_tokens(p.added, p.added.normalized, normalized, options.special_in_text, regex, piece,
                    token);
  };
  const auto itself = [&] {
    split_at_tokens(p.added, p.added.raw, text, options.special_in_text, regex, raw, token);
  };
  if (!options.add_special) return itself();
  for (const std::int32_t id : p.around)
    if (id == kTextItself) {
      itself();
    } else {
      tokens.push_back(id);
    }
}

}  // namespace lockstep::model
