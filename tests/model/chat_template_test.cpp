// What jinja2 renders, set up as transformers sets it up, for templates with the marks of each
// family (tools/golden/tokenizer.py).
#include "model/chat_template.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "model/strict_json.h"
#include "model/temp_folder.h"
#include "model/tokenizer.h"

namespace lockstep::model {
namespace {

using nlohmann::json;
struct ChatFiles : TempFolderTest {};

std::vector<data::Message> messages_of(const json& chat) {
  std::vector<data::Message> out;
  for (const json& m : chat) out.push_back({m[0], m[1]});
  return out;
}

TEST(ChatTemplate, renders_what_the_template_renders) {
  std::ifstream in(LOCKSTEP_TEST_DATA "/tokenizer/chats.json");
  const json families = json::parse(in);
  ASSERT_GE(families.size(), 15u);
  for (const json& family : families) {
    SCOPED_TRACE(family["name"].get<std::string>());
    const ChatTemplate t = recognise_chat_template(family["template"].get<std::string>());
    for (const json& row : family["cases"]) {
      SCOPED_TRACE(row.dump());
      const ChatOptions options{row[1], row[2], "<bos>", "<eos>"};
      if (row[3].is_null()) {
        EXPECT_THROW(render_chat(t, messages_of(row[0]), options), base::InputError);
      } else {
        EXPECT_EQ(render_chat(t, messages_of(row[0]), options), row[3].get<std::string>());
      }
    }
  }
}

TEST(ChatTemplate, refuses_what_it_does_not_know_by_name) {
  const std::vector<data::Message> chat = {{"user", "x"}};
  const auto refused = [&](const std::string& jinja, const std::string& part) {
    expect_refused([&] { render_chat(recognise_chat_template(jinja), chat, {}); }, {part});
  };
  refused("", "no chat template");
  refused("{{ '<|user|>' }}", "none of ChatML");
  refused("{{ '<|im_start|>' }}{{ '<|im_end|>' }}{{ '</think>' }}", "not Qwen3's");
  refused("'<|start_header_id|>' '<|eot_id|>' Cutting Knowledge Date strftime_now", "3.2");
  refused("'<｜User｜>' '<｜Assistant｜>' {% if thinking %}", "thinking");
  refused("'[INST] please ' ' [/INST]'", "beside [INST]");
  refused("'[INST] ' ' [/INST]' system_message", "another place");
  const ChatTemplate ml = recognise_chat_template("'<|im_start|>' '<|im_end|>'");
  expect_refused([&] { render_chat(ml, {{"tool", "x"}}, {}); }, {"'tool'"});
  expect_refused([&] { render_chat(ml, {}, {}); }, {"without messages"});
}

TEST_F(ChatFiles, come_with_the_tokenizer_and_its_special_tokens) {
  const std::string source = LOCKSTEP_TEST_DATA "/tokenizer/";
  put_file(folder / "tokenizer.json", file_bytes(source + "qwen.json"));
  const std::string jinja =
      "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
      "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
  put_file(folder / "tokenizer_config.json",
           json_text({{"bos_token", nullptr},
                      {"eos_token", {{"content", "<|im_end|>"}, {"lstrip", false}}},
                      {"pad_token", "<|endoftext|>"},
                      {"chat_template", jinja}}));
  const Tokenizer t = read_tokenizer(folder);
  EXPECT_EQ(t.chat_template.kind, ChatTemplate::kChatMl);
  EXPECT_EQ(t.bos_id, -1);
  EXPECT_EQ(decode(t, {t.eos_id, t.pad_id}, false), "<|im_end|><|endoftext|>");
  const std::string text = chat_text(t, {{"user", "hi"}});
  EXPECT_EQ(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(decode(t, encode(t, text), false), text);

  // Another file has the last word, and all of them are written again byte for byte.
  put_file(folder / "chat_template.jinja", "{{ '<|user|>' }}");
  put_file(folder / "special_tokens_map.json", "{}");
  const Tokenizer other = read_tokenizer(folder);
  expect_refused([&] { chat_text(other, {{"user", "hi"}}); }, {folder.string(), "none of ChatML"});
  const auto copy = folder / "copy";
  std::filesystem::create_directories(copy);
  write_tokenizer(other, copy);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                           "special_tokens_map.json"})
    EXPECT_EQ(file_bytes(copy / name), file_bytes(folder / name)) << name;

  put_file(folder / "tokenizer_config.json", R"({"eos_token": "<nobody>"})");
  expect_refused([&] { read_tokenizer(folder); },
                 {"tokenizer_config.json", "eos_token", "<nobody>"});
}

}  // namespace
}  // namespace lockstep::model
