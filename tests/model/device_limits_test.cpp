// What is refused before a GPU sees it; needs none.
#include "model/device_limits.h"

#include "model/hf_config.h"
#include "model/hf_golden.h"
#include "model/temp_folder.h"

namespace lockstep::model {
namespace {

struct Read {
  ModelConfig config;
  ParamTable table;
};

Read read(const std::string& name) {
  const ModelConfig c = read_hf_config(std::filesystem::path(LOCKSTEP_TEST_DATA) / "hf" / name);
  return {c, build_param_table(c)};
}

std::vector<bool> fp8_of(const Read& m) {
  Precision precision;
  precision.fp8 = true;
  return fp8_params(m.table, m.config, precision);
}

TEST(DeviceLimits, families_run_on_a_gpu_in_both_precisions) {
  for (const char* name : kGoldenFamilies) {
    const Read m = read(name);
    EXPECT_EQ(gpu_problem(m.config, m.table, {}), "") << name;
    EXPECT_EQ(gpu_problem(m.config, m.table, fp8_of(m)), "") << name;
    check_widths(tensor::Device::kCuda, m.config, m.table, fp8_of(m));
  }
}

TEST(DeviceLimits, heads_that_are_no_multiples_of_16_are_refused_by_name) {
  for (const char* name : {"llama", "qwen3", "olmoe_clip"}) {
    const Read m = read(name);
    expect_refused([&] { check_widths(tensor::Device::kCuda, m.config, m.table, {}); },
                   {"device cuda", "head_dim", std::to_string(m.config.head_dim), "device=cpu"});
    check_widths(tensor::Device::kCpu, m.config, m.table, fp8_of(m));
  }
  Read wide = read("qwen3_moe");
  wide.config.head_dim = 512;
  EXPECT_NE(gpu_problem(wide.config, wide.table, {}).find("up to 256"), std::string::npos);
}

TEST(DeviceLimits, hidden_sizes_that_are_no_multiples_of_16_are_refused_in_fp8_alone) {
  const Read m = read("qwen3_moe_mixed");  // heads of 16, hidden size 56
  check_widths(tensor::Device::kCuda, m.config, m.table, {});
  check_widths(tensor::Device::kCuda, m.config, m.table,
               std::vector<bool>(m.table.params.size(), false));
  expect_refused([&] { check_widths(tensor::Device::kCuda, m.config, m.table, fp8_of(m)); },
                 {"device cuda", "hidden_size", "56", "FP8", "device=cpu"});
}

TEST(DeviceLimits, latent_widths_are_refused_by_name) {
  Read m = read("deepseek_v3");
  m.config.latent.kv_rank = 40;
  EXPECT_NE(gpu_problem(m.config, m.table, {}).find("kv_lora_rank is 40"), std::string::npos);
  m = read("deepseek_v3");
  m.config.head_dim = 24;
  EXPECT_NE(gpu_problem(m.config, m.table, {}).find("qk_rope_head_dim is 24"), std::string::npos);
  m = read("deepseek_v3");
  m.config.latent.value = 36;
  EXPECT_NE(gpu_problem(m.config, m.table, {}).find("v_head_dim is 36"), std::string::npos);
}

}  // namespace
}  // namespace lockstep::model
