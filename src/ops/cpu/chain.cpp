// The BF16 step in double arithmetic that rounds toward zero (docs/numerics.md, section 4). With X
// the largest exponent, the numbers in [2^(X+27), 2^(X+28)) are 2^(X-25) apart, so adding a
// magnitude to an accumulator that starts at 2^(X+27) truncates it to 25 fraction bits: alignment,
// truncation and sum are one FMA. Positive and negative terms have an accumulator each; their
// difference is S, exactly, and its conversion to FP32 truncates once more.
//
// Columns of b lie along the lanes. A slice of b is unpacked to doubles in two planes, positive
// values and magnitudes of negative ones; the sign of a(m, k) says which plane feeds which
// accumulator.
#include "ops/cpu/chain.h"

#include <limits>

#include "ops/cpu/simd.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {
namespace {

using numerics::Bf16;

constexpr int kStep = 16;
constexpr int kSlice = 32;                     // contraction values unpacked at a time: two steps
constexpr int kVectors = 4;                    // vectors of doubles across a panel
constexpr int kPanel = kVectors * kLanes / 2;  // columns of a panel
constexpr int kHalf = kLanes / 2;              // doubles in a vector
constexpr int kNonzero = 1024;                 // lifts sums of two exponents above all others
constexpr int kExponentBias = 2 * kNonzero + 2 * 127;
constexpr int kLarge = 100;  // sums stay below 2^128 while no exponent is above it
constexpr int kLowest = numerics::kLowestAlignment;

struct ColumnSlice {
  alignas(64) double plane[kSlice][2][kPanel];
  alignas(64) std::int16_t exponent[kSlice / 2][kPanel][2];
};
struct RowSlice {
  alignas(64) double magnitude[kSlice];
  alignas(64) std::int16_t exponent[kSlice];
  alignas(64) std::int32_t swap[kSlice];  // offset of the plane that a positive product comes from
};

// Exponents of pairs of values; zero gives 0.
inline VecI16 exponent_of(VecI pairs) {
  const VecI16 magnitude = reinterpret_cast<VecI16>(pairs & 0x7FFF7FFF);
  const VecI16 field = magnitude >> 7;
  const VecI16 subnormal = (field == 0) & std::int16_t{1};
  return (field + subnormal + std::int16_t{kNonzero}) & (magnitude != 0);
}
// Magnitudes of values (without signs) as FP32; infinities become NaN.
inline VecF magnitude_of(VecI value) {
  const VecI bits = value << 16;
  return reinterpret_cast<VecF>(value >= 0x7F80 ? VecI{} + 0x7FC00000 : bits);
}

[[gnu::noinline]] void unpack_columns(const StridedBf16& b, std::int64_t n0, int columns,
                                      std::int64_t k0, int depth, ColumnSlice& out) {
  alignas(64) std::uint32_t pair[kSlice / 2][kPanel];  // two k of a column side by side
  if (columns < kPanel || depth < kSlice) std::memset(pair, 0, sizeof(pair));
  const Bf16* base = b.data + n0 * b.row_stride + k0 * b.k_stride;
  if (b.k_stride == 1 && depth == kSlice) {
    for (int n = 0; n < columns; ++n) {
      std::uint32_t words[kSlice / 2];
      std::memcpy(words, base + n * b.row_stride, sizeof(words));
      for (int q = 0; q < kSlice / 2; ++q) pair[q][n] = words[q];
    }
  } else {
    for (int k = 0; k < depth; ++k) {
      const Bf16* from = base + k * b.k_stride;
      const int shift = 16 * (k % 2);
      std::uint32_t* to = pair[k / 2];
      if (shift == 0)
        for (int n = 0; n < columns; ++n) to[n] = from[n * b.row_stride].bits;
      else
        for (int n = 0; n < columns; ++n)
          to[n] |= static_cast<std::uint32_t>(from[n * b.row_stride].bits) << 16;
    }
  }
  for (int q = 0; q < kSlice / 2; ++q)
    for (int n = 0; n < kPanel; n += kLanes) {
      const VecI pairs = load<VecI>(&pair[q][n]);
      store(out.exponent[q][n], exponent_of(pairs));
      for (int j = 0; j < 2; ++j) {
        const VecI value = pairs >> (16 * j);
        const VecI negative = (value << 16) >> 31;
        const VecI magnitude = reinterpret_cast<VecI>(magnitude_of(value & 0x7FFF));
        alignas(64) float sides[2][kLanes];
        store(sides[0], magnitude & ~negative);
        store(sides[1], magnitude & negative);
        for (int side = 0; side < 2; ++side)
          for (int h = 0; h < 2; ++h)
            store(&out.plane[2 * q + j][side][n + h * kHalf],
                  __builtin_convertvector(load<HalfF>(sides[side] + h * kHalf), VecD));
      }
    }
}

inline void unpack_row(const Bf16* a, std::int64_t k_stride, int depth, RowSlice& out) {
  alignas(64) std::uint16_t raw[kSlice];
  if (depth == kSlice && k_stride == 1) {
    std::memcpy(raw, a, sizeof(raw));
  } else {
    for (int k = 0; k < kSlice; ++k) raw[k] = k < depth ? a[k * k_stride].bits : 0;
  }
  using Pairs = std::uint16_t __attribute__((vector_size(kLanes * 2)));
  alignas(64) float magnitude[kSlice];
  for (int k = 0; k < kSlice; k += 2 * kLanes)
    store(out.exponent + k, exponent_of(load<VecI>(raw + k)));
  for (int k = 0; k < kSlice; k += kLanes) {
    const VecI value = __builtin_convertvector(load<Pairs>(raw + k), VecI);
    store(magnitude + k, magnitude_of(value & 0x7FFF));
    store(out.swap + k, (value >> 15) * kPanel);
  }
  for (int k = 0; k < kSlice; k += kHalf)
    store(out.magnitude + k, __builtin_convertvector(load<HalfF>(magnitude + k), VecD));
}

// One step of one row against a panel. Rounds toward zero.
inline void row_step(const RowSlice& a, const ColumnSlice& b, int k0, VecF (&c)[kVectors / 2]) {
  // 1. The largest exponent of the products, pairs of k side by side.
  VecI16 top[kVectors / 2] = {};
  for (int k = k0; k < k0 + kStep; k += 2) {
    std::int32_t pair;
    std::memcpy(&pair, a.exponent + k, sizeof(pair));
    const VecI16 exponents = reinterpret_cast<VecI16>(pair + VecI{});
    for (int v = 0; v < kVectors / 2; ++v)
      top[v] = max(top[v], exponents + load<VecI16>(b.exponent[k / 2] + v * kLanes));
  }

  // 2. With the exponent of C; where it is large, results may overflow and C may be non-finite.
  VecI exponent[kVectors / 2];
  for (int v = 0; v < kVectors / 2; ++v) {
    const VecI both = reinterpret_cast<VecI>(top[v]);
    const VecI of_product = max(both >> 16, (both << 16) >> 16) - kExponentBias;
    const VecI bits = reinterpret_cast<VecI>(c[v]) & 0x7FFFFFFF;
    const VecI of_c = bits == 0 ? VecI{} + kLowest : max(bits >> 23, VecI{} + 1) - 127;
    exponent[v] = max(max(of_product, of_c), VecI{} + kLowest);
  }
  static_assert(kVectors == 4);
  const bool large = any_above(max(exponent[0], exponent[1]), kLarge);
  if (large)
    for (VecF& x : c) x = x + (x - x);  // infinity becomes NaN

  // 3. Accumulators start at 2^(X+27) and C's own part.
  VecD positive[kVectors], negative[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const VecF all = reinterpret_cast<VecF>(exponent[v / 2] + (27 + 1023));
    const HalfI half = reinterpret_cast<HalfI>(v % 2 == 0 ? low_half(all) : high_half(all));
    const VecD origin = reinterpret_cast<VecD>(__builtin_convertvector(half, VecL) << 52);
    const VecD from =
        __builtin_convertvector(v % 2 == 0 ? low_half(c[v / 2]) : high_half(c[v / 2]), VecD);
    positive[v] = origin + above_zero(from);
    negative[v] = origin - below_zero(from);
  }

  // 4. Truncated products.
  for (int k = k0; k < k0 + kStep; ++k) {
    const VecD magnitude = a.magnitude[k] - VecD{};
    const double* plane = b.plane[k][0];
    const double* plus = plane + a.swap[k];
    const double* minus = plane + (kPanel - a.swap[k]);
    for (int v = 0; v < kVectors; ++v) {
      positive[v] = multiply_add(magnitude, load<VecD>(plus + v * kHalf), positive[v]);
      negative[v] = multiply_add(magnitude, load<VecD>(minus + v * kHalf), negative[v]);
    }
  }

  // 5. S to FP32, truncated; from 2^128 on it is an infinity.
  HalfF result[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    VecD sum = positive[v] - negative[v];
    if (large) {
      constexpr std::int64_t kInfinity = 0x7FF0000000000000, kTwo128 = 0x47F0000000000000;
      const VecL bits = reinterpret_cast<VecL>(sum);
      const VecL magnitude = bits & std::int64_t{0x7FFFFFFFFFFFFFFF};
      const VecL infinity = (bits & INT64_MIN) | kInfinity;
      const VecL capped = ((magnitude >= kTwo128) & (magnitude <= kInfinity)) ? infinity : bits;
      sum = reinterpret_cast<VecD>(capped);
    }
    result[v] = __builtin_convertvector(sum, HalfF) + 0.0f;  // a truncated zero is +0
  }
  for (int v = 0; v < kVectors / 2; ++v) c[v] = join(result[2 * v], result[2 * v + 1]);
}

// A slice of `steps` steps for all rows. Rounds toward zero.
[[gnu::noinline]] void run_slice(const StridedBf16& a, std::int64_t k0, int depth,
                                 const ColumnSlice& b, float* c, std::int64_t c_stride,
                                 std::int64_t M, int columns) {
  const int steps = (depth + kStep - 1) / kStep;
  for (std::int64_t m = 0; m < M; ++m, c += c_stride) {
    RowSlice row;
    unpack_row(a.data + m * a.row_stride + k0 * a.k_stride, a.k_stride, depth, row);
    VecF state[kVectors / 2];
    if (columns == kPanel) {
      for (int v = 0; v < kVectors / 2; ++v) state[v] = load<VecF>(c + v * kLanes);
      for (int s = 0; s < steps; ++s) row_step(row, b, s * kStep, state);
      for (int v = 0; v < kVectors / 2; ++v) store(c + v * kLanes, state[v]);
    } else {
      alignas(64) float c_P[kPanel] = {};
      std::memcpy(c_P, c, sizeof(float) * static_cast<std::size_t>(columns));
      for (int v = 0; v < kVectors / 2; ++v) state[v] = load<VecF>(c_P + v * kLanes);
      for (int s = 0; s < steps; ++s) row_step(row, b, s * kStep, state);
      for (int v = 0; v < kVectors / 2; ++v) store(c_P + v * kLanes, state[v]);
      std::memcpy(c, c_P, sizeof(float) * static_cast<std::size_t>(columns));
    }
  }
}

}  // namespace

void bf16_chain(const StridedBf16& a, const StridedBf16& b, float* c, std::int64_t c_stride,
                std::int64_t M, std::int64_t N, std::int64_t K) {
  if (M == 0) return;
  ColumnSlice slice;
  for (std::int64_t n0 = 0; n0 < N; n0 += kPanel) {
    const int columns = static_cast<int>(N - n0 < kPanel ? N - n0 : kPanel);
    for (std::int64_t k0 = 0; k0 < K; k0 += kSlice) {
      const int depth = static_cast<int>(K - k0 < kSlice ? K - k0 : kSlice);
      unpack_columns(b, n0, columns, k0, depth, slice);
      const RoundTowardZero mode;
      run_slice(a, k0, depth, slice, c + n0, c_stride, M, columns);
    }
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
