// Which chat template a model has, see chat_template.h.
#include "model/chat_template.h"

namespace lockstep::model {

namespace {

using Kind = ChatTemplate::Kind;

// The template as plain as it can be compared: one kind of quotes, no blanks around operators,
// newlines of literals as they are meant, no comments.
std::string plain(std::string_view jinja) {
  std::string out;
  for (std::size_t i = 0; i < jinja.size(); ++i) {
    if (jinja.substr(i).starts_with("{#")) {
      const std::size_t end = jinja.find("#}", i + 2);
      if (end == std::string_view::npos) break;
      i = end + 1;
    } else if (jinja[i] == '"') {
      out += '\'';
    } else if (jinja.substr(i).starts_with("\\n")) {
      out += '\n';
      ++i;
    } else {
      out += jinja[i];
    }
  }
  return out;
}

bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// What stands between `before` and `after` where no quote comes in between; "" when there is none.
std::string between(std::string_view text, std::string_view before, std::string_view after) {
  for (std::size_t at = text.find(before); at != std::string_view::npos;
       at = text.find(before, at + 1)) {
    const std::size_t begin = at + before.size(), end = text.find(after, begin);
    if (end == std::string_view::npos) return "";
    const std::string_view found = text.substr(begin, end - begin);
    if (!has(found, "'") && !has(found, "{")) return std::string(found);
  }
  return "";
}

// The literal that holds `mark`, without its quotes.
std::string literal_with(std::string_view text, std::string_view mark) {
  const std::size_t at = text.find(mark);
  if (at == std::string_view::npos) return "";
  const std::size_t begin = text.rfind('\'', at), end = text.find('\'', at);
  if (begin == std::string_view::npos || end == std::string_view::npos) return "";
  return std::string(text.substr(begin + 1, end - begin - 1));
}

ChatTemplate unknown(std::string reason) {
  ChatTemplate t;
  t.kind = Kind::kUnknown;
  t.reason = std::move(reason);
  return t;
}

ChatTemplate chat_ml(const std::string& source) {
  ChatTemplate t;
  const bool thinks = has(source, "</think>");
  if (thinks && !has(source, "last_query_index"))
    return unknown("a ChatML template with <think> that is not Qwen3's");
  t.kind = thinks ? Kind::kQwen3 : Kind::kChatMl;
  t.always_prompts = !has(source, "add_generation_prompt");
  t.can_switch_thinking = has(source, "enable_thinking");
  if (has(source, "assistant\n<think>\n'")) {
    if (t.can_switch_thinking) return unknown("a Qwen template that opens a thought by a switch");
    t.prompt_suffix = "<think>\n";
  }
  t.wraps_last = has(source, "loop.last or (not loop.last and reasoning_content)");
  if (thinks && !t.wraps_last && !has(source, "if reasoning_content %}"))
    return unknown("a Qwen template that shows thoughts in another way");
  if (!thinks) {
    t.trim = has(source, "['content']|trim") || has(source, "['content'] | trim") ||
             has(source, ".content|trim") || has(source, ".content | trim") ||
             has(source, "['content'].strip()");
    t.system_text = between(source, "<|im_start|>system\n", "<|im_end|>");
    t.default_system = !t.system_text.empty();
  }
  return t;
}

ChatTemplate deep_seek(const std::string& source) {
  if (has(source, "thinking"))
    return unknown("a DeepSeek template with a switch 'thinking' (V3.1)");
  ChatTemplate t;
  t.kind = Kind::kDeepSeek;
  t.always_prompts = !has(source, "add_generation_prompt");
  t.joins_system = has(source, "is_first_sp");
  t.drops_thoughts = has(source, "split('</think>')");
  if (has(source, "<｜Assistant｜><think>\n'")) t.prompt_suffix = "<think>\n";
  return t;
}

ChatTemplate llama3(const std::string& source) {
  ChatTemplate t;
  t.kind = Kind::kLlama3;
  t.always_prompts = !has(source, "add_generation_prompt");
  t.trim = has(source, "trim");
  if (!has(source, "Cutting Knowledge Date")) return t;
  if (has(source, "strftime_now"))
    return unknown("a Llama template whose text has the date of the day (3.2)");
  t.date = between(source, "set date_string = '", "'");
  if (t.date.empty()) return unknown("a Llama 3.1 template without a date_string");
  t.system_text = between(source, "set system_message = '", "'");
  t.default_system = !t.system_text.empty();
  return t;
}

ChatTemplate mistral(const std::string& source) {
  ChatTemplate t;
  t.kind = Kind::kMistral;
  t.before_user = literal_with(source, "[INST]");
  t.after_user = literal_with(source, "[/INST]");
  const auto blank = [](const std::string& s) {
    return s.find_first_not_of(' ') == std::string::npos;
  };
  for (auto [text, mark] : {std::pair{t.before_user, "[INST]"}, {t.after_user, "[/INST]"}}) {
    const std::size_t at = text.find(mark);
    if (at == std::string::npos || !blank(text.replace(at, std::string_view(mark).size(), "")))
      return unknown("a Mistral template with other text beside [INST] and [/INST]");
  }
  if (has(source, "[SYSTEM_PROMPT]")) {
    t.before_system = literal_with(source, "[SYSTEM_PROMPT]");
    t.after_system = literal_with(source, "[/SYSTEM_PROMPT]");
    t.system_place = ChatTemplate::kOwnBlock;
    if (has(source, "default_system_message") || has(source, "strftime_now"))
      return unknown("a Mistral template with a system prompt of its own");
  } else if (has(source, "system_message")) {
    const bool first = has(source, "loop.first and system_message"),
               last =
                   has(source, "loop.last and system_message") || has(source, "user_messages[-1]");
    if (first == last) return unknown("a Mistral template with a system prompt at another place");
    t.system_place = first ? ChatTemplate::kFirstUser : ChatTemplate::kLastUser;
  }
  t.before_answer =
      has(source, "' ' + message['content']") || has(source, "' '+message['content']") ? " " : "";
  if (has(source, "eos_token + ' '") || has(source, "eos_token+' '")) t.after_answer = " ";
  t.trims_answer = has(source, "message['content']|trim + eos_token") ||
                   has(source, "message['content'] | trim + eos_token");
  if (!t.trims_answer && has(source, "trim"))
    return unknown("a Mistral template that trims at another place");
  return t;
}

}  // namespace

ChatTemplate recognise_chat_template(std::string_view jinja) {
  if (jinja.empty()) return {};
  const std::string source = plain(jinja);
  if (has(source, "<|im_start|>") && has(source, "<|im_end|>")) return chat_ml(source);
  if (has(source, "<｜User｜>") && has(source, "<｜Assistant｜>")) return deep_seek(source);
  if (has(source, "<|start_header_id|>") && has(source, "<|eot_id|>")) return llama3(source);
  if (has(source, "[INST]") && has(source, "[/INST]") && !has(source, "<<SYS>>"))
    return mistral(source);
  return unknown("none of ChatML, Qwen3, DeepSeek, Llama 3, Mistral");
}

}  // namespace lockstep::model
