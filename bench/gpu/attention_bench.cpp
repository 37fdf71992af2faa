// Attention on the GPU: forward and backward of packed causal sequences (FLOP of visible keys only:
// 2 K + 2 Kv a query and key forward, 2.5 times that backward) beside cuDNN's, decode over pages of
// 16 (bytes of keys and values once).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "cudnn_attention.h"
#include "gpu_bench.h"
#include "ops/attention.h"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Shape;
using tensor::Tensor;
using tensor::TensorView;

Tensor random_bf16(const Context& ctx, const Shape& shape, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<numerics::Bf16> values(1000003);  // repeated: a prime, so that rows differ
  for (auto& x : values) x = numerics::to_bf16(normal(rng));
  Tensor host(Device::kCpu, DType::kBf16, shape), device(Device::kCuda, DType::kBf16, shape);
  auto* to = host.as<numerics::Bf16>();
  const auto period = static_cast<std::int64_t>(values.size());
  for (std::int64_t i = 0; i < shape.count(); i += period)
    std::memcpy(to + i, values.data(),
                static_cast<std::size_t>(std::min(period, shape.count() - i)) * sizeof(*to));
  tensor::copy(ctx, host, device);
  return device;
}

Tensor on_device(const Context& ctx, const std::vector<std::int32_t>& values, const Shape& shape) {
  Tensor host(Device::kCpu, DType::kInt32, shape), device(Device::kCuda, DType::kInt32, shape);
  std::memcpy(host.view().data, values.data(), host.view().bytes());
  tensor::copy(ctx, host, device);
  return device;
}

// Of the first values, which are those of the first sequence.
double largest_difference(const Context& ctx, const TensorView& a, const TensorView& b) {
  const std::int64_t n = std::min<std::int64_t>(a.count(), 1 << 20);
  std::vector<numerics::Bf16> x(static_cast<std::size_t>(n)), y(x.size());
  const auto read = [&](const TensorView& from, std::vector<numerics::Bf16>& to) {
    tensor::copy_bytes(ctx, from.data, Device::kCuda, to.data(), Device::kCpu, to.size() * 2);
  };
  read(a, x);
  read(b, y);
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double d = std::abs(numerics::to_float(x[i]) - numerics::to_float(y[i]));
    if (!(d <= worst)) worst = d;
  }
  return worst;
}

struct TrainingShape {
  std::int64_t sequences, length, H, J, K;
};

void bench_training(const Context& ctx, const TrainingShape& n) {
  const std::int64_t T = n.sequences * n.length;
  std::vector<std::int32_t> offsets{0}, lengths;
  for (std::int64_t s = 0; s < n.sequences; ++s) {
    lengths.push_back(static_cast<std::int32_t>(n.length));
    offsets.push_back(offsets.back() + lengths.back());
  }
  const Tensor q = random_bf16(ctx, {T, n.H, n.K}, 1), k = random_bf16(ctx, {T, n.J, n.K}, 2),
               v = random_bf16(ctx, {T, n.J, n.K}, 3), d_out = random_bf16(ctx, {T, n.H, n.K}, 4);
  const Tensor out(Device::kCuda, DType::kBf16, {T, n.H, n.K}),
      lse2(Device::kCuda, DType::kFp32, {T, n.H}), d_q(Device::kCuda, DType::kBf16, {T, n.H, n.K}),
      d_k(Device::kCuda, DType::kBf16, {T, n.J, n.K}),
      d_v(Device::kCuda, DType::kBf16, {T, n.J, n.K});
  const Tensor offsets_S1 = on_device(ctx, offsets, {n.sequences + 1}),
               lengths_S = on_device(ctx, lengths, {n.sequences});
  const ops::AttentionBatch batch{offsets_S1, lengths_S, {}, 0, n.length, n.length};
  const double scale = 1 / std::sqrt(static_cast<double>(n.K));
  const Timing forward = time_kernel(
      ctx, [&](int) { ops::attention(ctx, q, k, v, batch, scale, out, lse2); }, 9, 2);
  const Timing backward = time_kernel(
      ctx,
      [&](int) {
        ops::attention_backward(ctx, q, k, v, out, lse2, d_out, batch, scale, d_q, d_k, d_v);
      },
      9, 2);
  const double length = static_cast<double>(n.length);
  const double flop = length * (length + 1) / 2 * static_cast<double>(n.sequences * n.H * 4 * n.K);
  std::printf(
      "causal b %3ld s %6ld H %3ld J %2ld d %3ld: forward %8.1f us %6.1f TFLOPS (p10 %.1f p90 %.1f "
      "us), "
      "backward %8.1f us %6.1f TFLOPS\n",
      n.sequences, n.length, n.H, n.J, n.K, forward.median * 1e6, flop / forward.median * 1e-12,
      forward.p10 * 1e6, forward.p90 * 1e6, backward.median * 1e6,
      2.5 * flop / backward.median * 1e-12);
  std::fflush(stdout);

  const CudnnAttention peer =
      cudnn_attention(ctx, {n.sequences, n.length, n.H, n.J, n.K, scale, q, k, v, d_out});
  if (!peer.problem.empty()) {
    std::printf("  cuDNN: %s\n", peer.problem.c_str());
    return;
  }
  const Timing peer_forward = time_kernel(
      ctx, [&](int) { peer.forward(); }, 9, 2);
  const Timing peer_backward = time_kernel(
      ctx, [&](int) { peer.backward(); }, 9, 2);
  std::printf(
      "  cuDNN %s: forward %8.1f us %6.1f TFLOPS (x%.2f), backward %8.1f us %6.1f TFLOPS (x%.2f); "
      "largest difference %.2g of the outputs, %.2g of d_q\n",
      peer.version.c_str(), peer_forward.median * 1e6, flop / peer_forward.median * 1e-12,
      peer_forward.median / forward.median, peer_backward.median * 1e6,
      2.5 * flop / peer_backward.median * 1e-12, peer_backward.median / backward.median,
      largest_difference(ctx, out, peer.out), largest_difference(ctx, d_q, peer.d_q));
  std::fflush(stdout);
}

struct ServedShape {
  std::int64_t sequences, queries, keys, H, J, K;
};

void bench_served(const Context& ctx, const ServedShape& n) {
  constexpr std::int64_t kPage = 16;
  const std::int64_t P = (n.keys + kPage - 1) / kPage, R = n.sequences * P * kPage;
  std::vector<std::int32_t> offsets{0}, lengths, order;
  for (std::int64_t s = 0; s < n.sequences; ++s) {
    lengths.push_back(static_cast<std::int32_t>(n.keys));
    offsets.push_back(offsets.back() + static_cast<std::int32_t>(n.queries));
  }
  std::mt19937 rng(5);
  for (std::int64_t p = 0; p < n.sequences * P; ++p) order.push_back(static_cast<std::int32_t>(p));
  std::shuffle(order.begin(), order.end(), rng);
  const std::int64_t T = n.sequences * n.queries;
  const Tensor q = random_bf16(ctx, {T, n.H, n.K}, 1), k = random_bf16(ctx, {R, n.J, n.K}, 2),
               v = random_bf16(ctx, {R, n.J, n.K}, 3);
  const Tensor out(Device::kCuda, DType::kBf16, {T, n.H, n.K});
  const Tensor offsets_S1 = on_device(ctx, offsets, {n.sequences + 1}),
               lengths_S = on_device(ctx, lengths, {n.sequences}),
               pages_SP = on_device(ctx, order, {n.sequences, P});
  const ops::AttentionBatch batch{offsets_S1, lengths_S, pages_SP, kPage, n.queries, n.keys};
  const double scale = 1 / std::sqrt(static_cast<double>(n.K));
  const Timing time = time_kernel(
      ctx, [&](int) { ops::attention(ctx, q, k, v, batch, scale, out, {}); }, 9, 4);
  const double bytes = static_cast<double>(n.sequences * n.keys * n.J * n.K * 4);
  const double seen = static_cast<double>(n.queries) *
                      (static_cast<double>(n.keys) - static_cast<double>(n.queries - 1) / 2);
  const double flop = seen * static_cast<double>(n.sequences * n.H * 4 * n.K);
  std::printf(
      "paged b %3ld n %4ld L %6ld H %3ld J %2ld d %3ld: %8.1f us (p10 %.1f p90 %.1f), %5.2f TB/s, "
      "%6.1f TFLOPS\n",
      n.sequences, n.queries, n.keys, n.H, n.J, n.K, time.median * 1e6, time.p10 * 1e6,
      time.p90 * 1e6, bytes / time.median * 1e-12, flop / time.median * 1e-12);
  std::fflush(stdout);
}

// Values in keys (DeepSeek's latent attention, absorbed): one KV head, key rows of 576, values
// their first 512 columns.
constexpr std::int64_t kLatentWidth = 576, kLatentValues = 512;

void bench_latent_training(const Context& ctx, std::int64_t sequences, std::int64_t length,
                           std::int64_t H) {
  const std::int64_t T = sequences * length;
  std::vector<std::int32_t> offsets{0}, lengths;
  for (std::int64_t s = 0; s < sequences; ++s) {
    lengths.push_back(static_cast<std::int32_t>(length));
    offsets.push_back(offsets.back() + lengths.back());
  }
  const Tensor q = random_bf16(ctx, {T, H, kLatentWidth}, 1),
               k = random_bf16(ctx, {T, 1, kLatentWidth}, 2),
               d_out = random_bf16(ctx, {T, H, kLatentValues}, 4);
  const Tensor out(Device::kCuda, DType::kBf16, {T, H, kLatentValues}),
      lse2(Device::kCuda, DType::kFp32, {T, H}),
      d_q(Device::kCuda, DType::kBf16, {T, H, kLatentWidth}),
      d_k(Device::kCuda, DType::kBf16, {T, 1, kLatentWidth});
  const Tensor offsets_S1 = on_device(ctx, offsets, {sequences + 1}),
               lengths_S = on_device(ctx, lengths, {sequences});
  const ops::AttentionBatch batch{offsets_S1, lengths_S, {}, 0, length, length};
  const double scale = 1 / std::sqrt(192.0);
  const Timing forward = time_kernel(
      ctx, [&](int) { ops::attention(ctx, q, k, {}, batch, scale, out, lse2); }, 5, 1);
  const Timing backward = time_kernel(
      ctx,
      [&](int) {
        ops::attention_backward(ctx, q, k, {}, out, lse2, d_out, batch, scale, d_q, d_k, {});
      },
      3, 1);
  const double n = static_cast<double>(length);
  const double flop =
      n * (n + 1) / 2 * static_cast<double>(sequences * H * 2 * (kLatentWidth + kLatentValues));
  std::printf(
      "latent causal b %3ld s %6ld H %3ld: forward %9.1f us %6.1f TFLOPS, backward %9.1f us "
      "%6.1f TFLOPS\n",
      sequences, length, H, forward.median * 1e6, flop / forward.median * 1e-12,
      backward.median * 1e6, 2.5 * flop / backward.median * 1e-12);
  std::fflush(stdout);
}

void bench_latent_served(const Context& ctx, std::int64_t sequences, std::int64_t queries,
                         std::int64_t keys, std::int64_t H) {
  constexpr std::int64_t kPage = 16;
  const std::int64_t P = (keys + kPage - 1) / kPage, R = sequences * P * kPage;
  std::vector<std::int32_t> offsets{0}, lengths, order;
  for (std::int64_t s = 0; s < sequences; ++s) {
    lengths.push_back(static_cast<std::int32_t>(keys));
    offsets.push_back(offsets.back() + static_cast<std::int32_t>(queries));
  }
  std::mt19937 rng(5);
  for (std::int64_t p = 0; p < sequences * P; ++p) order.push_back(static_cast<std::int32_t>(p));
  std::shuffle(order.begin(), order.end(), rng);
  const std::int64_t T = sequences * queries;
  const Tensor q = random_bf16(ctx, {T, H, kLatentWidth}, 1),
               k = random_bf16(ctx, {R, 1, kLatentWidth}, 2);
  const Tensor out(Device::kCuda, DType::kBf16, {T, H, kLatentValues});
  const Tensor offsets_S1 = on_device(ctx, offsets, {sequences + 1}),
               lengths_S = on_device(ctx, lengths, {sequences}),
               pages_SP = on_device(ctx, order, {sequences, P});
  const ops::AttentionBatch batch{offsets_S1, lengths_S, pages_SP, kPage, queries, keys};
  const double scale = 1 / std::sqrt(192.0);
  const Timing time = time_kernel(
      ctx, [&](int) { ops::attention(ctx, q, k, {}, batch, scale, out, {}); }, 9, 4);
  const double bytes = static_cast<double>(sequences * keys * kLatentWidth * 2);
  const double seen = static_cast<double>(queries) *
                      (static_cast<double>(keys) - static_cast<double>(queries - 1) / 2);
  const double flop =
      seen * static_cast<double>(sequences * H * 2 * (kLatentWidth + kLatentValues));
  std::printf(
      "latent paged b %3ld n %4ld L %6ld H %3ld: %8.1f us (p10 %.1f p90 %.1f), %5.2f TB/s, "
      "%6.1f TFLOPS\n",
      sequences, queries, keys, H, time.median * 1e6, time.p10 * 1e6, time.p90 * 1e6,
      bytes / time.median * 1e-12, flop / time.median * 1e-12);
  std::fflush(stdout);
}

}  // namespace
}  // namespace lockstep::bench

// Arguments: training, served, latent or all; then the number of a shape, or nothing for all of
// them.
int main(int argc, char** argv) {
  using namespace lockstep;
  if (const std::string problem = tensor::cuda_problem(); !problem.empty()) {
    std::fprintf(stderr, "%s\n", problem.c_str());
    return 1;
  }
  tensor::Arena arena(tensor::Device::kCuda);
  const tensor::Context ctx = tensor::cuda_context(arena);
  std::printf("%s\n", tensor::device_text(ctx).c_str());
  const std::string which = argc > 1 ? argv[1] : "all";
  const int only = argc > 2 ? std::atoi(argv[2]) : -1;
  int shape = 0;
  if (which == "training" || which == "all")
    for (const bench::TrainingShape& n : {bench::TrainingShape{2, 8192, 32, 32, 128},
                                          {2, 8192, 32, 4, 128},
                                          {8, 2048, 32, 4, 128},
                                          {16, 1024, 32, 4, 128},
                                          {4, 4096, 32, 32, 64}})
      if (only < 0 || only == shape++) bench::bench_training(ctx, n);
  shape = 0;
  if (which == "served" || which == "all")
    for (const bench::ServedShape& n : {bench::ServedShape{64, 1, 8192, 32, 4, 128},
                                        {33, 1, 32768, 32, 4, 128},
                                        {128, 1, 2048, 32, 4, 128},
                                        {128, 1, 1024, 32, 8, 128},
                                        {64, 1, 8192, 64, 8, 64},
                                        {16, 1, 8192, 32, 32, 128},
                                        {1, 2048, 8192, 32, 4, 128},
                                        {4, 512, 4096, 32, 4, 128}})
      if (only < 0 || only == shape++) bench::bench_served(ctx, n);
  shape = 0;
  if (which == "latent" || which == "all") {
    struct Latent {
      std::int64_t sequences, queries, keys, H;
    };
    for (const Latent& n : {Latent{1, 4096, 4096, 128}, {4, 1024, 1024, 128}, {2, 2048, 2048, 16}})
      if (only < 0 || only == shape++) bench::bench_latent_training(ctx, n.sequences, n.keys, n.H);
    for (const Latent& n : {Latent{128, 1, 4096, 128},
                            {128, 1, 2048, 16},
                            {32, 1, 8192, 16},
                            {8, 1, 32768, 128},
                            {16, 1, 8192, 128},
                            {1, 512, 4096, 128}})
      if (only < 0 || only == shape++)
        bench::bench_latent_served(ctx, n.sequences, n.queries, n.keys, n.H);
  }
  std::fflush(stdout);
  std::_Exit(0);  // the driver goes before the arena
}
