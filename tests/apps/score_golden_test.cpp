// `lockstep score` on the golden checkpoints against PyTorch's logits (tests/data/hf): in BF16
// within the rounding bound, in FP8 within the quantization bound, but for rows that a near-tie of
// a router reaches. For another folder of the same files: expect_score_is_golden.
#include <fstream>
#include <nlohmann/json.hpp>

#include "apps/tiny_run.h"
#include "model/golden_gap.h"

namespace lockstep {
namespace {

using nlohmann::json;

struct ScoreGolden : TinyRunTest, testing::WithParamInterface<const char*> {
  // Scores the folder's input_ids in this precision. The logits must be, bit for bit, those of the
  // same forward pass in this process, which tells the experts that the routers chose.
  void expect_score_is_golden(const std::filesystem::path& folder, bool fp8) {
    model::HfGolden golden = model::load_hf_golden_folder(folder);
    std::ofstream lines(dir / "ids.jsonl");
    for (const auto& tokens : golden.sequences) lines << json{{"tokens", tokens}}.dump() << "\n";
    lines.close();
    const Outcome scored = run({"score", "--model", folder, "--device", "cpu", "--precision",
                                fp8 ? "fp8" : "bf16", "--input", dir / "ids.jsonl", "--output",
                                dir / "scores.jsonl", "--logits", dir / "logits.safetensors"});
    ASSERT_EQ(scored.code, 0) << scored.text;

    const auto file = model::open_safetensors(dir / "logits.safetensors");
    const model::FileTensor& logits = file.at("logits");
    model::Precision precision;
    precision.fp8 = fp8;
    const model::EngineRun here = model::run_engine(golden.weights, precision, golden.sequences);
    ASSERT_EQ(logits.bytes.size(), here.logits_TV.size() * sizeof(float));
    ASSERT_EQ(std::memcmp(logits.bytes.data(), here.logits_TV.data(), logits.bytes.size()), 0);
    const model::ModelConfig& c = golden.weights.config;
    const model::GoldenGap gap =
        model::expect_golden_gap(golden, here, fp8 ? model::fp8_noise(c) : model::bf16_noise(c));
    std::printf("score, %s, %s: %s\n", folder.filename().c_str(), fp8 ? "fp8" : "bf16",
                gap.text().c_str());
    if (!fp8) {
      EXPECT_LE(10 * static_cast<std::int64_t>(gap.flips.size()), gap.choices);
    }

    // The log-probabilities of the output are those of the logits.
    std::ifstream in(dir / "scores.jsonl");
    std::size_t row = 0;
    double worst = 0;
    for (const auto& tokens : golden.sequences) {
      std::string line;
      ASSERT_TRUE(std::getline(in, line));
      const json scores = json::parse(line);
      EXPECT_EQ(scores["tokens"], json(tokens));
      for (std::size_t t = 0; t < tokens.size(); ++t, ++row) {
        if (t + 1 == tokens.size()) continue;
        const float* z = here.logits_TV.data() + row * static_cast<std::size_t>(c.vocab_size);
        double total = 0;
        for (std::int64_t v = 0; v < c.vocab_size; ++v)
          total += std::exp(static_cast<double>(z[v]));
        const double expected = static_cast<double>(z[tokens[t + 1]]) - std::log(total);
        worst = std::max(worst, std::fabs(scores["logprobs"][t + 1].get<double>() - expected));
      }
    }
    EXPECT_LE(worst, 1e-5);
  }
};

TEST_P(ScoreGolden, AgreesWithPyTorch) {
  const auto folder = std::filesystem::path(LOCKSTEP_TEST_DATA) / "hf" / GetParam();
  for (const bool fp8 : {false, true}) expect_score_is_golden(folder, fp8);
}

INSTANTIATE_TEST_SUITE_P(Families, ScoreGolden, testing::ValuesIn(model::kGoldenFamilies),
                         [](const auto& info) { return std::string(info.param); });
INSTANTIATE_TEST_SUITE_P(Options, ScoreGolden, testing::ValuesIn(model::kGoldenOptions),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace lockstep
