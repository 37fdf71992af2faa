// TB/s of every quantizer at model shapes, bytes read and written, beside a plain device copy in
// the same run. Two counts: each input and output once; and what an op has to move where a tensor
// does not fit on the chip, that is with a second read where a scale covers whole columns (or where
// a norm is followed by columns), and a gathered row for every time it is read.
//
//   gpu_quantize_bench [name]     only the rows whose name holds this text
#include <cmath>
#include <cstring>
#include <string>

#include "gpu_bench.h"
#include "ops/norm_quantize.h"
#include "ops/permute_quantize.h"
#include "ops/swiglu.h"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using ops::Fp8Columns;
using ops::Fp8Rows;
using ops::Fp8Weight;
using ops::QuantStats;
using ops::Scaling;
using ops::Segments;
using tensor::Context;
using tensor::DType;
using tensor::Shape;
using tensor::TensorView;

__device__ std::uint32_t mix(std::uint32_t h) {
  h = (h ^ (h >> 15)) * 0x2C1B3C6Du;
  h = (h ^ (h >> 12)) * 0x297A2D39u;
  return h ^ (h >> 15);
}

// Nearly normal: the sum of four uniform halves of words, from hashes of the index.
__global__ void fill_random(numerics::Bf16* x, std::int64_t n, std::uint32_t seed) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    const std::uint32_t a = mix(static_cast<std::uint32_t>(i) * 2654435761u + seed), b = mix(~a);
    const std::uint32_t sum = (a & 65535) + (a >> 16) + (b & 65535) + (b >> 16);
    x[i] = numerics::to_bf16((static_cast<float>(sum) - 131070.0f) / 37837.0f);
  }
}

struct Bench {
  Context ctx;
  tensor::Arena* arena;
  std::string only;
  double copy_rate = 0;

  TensorView random(const Shape& shape) const {
    const TensorView x = arena->take(DType::kBf16, shape);
    fill_random<<<1024, 256, 0, tensor::stream_of(ctx)>>>(x.as<numerics::Bf16>(), x.count(), 7);
    tensor::check_cuda(cudaGetLastError(), "fill");
    return x;
  }
  Fp8Rows rows(std::int64_t M, std::int64_t K, Scaling scaling) const {
    const Shape s = scaling == Scaling::kBlock ? Shape{(K + 127) / 128, M} : Shape{M};
    return {arena->take(DType::kE4m3, {M, K}), arena->take(DType::kFp32, s), scaling};
  }
  Fp8Columns columns(std::int64_t N, std::int64_t R, std::int64_t E, Scaling scaling) const {
    const Shape s = scaling == Scaling::kBlock ? Shape{R / 128, N} : Shape{E, N};
    return {arena->take(DType::kE4m3, {N, R}), arena->take(DType::kFp32, s), scaling};
  }
  Fp8Weight weight(std::int64_t E, std::int64_t N, std::int64_t K, Scaling scaling) const {
    const Shape s =
        scaling == Scaling::kBlock ? Shape{E, (N + 127) / 128, (K + 127) / 128} : Shape{E, N};
    return {arena->take(DType::kE4m3, {E, N, K}), arena->take(DType::kFp32, s), scaling};
  }
  bool wanted(const char* name) const { return std::strstr(name, only.c_str()) != nullptr; }

  template <typename Run>
  void time(const char* name, const char* shape, double bytes, double moved, const Run& run) {
    const Timing t = time_kernel(
        ctx, [&](int) { run(); }, 15, 3);
    const double rate = bytes / t.median * 1e-12;
    if (copy_rate == 0) copy_rate = rate;
    const double moves = moved / t.median * 1e-12;
    std::printf(
        "%-37s %-23s %8.1f us  %5.2f TB/s once (%.2f .. %.2f)  %5.2f moved, %3.0f %% of a copy\n",
        name, shape, t.median * 1e6, rate, bytes / t.p90 * 1e-12, bytes / t.p10 * 1e-12, moves,
        100 * moves / copy_rate);
    std::fflush(stdout);
  }
};

// Experts' rows as a router would deal them: uneven, some experts with few.
struct Routing {
  Segments segments;
  TensorView token_M;
  std::int64_t R;  // room: M + 127 an expert, rounded up
};

Routing route(const Bench& b, std::int64_t T, std::int64_t C, std::int64_t E) {
  const std::int64_t M = T * C;
  std::vector<double> share(E);
  double sum = 0;
  for (std::int64_t e = 0; e < E; ++e) sum += share[e] = 1.0 + 0.9 * std::sin(1.7 * (e + 1));
  std::vector<std::int32_t> offsets{0}, padded{0}, token(M);
  double at = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    at += share[e] / sum * M;
    offsets.push_back(e + 1 == E ? static_cast<std::int32_t>(M) : static_cast<std::int32_t>(at));
    padded.push_back(padded.back() + (offsets[e + 1] - offsets[e] + 127) / 128 * 128);
    // Tokens of an expert ascend.
    const std::int64_t n = offsets[e + 1] - offsets[e];
    for (std::int64_t i = 0; i < n; ++i)
      token[offsets[e] + i] =
          static_cast<std::int32_t>((i * T + e % T) / std::max<std::int64_t>(n, 1) % T);
  }
  Routing r;
  r.segments = {tensor::upload<std::int32_t>(b.ctx, *b.arena, offsets),
                tensor::upload<std::int32_t>(b.ctx, *b.arena, padded)};
  r.token_M = tensor::upload<std::int32_t>(b.ctx, *b.arena, token);
  r.R = (M + 127 * E + 127) / 128 * 128;
  return r;
}

struct LayerShape {
  const char* name;
  std::int64_t T, C, E, D, F;
};

void layer(Bench& b, const LayerShape& s) {
  const std::int64_t M = s.T * s.C, D = s.D, F = s.F;
  const tensor::ArenaScope scope(*b.arena);
  const Routing r = route(b, s.T, s.C, s.E);
  auto* stats = tensor::take_structs<QuantStats>(*b.arena, 1);
  tensor::check_cuda(cudaMemset(stats, 0, sizeof(QuantStats)), "stats");
  const double MD = static_cast<double>(M) * D, MF = static_cast<double>(M) * F;
  const double MD_scales = MD / 32, MF_scales = MF / 32;  // one layout's
  const auto shape = [&](std::int64_t rows, std::int64_t width) {
    return fmt::format("{} {} x {}", s.name, rows, width);
  };
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
    const bool block = scaling == Scaling::kBlock;
    const double k = block ? 1 : 0;
    const std::string kind = block ? "" : " (kRow)";
    // again: bytes that have to move beside those of every input and output once.
    const auto time = [&](const std::string& name, std::int64_t width, double bytes, double again,
                          const auto& run) {
      if (b.wanted((name + kind).c_str()))
        b.time((name + kind).c_str(), shape(M, width).c_str(), bytes, bytes + again, run);
    };
    const double second = block ? 0 : 1;  // a column's scale needs all of it first
    {
      const tensor::ArenaScope inner(*b.arena);
      const TensorView x = b.random({M, D});
      const Fp8Rows rows = b.rows(M, D, scaling);
      const Fp8Columns columns = b.columns(D, r.R, s.E, scaling);
      time("quantize_rows", D, 3 * MD + k * MD_scales, 0,
           [&] { ops::quantize_rows(b.ctx, x, false, rows, nullptr); });
      time("quantize_rows, counted", D, 3 * MD + k * MD_scales, 0,
           [&] { ops::quantize_rows(b.ctx, x, false, rows, stats); });
      time("quantize_columns", D, 3 * MD + k * MD_scales, second * 2 * MD,
           [&] { ops::quantize_columns(b.ctx, x, r.segments, false, columns, nullptr); });
      time("quantize_rows_columns", D, 4 * MD + 2 * k * MD_scales, second * 2 * MD, [&] {
        ops::quantize_rows_columns(b.ctx, x, r.segments, false, rows, columns, nullptr);
      });
      time("quantize_rows_columns, counted", D, 4 * MD + 2 * k * MD_scales, second * 2 * MD,
           [&] { ops::quantize_rows_columns(b.ctx, x, r.segments, false, rows, columns, stats); });
      // The gathered rows come from a table of T, of which each is read once from memory.
      const TensorView h = x.rows(0, s.T);
      const double table = 2.0 * s.T * D;
      time("permute_quantize rows", D, table + MD + k * MD_scales, 2 * MD - table, [&] {
        ops::permute_quantize(b.ctx, h, r.token_M, r.segments, false, rows, nullptr, stats);
      });
      time("permute_quantize both", D, table + 2 * MD + 2 * k * MD_scales,
           (1 + second) * 2 * MD - table, [&] {
             ops::permute_quantize(b.ctx, h, r.token_M, r.segments, false, rows, &columns, stats);
           });
      time("dequantize_rows", D, 3 * MD + k * MD_scales, 0,
           [&] { ops::dequantize_rows(b.ctx, rows, x); });
    }
    const TensorView gate_up = b.random({M, 2 * F}), d_a = b.random({M, F});
    const TensorView d_gate_up = b.random({M, 2 * F});
    {
      const tensor::ArenaScope inner(*b.arena);
      const Fp8Rows rows = b.rows(M, F, scaling);
      const Fp8Columns columns = b.columns(F, r.R, s.E, scaling);
      if (block) {
        time("swiglu", F, 6 * MF, 0, [&] { ops::swiglu(b.ctx, gate_up, d_a); });
        time("swiglu_backward", F, 10 * MF, 0,
             [&] { ops::swiglu_backward(b.ctx, gate_up, d_a, d_gate_up); });
      }
      time("swiglu_quantize rows", F, 5 * MF + k * MF_scales, 0,
           [&] { ops::swiglu_quantize(b.ctx, gate_up, r.segments, false, rows, nullptr, stats); });
      time("swiglu_quantize both", F, 6 * MF + 2 * k * MF_scales, second * 4 * MF,
           [&] { ops::swiglu_quantize(b.ctx, gate_up, r.segments, false, rows, &columns, stats); });
    }
    const Fp8Rows rows = b.rows(M, 2 * F, scaling);
    const Fp8Columns columns = b.columns(2 * F, r.R, s.E, scaling);
    time("swiglu_backward_quantize both", F, 10 * MF + 4 * k * MF_scales, second * 6 * MF, [&] {
      ops::swiglu_backward_quantize(b.ctx, gate_up, d_a, r.segments, false, {}, rows, &columns,
                                    stats);
    });
  }
}

// Norms of T tokens, as a policy packs them (one segment).
void norms(Bench& b, std::int64_t T, std::int64_t D) {
  const tensor::ArenaScope scope(*b.arena);
  const std::int32_t ends[2] = {0, static_cast<std::int32_t>(T)};
  const TensorView offsets = tensor::upload<std::int32_t>(b.ctx, *b.arena, ends);
  const Segments segments{offsets, offsets};  // T is a multiple of 128
  const TensorView x = b.random({T, D}), delta = b.random({T, D}), w = b.random({D});
  const TensorView out = b.random({T, D}), h = b.random({T, D});
  const TensorView rstd = b.arena->take(DType::kFp32, {T});
  const double n = static_cast<double>(T) * D;
  const std::string shape = fmt::format("{} x {}", T, D);
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
    const double scales = scaling == Scaling::kBlock ? n / 32 : 0;
    const std::string kind = scaling == Scaling::kBlock ? "" : " (kRow)";
    const Fp8Rows rows = b.rows(T, D, scaling);
    const Fp8Columns columns = b.columns(D, T, 1, scaling);
    const auto time = [&](const std::string& name, double bytes, const TensorView& to,
                          const Fp8Columns* c) {
      if (b.wanted((name + kind).c_str()))
        b.time((name + kind).c_str(), shape.c_str(), bytes, bytes + (c != nullptr ? 2 * n : 0),
               [&] {
                 ops::rms_norm_quantize(b.ctx, x, delta, w, 1e-6f, out, to, rstd, segments, false,
                                        rows, c, nullptr);
               });
    };
    time("rms_norm_quantize rows", 7 * n + scales, {}, nullptr);
    time("rms_norm_quantize rows, h", 9 * n + scales, h, nullptr);
    time("rms_norm_quantize both", 8 * n + 2 * scales, {}, &columns);
    time("rms_norm_quantize both, h", 10 * n + 2 * scales, h, &columns);
  }
}

void weights(Bench& b, std::int64_t E, std::int64_t N, std::int64_t K) {
  const tensor::ArenaScope scope(*b.arena);
  const TensorView w = b.random({E, N, K});
  const double n = static_cast<double>(w.count());
  for (const auto kind :
       {ops::WeightScales::kBlock128, ops::WeightScales::kPerRow, ops::WeightScales::kPerTensor}) {
    const Scaling scaling = kind == ops::WeightScales::kBlock128 ? Scaling::kBlock : Scaling::kRow;
    const char* text = scaling == Scaling::kBlock           ? "kBlock128"
                       : kind == ops::WeightScales::kPerRow ? "kPerRow"
                                                            : "kPerTensor";
    const Fp8Weight out = b.weight(E, N, K, scaling), out_t = b.weight(E, K, N, scaling);
    const std::string name = fmt::format("quantize_weight {}", text);
    if (b.wanted(name.c_str()))
      b.time(name.c_str(), fmt::format("{} x {} x {}", E, N, K).c_str(), 4 * n,
             (scaling == Scaling::kBlock ? 4 : 6) * n,
             [&] { ops::quantize_weight(b.ctx, w, kind, false, {}, out, out_t, nullptr); });
  }
}

void run(const std::string& only) {
  tensor::Arena arena(tensor::Device::kCuda);
  Bench b{tensor::cuda_context(arena), &arena, only};
  std::printf("%s\n", tensor::device_text(b.ctx).c_str());
  {
    const tensor::ArenaScope scope(arena);
    const TensorView from = b.random({1 << 28}), to = b.random({1 << 28});
    b.time("copy", "512 MiB", 2.0 * from.bytes(), 2.0 * from.bytes(), [&] {
      tensor::check_cuda(cudaMemcpyAsync(to.data, from.data, from.bytes(), cudaMemcpyDeviceToDevice,
                                         tensor::stream_of(b.ctx)),
                         "copy");
    });
  }
  layer(b, {"qwen3-30b", 16384, 8, 128, 2048, 768});
  layer(b, {"dsv3", 4096, 8, 32, 7168, 2048});
  norms(b, 65536, 2048);
  norms(b, 32768, 7168);
  weights(b, 128, 1536, 2048);
  weights(b, 128, 2048, 768);
  weights(b, 32, 4096, 7168);
}

}  // namespace
}  // namespace lockstep::bench

int main(int argc, char** argv) {
  try {
    lockstep::bench::run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
