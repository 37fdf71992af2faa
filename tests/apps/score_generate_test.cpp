// score and generate from the command line, on the demo's checkpoint.
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "apps/tiny_run.h"
#include "base/file_io.h"
#include "model/safetensors.h"

namespace lockstep {
namespace {

using nlohmann::json;

const std::string kModel = std::string(LOCKSTEP_SOURCE_DIR) + "/models/demo";

using GenerateTest = TinyRunTest;
using ScoreTest = TinyRunTest;

std::vector<json> lines_of(const std::filesystem::path& path) {
  std::vector<json> out;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) out.push_back(json::parse(line));
  return out;
}

void write(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path) << text;
}

TEST_F(ScoreTest, TokensNeedNoTokenizer) {
  write(dir / "tokens.jsonl", "{\"tokens\": [1, 5, 9, 77, 200, 13]}\n");
  write(dir / "text.jsonl", "{\"text\": \"a\"}\n");
  for (const std::string family : {"qwen3_moe", "mixtral", "olmoe", "deepseek_v3"}) {
    const std::string model = std::string(LOCKSTEP_SOURCE_DIR) + "/tests/data/hf/" + family;
    const Outcome scored = run({"score", "--model", model, "--device", "cpu", "--input",
                                dir / "tokens.jsonl", "--output", dir / "out.jsonl"});
    ASSERT_EQ(scored.code, 0) << scored.text;
    EXPECT_EQ(lines_of(dir / "out.jsonl")[0]["logprobs"].size(), 6u);
    const Outcome refused = run({"score", "--model", model, "--device", "cpu", "--input",
                                 dir / "text.jsonl", "--output", dir / "out.jsonl"});
    EXPECT_NE(refused.code, 0);
    EXPECT_NE(refused.text.find("tokenizer.json"), std::string::npos) << refused.text;
  }
}

TEST_F(GenerateTest, ScoreGivesTheLogprobsThatItSampledWith) {
  write(dir / "prompts.jsonl", "{\"prompt\": \"abc>\"}\n{\"prompt\": \"hg>\"}\n");
  for (const std::string precision : {"bf16", "fp8"}) {
    const Outcome made =
        run({"generate", "--model", kModel, "--device", "cpu", "--precision", precision, "--input",
             dir / "prompts.jsonl", "--samples", "3", "--max-new-tokens", "9", "--json"});
    ASSERT_EQ(made.code, 0) << made.text;
    std::istringstream text(made.text);
    std::string input;
    std::vector<json> answers;
    for (std::string line; std::getline(text, line);) {
      answers.push_back(json::parse(line));
      std::vector<int> tokens = answers.back()["prompt_tokens"];
      for (const int t : answers.back()["tokens"]) tokens.push_back(t);
      input += json{{"tokens", tokens}}.dump() + "\n";
    }
    ASSERT_EQ(answers.size(), 6u);
    write(dir / "in.jsonl", input);
    const Outcome scored =
        run({"score", "--model", kModel, "--device", "cpu", "--precision", precision, "--input",
             dir / "in.jsonl", "--output", dir / "out.jsonl"});
    ASSERT_EQ(scored.code, 0) << scored.text;
    const std::vector<json> scores = lines_of(dir / "out.jsonl");
    ASSERT_EQ(scores.size(), answers.size());
    for (std::size_t i = 0; i < answers.size(); ++i) {
      const std::vector<double> logprobs = answers[i]["logprobs"];
      const json& all = scores[i]["logprobs"];
      ASSERT_EQ(all.size(), scores[i]["tokens"].size());
      EXPECT_TRUE(all[0].is_null());
      for (std::size_t t = 0; t < logprobs.size(); ++t)
        EXPECT_EQ(all[all.size() - logprobs.size() + t].get<double>(), logprobs[t])
            << precision << ", answer " << i << ", token " << t;
    }
  }
}

TEST_F(GenerateTest, OneAnswerIsWrittenAsItComes) {
  const std::vector<std::string> arguments = {"generate", "--model",          kModel, "--device",
                                              "cpu",      "--temperature",    "0",    "--prompt",
                                              "abcd>",    "--max-new-tokens", "8"};
  const Outcome streamed = run(arguments);
  ASSERT_EQ(streamed.code, 0) << streamed.text;
  std::vector<std::string> as_json = arguments;
  as_json.push_back("--json");
  const Outcome whole = run(as_json);
  ASSERT_EQ(whole.code, 0) << whole.text;
  EXPECT_EQ(streamed.text, json::parse(whole.text)["text"].get<std::string>() + "\n");
}

TEST_F(ScoreTest, LogitsGiveTheLogprobs) {
  write(dir / "in.jsonl", "{\"tokens\": [97, 98, 99, 62]}\n{\"text\": \"dcba\"}\n");
  const Outcome scored =
      run({"score", "--model", kModel, "--device", "cpu", "--input", dir / "in.jsonl", "--output",
           dir / "out.jsonl", "--logits", dir / "logits.safetensors"});
  ASSERT_EQ(scored.code, 0) << scored.text;
  const std::vector<json> scores = lines_of(dir / "out.jsonl");
  const auto file = model::open_safetensors(dir / "logits.safetensors");
  const model::FileTensor& t = file.at("logits");
  ASSERT_EQ(t.shape.size(), 3u);
  const std::int64_t L = t.shape[1], V = t.shape[2];
  ASSERT_EQ(t.shape[0], 2);
  ASSERT_EQ(L, 4);
  std::vector<float> logits(t.bytes.size() / 4);
  std::memcpy(logits.data(), t.bytes.data(), t.bytes.size());
  for (std::int64_t s = 0; s < 2; ++s) {
    double sum = 0;
    for (std::int64_t i = 1; i < L; ++i) {
      const float* row = logits.data() + (s * L + i - 1) * V;
      double total = 0;
      for (std::int64_t v = 0; v < V; ++v) total += std::exp(static_cast<double>(row[v]));
      const double expected = row[scores[s]["tokens"][i].get<int>()] - std::log(total);
      const double found = scores[s]["logprobs"][i];
      EXPECT_LE(std::abs(found - expected), 1e-5 * (1 + std::abs(expected))) << s << " " << i;
      sum += found;
    }
    EXPECT_EQ(scores[s]["sum"].get<double>(), sum);
  }
}

TEST_F(ScoreTest, RefusesWhatItCannotScore) {
  const auto refused = [&](const std::string& text, std::vector<std::string> more,
                           const std::string& part) {
    write(dir / "in.jsonl", text);
    std::vector<std::string> arguments = {"score",          "--model",  kModel,
                                          "--device",       "cpu",      "--input",
                                          dir / "in.jsonl", "--output", dir / "out.jsonl"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.code, 2) << outcome.text;
    EXPECT_TRUE(holds(outcome.text, part)) << outcome.text;
    EXPECT_FALSE(std::filesystem::exists(dir / "out.jsonl"));
  };
  refused("", {}, "no line to score");
  refused("{\"tokens\": [1, 2]}\n{oops\n", {}, "line 2");
  refused("{\"tokens\": [1, 99999]}\n", {}, "outside the vocabulary");
  refused("{\"tokens\": []}\n", {}, "has 0 tokens");
  refused("{\"tokens\": [1], \"text\": \"a\"}\n", {}, "must be");
  refused("{\"tokens\": [1]}\n{\"tokens\": [1, 2]}\n", {"--logits", dir / "l.safetensors"},
          "one length");
}

}  // namespace
}  // namespace lockstep
