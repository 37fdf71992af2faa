// Chat templates: a conversation to the text that a model was trained on. The templates of four
// families are built in; which one a model has is seen by marks of the Jinja template that its
// files carry. Nothing of that template is run.
//
// | kind      | marks                                                                             |
// |-----------|-----------------------------------------------------------------------------------|
// | ChatML    | <|im_start|>, <|im_end|>, no <think>; a system prompt of its own is read from it  |
// | Qwen3     | the same with last_query_index and </think>                                       |
// | DeepSeek  | <｜User｜> and <｜Assistant｜> (V3, R1; not V3.1, which has a switch "thinking") |
// | Llama 3   | <|start_header_id|> and <|eot_id|> (3.0 and 3.1; not 3.2, whose text has the date)
// | | Mistral   | [INST] and [/INST] (spaces, place of the system prompt read from it) |
//
// Conversations have turns of the roles system, user and assistant; tools are not rendered.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::model {

struct ChatTemplate {
  enum Kind { kNone, kChatMl, kQwen3, kDeepSeek, kLlama3, kMistral, kUnknown };
  enum SystemPlace { kRefused, kFirstUser, kLastUser, kOwnBlock };

  Kind kind = kNone;   // kNone: the files carry none
  std::string reason;  // of kUnknown: what is not supported
  std::string file;    // where it stands, for messages

  bool trim = false;            // contents lose white space at both ends
  bool always_prompts = false;  // the prompt for an answer stands at the end in any case
  bool default_system = false;  // ChatML, Llama 3.1: a conversation without a system turn gets one
  std::string system_text;      // of default_system
  std::string prompt_suffix;  // Qwen3, DeepSeek: what opens the answer behind the role, "<think>\n"
  bool wraps_last = false;    // Qwen3: the last answer gets <think> even without a thought
  bool can_switch_thinking = false;  // Qwen3: enable_thinking
  bool joins_system = false;         // DeepSeek: all system turns count, not only the last one
  bool drops_thoughts = false;       // DeepSeek: what stands before </think> in an answer
  std::string date;                  // Llama 3.1: the date of its preamble; "" is 3.0
  // Mistral: around a user turn, around an answer and its end token, around a system turn.
  std::string before_user, after_user, before_answer, after_answer, before_system, after_system;
  bool trims_answer = false;
  SystemPlace system_place = kRefused;
};

// "" gives kNone, a template that is not known kUnknown with the reason.
ChatTemplate recognise_chat_template(std::string_view jinja);

struct ChatOptions {
  bool add_generation_prompt = true;
  bool enable_thinking = true;  // Qwen3
  std::string bos, eos;         // the texts of these tokens
};

// What transformers' apply_chat_template renders (tokenize=False). InputError for kNone and
// kUnknown, and where the template itself refuses the conversation.
std::string render_chat(const ChatTemplate& chat, const std::vector<data::Message>& messages,
                        const ChatOptions& options);

}  // namespace lockstep::model
