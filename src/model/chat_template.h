// Chat templates: a conversation to the text that a model was trained on. The templates of four
// families are built in; which one a model has is seen by the template that its files carry.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::model {

struct ChatTemplate {
  enum Kind { kNone, kChatMl, kQwen3, kDeepSeek, kLlama3, kMistral, kUnknown };
  Kind kind = kNone;  // kNone: the files carry none
};

ChatTemplate recognise_chat_template(std::string_view text);

}  // namespace lockstep::model
