// Run folders as a run would leave them, small, for the tests of report and comparison.
#pragma once

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "loop/metrics.h"

namespace lockstep::loop {

// `steps` steps of reinforcement learning with rollouts of the first and the last.
inline void write_rl_run(const std::filesystem::path& folder, int steps, double reward = 0.5) {
  std::filesystem::create_directories(folder / "rollouts");
  std::ofstream metrics(folder / "metrics.jsonl");
  for (int step = 1; step <= steps; ++step) {
    Metrics m;
    m["train/reward"] = reward + 0.01 * step;
    m["train/loss"] = step == 2 ? std::nan("") : 0.1 / step;
    m["train/grad_norm"] = std::pow(10.0, step % 7);
    m["train/token_mult_prob_error"] = 1.0;
    m["train/gen_kl_error"] = 0.0;
    m["train/logprobs_compared"] = std::int64_t{1000};
    m["train/logprobs_different"] = std::int64_t{0};
    if (step == 1 || step == steps) m["validation/accuracy"] = 0.25 * (step == 1 ? 1 : 3);
    m["fp8/weights/saturated"] = 0.0;
    m["fp8/weights/flushed_to_zero"] = 1e-5;
    m["fp8/weights/amax_max"] = 2.5;
    m["moe/load_cv"] = 0.3;
    m["timing/train/generation"] = 1.0 + 0.001 * reward;
    m["timing/train/total_step_time"] = 3.0;
    m["performance/tokens_per_sec"] = 2000.0 + reward;
    m["sync/weight_checksum"] = "c0ffee" + std::to_string(step);
    metrics << metrics_line(step, m);
  }
  std::ofstream(folder / "config.yaml") << "grpo:\n  seed: 7\n";
  for (const int step : {1, steps})
    std::ofstream(folder / "rollouts" / ("train_data_step" + std::to_string(step) + ".jsonl"))
        << R"({"prompt_id": 1, "sample": 0, "prompt": "sort <b> & 'x'", "response": )"
        << R"("</td><script>alert(1)</script>\u0001", "label": "\"b\"", "reward": 1.0, )"
        << R"("advantage": 0.5, "finish_reason": "stop", "response_tokens": [1, 2]})"
        << "\nnot json\n";
}

}  // namespace lockstep::loop
