#include "ops/cpu/quantize.h"

#include <algorithm>

#include "ops/cpu/quantize_block.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

using numerics::kQuantBlock;

template <typename T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

// Adds a thread's counters to the caller's; integers and extrema, so the order does not matter.
void merge_stats(const QuantStats& local, QuantStats* stats) {
  if (stats == nullptr) return;
#pragma omp critical(lockstep_quant_stats)
  stats->add(local);
}

template <typename Source>
void quantize_rows_of(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                      QuantStats* stats) {
  const std::int64_t M = x_MK.dim(0), K = x_MK.dim(1);
  const bool blocks = out.scaling == Scaling::kBlock;
  const std::int64_t width = blocks ? kQuantBlock : K;
  const std::int64_t groups = blocks ? (K + kQuantBlock - 1) / kQuantBlock : 1;
  const Source* x = data<const Source>(x_MK);
  Fp8* codes = data<Fp8>(out.codes_MK);
  float* scales = data<float>(out.scales);
#pragma omp parallel num_threads(ctx.threads)
  {
    QuantStats local;
#pragma omp for schedule(static)
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t begin = m * K + g * width;
        const std::int64_t n = std::min(width, K - g * width);
        const std::uint32_t amax = row_amax(x + begin, n);
        const float s = block_scale(amax, pow2);
        scales[g * M + m] = s;
        if (stats != nullptr) count_block(amax, local);
        encode_row(x + begin, n, 1.0f / s, codes + begin, stats != nullptr ? &local : nullptr);
      }
    merge_stats(local, stats);
  }
}

// One expert's segment of n <= kTile columns: x at its first row and column, `codes` at the
// segment's first padded row of the first column, `scales` at the first column of the segment.
struct ColumnSegment {
  std::int64_t stride, rows, padded, code_stride, scale_stride;
};

template <typename Source>
void quantize_segment(const Source* x, const ColumnSegment& at, std::int64_t n, bool blocks,
                      bool pow2, Fp8* codes, float* scales, QuantStats* stats) {
  std::uint32_t amax[kTile] = {};
  float inv[kTile];
  const auto set_scales = [&](float* to, bool count) {
    for (std::int64_t c = 0; c < n; ++c) {
      to[c] = block_scale(amax[c], pow2);
      inv[c] = 1.0f / to[c];
      if (stats != nullptr && count) count_block(amax[c], *stats);
    }
  };
  if (!blocks) {
    column_amax(x, at.stride, at.rows, n, amax);
    set_scales(scales, at.rows > 0);
  }
  for (std::int64_t r = 0; r < at.padded; r += kQuantBlock) {
    const std::int64_t rows = std::clamp<std::int64_t>(at.rows - r, 0, std::int64_t{kQuantBlock});
    if (blocks) {
      for (std::uint32_t& a : amax) a = 0;
      column_amax(x + r * at.stride, at.stride, rows, n, amax);
      set_scales(scales + r / kQuantBlock * at.scale_stride, rows > 0);
    }
    encode_columns(x + r * at.stride, at.stride, rows, n, inv, codes + r, at.code_stride, stats);
    const std::int64_t end = std::min<std::int64_t>(at.padded, r + kQuantBlock);
    for (std::int64_t c = 0; c < n; ++c)
      for (std::int64_t i = r + rows; i < end; ++i) codes[c * at.code_stride + i] = 0;
  }
}

template <typename Source>
void quantize_columns_of(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                         bool pow2, const Fp8Columns& out, QuantStats* stats) {
  const std::int64_t N = x_MN.dim(1), R = out.codes_NR.dim(1), E = segments.experts();
  const bool blocks = out.scaling == Scaling::kBlock;
  const auto* offsets = data<const std::int32_t>(segments.offsets_E1);
  const auto* padded = data<const std::int32_t>(segments.padded_offsets_E1);
  const Source* x = data<const Source>(x_MN);
  Fp8* codes = data<Fp8>(out.codes_NR);
  float* scales = data<float>(out.scales);
#pragma omp parallel num_threads(ctx.threads)
  {
    QuantStats local;
#pragma omp for schedule(static)
    for (std::int64_t c = 0; c < N; c += kTile) {
      const std::int64_t n = std::min(kTile, N - c);
      for (std::int64_t e = 0; e < E; ++e) {
        const std::int64_t begin = padded[e];
        const ColumnSegment at{N, offsets[e + 1] - offsets[e], padded[e + 1] - begin, R, N};
        float* to = scales + (blocks ? begin / kQuantBlock : e) * N + c;
        quantize_segment(x + offsets[e] * N + c, at, n, blocks, pow2, codes + c * R + begin, to,
                         stats != nullptr ? &local : nullptr);
      }
    }
    merge_stats(local, stats);
  }
}

struct WeightShape {
  std::int64_t E, N, K;
};

void weight_blocks(const Context& ctx, const Bf16* w, const WeightShape& shape, bool pow2,
                   const Fp8Weight& out, const Fp8Weight& out_t, QuantStats* stats) {
  const auto [E, N, K] = shape;
  const std::int64_t NB = (N + kQuantBlock - 1) / kQuantBlock;
  const std::int64_t KB = (K + kQuantBlock - 1) / kQuantBlock;
  const std::int64_t blocks = E * NB * KB;
  Fp8* codes = data<Fp8>(out.codes_ENK);
  float* scales = data<float>(out.scales);
  const bool transpose = static_cast<bool>(out_t.codes_ENK);
  Fp8* codes_t = data<Fp8>(out_t.codes_ENK);
  float* scales_t = data<float>(out_t.scales);
#pragma omp parallel num_threads(ctx.threads)
  {
    QuantStats local;
#pragma omp for schedule(static)
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t e = b / (NB * KB), nb = b / KB % NB, kb = b % KB;
      const std::int64_t n0 = nb * kQuantBlock, k0 = kb * kQuantBlock;
      const std::int64_t rows = std::min<std::int64_t>(kQuantBlock, N - n0);
      const std::int64_t width = std::min<std::int64_t>(kQuantBlock, K - k0);
      const std::int64_t first = (e * N + n0) * K + k0;
      std::uint32_t amax = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::uint32_t v = row_amax(w + first + r * K, width);
        amax = v > amax ? v : amax;
      }
      const float s = block_scale(amax, pow2);
      scales[b] = s;
      if (stats != nullptr) count_block(amax, local);
      for (std::int64_t r = 0; r < rows; ++r)
        encode_row(w + first + r * K, width, 1.0f / s, codes + first + r * K,
                   stats != nullptr ? &local : nullptr);
      if (!transpose) continue;
      scales_t[(e * KB + kb) * NB + nb] = s;
      for (std::int64_t k = 0; k < width; ++k) {
        Fp8* to = codes_t + (e * K + k0 + k) * N + n0;
        for (std::int64_t r = 0; r < rows; ++r) to[r] = codes[first + r * K + k];
      }
    }
    merge_stats(local, stats);
  }
}

// The transposed copy with one scale per column of w.
void weight_columns(const Context& ctx, const Bf16* w, const WeightShape& shape, bool pow2,
                    const Fp8Weight& out_t) {
  const auto [E, N, K] = shape;
  const std::int64_t tiles = (K + kTile - 1) / kTile, jobs = E * tiles;
  Fp8* codes = data<Fp8>(out_t.codes_ENK);
  float* scales = data<float>(out_t.scales);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t e = job / tiles, k = job % tiles * kTile;
    quantize_segment(w + e * N * K + k, {K, N, N, N, 0}, std::min(kTile, K - k), false, pow2,
                     codes + (e * K + k) * N, scales + e * K + k, nullptr);
  }
}

// One scale per projection in `out`. The contraction of the transposed copy runs across the
// projections of a slab, so that copy has one scale per slab.
void weight_tensors(const Context& ctx, const Bf16* w, const WeightShape& shape, bool pow2,
                    const std::int64_t* part_rows, std::int64_t parts, const Fp8Weight& out,
                    const Fp8Weight& out_t, QuantStats* stats) {
  const auto [E, N, K] = shape;
  const tensor::ArenaScope scope(*ctx.workspace);
  const std::int64_t rows = E * N;
  auto* amax = data<std::uint32_t>(ctx.workspace->take(tensor::DType::kInt32, {rows}));
  Fp8* codes = data<Fp8>(out.codes_ENK);
  float* scales = data<float>(out.scales);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t r = 0; r < rows; ++r) amax[r] = row_amax(w + r * K, K);
  for (std::int64_t e = 0, first = 0; e < E; ++e)
    for (std::int64_t i = 0; i < parts; first += part_rows[i++]) {
      std::uint32_t largest = 0;
      for (std::int64_t r = first; r < first + part_rows[i]; ++r)
        largest = std::max(largest, amax[r]);
      const float s = block_scale(largest, pow2);
      for (std::int64_t r = first; r < first + part_rows[i]; ++r) scales[r] = s;
      if (stats != nullptr) count_block(largest, *stats);
    }
#pragma omp parallel num_threads(ctx.threads)
  {
    QuantStats local;
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r)
      encode_row(w + r * K, K, 1.0f / scales[r], codes + r * K,
                 stats != nullptr ? &local : nullptr);
    merge_stats(local, stats);
  }
  if (!out_t.codes_ENK) return;
  Fp8* codes_t = data<Fp8>(out_t.codes_ENK);
  float* scales_t = data<float>(out_t.scales);
  const std::int64_t tiles = (K + kTile - 1) / kTile, jobs = E * tiles;
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t e = job / tiles, k = job % tiles * kTile, n = std::min(kTile, K - k);
    std::uint32_t largest = 0;
    for (std::int64_t r = e * N; r < (e + 1) * N; ++r) largest = std::max(largest, amax[r]);
    float inv[kTile];
    for (std::int64_t c = 0; c < n; ++c) {
      scales_t[e * K + k + c] = block_scale(largest, pow2);
      inv[c] = 1.0f / scales_t[e * K + k + c];
    }
    for (std::int64_t r = 0; r < N; r += kQuantBlock)
      encode_columns(w + (e * N + r) * K + k, K, std::min<std::int64_t>(kQuantBlock, N - r), n, inv,
                     codes_t + (e * K + k) * N + r, N, nullptr);
  }
}

}  // namespace

void quantize_rows(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                   QuantStats* stats) {
  if (x_MK.dtype == tensor::DType::kBf16)
    quantize_rows_of<Bf16>(ctx, x_MK, pow2, out, stats);
  else
    quantize_rows_of<float>(ctx, x_MK, pow2, out, stats);
}

void quantize_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                      bool pow2, const Fp8Columns& out, QuantStats* stats) {
  if (x_MN.dtype == tensor::DType::kBf16)
    quantize_columns_of<Bf16>(ctx, x_MN, segments, pow2, out, stats);
  else
    quantize_columns_of<float>(ctx, x_MN, segments, pow2, out, stats);
}

void quantize_weight(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                     const std::int64_t* part_rows, std::int64_t parts, const Fp8Weight& out,
                     const Fp8Weight& out_t, QuantStats* stats) {
  const WeightShape shape{w_ENK.dim(0), w_ENK.dim(1), w_ENK.dim(2)};
  const Bf16* w = data<const Bf16>(w_ENK);
  switch (kind) {
    case WeightScales::kBlock128:
      weight_blocks(ctx, w, shape, pow2, out, out_t, stats);
      return;
    case WeightScales::kPerRow: {
      const TensorView rows = w_ENK.reshape({shape.E * shape.N, shape.K});
      const Fp8Rows to{out.codes_ENK.reshape(rows.shape), out.scales.reshape({shape.E * shape.N}),
                       Scaling::kRow};
      quantize_rows_of<Bf16>(ctx, rows, pow2, to, stats);
      if (out_t.codes_ENK) weight_columns(ctx, w, shape, pow2, out_t);
      return;
    }
    case WeightScales::kPerTensor:
      weight_tensors(ctx, w, shape, pow2, part_rows, parts, out, out_t, stats);
      return;
  }
}

void dequantize_rows(const Context& ctx, const Fp8Rows& x, const TensorView& out_MK) {
  const std::int64_t M = out_MK.dim(0), K = out_MK.dim(1);
  const bool blocks = x.scaling == Scaling::kBlock;
  const Fp8* codes = data<const Fp8>(x.codes_MK);
  const float* scales = data<const float>(x.scales);
  Bf16* out = data<Bf16>(out_MK);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t k0 = 0; k0 < K; k0 += kQuantBlock) {
      const float s = scales[blocks ? k0 / kQuantBlock * M + m : m];
      const std::int64_t end = std::min<std::int64_t>(K, k0 + kQuantBlock);
      for (std::int64_t k = k0; k < end; ++k)
        out[m * K + k] = numerics::to_bf16(numerics::e4m3_to_float(codes[m * K + k]) * s);
    }
}

void dequantize_weight(const Context& ctx, const Fp8Weight& w, const TensorView& out_ENK) {
  const std::int64_t E = out_ENK.dim(0), N = out_ENK.dim(1), K = out_ENK.dim(2), rows = E * N;
  const std::int64_t NB = (N + kQuantBlock - 1) / kQuantBlock;
  const std::int64_t KB = (K + kQuantBlock - 1) / kQuantBlock;
  const bool blocks = w.scaling == Scaling::kBlock;
  const Fp8* codes = data<const Fp8>(w.codes_ENK);
  const float* scales = data<const float>(w.scales);
  Bf16* out = data<Bf16>(out_ENK);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t k0 = 0; k0 < K; k0 += kQuantBlock) {
      const std::int64_t block = (r / N * NB + r % N / kQuantBlock) * KB + k0 / kQuantBlock;
      const float s = scales[blocks ? block : r];
      const std::int64_t end = std::min<std::int64_t>(K, k0 + kQuantBlock);
      for (std::int64_t k = k0; k < end; ++k)
        out[r * K + k] = numerics::to_bf16(numerics::e4m3_to_float(codes[r * K + k]) * s);
    }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
