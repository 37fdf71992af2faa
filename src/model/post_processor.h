// The post-processor of a tokenizer.json: special tokens around a text.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "model/json_part.h"

namespace lockstep::model {

constexpr std::int32_t kTextItself = -1;

// The ids around a single text, kTextItself where its tokens stand. TemplateProcessing, ByteLevel
// (which moves offsets, not tokens), Sequence; null gives the text itself. Any other type is an
// InputError that names it.
std::vector<std::int32_t> read_post_processor(const JsonPart& part);

}  // namespace lockstep::model
