// Bandwidth of the vocabulary's ops and of the optimizer: bytes that must move (logits in, gradient
// out, optimizer state in and out) over the median time.
#include <cstdlib>

#include "gpu_bench.h"
#include "ops/op_test_util.h"
#include "ops/optimizer.h"
#include "ops/vocab.h"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using namespace lockstep::ops;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;

void line(const char* name, const std::string& what, double bytes, const Timing& t) {
  fmt::print("{:<16} {:<44} {:9.1f} us  {:6.3f} TB/s  (p10 {:.1f}, p90 {:.1f})\n", name, what,
             t.median * 1e6, bytes / t.median * 1e-12, t.p10 * 1e6, t.p90 * 1e6);
}

// Random values of the given deviation: one random megabyte-sized stretch, repeated with a shift.
Tensor random_on_gpu(const tensor::Context& ctx, std::int64_t n, double deviation) {
  test::Rng rng(1);
  const std::int64_t piece = std::min<std::int64_t>(n, 1 << 20);
  const Tensor host = test::random_normal(rng, DType::kFp32, {piece}, deviation);
  Tensor out(Device::kCuda, DType::kFp32, {n});
  for (std::int64_t at = 0; at<n; at += piece> 4 ? piece - 4 : piece) {
    const std::int64_t count = std::min(piece, n - at);
    tensor::copy(ctx, host.view().rows(0, count), out.view().rows(at, count));
  }
  return out;
}

RowSampling settings(float temperature, int top_k, float top_p, float min_p) {
  RowSampling s;
  s.temperature = temperature;
  s.top_k = top_k;
  s.top_p = top_p;
  s.min_p = min_p;
  return s;
}

void vocab(const tensor::Context& ctx, std::int64_t R, std::int64_t V, double deviation) {
  // Several sets, so that a launch does not find its logits in the L2 cache.
  const std::int64_t sets = std::max<std::int64_t>(1, std::min<std::int64_t>(256, 600 / R));
  const Tensor logits = random_on_gpu(ctx, sets * R * V, deviation);
  const Tensor tokens(Device::kCuda, DType::kInt32, {R}), g = random_on_gpu(ctx, R, 1.0);
  const Tensor stats(Device::kCuda, DType::kE4m3,
                     {R * static_cast<std::int64_t>(sizeof(RowStats))});
  auto* stats_of = static_cast<RowStats*>(stats.view().data);
  const Tensor rows(Device::kCuda, DType::kE4m3,
                    {R * static_cast<std::int64_t>(sizeof(RowSampling))});
  const auto* rows_of = static_cast<const RowSampling*>(rows.view().data);
  const auto fill = [&](RowSampling s) {
    std::vector<RowSampling> all(static_cast<std::size_t>(R), s);
    for (std::size_t r = 0; r < all.size(); ++r) all[r].stream = r;
    tensor::copy_bytes(ctx, all.data(), Device::kCpu, rows.view().data, Device::kCuda,
                       rows.view().bytes());
  };
  const auto set = [&](int i) {
    return logits.view().rows(i % sets * R * V, R * V).reshape({R, V});
  };
  const double read = 4.0 * static_cast<double>(R * V);
  const std::string shape = fmt::format("R {} V {} sd {}", R, V, deviation);
  fill(settings(1, -1, 1, 0));
  line("vocab_logprobs", shape, read,
       time_kernel(ctx, [&](int i) { vocab_logprobs(ctx, set(i), tokens, rows_of, stats_of); }));
  const struct {
    const char* name;
    RowSampling s;
  } kinds[] = {{"", settings(1, -1, 1, 0)},
               {" greedy", settings(0, -1, 1, 0)},
               {" top_p 0.95", settings(1, -1, 0.95f, 0)},
               {" top_k 50", settings(1, 50, 1, 0)},
               {" min_p 0.05", settings(1, -1, 1, 0.05f)},
               {" T 0.7 top_k 20 top_p 0.8", settings(0.7f, 20, 0.8f, 0)}};
  for (const auto& kind : kinds) {
    fill(kind.s);
    line("vocab_sample", shape + kind.name, read,
         time_kernel(ctx, [&](int i) { vocab_sample(ctx, set(i), rows_of, tokens, stats_of); }));
  }
  fill(settings(1, -1, 1, 0));
  vocab_sample(ctx, set(0), rows_of, tokens, stats_of);
  const Tensor d_logits(Device::kCuda, DType::kBf16, {R, V});
  line("vocab_backward", shape, 1.5 * read, time_kernel(ctx, [&](int i) {
         vocab_backward(ctx, set(i), tokens, rows_of, stats_of, g, d_logits);
       }));
}

void optimizer(const tensor::Context& ctx, std::int64_t n, DType moments) {
  const Tensor grad(Device::kCuda, DType::kFp32, {n}), master(Device::kCuda, DType::kFp32, {n});
  const Tensor m(Device::kCuda, moments, {n}), v(Device::kCuda, moments, {n});
  const Tensor w(Device::kCuda, DType::kBf16, {n});
  const double moved = static_cast<double>(n) * (4 + 8 + 2 + 4.0 * tensor::dtype_size(moments));
  line("adamw", fmt::format("n {} moments {}", n, tensor::dtype_name(moments)), moved,
       time_kernel(
           ctx, [&](int) { adamw(ctx, grad, {}, master, m, v, w); }, 9, 2));
  if (moments != DType::kFp32) return;
  const double read = 4.0 * static_cast<double>(n);
  std::vector<TensorView> one{grad}, many;
  for (std::int64_t at = 0; at < n; at += 100096)
    many.push_back(grad.view().rows(at, std::min<std::int64_t>(100096, n - at)));
  const auto norm = [&](const std::vector<TensorView>& tensors) {
    line("global_norm", fmt::format("n {} in {} tensors", n, tensors.size()), read,
         time_kernel(
             ctx, [&](int) { global_norm(ctx, tensors); }, 9, 2));
  };
  norm(one);
  norm(many);
  line("count_nonfinite", fmt::format("n {}", n), read,
       time_kernel(
           ctx, [&](int) { count_nonfinite(ctx, grad); }, 9, 2));
}

}  // namespace
}  // namespace lockstep::bench

int main(int argc, char** argv) {
  using namespace lockstep;
  if (const std::string problem = tensor::cuda_problem(); !problem.empty()) {
    fmt::print("{}\n", problem);
    return 77;
  }
  static tensor::Arena arena(tensor::Device::kCuda);
  const tensor::Context ctx = tensor::cuda_context(arena);
  fmt::print("{}\n", tensor::device_text(ctx));
  const std::int64_t V = argc > 1 ? std::atoll(argv[1]) : 151936;
  if (argc > 2) {  // only so many rows
    bench::vocab(ctx, std::atoll(argv[2]), V, argc > 3 ? std::atof(argv[3]) : 3.0);
    return 0;
  }
  for (const std::int64_t R : {1, 64, 512, 1024}) bench::vocab(ctx, R, V, 3.0);
  bench::vocab(ctx, 512, V, 1.0);
  for (const auto moments : {tensor::DType::kFp32, tensor::DType::kBf16})
    bench::optimizer(ctx, 1000000000, moments);
  return 0;
}
