// The command line as a user meets it: runs the built binary.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "loop/config_load.h"
#include "loop/report_run.h"
#include "loop/temp_dir.h"

namespace lockstep {
namespace {

struct Outcome {
  int code = -1;
  std::string text;  // standard output and error together
};

Outcome run(const std::string& command) {
  Outcome out;
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return out;
  std::array<char, 4096> buffer;
  for (std::size_t n; (n = ::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    out.text.append(buffer.data(), n);
  const int status = ::pclose(pipe);
  out.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return out;
}

Outcome lockstep(const std::string& arguments, const std::string& environment = "") {
  return run(environment + " '" LOCKSTEP_BINARY "' " + arguments + " 2>&1 </dev/null");
}

// With a file, named for the shell, as standard input.
Outcome lockstep_with(const std::string& arguments, const std::string& input) {
  return run("'" LOCKSTEP_BINARY "' " + arguments + " 2>&1 <" + input);
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Cli : TempDirTest {
  std::string path(const std::string& name) const { return "'" + (dir / name).string() + "'"; }
};

TEST_F(Cli, EveryVerbHasHelpWithAnExample) {
  const Outcome all = lockstep("--help");
  EXPECT_EQ(all.code, 0);
  for (const char* verb : {"pretrain", "rl", "compare", "report", "convert", "tokenize", "score",
                           "generate", "doctor"}) {
    EXPECT_TRUE(holds(all.text, verb)) << verb;
    const Outcome help = lockstep(std::string(verb) + " --help");
    EXPECT_EQ(help.code, 0) << verb;
    EXPECT_TRUE(holds(help.text, std::string("Example: lockstep ") + verb)) << help.text;
  }
}

TEST_F(Cli, TokenizeWritesTheIdsOfEachLineAndTakesThemBack) {
  const std::string model = "'" LOCKSTEP_TEST_DATA "/tokenizer/llama3.json'";
  const auto ids_of = [](const std::string& rows) {
    std::vector<std::vector<int>> ids;
    std::istringstream in(rows);
    for (std::string row; std::getline(in, row);)
      ids.push_back(nlohmann::json::parse(row).get<std::vector<int>>());
    return ids;
  };
  std::ifstream cases(LOCKSTEP_TEST_DATA "/tokenizer/llama3.cases.json");
  std::string text;
  std::vector<std::vector<int>> expected, bare;
  std::vector<std::string> decoded;
  const nlohmann::json all = nlohmann::json::parse(cases);
  for (const nlohmann::json& row : all["cases"]) {
    const std::string line = row[0];
    if (line.find('\n') != std::string::npos) continue;  // a carriage return does not end a line
    text += line + "\n";
    expected.push_back(row[1]);
    bare.push_back(row[2].is_null() ? row[1] : row[2]);
    decoded.push_back(row[3]);
  }
  text.pop_back();  // the last line needs no newline
  put("text", text);
  const Outcome out = lockstep_with("tokenize --model " + model, path("text"));
  ASSERT_EQ(out.code, 0) << out.text;
  EXPECT_EQ(ids_of(out.text), expected);
  EXPECT_EQ(ids_of(lockstep_with("tokenize --no-special --model " + model, path("text")).text),
            bare);
  put("ids", out.text);
  const Outcome back = lockstep_with("tokenize --decode --model " + model, path("ids"));
  std::istringstream rows(back.text);
  std::vector<std::string> texts;
  for (std::string row; std::getline(rows, row);) texts.push_back(nlohmann::json::parse(row));
  EXPECT_EQ(texts, decoded);

  put("bad", "[1, 2]\n[1, -2]\n");
  const Outcome bad = lockstep_with("tokenize --decode --model " + model, path("bad"));
  EXPECT_EQ(bad.code, 2);
  EXPECT_TRUE(holds(bad.text, "line 2")) << bad.text;
  put("unigram.json", R"({"model": {"type": "Unigram", "vocab": []}})");
  const Outcome refused = lockstep_with("tokenize --model " + path("unigram.json"), path("bad"));
  EXPECT_EQ(refused.code, 2);
  EXPECT_TRUE(holds(refused.text, "Unigram") && holds(refused.text, "unigram.json"))
      << refused.text;
}

TEST_F(Cli, BadInputEndsWithCode2AndSaysWhatToDo) {
  put("unknown.yaml", "grpo:\n  num_prompt_per_step: 4\n");
  put("twice.yaml", "grpo:\n  seed: 1\n  seed: 2\n");
  const struct {
    std::string arguments, message;
  } cases[] = {
      {"frobnicate", "frobnicate"},
      {"rl --no-such-option", "no-such-option"},
      {"rl --config " + path("absent.yaml"), "absent.yaml"},
      {"rl --config " + path("unknown.yaml"), "did you mean"},
      {"rl --config " + path("twice.yaml"), "grpo.seed"},
      {"rl policy.optimizer.lr=fast", "policy.optimizer.lr"},
      {"rl --fresh --resume auto logger.log_dir=" + path("run"), "--fresh"},
      {"rl --markdown", "--keys"},
      {"report " + path("absent"), "metrics.jsonl"},
      {"compare " + path("absent"), "two runs"},
  };
  for (const auto& c : cases) {
    const Outcome out = lockstep(c.arguments);
    EXPECT_EQ(out.code, 2) << c.arguments << "\n" << out.text;
    EXPECT_TRUE(holds(out.text, c.message)) << c.arguments << "\n" << out.text;
  }
}

TEST_F(Cli, ConvertWritesAFolderThatConvertsBack) {
  const std::string demo = "'" LOCKSTEP_SOURCE_DIR "/models/demo'";
  const Outcome fp8 =
      lockstep("convert --input " + demo + " --output " + path("fp8") + " --to fp8");
  EXPECT_EQ(fp8.code, 0) << fp8.text;
  EXPECT_TRUE(holds(fp8.text, "Qwen3MoeForCausalLM")) << fp8.text;
  EXPECT_TRUE(std::filesystem::exists(dir / "fp8/tokenizer.json"));
  EXPECT_EQ(lockstep("convert --input " + path("fp8") + " --output " + path("bf16") +
                     " --to bf16 "
                     "--max-shard-size 500KB")
                .code,
            0);
  EXPECT_TRUE(std::filesystem::exists(dir / "bf16/model.safetensors.index.json"));
  const struct {
    std::string arguments, message;
  } cases[] = {
      {"--input " + path("absent") + " --output " + path("x"), "absent"},
      {"--input " + demo + " --output " + path("x") + " --to int4", "int4"},
      {"--input " + demo + " --output " + path("x") + " --max-shard-size big", "--max-shard-size"},
      {"--input " + demo + " --output " + path("x") + " --upcycle experts=2", "dense"},
      {"--from gguf --input " + demo + "/config.json --output " + path("x"), "GGUF"},
      {"--from ollama --input " + demo + " --output " + path("x"), "ollama"},
  };
  for (const auto& c : cases) {
    const Outcome out = lockstep("convert " + c.arguments);
    EXPECT_EQ(out.code, 2) << c.arguments << "\n" << out.text;
    EXPECT_TRUE(holds(out.text, c.message)) << c.arguments << "\n" << out.text;
    EXPECT_FALSE(std::filesystem::exists(dir / "x"));
  }
}

TEST_F(Cli, KeysListsEveryKeyAndTheDocumentIsCurrent) {
  const Outcome keys = lockstep("rl --keys");
  EXPECT_EQ(keys.code, 0);
  EXPECT_TRUE(holds(keys.text, "policy.fp8_cfg.recipe"));
  EXPECT_EQ(lockstep("rl --keys --markdown").text, loop::config_markdown());
  EXPECT_TRUE(holds(slurp(LOCKSTEP_SOURCE_DIR "/docs/configuration.md"), loop::config_markdown()))
      << "run: build/lockstep rl --keys --markdown, and put it into docs/configuration.md";
}

TEST_F(Cli, PrintConfigIsAConfigurationAndStartsNothing) {
  const std::string overrides =
      "policy.model_name=models/demo data.train.task=sort grpo.seed=7 logger.log_dir=" +
      path("run");
  const Outcome out = lockstep("rl --print-config " + overrides);
  EXPECT_EQ(out.code, 0) << out.text;
  EXPECT_TRUE(holds(out.text, "  seed: 7\n"));
  put("printed.yaml", out.text);
  EXPECT_EQ(lockstep("rl --print-config --config " + path("printed.yaml")).text, out.text);
  EXPECT_FALSE(std::filesystem::exists(dir / "run"));
}

TEST_F(Cli, CompareRequireEqualTellsEqualRunsFromOthers) {
  loop::write_rl_run(dir / "a", 3);
  loop::write_rl_run(dir / "b", 3);
  loop::write_rl_run(dir / "c", 3, 0.75);
  const Outcome equal = lockstep("compare --require-equal " + path("a") + " " + path("b"));
  EXPECT_EQ(equal.code, 0) << equal.text;
  EXPECT_TRUE(holds(equal.text, "equal to the bit in all 3 steps"));
  const Outcome other = lockstep("compare --require-equal " + path("a") + " " + path("c"));
  EXPECT_EQ(other.code, 1) << other.text;
  EXPECT_TRUE(holds(other.text, "train/reward"));
  const Outcome page =
      lockstep("compare " + path("a") + " " + path("c") + " --output " + path("page.html"));
  EXPECT_EQ(page.code, 0) << page.text;
  EXPECT_TRUE(std::filesystem::exists(dir / "page.html"));
}

TEST_F(Cli, ReportNamesItsFile) {
  loop::write_rl_run(dir / "a", 3);
  const Outcome out = lockstep("report " + path("a"));
  EXPECT_EQ(out.code, 0) << out.text;
  EXPECT_TRUE(holds(out.text, "report.html"));
  EXPECT_TRUE(std::filesystem::exists(dir / "a" / "report.html"));
}

TEST_F(Cli, DoctorIsWellHereAndNamesABadVariable) {
  const Outcome well = lockstep("doctor", "LOCKSTEP_CPU_ISA=");
  EXPECT_EQ(well.code, 0) << well.text;
  EXPECT_TRUE(holds(well.text, "equal by bytes"));
  const Outcome bad = lockstep("doctor", "LOCKSTEP_CPU_ISA=sse9");
  EXPECT_NE(bad.code, 0);
  EXPECT_TRUE(holds(bad.text, "LOCKSTEP_CPU_ISA=sse9")) << bad.text;
}

}  // namespace
}  // namespace lockstep
