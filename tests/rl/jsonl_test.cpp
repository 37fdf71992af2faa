#include "rl/jsonl.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

#include "base/error.h"

namespace lockstep::rl {
namespace {

struct File {
  std::string path = testing::TempDir() + "lockstep_jsonl_" +
                     testing::UnitTest::GetInstance()->current_test_info()->name() + ".jsonl";
  explicit File(const std::string& text) { std::ofstream(path, std::ios::binary) << text; }
  ~File() { std::remove(path.c_str()); }
};

std::string complaint(const std::string& text, const JsonlKeys& keys = {}) {
  const File file(text);
  try {
    load_jsonl(file.path, keys);
    return "accepted";
  } catch (const base::InputError& error) {
    const std::string what = error.what();
    EXPECT_EQ(what.find(file.path), 0u) << what;
    return what.substr(file.path.size());
  }
}

void expect_complaint(const std::string& text, const std::string& line, const std::string& part) {
  const std::string what = complaint(text);
  EXPECT_EQ(what.find(line), 0u) << what;
  EXPECT_NE(what.find(part), std::string::npos) << what;
}

TEST(Jsonl, ReadsTheThreeShapes) {
  const File file(
      "{\"prompt\": \"2+2=\", \"label\": \"4\", \"metadata\": {\"x\": 1}}\r\n"
      "\n"
      "{\"prompt\": [{\"role\": \"user\", \"content\": \"hi\"}], \"label\": 4}\n"
      "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", "
      "\"content\": "
      "\"u\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n"
      "{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}], \"label\": true}\n"
      "{\"q\": \"why\", \"a\": 4.5}");
  const auto prompts = load_jsonl(file.path, {"q", "a"});
  ASSERT_EQ(prompts.size(), 5u);
  EXPECT_EQ(prompts[0].text, "2+2=");
  EXPECT_EQ(prompts[0].label, "4");
  EXPECT_EQ(prompts[1].text, "hi");
  EXPECT_EQ(prompts[1].label, "4");
  EXPECT_EQ(prompts[2].text, "s\nu");
  EXPECT_EQ(prompts[2].label, "a");
  EXPECT_EQ(prompts[2].messages.size(), 2u);
  EXPECT_EQ(prompts[3].label, "true");
  EXPECT_EQ(prompts[4].text, "why");
  EXPECT_EQ(prompts[4].label, "4.5");
  EXPECT_EQ(prompts[4].id, 4);
  EXPECT_EQ(prompts[4].task, file.path);
}

TEST(Jsonl, MalformedLinesNameLineAndKey) {
  const std::string good = "{\"prompt\": \"p\", \"label\": \"l\"}\n";
  expect_complaint(good + "{\"prompt\": \"p\"}", ":2: ", "'label'");
  expect_complaint(good + good + "{\"prompt\": \"p\", ", ":3: ", "JSON");
  expect_complaint(good + "[1]", ":2: ", "object");
  expect_complaint("{\"prompt\": 3, \"label\": \"l\"}", ":1: ", "'prompt'");
  expect_complaint("{\"prompt\": \"\", \"label\": \"l\"}", ":1: ", "empty");
  expect_complaint("{\"prompt\": \"p\", \"label\": null}", ":1: ", "'label'");
  expect_complaint("{\"text\": \"p\"}", ":1: ", "'input'");
  expect_complaint("{\"input\": \"p\"}", ":1: ", "'output'");
  expect_complaint("{\"messages\": []}", ":1: ", "'messages'");
  expect_complaint("{\"messages\": [3]}", ":1: ", "messages[0]");
  expect_complaint("{\"messages\": [{\"role\": \"user\"}]}", ":1: ", "'content'");
  expect_complaint("{\"messages\": [{\"role\": 1, \"content\": \"x\"}]}",
                   ":1: ", "messages[0].role");
  expect_complaint("{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\"}]}",
                   ":1: ", "messages");
  expect_complaint("{\"prompt\": \"\xff\xfe\", \"label\": \"l\"}", ":1: ", "JSON");
  expect_complaint("\n\n{]", ":3: ", "JSON");
}

TEST(Jsonl, EmptyAndMissingFiles) {
  EXPECT_NE(complaint("\n \n").find("no prompts"), std::string::npos);
  EXPECT_THROW(load_jsonl("/nonexistent/x.jsonl", {}), base::InputError);
}

}  // namespace
}  // namespace lockstep::rl
