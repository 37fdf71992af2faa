#include <algorithm>

#include "ops/cuda/quantize.h"
#include "ops/cuda/quantize_lanes.cuh"
#include "ops/cuda/quantize_row.cuh"

namespace lockstep::ops::cuda {
namespace {

// Rows of a BF16 matrix, straight or by a table of rows.
template <bool kTable>
struct RowSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 1, kHeld = 0, kParts = 1, kTableBytes = 0;
  static constexpr int ctas(Pass pass) { return pass == Pass::kBlocks ? 2 : 3; }
  static constexpr bool kGather = kTable, kCombines = false, kColumnsAlone = true;
  const Bf16* x;
  const std::int32_t* token;
  std::int64_t width;

  bool aligned() const { return aligned16(x); }
  __device__ std::int32_t gathered(std::int64_t r) const { return __ldg(token + r); }
  __device__ const Bf16* at(int, std::int64_t r, std::int64_t column) const {
    return x + r * width + column;
  }
  __device__ std::int64_t stride(int) const { return width; }
};

// The same, a whole row at a time; token may be null.
struct StoredRows {
  using Values = Bf16x8;
  const Bf16* x;
  const std::int32_t* token;
  std::int64_t width;

  static constexpr int kTableBytes = 0, kLaneWarps = kMostLaneWarps;
  __device__ void values(std::int64_t row, const LanePart& part, const auto&, const float*,
                         Bf16x8 (&y)[kLaneEights]) const {
    load_lane_eights(x + (token != nullptr ? __ldg(token + row) : row) * width, part, y);
  }
};

// Codes of rows of K under the scale of their block of 128 columns and `block_rows` rows, in
// segments of `segment_rows`: scales[segment][row block][group], or by the strides of Fp8Rows.
struct ScaleGrid {
  std::int64_t segment_rows, block_rows, row_stride, group_stride, segment_stride;
};

// Two neighbouring codes; through FP16, which holds every E4M3 value.
__device__ inline std::uint32_t decode2(std::uint32_t pair, float s) {
  std::uint32_t half2;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half2) : "h"(static_cast<std::uint16_t>(pair)));
  float low, high;
  asm("{\n\t.reg .b16 lo, hi;\n\tmov.b32 {lo, hi}, %2;\n\t"
      "cvt.f32.f16 %0, lo;\n\tcvt.f32.f16 %1, hi;\n\t}"
      : "=f"(low), "=f"(high)
      : "r"(half2));
  return pack_bf16(low * s, high * s);
}

// A warp takes kWarpEights pieces of eight codes of a row at a time, and a CTA those of
// neighbouring rows, whose scales may lie side by side.
constexpr int kDequantRows = 8;
template <bool kVector>
__global__ void __launch_bounds__(32 * kDequantRows)
    dequantize_kernel(const Fp8* codes, const float* scales, ScaleGrid grid, std::int64_t rows,
                      std::int64_t K, std::int64_t units, Bf16* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t row_units = (K + kWarpEights * 8 - 1) / (kWarpEights * 8);
  for (std::int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::int64_t group = unit / row_units, row = group * kDequantRows + warp;
    if (row >= rows) continue;
    const std::int64_t first = ((unit - group * row_units) * kWarpEights + lane) * 8;
    const std::int64_t segment = row / grid.segment_rows;
    const std::int64_t in_segment = row - segment * grid.segment_rows;
    const float* scale =
        scales + segment * grid.segment_stride + in_segment / grid.block_rows * grid.row_stride;
    const Fp8* from = codes + row * K;
    Bf16* to = out + row * K;
    float s[kLaneEights];
    uint2 w[kLaneEights];
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      const std::int64_t k = first + 32 * 8 * i;
      if (k >= K) continue;
      s[i] = __ldg(scale + k / kQuantBlock * grid.group_stride);
      if constexpr (kVector) w[i] = __ldg(reinterpret_cast<const uint2*>(from + k));
    }
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      const std::int64_t k = first + 32 * 8 * i;
      if (k >= K) continue;
      if constexpr (kVector) {
        store8<true>(to + k,
                     {{decode2(w[i].x & 0xFFFFu, s[i]), decode2(w[i].x >> 16, s[i]),
                       decode2(w[i].y & 0xFFFFu, s[i]), decode2(w[i].y >> 16, s[i])}},
                     8);
      } else {
        for (int c = 0; c < 8 && k + c < K; ++c)
          to[k + c] = numerics::to_bf16(numerics::e4m3_to_float(from[k + c]) * s[i]);
      }
    }
  }
}

void dequantize(const Context& ctx, const TensorView& codes, const TensorView& scales,
                const ScaleGrid& grid, std::int64_t rows, std::int64_t K, const TensorView& out) {
  if (rows * K == 0) return;
  const bool vector = K % 8 == 0 && aligned16(codes.data) && aligned16(out.data);
  const std::int64_t units =
      (rows + kDequantRows - 1) / kDequantRows * ((K + kWarpEights * 8 - 1) / (kWarpEights * 8));
  const auto blocks = static_cast<unsigned>(std::min(units, std::int64_t{kMultiprocessors} * 32));
  const auto kernel = vector ? dequantize_kernel<true> : dequantize_kernel<false>;
  kernel<<<blocks, 32 * kDequantRows, 0, stream_of(ctx)>>>(codes.fp8(), scales.as<float>(), grid,
                                                           rows, K, units, out.as<Bf16>());
  LOCKSTEP_CUDA_LAUNCHED("dequantize");
}

}  // namespace

std::uint32_t* take_largest(const Context& ctx, std::int64_t n) {
  const TensorView memory = ctx.workspace->take(tensor::DType::kInt32, {n});
  if (n > 0)
    tensor::check_cuda(cudaMemsetAsync(memory.data, 0, memory.bytes(), stream_of(ctx)),
                       "quantize: scratch");
  return static_cast<std::uint32_t*>(memory.data);
}

void quantize_rows(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                   QuantStats* stats) {
  const std::int64_t M = x_MK.dim(0), K = x_MK.dim(1);
  const bool blocks = out.scaling == Scaling::kBlock;
  const LaneRows lanes{M, K, out.codes_MK.fp8(), out.scales.as<float>(), pow2, stats};
  const StoredRows stored{x_MK.as<Bf16>(), nullptr, K};
  if (K % 8 == 0 && aligned16(stored.x) && aligned16(lanes.codes) &&
      launch_lane_rows(ctx, stored, lanes, blocks))
    return;
  if (!blocks) {
    RowPlan plan;
    plan.M = M, plan.K = K, plan.x = stored.x, plan.codes = lanes.codes;
    plan.scales = lanes.scales, plan.blocks = false, plan.pow2 = pow2, plan.stats = stats;
    if (launch_rows<false>(ctx, plan)) return;
  }
  const RowSource<false> source{x_MK.as<Bf16>(), nullptr, K};
  quantize_source(ctx, source, M, K, {}, pow2, &out, nullptr, stats);
}

void quantize_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                      bool pow2, const Fp8Columns& out, QuantStats* stats) {
  const RowSource<false> source{x_MN.as<Bf16>(), nullptr, x_MN.dim(1)};
  quantize_source(ctx, source, x_MN.dim(0), x_MN.dim(1), segments, pow2, nullptr, &out, stats);
}

void quantize_rows_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                           bool pow2, const Fp8Rows& rows, const Fp8Columns& columns,
                           QuantStats* stats) {
  const std::int64_t M = x_MN.dim(0), N = x_MN.dim(1);
  const RowSource<false> source{x_MN.as<Bf16>(), nullptr, N};
  const LaneRows lanes{M, N, rows.codes_MK.fp8(), rows.scales.as<float>(), pow2, stats};
  if (rows.scaling == Scaling::kRow && N % 8 == 0 && source.aligned() && aligned16(lanes.codes) &&
      quantize_whole_rows_columns(ctx, StoredRows{source.x, nullptr, N}, source, lanes, segments,
                                  columns))
    return;
  quantize_source(ctx, source, M, N, segments, pow2, &rows, &columns, stats);
}

void permute_quantize(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
                      const Segments& segments, bool pow2, const Fp8Rows& rows,
                      const Fp8Columns* columns, QuantStats* stats) {
  const std::int64_t M = token_M.dim(0), D = h_TD.dim(1);
  const RowSource<true> source{h_TD.as<Bf16>(), token_M.as<std::int32_t>(), D};
  const StoredRows stored{source.x, source.token, D};
  const LaneRows lanes{M, D, rows.codes_MK.fp8(), rows.scales.as<float>(), pow2, stats};
  const bool blocks = rows.scaling == Scaling::kBlock;
  if (D % 8 == 0 && source.aligned() && aligned16(lanes.codes)) {
    if (columns == nullptr && launch_lane_rows(ctx, stored, lanes, blocks)) return;
    if (columns != nullptr && !blocks &&
        quantize_whole_rows_columns(ctx, stored, source, lanes, segments, *columns))
      return;
  }
  quantize_source(ctx, source, M, D, segments, pow2, &rows, columns, stats);
}

void dequantize_rows(const Context& ctx, const Fp8Rows& x, const TensorView& out_MK) {
  const std::int64_t M = out_MK.dim(0), K = out_MK.dim(1);
  const bool blocks = x.scaling == Scaling::kBlock;
  dequantize(ctx, x.codes_MK, x.scales, {std::max<std::int64_t>(M, 1), 1, 1, blocks ? M : 0, 0}, M,
             K, out_MK);
}

void dequantize_weight(const Context& ctx, const Fp8Weight& w, const TensorView& out_ENK) {
  const std::int64_t E = out_ENK.dim(0), N = out_ENK.dim(1), K = out_ENK.dim(2);
  const std::int64_t NB = (N + kQuantBlock - 1) / kQuantBlock;
  const std::int64_t KB = (K + kQuantBlock - 1) / kQuantBlock;
  const ScaleGrid grid = w.scaling == Scaling::kBlock ? ScaleGrid{N, kQuantBlock, KB, 1, NB * KB}
                                                      : ScaleGrid{N, 1, 1, 0, N};
  dequantize(ctx, w.codes_ENK, w.scales, grid, E * N, K, out_ENK);
}

}  // namespace lockstep::ops::cuda
