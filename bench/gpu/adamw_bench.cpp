// AdamW with a weight's codes in one pass against the two ops one after the other. Bytes that must
// move: the optimizer's state in and out, the BF16 weight out, two copies of codes out; the
// separate ops read the BF16 weight once more.
#include <fmt/format.h>

#include "gpu_bench.h"
#include "ops/adamw_quantize.h"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using namespace lockstep::ops;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;

void line(const char* name, const std::string& what, double bytes, const Timing& t) {
  fmt::print("{:<24} {:<36} {:9.1f} us  {:6.3f} TB/s  (p10 {:.1f}, p90 {:.1f})\n", name, what,
             t.median * 1e6, bytes / t.median * 1e-12, t.p10 * 1e6, t.p90 * 1e6);
}

void step(const tensor::Context& ctx, std::int64_t E, std::int64_t N, std::int64_t K,
          DType moments) {
  const tensor::Shape shape{E, N, K}, turned{E, K, N};
  const Tensor grad(Device::kCuda, DType::kFp32, shape), master(Device::kCuda, DType::kFp32, shape);
  const Tensor m(Device::kCuda, moments, shape), v(Device::kCuda, moments, shape);
  const Tensor w(Device::kCuda, DType::kBf16, shape);
  const Tensor codes(Device::kCuda, DType::kE4m3, shape),
      codes_t(Device::kCuda, DType::kE4m3, turned);
  const std::int64_t NB = (N + 127) / 128, KB = (K + 127) / 128;
  const Tensor scales(Device::kCuda, DType::kFp32, {E, NB, KB}),
      scales_t(Device::kCuda, DType::kFp32, {E, KB, NB});
  const Tensor stats(Device::kCuda, DType::kE4m3, {static_cast<std::int64_t>(sizeof(QuantStats))});
  auto* counters = static_cast<QuantStats*>(stats.view().data);
  const Fp8Weight out{codes, scales, Scaling::kBlock}, out_t{codes_t, scales_t, Scaling::kBlock};
  tensor::fill_bytes(ctx, grad, 0x3C);  // finite values that are not zero
  tensor::fill_bytes(ctx, master, 0x3D);

  const auto n = static_cast<double>(shape.count());
  const double state = n * (4 + 8 + 2 + 4.0 * static_cast<double>(tensor::dtype_size(moments)));
  const std::string what =
      fmt::format("[{}, {}, {}] moments {}", E, N, K, tensor::dtype_name(moments));
  const auto time = [&](const std::function<void(int)>& run) {
    return time_kernel(ctx, run, 9, 3);
  };
  const auto quantize = [&] {
    quantize_weight(ctx, w, WeightScales::kBlock128, false, {}, out, out_t, counters);
  };
  line("adamw_quantize", what, state + 2 * n, time([&](int) {
         adamw_quantize(ctx, grad, {}, master, m, v, w, false, out, out_t, counters);
       }));
  line("adamw, quantize_weight", what, state + 4 * n, time([&](int) {
         adamw(ctx, grad, {}, master, m, v, w);
         quantize();
       }));
  line("adamw", what, state, time([&](int) { adamw(ctx, grad, {}, master, m, v, w); }));
  line("quantize_weight", what, 4 * n, time([&](int) { quantize(); }));
}

}  // namespace
}  // namespace lockstep::bench

int main() {
  using namespace lockstep;
  if (const std::string problem = tensor::cuda_problem(); !problem.empty()) {
    fmt::print("{}\n", problem);
    return 77;
  }
  static tensor::Arena arena(tensor::Device::kCuda);
  const tensor::Context ctx = tensor::cuda_context(arena);
  fmt::print("{}\n", tensor::device_text(ctx));
  for (const auto moments : {tensor::DType::kFp32, tensor::DType::kBf16}) {
    bench::step(ctx, 128, 1536, 2048, moments);
    bench::step(ctx, 1, 5120, 2048, moments);
  }
  return 0;
}
