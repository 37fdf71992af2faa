#include "rl/jsonl.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace lockstep::rl {
namespace {

using Json = nlohmann::json;

// Where a complaint points to.
struct Line {
  const std::string& path;
  std::int64_t number;

  [[noreturn]] void fail(const std::string& what) const {
    base::fail<base::InputError>("{}:{}: {}", path, number, what);
  }
};

const Json& member(const Line& line, const Json& object, const std::string& key) {
  const auto found = object.find(key);
  if (found == object.end()) line.fail(fmt::format("key '{}' is missing", key));
  return *found;
}

std::string text_of(const Line& line, const Json& value, const std::string& key) {
  if (!value.is_string())
    line.fail(fmt::format("key '{}' must be a string, is {}", key, value.type_name()));
  return value.get<std::string>();
}

std::string label_of(const Line& line, const Json& value, const std::string& key) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number() || value.is_boolean()) return value.dump();
  line.fail(
      fmt::format("key '{}' must be a string, number or boolean, is {}", key, value.type_name()));
}

std::vector<data::Message> messages_of(const Line& line, const Json& value,
                                       const std::string& key) {
  if (!value.is_array() || value.empty())
    line.fail(fmt::format("key '{}' must be a non-empty array of messages", key));
  std::vector<data::Message> messages;
  for (std::size_t i = 0; i < value.size(); ++i) {
    const std::string place = fmt::format("{}[{}]", key, i);
    if (!value[i].is_object()) line.fail(fmt::format("'{}' must be an object", place));
    messages.push_back({text_of(line, member(line, value[i], "role"), place + ".role"),
                        text_of(line, member(line, value[i], "content"), place + ".content")});
  }
  return messages;
}

std::string joined(const std::vector<data::Message>& messages) {
  std::string text;
  for (std::size_t i = 0; i < messages.size(); ++i)
    text += (i == 0 ? "" : "\n") + messages[i].content;
  return text;
}

data::Prompt prompt_of(const Line& line, const Json& row, const JsonlKeys& keys) {
  if (!row.is_object()) line.fail(fmt::format("must be a JSON object, is {}", row.type_name()));
  data::Prompt prompt;
  if (row.contains("messages")) {
    prompt.messages = messages_of(line, row["messages"], "messages");
    if (row.contains("label")) {
      prompt.label = label_of(line, row["label"], "label");
    } else if (prompt.messages.back().role == "assistant") {
      prompt.label = prompt.messages.back().content;
      prompt.messages.pop_back();
      if (prompt.messages.empty()) line.fail("key 'messages' holds an answer without a question");
    }
    prompt.text = joined(prompt.messages);
    return prompt;
  }
  if (row.contains("prompt")) {
    const Json& value = row["prompt"];
    if (value.is_array()) {
      prompt.messages = messages_of(line, value, "prompt");
      prompt.text = joined(prompt.messages);
    } else {
      prompt.text = text_of(line, value, "prompt");
    }
    prompt.label = label_of(line, member(line, row, "label"), "label");
    return prompt;
  }
  if (!row.contains(keys.input_key))
    line.fail(fmt::format("needs one of the keys 'messages', 'prompt' or '{}' (data.input_key)",
                          keys.input_key));
  prompt.text = text_of(line, row[keys.input_key], keys.input_key);
  prompt.label = label_of(line, member(line, row, keys.output_key), keys.output_key);
  return prompt;
}

}  // namespace

std::vector<data::Prompt> load_jsonl(const std::string& path, const JsonlKeys& keys) {
  std::ifstream file(path);
  if (!file) base::fail<base::InputError>("cannot open {}: {}", path, std::strerror(errno));
  std::vector<data::Prompt> prompts;
  std::string text;
  for (std::int64_t number = 1; std::getline(file, text); ++number) {
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    const Line line{path, number};
    Json row;
    try {
      row = Json::parse(text);
    } catch (const Json::exception& error) {
      line.fail(fmt::format("not valid JSON: {}", error.what()));
    }
    data::Prompt prompt = prompt_of(line, row, keys);
    if (prompt.text.empty()) line.fail("the prompt is empty");
    prompt.id = static_cast<std::int64_t>(prompts.size());
    prompt.task = path;
    prompts.push_back(std::move(prompt));
  }
  if (file.bad()) base::fail<base::SystemError>("cannot read {}: {}", path, std::strerror(errno));
  if (prompts.empty())
    base::fail<base::InputError>("{} holds no prompts; it needs one JSON object a line", path);
  return prompts;
}

}  // namespace lockstep::rl
