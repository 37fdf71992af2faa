// The FP8 step in FP32 arithmetic that rounds toward zero (docs/numerics.md, section 4). With X the
// largest exponent, the numbers in [2^(X+10), 2^(X+11)) are 2^(X-13) apart, so adding a magnitude
// to an accumulator that starts at 2^(X+10) truncates it to 13 fraction bits: alignment, truncation
// and sum are one FMA (products of two FP8 values are exact in FP32, and 32 of them and C stay
// below 2^(X+8)). Positive and negative terms have an accumulator each; their difference is S,
// exactly.
//
// Columns of b lie along the lanes. A slice of b is unpacked to FP32 in two planes, positive values
// and magnitudes of negative ones; the sign of a(m, k) says which plane feeds which accumulator.
// A NaN in an operand becomes a NaN in a plane and reaches every result that it must.
#include "numerics/math.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemm_tiles.h"
#include "ops/cpu/simd.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {
namespace {

using numerics::Fp8;

constexpr int kStep = 32;
constexpr int kVectors = 4;                // vectors of FP32 across a panel
constexpr int kPanel = kVectors * kLanes;  // columns of a panel
constexpr std::int32_t kExponentField = 0x7F800000;

// How the codes of one operand make numbers: value = bits(code << shift + rebias) for normal codes.
// An exponent is stored as a byte, `lift` above its field, and zero as 0; the lifts of the two
// operands make the sum of two exponents that of an FP32 number, and sums with a zero come out
// below all others.
struct Format {
  int mantissa_bits, bias, lift;
  std::int32_t first_nonfinite;
};
Format format_of(tensor::DType dtype, tensor::DType other, bool is_a) {
  const auto bias = [](tensor::DType x) { return x == tensor::DType::kE4m3 ? 7 : 15; };
  const int lift = 127 - bias(dtype) - bias(other) + (is_a ? 1 : 0);
  if (dtype == tensor::DType::kE4m3) return {3, 7, lift / 2, 0x7F};
  return {2, 15, lift / 2, 0x7C};
}

// Magnitudes of codes without their signs. No subnormal FP32 number is touched (that is slow).
inline VecF magnitude_of(const Format& format, VecI code) {
  const VecF one = reinterpret_cast<VecF>((VecI{} + 127 - format.bias) << 23);
  const VecI bits = (code << (23 - format.mantissa_bits)) + reinterpret_cast<VecI>(one);
  const VecF normal = reinterpret_cast<VecF>(bits);
  const VecF subnormal = (normal + normal) - (one + one);
  const VecF value = code < (1 << format.mantissa_bits) ? subnormal : normal;
  return code >= format.first_nonfinite ? reinterpret_cast<VecF>(VecI{} + 0x7FC00000) : value;
}

// Exponent bytes of code bytes. V: a vector of bytes, I: the same vector as int32.
template <typename V, typename I>
inline V exponent_of(const Format& format, V code) {
  const std::uint8_t field_mask = static_cast<std::uint8_t>(0x7F >> format.mantissa_bits);
  const std::uint8_t lift = static_cast<std::uint8_t>(format.lift);
  const V magnitude = code & std::uint8_t{0x7F};
  const V field =
      reinterpret_cast<V>(reinterpret_cast<I>(magnitude) >> format.mantissa_bits) & field_mask;
  const V subnormal = reinterpret_cast<V>(field == 0) & std::uint8_t{1};
  const V lifted = field + subnormal + lift;
  return lifted & reinterpret_cast<V>(magnitude != 0);
}

struct ColumnStep {
  alignas(64) float plane[kStep][2][kPanel];
  alignas(64) std::uint8_t exponent[kStep / 4][kPanel][4];
};
struct RowStep {
  alignas(64) float magnitude[kStep];
  alignas(64) std::uint8_t exponent[kStep];
  alignas(64) std::int32_t swap[kStep];  // offset of the plane that a positive product comes from
};

// `columns` rows of b, `depth` codes each, to a panel; the rest is zero.
[[gnu::noinline]] void unpack_columns(const Format& format, const Fp8* b, std::int64_t b_stride,
                                      int columns, int depth, ColumnStep& out) {
  alignas(64) std::uint32_t quad[kStep / 4][kPanel];  // four k of a column side by side
  if (columns < kPanel) std::memset(quad, 0, sizeof(quad));
  for (int n = 0; n < columns; ++n) {
    std::uint32_t words[kStep / 4] = {};
    if (depth == kStep)
      std::memcpy(words, b + n * b_stride, kStep);
    else
      std::memcpy(words, b + n * b_stride, static_cast<std::size_t>(depth));
    for (int q = 0; q < kStep / 4; ++q) quad[q][n] = words[q];
  }
  for (int q = 0; q < kStep / 4; ++q)
    for (int n = 0; n < kPanel; n += kLanes) {
      const VecI codes = load<VecI>(&quad[q][n]);
      store(out.exponent[q][n], exponent_of<VecU8, VecI>(format, reinterpret_cast<VecU8>(codes)));
      for (int j = 0; j < 4; ++j) {
        const VecI code = codes >> (8 * j);
        const VecI negative = (code << 24) >> 31;
        const VecI magnitude = reinterpret_cast<VecI>(magnitude_of(format, code & 0x7F));
        store(&out.plane[4 * q + j][0][n], magnitude & ~negative);
        store(&out.plane[4 * q + j][1][n], magnitude & negative);
      }
    }
}

inline void unpack_row(const Format& format, const Fp8* a, int depth, RowStep& out) {
  constexpr int kBytes = kVectorBytes < kStep ? kVectorBytes : kStep;
  using Bytes = std::uint8_t __attribute__((vector_size(kBytes)));
  using Words = std::int32_t __attribute__((vector_size(kBytes)));
  using Some = std::uint8_t __attribute__((vector_size(kLanes)));
  alignas(64) Fp8 padded[kStep] = {};
  if (depth < kStep) {
    for (int k = 0; k < depth; ++k) padded[k] = a[k];
    a = padded;
  }
  for (int k = 0; k < kStep; k += kBytes)
    store(out.exponent + k, exponent_of<Bytes, Words>(format, load<Bytes>(a + k)));
  for (int k = 0; k < kStep; k += kLanes) {
    const VecI code = __builtin_convertvector(load<Some>(a + k), VecI);
    store(out.magnitude + k, magnitude_of(format, code & 0x7F));
    store(out.swap + k, (code >> 7) * kPanel);
  }
}

// One step of one row against a panel: part_P = step(a, b, part_P). Rounds toward zero.
inline void row_step(const RowStep& a, const ColumnStep& b, float* part_P) {
  // 1. The largest exponent of the products, four k side by side.
  VecU8 top[kVectors] = {};
  for (int q = 0; q < kStep / 4; ++q) {
    std::int32_t four;
    std::memcpy(&four, a.exponent + 4 * q, sizeof(four));
    const VecU8 exponents = reinterpret_cast<VecU8>(four + VecI{});
    for (int v = 0; v < kVectors; ++v)
      top[v] = max(top[v], exponents + load<VecU8>(b.exponent[q][v * kLanes]));
  }

  // 2. With the exponent of C; accumulators start at 2^(X+10) and C's own part.
  VecF positive[kVectors], negative[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const VecI two = reinterpret_cast<VecI>(
        max(top[v], reinterpret_cast<VecU8>(reinterpret_cast<VecI>(top[v]) >> 16)));
    const VecI one = reinterpret_cast<VecI>(
        max(reinterpret_cast<VecU8>(two), reinterpret_cast<VecU8>(two >> 8)));
    const VecF c = load<VecF>(part_P + v * kLanes);
    const VecI of_product = (one & 0xFF) << 23;
    const VecI of_c = reinterpret_cast<VecI>(c) & kExponentField;
    // (Unsigned, because a NaN in C may wrap it.)
    const VecU top_exponent = reinterpret_cast<VecU>(max(of_product, of_c));
    const VecF origin = reinterpret_cast<VecF>(top_exponent + (10u << 23));
    positive[v] = origin + above_zero(c);
    negative[v] = origin - below_zero(c);
  }

  // 3. Truncated products.
  for (int k = 0; k < kStep; ++k) {
    const VecF magnitude = a.magnitude[k] - VecF{};
    const float* plane = b.plane[k][0];
    const float* plus = plane + a.swap[k];
    const float* minus = plane + (kPanel - a.swap[k]);
    for (int v = 0; v < kVectors; ++v) {
      positive[v] = multiply_add(magnitude, load<VecF>(plus + v * kLanes), positive[v]);
      negative[v] = multiply_add(magnitude, load<VecF>(minus + v * kLanes), negative[v]);
    }
  }

  // 4. S, truncated to 14 significant bits.
  for (int v = 0; v < kVectors; ++v) {
    const VecI sum = reinterpret_cast<VecI>(positive[v] - negative[v]);
    store(part_P + v * kLanes, sum & ~0x3FF);
  }
}

// One step of all rows. Rounds toward zero.
[[gnu::noinline]] void run_step(const Format& format, const Fp8* a, std::int64_t a_stride,
                                int depth, const ColumnStep& b, int rows, float* part) {
  for (int m = 0; m < rows; ++m) {
    RowStep row;
    unpack_row(format, a + m * a_stride, depth, row);
    row_step(row, b, part + m * kPanel);
  }
}

// A product of rows of a and rows of b, both with the contraction contiguous. The scale of row m in
// block g is a_scales[m + g * a_block]; that of column n b_scales[n / b_group * b_stride + g *
// b_block]. kRow: blocks have stride 0.
struct Operands {
  Format a_format, b_format;
  const Fp8 *a, *b;
  std::int64_t a_stride, b_stride;
  std::int64_t K;
  Scaling scaling;
  const float *a_scales, *b_scales;
  std::int64_t a_block, b_block, b_group, b_scale_stride;
};

// acc = acc + part or fma(part, sa*sb, acc); round to nearest.
[[gnu::noinline]] void add_part(const Operands& x, const Tile& tile, std::int64_t g,
                                const float* part, float* acc) {
  float b_scale[kPanel] = {};
  for (int n = 0; n < tile.columns; ++n)
    b_scale[n] = x.b_scales[(tile.column + n) / x.b_group * x.b_scale_stride + g * x.b_block];
  for (int m = 0; m < tile.rows; ++m, part += kPanel, acc += kPanel) {
    if (x.scaling == Scaling::kRow) {
      for (int n = 0; n < kPanel; ++n) acc[n] = acc[n] + part[n];
    } else {
      const float a_scale = x.a_scales[tile.row + m + g * x.a_block];
      for (int n = 0; n < kPanel; ++n)
        acc[n] = numerics::fma(part[n], a_scale * b_scale[n], acc[n]);
    }
  }
}

[[gnu::noinline]] void scale_rows(const Operands& x, const Tile& tile, float* acc) {
  float b_scale[kPanel] = {};
  for (int n = 0; n < tile.columns; ++n)
    b_scale[n] = x.b_scales[(tile.column + n) / x.b_group * x.b_scale_stride];
  for (int m = 0; m < tile.rows; ++m, acc += kPanel) {
    const float a_scale = x.a_scales[tile.row + m];
    for (int n = 0; n < kPanel; ++n) acc[n] = acc[n] * (a_scale * b_scale[n]);
  }
}

// A tile's results, [rows, kPanel].
void run_tile(const Operands& x, const Tile& tile, float* acc) {
  alignas(64) float part[Tiling::kTileRows * kPanel];
  ColumnStep slice;
  const std::size_t bytes = sizeof(float) * kPanel * static_cast<std::size_t>(tile.rows);
  const Fp8* a = x.a + tile.row * x.a_stride;
  const Fp8* b = x.b + tile.column * x.b_stride;
  std::memset(acc, 0, bytes);
  for (std::int64_t k0 = 0; k0 < x.K; k0 += kStep) {
    if (k0 % numerics::kQuantBlock == 0) std::memset(part, 0, bytes);
    const int depth = static_cast<int>(x.K - k0 < kStep ? x.K - k0 : kStep);
    unpack_columns(x.b_format, b + k0, x.b_stride, tile.columns, depth, slice);
    {
      const RoundTowardZero mode;
      run_step(x.a_format, a + k0, x.a_stride, depth, slice, tile.rows, part);
    }
    if ((k0 + kStep) % numerics::kQuantBlock == 0 || k0 + kStep >= x.K)
      add_part(x, tile, k0 / numerics::kQuantBlock, part, acc);
  }
  if (x.scaling == Scaling::kRow && x.K > 0) scale_rows(x, tile, acc);
}

}  // namespace

void fp8_gemm(const Context& ctx, const Fp8Rows& a, const Fp8Weight& b,
              const TensorView& offsets_E1, const TensorView& d_MN) {
  const std::int64_t M = a.codes_MK.dim(0), K = a.codes_MK.dim(1);
  const std::int64_t E = b.codes_ENK.dim(0), N = b.codes_ENK.dim(1);
  const std::int64_t G = ceil_div(K, numerics::kQuantBlock);
  const std::int64_t b_scales = b.scaling == Scaling::kBlock ? b.scales.dim(1) * G : N;
  const Tiling tiling{offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr, E, M, N, kPanel};
  const std::int64_t tiles = tiling.count();
  [[maybe_unused]] const int threads = threads_for(ctx, M, E, N, K);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Tile tile = tiling.at(t);
    const std::int64_t e = tile.expert, row = tiling.first_row(e);
    const bool block = a.scaling == Scaling::kBlock;
    const Operands x{format_of(a.codes_MK.dtype, b.codes_ENK.dtype, true),
                     format_of(b.codes_ENK.dtype, a.codes_MK.dtype, false),
                     a.codes_MK.fp8() + row * K,
                     b.codes_ENK.fp8() + e * N * K,
                     K,
                     K,
                     K,
                     a.scaling,
                     a.scales.as<float>() + row,
                     b.scales.as<float>() + e * b_scales,
                     block ? M : 0,
                     block ? 1 : 0,
                     block ? numerics::kQuantBlock : 1,
                     block ? G : 1};
    alignas(64) float acc[Tiling::kTileRows * kPanel];
    run_tile(x, tile, acc);
    write_tile(d_MN, (row + tile.row) * N + tile.column, N, acc, kPanel, tile.rows, tile.columns,
               false);
  }
}

void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                         const Segments& segments, bool accumulate, const TensorView& d_ENK) {
  const std::int64_t E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2);
  const std::int64_t R = dy.codes_NR.dim(1);
  const auto* offsets = segments.offsets_E1.as<std::int32_t>();
  const auto* padded = segments.padded_offsets_E1.as<std::int32_t>();
  const Tiling tiling{nullptr, E, N, K, kPanel};
  const std::int64_t tiles = tiling.count();
  [[maybe_unused]] const int threads = threads_for(ctx, offsets[E], E, N, K);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Tile tile = tiling.at(t);
    const std::int64_t e = tile.expert, first = padded[e];
    const bool block = dy.scaling == Scaling::kBlock;
    const std::int64_t scales = block ? first / numerics::kQuantBlock : e;
    const Operands operands{format_of(dy.codes_NR.dtype, x.codes_NR.dtype, true),
                            format_of(x.codes_NR.dtype, dy.codes_NR.dtype, false),
                            dy.codes_NR.fp8() + first,
                            x.codes_NR.fp8() + first,
                            R,
                            R,
                            offsets[e + 1] - offsets[e],
                            dy.scaling,
                            dy.scales.as<float>() + scales * N,
                            x.scales.as<float>() + scales * K,
                            block ? N : 0,
                            block ? K : 0,
                            1,
                            1};
    alignas(64) float acc[Tiling::kTileRows * kPanel];
    run_tile(operands, tile, acc);
    if (!accumulate)  // a scale can make a product -0
      for (int i = 0; i < tile.rows * kPanel; ++i) acc[i] = 0.0f + acc[i];
    write_tile(d_ENK, (e * N + tile.row) * K + tile.column, K, acc, kPanel, tile.rows, tile.columns,
               accumulate);
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
