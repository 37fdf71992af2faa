// AdamW with the weight's codes. A CTA walks over blocks of 128 x 128. It first steps the block, a
// warp row by row with four neighbouring values a thread, so that every access is a whole line, and
// leaves the new BF16 values in shared memory; then each thread takes its 8 x 8 values from there
// and quantizes them. All the while the warp's next rows, also those of its next block, are on
// their way into shared memory by the copy engine, which takes no registers.
#include <algorithm>

#include "ops/cuda/adamw_quantize.h"
#include "ops/cuda/adamw_values.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/quantize_launch.cuh"
#include "ops/cuda/quantize_weight_block.cuh"

namespace lockstep::ops::cuda {
namespace {

constexpr int kCtas = 2;  // a multiprocessor's
constexpr int kWarps = kBlockThreads / 32;
constexpr int kWarpRows = kQuantBlock / kWarps;

template <typename M, typename V>
struct StepState {
  const float* grad;
  float* master;
  M* m;
  V* v;
  Bf16* w;
  AdamwFactors factors;
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
template <typename M, typename V>
struct StepRow {
  Four<float> grad, master;
  Four<M> m;
  Four<V> v;
};

// Four values, of which n are in the matrix. kVector: all of them are.
template <bool kVector, typename T>
__device__ void load4(const T* from, int n, Four<T>& to) {
  if constexpr (kVector) {
    to = *reinterpret_cast<const Four<T>*>(from);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) to.x[c] = c < n ? from[c] : T{};
  }
}
template <bool kVector, typename T>
__device__ void store4(T* to, int n, const Four<T>& from) {
  if constexpr (kVector) {
    *reinterpret_cast<Four<T>*>(to) = from;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c < n) to[c] = from.x[c];
  }
}

template <bool kVector, typename M, typename V>
__device__ void load_row(const StepState<M, V>& s, std::int64_t at, int n, StepRow<M, V>& to) {
  load4<kVector>(s.grad + at, n, to.grad);
  load4<kVector>(s.master + at, n, to.master);
  load4<kVector>(s.m + at, n, to.m);
  load4<kVector>(s.v + at, n, to.v);
}

// The new BF16 values.
template <bool kVector, typename M, typename V>
__device__ uint2 step_row(const StepState<M, V>& s, std::int64_t at, int n, StepRow<M, V>& x) {
  Four<Bf16> w;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    adamw_step(x.grad.x[c], s.factors, x.master.x[c], x.m.x[c], x.v.x[c]);
    w.x[c] = kVector || c < n ? narrow(x.master.x[c]) : Bf16{};
  }
  store4<kVector>(s.master + at, n, x.master);
  store4<kVector>(s.m + at, n, x.m);
  store4<kVector>(s.v + at, n, x.v);
  store4<kVector>(s.w + at, n, w);
  return {w.x[0].bits | static_cast<unsigned>(w.x[1].bits) << 16,
          w.x[2].bits | static_cast<unsigned>(w.x[3].bits) << 16};
}

// A warp's rows of a block: where they begin, how many there are, and the block's columns.
struct Part {
  std::int64_t at;
  int rows, columns;
};
__device__ Part part_of(const WeightBlocks& plan, const WeightBlock& b) {
  const int row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  return {(b.e * plan.N + b.nb * kQuantBlock + row) * plan.K + b.kb * kQuantBlock,
          min(b.rows - row, kWarpRows), b.columns};
}

// A row on its way: the state of 128 values.
template <typename M, typename V>
struct Slot {
  alignas(16) float grad[kQuantBlock];
  float master[kQuantBlock];
  M m[kQuantBlock];
  V v[kQuantBlock];
};
constexpr int kAheadBytes = 8192;  // of a warp
template <typename M, typename V>
constexpr int kAhead = kAheadBytes / sizeof(Slot<M, V>);

// The rows of a warp's blocks, one after the other, each fetched kAhead rows before it is stepped.
// Lanes 0 to 3 have an array of the state each.
template <typename M, typename V>
struct RowStream {
  const StepState<M, V>& s;
  const WeightBlocks& plan;
  Slot<M, V>* slots;
  std::uint32_t barriers;  // of each slot: its row is there; every lane has read it
  std::int64_t index;      // the block that is fetched
  Part part;
  int row = 0;           // the next to fetch
  int to = 0, from = 0;  // slots
  std::uint32_t to_parity = 1, from_parity = 0;

  __device__ void fetch() {
    while (row >= part.rows) {
      index += gridDim.x;
      if (index >= plan.blocks) return;
      part = part_of(plan, weight_block(plan, index)), row = 0;
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t barrier = barriers + to * 16;
    mbarrier_wait(barrier + 8, to_parity);
    constexpr int kValueBytes = 2 * sizeof(float) + sizeof(M) + sizeof(V);
    if (lane == 0) mbarrier_arrive_expect(barrier, part.columns * kValueBytes);
    const std::int64_t at = part.at + row * plan.K;
    const auto copy = [&](auto* slot, const auto* array) {
      bulk_load(shared_address(slot), array + at, part.columns * sizeof *array, barrier);
    };
    if (lane == 0) copy(slots[to].grad, s.grad);
    if (lane == 1) copy(slots[to].master, s.master);
    if (lane == 2) copy(slots[to].m, s.m);
    if (lane == 3) copy(slots[to].v, s.v);
    ++row;
    if (++to == kAhead<M, V>) to = 0, to_parity ^= 1;
  }
  __device__ void take(StepRow<M, V>& x) {
    mbarrier_wait(barriers + from * 16, from_parity);
    const int first = static_cast<int>(threadIdx.x) % 32 * 4;
    load_row<true>(
        {slots[from].grad, slots[from].master, slots[from].m, slots[from].v, nullptr, {}}, first, 4,
        x);
    mbarrier_arrive(barriers + from * 16 + 8);
    if (++from == kAhead<M, V>) from = 0, from_parity ^= 1;
  }
};

// Steps a warp's rows of a block; the new values, zeros outside the matrix, in `tile`, 128 to a
// row. next(x): the state of the next row.
template <bool kVector, typename M, typename V, typename Next>
__device__ void step_rows(const StepState<M, V>& s, std::int64_t K, const Part& part, uint2* tile,
                          const Next& next) {
  const int lane = static_cast<int>(threadIdx.x) % 32, n = part.columns - lane * 4;
  tile += threadIdx.x / 32 * kWarpRows * 32 + lane;
  std::int64_t at = part.at + lane * 4;
#pragma unroll 1
  for (int row = 0; row < kWarpRows; row += 2, at += 2 * K, tile += 2 * 32) {
    StepRow<M, V> x[2];
    next(row, x);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      tile[k * 32] =
          row + k < part.rows && n > 0 ? step_row<kVector>(s, at + k * K, n, x[k]) : uint2{};
  }
}

template <typename M, typename V>
struct StepMemory {
  uint2 tile[kQuantBlock * kQuantBlock / 4];
  Slot<M, V> slots[kWarps][kAhead<M, V>];
  std::uint64_t barriers[kWarps][2 * kAhead<M, V>];
  BlockMemory block;
};

template <typename M, typename V, bool kVector>
__global__ void __launch_bounds__(kBlockThreads, kCtas)
    adamw_blocks(const StepState<M, V> state, const WeightBlocks plan) {
  extern __shared__ __align__(128) uint4 shared[];
  auto& memory = *reinterpret_cast<StepMemory<M, V>*>(shared);
  constexpr int kRing = kAhead<M, V>;
  ThreadStats stats;
  const int tc = static_cast<int>(threadIdx.x) % 16, tr = static_cast<int>(threadIdx.x) / 16;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // The grid has no more CTAs than there are blocks.
  RowStream<M, V> stream{state,
                         plan,
                         memory.slots[warp],
                         shared_address(memory.barriers[warp]),
                         blockIdx.x,
                         part_of(plan, weight_block(plan, blockIdx.x))};
  if constexpr (kVector) {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < kWarps * kRing; ++i) {
        mbarrier_init(shared_address(memory.barriers[0]) + i * 16, 1);
        mbarrier_init(shared_address(memory.barriers[0]) + i * 16 + 8, 32);
      }
      fence_barrier_init();
    }
    __syncthreads();
    for (int i = 0; i < kRing; ++i) stream.fetch();
  }
  int turn = 0;
  for (std::int64_t index = blockIdx.x; index < plan.blocks; index += gridDim.x, turn ^= 1) {
    const Part part = part_of(plan, weight_block(plan, index));
    step_rows<kVector>(state, plan.K, part, memory.tile, [&](int row, StepRow<M, V>(&x)[2]) {
      const int rows = min(2, part.rows - row);
      if constexpr (kVector) {
        if (rows > 0) stream.take(x[0]);
        if (rows > 1) stream.take(x[1]);
        if (rows > 0) stream.fetch();
        if (rows > 1) stream.fetch();
      } else {
        const int first = static_cast<int>(threadIdx.x) % 32 * 4;
        const std::int64_t at = part.at + row * plan.K + first;
        for (int k = 0; k < rows; ++k)
          load_row<false>(state, at + k * plan.K, part.columns - first, x[k]);
      }
    });
    __syncthreads();
    Bf16x8 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[i] = shared8(reinterpret_cast<const uint4*>(memory.tile) + (tr * 8 + i) * 16 + tc);
    quantize_weight_block<kVector>(plan, weight_block(plan, index), x, turn, memory.block, stats);
  }
  if (plan.stats != nullptr) flush_stats(stats, plan.stats);
}

struct Tensors {
  const TensorView &grad, &master, &m, &v, &w;
};

template <typename M, typename V>
void launch(const Context& ctx, const Tensors& t, const AdamwFactors& factors,
            const WeightBlocks& plan, bool vector) {
  const StepState<M, V> state{t.grad.as<float>(), t.master.as<float>(), t.m.as<M>(),
                              t.v.as<V>(),        t.w.as<Bf16>(),       factors};
  const auto grid = static_cast<unsigned>(
      std::min<std::int64_t>(plan.blocks, std::int64_t{kMultiprocessors} * kCtas));
  const auto kernel = vector ? adamw_blocks<M, V, true> : adamw_blocks<M, V, false>;
  constexpr int kBytes = sizeof(StepMemory<M, V>);
  allow_shared_memory(kernel, kBytes);
  kernel<<<grid, kBlockThreads, kBytes, stream_of(ctx)>>>(state, plan);
  LOCKSTEP_CUDA_LAUNCHED("adamw_quantize");
}

}  // namespace

void adamw_quantize(const Context& ctx, const TensorView& grad, const AdamwFactors& factors,
                    const TensorView& master, const TensorView& m, const TensorView& v,
                    const TensorView& w, bool pow2, const Fp8Weight& out, const Fp8Weight& out_t,
                    QuantStats* stats) {
  const std::int64_t N = w.dim(1), K = w.dim(2);
  const bool transpose = static_cast<bool>(out_t.codes_ENK);
  WeightBlocks plan{N, K};
  plan.row_blocks = (N + kQuantBlock - 1) / kQuantBlock;
  plan.column_blocks = (K + kQuantBlock - 1) / kQuantBlock;
  plan.blocks = w.dim(0) * plan.row_blocks * plan.column_blocks;
  plan.pow2 = pow2, plan.stats = stats;
  plan.codes = out.codes_ENK.fp8(), plan.scales = out.scales.as<float>();
  plan.codes_t = transpose ? out_t.codes_ENK.fp8() : nullptr;
  plan.scales_t = transpose ? out_t.scales.as<float>() : nullptr;
  if (plan.blocks == 0) return;
  bool vector = K % 8 == 0 && aligned16(plan.codes) &&
                (!transpose || (N % 16 == 0 && aligned16(plan.codes_t)));
  for (const TensorView* t : {&grad, &master, &m, &v, &w}) vector = vector && aligned16(t->data);
  const bool m_short = m.dtype == tensor::DType::kBf16, v_short = v.dtype == tensor::DType::kBf16;
  const auto run = m_short ? (v_short ? launch<Bf16, Bf16> : launch<Bf16, float>)
                           : (v_short ? launch<float, Bf16> : launch<float, float>);
  run(ctx, {grad, master, m, v, w}, factors, plan, vector);
}

}  // namespace lockstep::ops::cuda
