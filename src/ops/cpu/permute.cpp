#include "ops/cpu/permute.h"

#include <cstring>

#include "numerics/reduce.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

using numerics::Bf16;

constexpr std::int64_t kChunk = 256;  // columns whose accumulators stay in the first-level cache

void add_row(float* acc, const Bf16* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] = acc[i] + numerics::to_float(x[i]);
}

void store_row(Bf16* out, const float* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = numerics::to_bf16(acc[i]);
}

}  // namespace

void plan_permutation(const std::int32_t* experts, std::int64_t T, std::int64_t C, std::int64_t E,
                      std::int32_t* offsets, std::int32_t* padded_offsets, std::int32_t* row,
                      std::int32_t* token, std::int32_t* next_E) {
  for (std::int64_t e = 0; e < E; ++e) next_E[e] = 0;
  for (std::int64_t i = 0; i < T * C; ++i) ++next_E[experts[i]];
  offsets[0] = padded_offsets[0] = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int32_t count = next_E[e];
    offsets[e + 1] = offsets[e] + count;
    padded_offsets[e + 1] = padded_offsets[e] + (count + 127) / 128 * 128;
    next_E[e] = offsets[e];
  }
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t c = 0; c < C; ++c) {
      const std::int32_t r = next_E[experts[t * C + c]]++;
      row[t * C + c] = r;
      token[r] = static_cast<std::int32_t>(t);
    }
}

void permute(const RoutedShape& shape, const Bf16* h, const std::int32_t* token, Bf16* out) {
  const std::size_t bytes = static_cast<std::size_t>(shape.D) * sizeof(Bf16);
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t r = 0; r < shape.T * shape.C; ++r)
    if (bytes > 0) std::memcpy(out + r * shape.D, h + token[r] * shape.D, bytes);
}

void scatter_rows(const RoutedShape& shape, const Bf16* from, const std::int32_t* row, Bf16* to) {
  const std::size_t bytes = static_cast<std::size_t>(shape.D) * sizeof(Bf16);
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t r = 0; r < shape.T; ++r)
    if (bytes > 0) std::memcpy(to + row[r] * shape.D, from + r * shape.D, bytes);
}

void combine(const RoutedShape& shape, const Bf16* o, const float* weights, const std::int32_t* row,
             const Bf16* shared, Bf16* y) {
  const std::int64_t C = shape.C, D = shape.D;
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t t = 0; t < shape.T; ++t)
    for (std::int64_t d = 0; d < D; d += kChunk) {
      const std::int64_t n = D - d < kChunk ? D - d : kChunk;
      float acc[kChunk] = {};
      for (std::int64_t c = 0; c < C; ++c) {
        const float w = weights[t * C + c];
        const Bf16* x = o + row[t * C + c] * D + d;
        for (std::int64_t i = 0; i < n; ++i)
          acc[i] = numerics::fma(w, numerics::to_float(x[i]), acc[i]);
      }
      if (shared != nullptr) add_row(acc, shared + t * D + d, n);
      store_row(y + t * D + d, acc, n);
    }
}

void combine_backward(const RoutedShape& shape, const Bf16* dy, const Bf16* o, const float* weights,
                      const std::int32_t* row, Bf16* d_o, float* d_weights) {
  const std::int64_t C = shape.C, D = shape.D;
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t t = 0; t < shape.T; ++t)
    for (std::int64_t c = 0; c < C; ++c) {
      const float w = weights[t * C + c];
      const Bf16* g = dy + t * D;
      const Bf16* x = o + row[t * C + c] * D;
      Bf16* out = d_o + row[t * C + c] * D;
      for (std::int64_t i = 0; i < D; ++i) out[i] = numerics::to_bf16(w * numerics::to_float(g[i]));
      d_weights[t * C + c] = numerics::lane_sum<float>(D, [=](std::int64_t i, float acc) {
        return numerics::fma(numerics::to_float(g[i]), numerics::to_float(x[i]), acc);
      });
    }
}

void permute_backward(const RoutedShape& shape, const Bf16* d_x, const std::int32_t* row,
                      const Bf16* first, const Bf16* last, Bf16* d_h) {
  const std::int64_t C = shape.C, D = shape.D;
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t t = 0; t < shape.T; ++t)
    for (std::int64_t d = 0; d < D; d += kChunk) {
      const std::int64_t n = D - d < kChunk ? D - d : kChunk;
      float acc[kChunk] = {};
      if (first != nullptr) add_row(acc, first + t * D + d, n);
      for (std::int64_t c = 0; c < C; ++c) add_row(acc, d_x + row[t * C + c] * D + d, n);
      if (last != nullptr) add_row(acc, last + t * D + d, n);
      store_row(d_h + t * D + d, acc, n);
    }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
