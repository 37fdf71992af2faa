#include "model/device_limits.h"

#include "base/error.h"

namespace lockstep::model {

namespace {

std::string not_a_multiple(const char* key, std::int64_t value, std::int64_t of,
                           std::int64_t most) {
  if (value % of == 0 && value <= most) return "";
  return fmt::format("{} is {}, it must be a multiple of {} up to {} there", key, value, of, most);
}

// The widths of attention (ops/attention.h) and of the products by heads (ops/gemm.h).
std::string attention_problem(const ModelConfig& c) {
  if (!is_latent(c)) return not_a_multiple("head_dim", c.head_dim, 16, 256);
  std::string problem = not_a_multiple("kv_lora_rank", c.latent.kv_rank, 16, 512);
  if (problem.empty())
    problem = not_a_multiple("qk_rope_head_dim", c.head_dim, 16, 576 - c.latent.kv_rank);
  if (problem.empty()) problem = not_a_multiple("qk_nope_head_dim", c.latent.nope, 8, 1 << 20);
  if (problem.empty()) problem = not_a_multiple("v_head_dim", c.latent.value, 8, 1 << 20);
  return problem;
}

}  // namespace

std::string gpu_problem(const ModelConfig& c, const ParamTable& table,
                        const std::vector<bool>& fp8) {
  if (const std::string problem = attention_problem(c); !problem.empty()) return problem;
  for (std::size_t p = 0; p < fp8.size(); ++p) {
    if (!fp8[p]) continue;
    const tensor::Shape& s = table.params[p].shape;  // [E, N, K]
    if (s[1] % 16 == 0 && s[2] % 16 == 0) continue;
    if (c.hidden_size % 16 != 0)
      return fmt::format("hidden_size is {}, in FP8 it must be a multiple of 16 there",
                         c.hidden_size);
    return fmt::format("{} is [{}, {}], in FP8 both must be multiples of 16 there",
                       table.params[p].parts[0].hf_name, s[1], s[2]);
  }
  return "";
}

void check_widths(tensor::Device device, const ModelConfig& config, const ParamTable& table,
                  const std::vector<bool>& fp8) {
  if (device != tensor::Device::kCuda) return;
  if (const std::string problem = gpu_problem(config, table, fp8); !problem.empty())
    base::fail<base::InputError>(
        "device cuda: this model does not run on a GPU: {}; use device=cpu (of score and generate: "
        "--device cpu)",
        problem);
}

}  // namespace lockstep::model
