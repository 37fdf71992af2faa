#include "loop/headline.h"

#include <fmt/format.h>

#include "numerics/contract.h"
#include "tensor/device.h"

namespace lockstep::loop {

namespace {

std::string precision_text(const std::string& precision, const Fp8Config& fp8) {
  if (precision != "fp8") return precision;
  std::string text = "fp8 " + fp8.recipe;
  if (fp8.num_first_layers_in_bf16 > 0 || fp8.num_last_layers_in_bf16 > 0)
    text += fmt::format(" (first {} and last {} layers bf16)", fp8.num_first_layers_in_bf16,
                        fp8.num_last_layers_in_bf16);
  return text;
}

std::string count_text(std::int64_t n) {
  const auto x = static_cast<double>(n);
  if (x >= 1e9) return fmt::format("{:.2f} G", x / 1e9);
  if (x >= 1e6) return fmt::format("{:.2f} M", x / 1e6);
  return fmt::format("{:.0f} k", x / 1e3);
}

}  // namespace

std::int64_t parameter_count(const model::ParamTable& table) {
  std::int64_t n = 0;
  for (const model::Param& param : table.params)
    for (const model::ParamPart& part : param.parts) n += part.rows * part.columns;
  return n;
}

std::string model_headline(const RunConfig& config, const model::ModelConfig& model,
                           std::int64_t parameters) {
  const std::string policy = precision_text(config.policy.precision, config.policy.fp8_cfg);
  const std::string rollout = precision_text(generation_precision(config), generation_fp8(config));
  const std::string experts =
      model.num_experts == 0
          ? "dense"
          : fmt::format("{} experts ({} a token)", model.num_experts, model.router.top_k);
  return fmt::format("model    {}: {} parameters, {} layers, {}, {}",
                     config.policy.model_name.empty() ? "new" : config.policy.model_name,
                     count_text(parameters), model.num_layers, experts,
                     policy == rollout ? policy : policy + " against a rollout in " + rollout);
}

std::string machine_headline(const RunConfig& config, const tensor::Context& ctx) {
  const bool none = config.device == "auto" && ctx.device == tensor::Device::kCpu;
  return fmt::format("machine  {}{}; numerics contract {}", tensor::device_text(ctx),
                     none ? fmt::format(" ({})", tensor::cuda_problem()) : "",
                     numerics::kContractVersion);
}

std::string memory_headline(const policy::MemoryPlan& plan, std::size_t cache,
                            const tensor::DeviceMemory& memory) {
  const auto gib = [](std::size_t bytes) { return static_cast<double>(bytes) / 0x1p30; };
  return fmt::format(
      "memory   GiB planned: weights {:.2f}, optimizer {:.2f}{}, activations {:.2f}, scratch "
      "{:.2f}; {:.1f} of {:.1f} free",
      gib(plan.weights), gib(plan.optimizer),
      cache > 0 ? fmt::format(", keys and values {:.2f}", gib(cache)) : "", gib(plan.activations),
      gib(plan.workspace), gib(memory.free), gib(memory.total));
}

std::string peak_memory_text(const policy::MemoryPlan& plan, const policy::Policy& policy) {
  const auto part = [](std::size_t used, std::size_t planned) {
    return fmt::format("{:.2f} of {:.2f} GiB", static_cast<double>(used) / 0x1p30,
                       static_cast<double>(planned) / 0x1p30);
  };
  return fmt::format("activations {}, scratch {}",
                     part(policy.saved.peak_bytes(), plan.activations),
                     part(policy.ctx.workspace->peak_bytes(), plan.workspace));
}

std::string folder_headline(const RunConfig& config) {
  return fmt::format("run      {}: config.yaml has every key", config.logger.log_dir);
}

std::vector<std::string> rl_headlines(const RunConfig& config, const model::ModelConfig& model,
                                      std::int64_t parameters, const tensor::Context& ctx) {
  const GrpoConfig& g = config.grpo;
  const DataSourceConfig& train = config.data.train;
  return {model_headline(config, model, parameters),
          fmt::format("task     {}, reward {}; {}, {} prompts x {} samples, {} steps",
                      train.task ? *train.task : train.data_path.value_or(""), config.env.reward,
                      g.adv_estimator.name, g.num_prompts_per_step, g.num_generations_per_prompt,
                      g.max_num_steps),
          machine_headline(config, ctx), folder_headline(config)};
}

}  // namespace lockstep::loop
