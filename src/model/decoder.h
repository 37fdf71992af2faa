// The decoder of a tokenizer.json: token texts to text, whole or as they come.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "model/json_part.h"
#include "model/normalizer.h"

namespace lockstep::model {

struct DecoderStep {
  enum Kind { kByteLevel, kByteFallback, kFuse, kStrip, kReplace, kMetaspace };
  Kind kind = kFuse;
  Pattern pattern;                  // of kReplace
  std::string content;              // of kReplace; of kStrip, kMetaspace: one character
  std::size_t start = 0, stop = 0;  // of kStrip: how many at most
  bool prefix = true;               // of kMetaspace: in the first token they go, not to blanks
};

struct Decoder {
  std::vector<DecoderStep> steps;
  // Without a decoder the texts are joined by spaces.
  bool spaces = true;
};

// Null, ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace, Sequence; any other type is an
// InputError that names it.
Decoder read_decoder(const JsonPart& part);

// The text of the tokens. Bytes that make no character become U+FFFD: with ByteLevel one for each
// maximal ill-formed part, with ByteFallback one for each byte of a run that is not UTF-8.
std::string decode_texts(const Decoder& decoder, std::vector<std::string> texts);

// The same in pieces that never split a character: the pieces and the end together are what
// decode_texts gives for all tokens. Held back: bytes of a character that is not complete
// (ByteLevel), and runs of byte tokens until they end (ByteFallback), because a bad byte later in
// the run changes all of it. Decoders of another shape give everything at the end.
class TextStream {
 public:
  explicit TextStream(const Decoder& decoder);
  std::string push(std::string_view token_text);
  std::string finish();

 private:
  enum Shape { kBytes, kTokens, kWhole };
  std::string flush_run();
  std::string after_fuse(std::string text);

  const Decoder& decoder_;
  Shape shape_;
  std::string held_;                      // kBytes: the end of the bytes; kTokens: the open run
  std::vector<std::string> texts_;        // kWhole
  std::size_t per_token_ = 0;             // kTokens: steps before ByteFallback
  bool fallback_ = false, first_ = true;  // kTokens: there is one; no token came yet
  std::vector<std::size_t> strip_left_;   // kTokens: of the steps behind Fuse, still to strip
};

}  // namespace lockstep::model
