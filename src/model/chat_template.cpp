#include "model/chat_template.h"

#include "base/error.h"
#include "model/unicode_text.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using data::Message;

namespace {

using Kind = ChatTemplate::Kind;
using Messages = std::vector<Message>;

// White space of Python's str.strip().
bool is_python_space(std::uint32_t c) { return is_white_space(c) || (c >= 0x1C && c <= 0x1F); }

std::string trimmed(std::string_view text) {
  std::size_t begin = 0, end = 0;
  bool started = false;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t here = at;
    if (is_python_space(next_code_point(text, at))) continue;
    if (!started) begin = here;
    started = true;
    end = at;
  }
  return std::string(text.substr(begin, end - begin));
}

std::string without_newlines(std::string text, bool left, bool right) {
  if (left) text.erase(0, text.find_first_not_of('\n'));
  if (right) text.erase(text.find_last_not_of('\n') + 1);
  return text;
}

void check_roles(const ChatTemplate& chat, const Messages& messages) {
  if (messages.empty()) fail<InputError>("{}: a conversation without messages", chat.file);
  for (const Message& m : messages)
    if (m.role != "system" && m.role != "user" && m.role != "assistant")
      fail<InputError>(
          "{}: a message of role '{}'; Lockstep renders the roles system, user and assistant",
          chat.file, m.role);
}

std::string chat_ml(const ChatTemplate& chat, const Messages& messages, bool prompt) {
  std::string out;
  if (chat.default_system && messages[0].role != "system")
    out += "<|im_start|>system\n" + chat.system_text + "<|im_end|>\n";
  for (const Message& m : messages)
    out += "<|im_start|>" + m.role + "\n" + (chat.trim ? trimmed(m.content) : m.content) +
           "<|im_end|>\n";
  return prompt ? out + "<|im_start|>assistant\n" : out;
}

// The last turn of a user that is not the answer of a tool.
std::size_t last_query(const Messages& messages) {
  for (std::size_t i = messages.size(); i-- > 0;) {
    const std::string& text = messages[i].content;
    if (messages[i].role == "user" &&
        !(text.starts_with("<tool_response>") && text.ends_with("</tool_response>")))
      return i;
  }
  return messages.size() - 1;
}

std::string qwen3(const ChatTemplate& chat, const Messages& messages, const ChatOptions& options,
                  bool prompt) {
  std::string out;
  const std::size_t query = last_query(messages);
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const Message& m = messages[i];
    std::string content = m.content, thought;
    if (m.role == "assistant") {
      if (const std::size_t end = content.find("</think>"); end != std::string::npos) {
        thought = without_newlines(content.substr(0, end), false, true);
        if (const std::size_t begin = thought.rfind("<think>"); begin != std::string::npos)
          thought.erase(0, begin + 7);
        thought = without_newlines(thought, true, false);
        content = without_newlines(content.substr(content.rfind("</think>") + 8), true, false);
      }
      if (i > query && ((chat.wraps_last && i + 1 == messages.size()) || !thought.empty()))
        content = "<think>\n" + without_newlines(thought, true, true) + "\n</think>\n\n" +
                  without_newlines(content, true, false);
    }
    out += "<|im_start|>" + m.role + "\n" + content + "<|im_end|>\n";
  }
  if (!prompt) return out;
  out += "<|im_start|>assistant\n" + chat.prompt_suffix;
  if (chat.can_switch_thinking && !options.enable_thinking) out += "<think>\n\n</think>\n\n";
  return out;
}

std::string deep_seek(const ChatTemplate& chat, const Messages& messages,
                      const ChatOptions& options, bool prompt) {
  std::string system, out;
  bool first = true;
  for (const Message& m : messages)
    if (m.role == "system") {
      system = (chat.joins_system && !first ? system + "\n\n" : "") + m.content;
      first = false;
    }
  out = options.bos + system;
  for (const Message& m : messages) {
    if (m.role == "user") out += "<｜User｜>" + m.content;
    if (m.role != "assistant") continue;
    const std::size_t thought =
        chat.drops_thoughts ? m.content.rfind("</think>") : std::string::npos;
    out += "<｜Assistant｜>" +
           (thought == std::string::npos ? m.content : m.content.substr(thought + 8)) +
           "<｜end▁of▁sentence｜>";
  }
  return prompt ? out + "<｜Assistant｜>" + chat.prompt_suffix : out;
}

std::string llama3(const ChatTemplate& chat, const Messages& messages, const ChatOptions& options,
                   bool prompt) {
  const auto header = [](const std::string& role) {
    return "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
  };
  const auto text = [&](const Message& m) { return chat.trim ? trimmed(m.content) : m.content; };
  std::string out = options.bos;
  std::size_t i = 0;
  if (!chat.date.empty()) {
    out += header("system") + "Cutting Knowledge Date: December 2023\nToday Date: " + chat.date +
           "\n\n";
    out += messages[0].role == "system" ? text(messages[i++]) : chat.system_text;
    out += "<|eot_id|>";
  }
  for (; i < messages.size(); ++i)
    out += header(messages[i].role) + text(messages[i]) + "<|eot_id|>";
  return prompt ? out + header("assistant") : out;
}

std::string mistral(const ChatTemplate& chat, Messages messages, const ChatOptions& options) {
  std::string out = options.bos, system;
  const bool has_system = messages[0].role == "system";
  if (has_system) {
    if (chat.system_place == ChatTemplate::kRefused)
      fail<InputError>("{}: this Mistral template has no place for a system message", chat.file);
    system = messages[0].content;
    messages.erase(messages.begin());
    if (chat.system_place == ChatTemplate::kOwnBlock)
      out += chat.before_system + system + chat.after_system;
  }
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const Message& m = messages[i];
    if (m.role != (i % 2 == 0 ? "user" : "assistant"))
      fail<InputError>(
          "{}: this Mistral template wants the roles user and assistant in turn, message {} has "
          "role '{}'",
          chat.file, i + 1 + has_system, m.role);
    if (m.role == "assistant") {
      out += chat.before_answer + (chat.trims_answer ? trimmed(m.content) : m.content) +
             options.eos + chat.after_answer;
      continue;
    }
    const bool here =
        has_system && ((chat.system_place == ChatTemplate::kFirstUser && i == 0) ||
                       (chat.system_place == ChatTemplate::kLastUser && i + 1 == messages.size()));
    out += chat.before_user + (here ? system + "\n\n" : "") + m.content + chat.after_user;
  }
  return out;
}

}  // namespace

std::string render_chat(const ChatTemplate& chat, const Messages& messages,
                        const ChatOptions& options) {
  check_roles(chat, messages);
  const bool prompt = options.add_generation_prompt || chat.always_prompts;
  switch (chat.kind) {
    case Kind::kChatMl:
      return chat_ml(chat, messages, prompt);
    case Kind::kQwen3:
      return qwen3(chat, messages, options, prompt);
    case Kind::kDeepSeek:
      return deep_seek(chat, messages, options, prompt);
    case Kind::kLlama3:
      return llama3(chat, messages, options, prompt);
    case Kind::kMistral:
      return mistral(chat, messages, options);
    case Kind::kNone:
      fail<InputError>("the tokenizer's files carry no chat template");
    case Kind::kUnknown:
      break;
  }
  fail<InputError>(
      "{}: the chat template is not supported: {}. Render the conversations with another program "
      "and give them as text",
      chat.file, chat.reason);
}

}  // namespace lockstep::model
