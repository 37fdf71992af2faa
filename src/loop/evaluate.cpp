#include "loop/evaluate.h"

#include <algorithm>

namespace lockstep::loop {

EvalResult evaluate(rollout::Engine& engine, const PromptSource& source, std::int64_t count,
                    const data::SamplingParams& sampling, const rl::RewardConfig& reward,
                    std::uint64_t seed, std::int64_t examples) {
  constexpr std::uint64_t kValidationStreams = std::uint64_t{1} << 63;
  count = std::min(count, source.size());
  std::vector<rollout::Request> requests;
  std::vector<data::Prompt> prompts;
  for (std::int64_t i = 0; i < count; ++i) {
    prompts.push_back(source.prompt(i));
    rollout::Request r;
    r.stream = kValidationStreams + static_cast<std::uint64_t>(i);
    r.seed = seed;
    r.prompt_id = i;
    r.prompt = prompts.back().tokens;
    r.sampling = sampling;
    requests.push_back(std::move(r));
  }
  const std::vector<data::Trajectory> answers = engine.generate(std::move(requests));
  std::vector<rl::RewardSample> samples;
  for (std::size_t i = 0; i < answers.size(); ++i)
    samples.push_back({prompts[i].text, answers[i].text, prompts[i].label});
  const std::vector<double> scores = rl::scores(reward, samples);
  EvalResult result;
  result.samples = count;
  for (std::size_t i = 0; i < answers.size(); ++i) {
    result.accuracy += scores[i] / static_cast<double>(count);
    result.mean_tokens +=
        static_cast<double>(answers[i].response.size()) / static_cast<double>(count);
    if (static_cast<std::int64_t>(i) < examples)
      result.examples.push_back(
          {samples[i].prompt, samples[i].response, samples[i].label, scores[i]});
  }
  return result;
}

}  // namespace lockstep::loop
