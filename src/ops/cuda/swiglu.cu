#include "ops/cuda/quantize.h"
#include "ops/cuda/quantize_lanes.cuh"
#include "ops/cuda/swiglu.cuh"
#include "ops/cuda/swiglu.h"

namespace lockstep::ops::cuda {
namespace {

// Nothing of SwiGLU belongs to the columns alone.
struct NoColumns {};

struct ProductSource {
  using Values = Float8;
  static constexpr int kInputs = 2, kHeld = 0, kParts = 1;
  static constexpr int ctas(Pass) { return 2; }
  static constexpr int kTableBytes = kSigmoids * 4;
  static constexpr bool kGather = false, kCombines = true, kColumnsAlone = false;
  const Bf16* gate_up;
  std::int64_t F;

  bool aligned() const { return aligned16(gate_up); }
  __device__ const Bf16* at(int input, std::int64_t r, std::int64_t column) const {
    return gate_up + (2 * r + input) * F + column;
  }
  __device__ std::int64_t stride(int) const { return 2 * F; }
  template <bool kVector>
  __device__ NoColumns columns(std::int64_t, int) const {
    return {};
  }
  __device__ static void fill_table(float* table) { fill_sigmoids(table); }
  template <Pass kPass, bool kVector>
  __device__ Float8 combine(const Bf16x8 (&in)[2], NoColumns, const float* table, std::int64_t,
                            std::int64_t, int) const {
    return swiglu8(in[0], in[1], sigmoid8(in[0], table));
  }
};

// The same, a whole row at a time. kTable: with the table of sigmoids, which pays from about
// kManyProducts on.
constexpr std::int64_t kManyProducts = 1 << 23;
template <bool kTable, int kWarps>
struct ProductRows {
  using Values = Float8;
  static constexpr int kTableBytes = kTable ? kSigmoids * 4 : 0, kLaneWarps = kWarps;
  const Bf16* gate_up;
  std::int64_t F;

  __device__ static void fill_table(float* table) { fill_sigmoids(table); }
  __device__ void values(std::int64_t row, const LanePart& part, const auto&, const float* table,
                         Float8 (&a)[kLaneEights]) const {
    Bf16x8 g[kLaneEights], u[kLaneEights];
    load_lane_eights(gate_up + row * 2 * F, part, g);
    load_lane_eights(gate_up + row * 2 * F + F, part, u);
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i)
      a[i] = swiglu8(g[i], u[i], kTable ? sigmoid8(g[i], table) : sigmoid8(g[i]));
  }
};

// More than ten warps spill, so only rows that are wider take them.
template <bool kTable>
bool launch_products(const Context& ctx, const ProductSource& source, const LaneRows& out,
                     bool blocks) {
  return launch_lane_rows(ctx, ProductRows<kTable, 10>{source.gate_up, source.F}, out, blocks) ||
         launch_lane_rows(ctx, ProductRows<kTable, kMostLaneWarps>{source.gate_up, source.F}, out,
                          blocks);
}

// d_gate | d_up; written as BF16 too where d_gate_up is not null.
struct GradientSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 2, kHeld = 1, kParts = 2;
  static constexpr int ctas(Pass) { return 2; }
  static constexpr int kTableBytes = kSigmoids * 4;
  static constexpr bool kGather = false, kCombines = true, kColumnsAlone = false;
  const Bf16 *gate_up, *d_a;
  Bf16* d_gate_up;
  std::int64_t F;

  bool aligned() const { return aligned16(gate_up) && aligned16(d_a) && aligned16(d_gate_up); }
  __device__ const Bf16* at(int input, std::int64_t r, std::int64_t column) const {
    return input == 2 ? d_a + r * F + column : gate_up + (2 * r + input) * F + column;
  }
  __device__ std::int64_t stride(int input) const { return input == 2 ? F : 2 * F; }
  __device__ static void fill_table(float* table) { fill_sigmoids(table); }
  template <Pass kPass, bool kVector>
  __device__ SwigluGradient combine(const Bf16x8 (&in)[2], const Bf16x8& d_a8, const float* table,
                                    std::int64_t row, std::int64_t column, int n) const {
    const SwigluGradient d = swiglu_gradient8(in[0], in[1], d_a8, sigmoid8(in[0], table));
    if (kPass != Pass::kLargest && d_gate_up != nullptr) {
      const std::int64_t at = row * 2 * F + column;
      store8<kVector>(d_gate_up + at, d.gate, n);
      store8<kVector>(d_gate_up + at + F, d.up, n);
    }
    return d;
  }
};

struct Slab {
  std::int64_t F, pieces, total;  // pieces of eight columns
};
Slab slab_of(std::int64_t M, std::int64_t F) { return {F, (F + 7) / 8, M * ((F + 7) / 8)}; }

template <bool kVector>
__global__ void __launch_bounds__(256) swiglu_kernel(const Bf16* gate_up, Bf16* a, Slab slab) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < slab.total;
       i += stride) {
    const std::int64_t row = i / slab.pieces, f = i % slab.pieces * 8;
    const Bf16* gate = gate_up + row * 2 * slab.F + f;
    const int n = static_cast<int>(slab.F - f);
    const Bf16x8 g = load8<kVector>(gate, n), u = load8<kVector>(gate + slab.F, n);
    const Float8 p = swiglu8(g, u, sigmoid8(g));
    Bf16x8 out;
#pragma unroll
    for (int c = 0; c < 8; c += 2) out.w[c / 2] = pack_bf16(p.v[c], p.v[c + 1]);
    store8<kVector>(a + row * slab.F + f, out, n);
  }
}

template <bool kVector>
__global__ void __launch_bounds__(256)
    swiglu_backward_kernel(const Bf16* gate_up, const Bf16* d_a, Bf16* d_gate_up, Slab slab) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < slab.total;
       i += stride) {
    const std::int64_t row = i / slab.pieces, f = i % slab.pieces * 8;
    const std::int64_t at = row * 2 * slab.F + f;
    const int n = static_cast<int>(slab.F - f);
    const Bf16x8 g = load8<kVector>(gate_up + at, n), u = load8<kVector>(gate_up + at + slab.F, n);
    const SwigluGradient d =
        swiglu_gradient8(g, u, load8<kVector>(d_a + row * slab.F + f, n), sigmoid8(g));
    store8<kVector>(d_gate_up + at, d.gate, n);
    store8<kVector>(d_gate_up + at + slab.F, d.up, n);
  }
}

}  // namespace

void swiglu(const Context& ctx, const TensorView& gate_up, const TensorView& a_MF) {
  const Slab slab = slab_of(a_MF.dim(0), a_MF.dim(1));
  if (slab.total == 0) return;
  const bool vector = slab.F % 8 == 0 && aligned16(gate_up.data) && aligned16(a_MF.data);
  const Grid grid = elementwise_grid(slab.total);
  const auto kernel = vector ? swiglu_kernel<true> : swiglu_kernel<false>;
  kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(gate_up.as<Bf16>(), a_MF.as<Bf16>(),
                                                           slab);
  LOCKSTEP_CUDA_LAUNCHED("swiglu");
}

void swiglu_quantize(const Context& ctx, const TensorView& gate_up, const Segments& segments,
                     bool pow2, const Fp8Rows& rows, const Fp8Columns* columns, QuantStats* stats) {
  const std::int64_t M = gate_up.dim(0), F = gate_up.dim(1) / 2;
  const ProductSource source{gate_up.as<Bf16>(), F};
  if (columns == nullptr && F % 8 == 0 && source.aligned() && aligned16(rows.codes_MK.data)) {
    const bool blocks = rows.scaling == Scaling::kBlock;
    const LaneRows out{M, F, rows.codes_MK.fp8(), rows.scales.as<float>(), pow2, stats};
    if (M * F < kManyProducts ? launch_products<false>(ctx, source, out, blocks)
                              : launch_products<true>(ctx, source, out, blocks))
      return;
  }
  quantize_source(ctx, source, M, F, segments, pow2, &rows, columns, stats);
}

void swiglu_backward(const Context& ctx, const TensorView& gate_up, const TensorView& d_a_MF,
                     const TensorView& d_gate_up) {
  const Slab slab = slab_of(d_a_MF.dim(0), d_a_MF.dim(1));
  if (slab.total == 0) return;
  const bool vector = slab.F % 8 == 0 && aligned16(gate_up.data) && aligned16(d_a_MF.data) &&
                      aligned16(d_gate_up.data);
  const Grid grid = elementwise_grid(slab.total);
  const auto kernel = vector ? swiglu_backward_kernel<true> : swiglu_backward_kernel<false>;
  kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(gate_up.as<Bf16>(), d_a_MF.as<Bf16>(),
                                                           d_gate_up.as<Bf16>(), slab);
  LOCKSTEP_CUDA_LAUNCHED("swiglu_backward");
}

void swiglu_backward_quantize(const Context& ctx, const TensorView& gate_up,
                              const TensorView& d_a_MF, const Segments& segments, bool pow2,
                              const TensorView& d_gate_up, const Fp8Rows& rows,
                              const Fp8Columns* columns, QuantStats* stats) {
  const std::int64_t M = d_a_MF.dim(0), F = d_a_MF.dim(1);
  if (rows.scaling == Scaling::kBlock && F % kQuantBlock != 0) {  // a block spans gate and up
    const tensor::ArenaScope scope(*ctx.workspace);
    const TensorView d =
        d_gate_up ? d_gate_up : ctx.workspace->take(tensor::DType::kBf16, {M, 2 * F});
    cuda::swiglu_backward(ctx, gate_up, d_a_MF, d);
    if (columns != nullptr)
      cuda::quantize_rows_columns(ctx, d, segments, pow2, rows, *columns, stats);
    else
      cuda::quantize_rows(ctx, d, pow2, rows, stats);
    return;
  }
  const GradientSource source{gate_up.as<Bf16>(), d_a_MF.as<Bf16>(),
                              d_gate_up ? d_gate_up.as<Bf16>() : nullptr, F};
  quantize_source(ctx, source, M, F, segments, pow2, &rows, columns, stats);
}

}  // namespace lockstep::ops::cuda
