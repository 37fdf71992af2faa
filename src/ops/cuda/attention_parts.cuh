// What attention's kernels share: the softmax of section 8 (docs/numerics.md) on fragments, and the
// ring of shared memory that keys and values pass through.
#pragma once

#include "ops/attention_args.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/mma.cuh"

namespace lockstep::ops::cuda {

using numerics::Bf16;

inline constexpr int kBlock = numerics::kAttentionBlock;
inline constexpr int kSplit = numerics::kAttentionSplit;
inline constexpr int kThreads = 128;  // of the kernels on mma.sync
inline constexpr int kDecodeRows = 16;
inline constexpr float kNone = -std::numeric_limits<float>::infinity();

// numerics::exp2_softmax with a maximum instruction for its clamp (a NaN takes the bound there,
// too).
__device__ inline float softmax_exp2(float x) {
  x = fmaxf(x, -127.0f);
  const float t = x + numerics::kRoundMagic;
  const float f = x - (t - numerics::kRoundMagic);
  float p = 0x1.c2a208p-5f;
  p = numerics::fma(p, f, 0x1.f00c4ep-3f);
  p = numerics::fma(p, f, 0x1.62f5fcp-1f);
  p = numerics::fma(p, f, 1.0f);
  return numerics::bits_float(numerics::float_bits(p) + (numerics::float_bits(t) << 23));
}

// The four lanes of an accumulator row.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ inline float quad_total(float l) {
  l = l + __shfl_xor_sync(0xFFFFFFFFu, l, 1);
  return l + __shfl_xor_sync(0xFFFFFFFFu, l, 2);
}

// One sequence's part of the batch.
struct Sequence {
  std::int64_t begin = 0;  // its first query row
  int queries = 0, keys = 0;
  int first_position = 0;  // of its first query

  Sequence() = default;
  // One beyond the host bounds, for which there may be no room, has no queries.
  __device__ Sequence(const AttentionArgs& a, int s)
      : begin(a.q_offsets[s]),
        queries(a.q_offsets[s + 1] - a.q_offsets[s]),
        keys(a.kv_lengths[s]),
        first_position(keys - queries) {
    if (queries > a.longest || keys > a.most_keys) queries = 0;
  }
};

// The row of the key and value tensors that holds a position; -1 where there is none.
__device__ inline int key_row(const AttentionArgs& a, const Sequence& q, int s, int position,
                              int end) {
  if (position >= end) return -1;
  if (a.pages == nullptr) return static_cast<int>(q.begin) + position;
  const int size = static_cast<int>(a.page_size);
  const int page = position / size;
  if (page >= a.pages_per_sequence) return -1;
  const std::int64_t row =
      std::int64_t{a.pages[s * a.pages_per_sequence + page]} * size + position % size;
  return row >= 0 && row < a.rows ? static_cast<int>(row) : -1;
}

// Blocks of keys and values of one KV head in the order k0 v0 k1 v1 .. through kSlots pieces of
// shared memory. All threads call acquire(i) for i = 0, 1, ..; what acquire(i - 1) gave is then
// free again. Rows of -1 in the table become zeros.
template <int kWidth, int kSlots>
struct KeyRing {
  static constexpr int kStride = kWidth + 8;
  static constexpr int kSlotBytes = kBlock * kStride * 2;
  const Bf16 *k, *v;  // of the KV head
  std::int64_t k_stride, v_stride;
  int k_width, v_width;
  const int* rows;  // shared, one a key
  unsigned memory;
  int items;

  __device__ SharedTile slot(int i) const {
    return {memory + static_cast<unsigned>(i % kSlots * kSlotBytes), kStride};
  }
  __device__ void load(int i) const {
    constexpr int kLanes = kWidth / 8;  // threads a row, 16 bytes each
    const bool values = i % 2 != 0;
    const int width = values ? v_width : k_width, column = threadIdx.x % kLanes * 8;
    const Bf16* from = (values ? v : k) + column;
    const std::int64_t stride = values ? v_stride : k_stride;
    const SharedTile to = slot(i);
    if (column < width) {
#pragma unroll 8
      for (int r = threadIdx.x / kLanes; r < kBlock; r += kThreads / kLanes) {
        const int row = rows[i / 2 * kBlock + r];
        copy_async(to.at(r, column), from + (row < 0 ? 0 : row) * stride, row >= 0);
      }
    }
  }
  __device__ void start() const {
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) {
      if (i < items) load(i);
      copy_commit();
    }
  }
  __device__ SharedTile acquire(int i) const {
    if constexpr (kSlots == 1) {
      __syncthreads();
      load(i);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
    } else {
      copy_wait<kSlots - 2>();
      __syncthreads();
      if (i + kSlots - 1 < items) load(i + kSlots - 1);
      copy_commit();
    }
    return slot(i);
  }
};

template <int kWidth, int kSlots>
__device__ inline KeyRing<kWidth, kSlots> key_ring(const AttentionArgs& a, int j, const int* rows,
                                                   unsigned memory, int blocks) {
  return {a.k + j * a.width,
          a.v + j * a.value_width,
          a.kv_heads * a.width,
          a.kv_heads * a.value_width,
          static_cast<int>(a.width),
          static_cast<int>(a.value_width),
          rows,
          memory,
          2 * blocks};
}

// Values that are not finite at keys that some rows of a tile see and others do not: p of the
// others is +0, but 0 * NaN is NaN. Such a value becomes 0, and its column remembers the first
// position that has one: rows from there on see it, which makes them NaN in that column.
struct BrokenValues {
  unsigned first;  // in shared memory, an int a column

  __device__ void clear(int columns, int threads) const {
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += threads)
      asm volatile("st.shared.s32 [%0], %1;" ::"r"(first + 4u * static_cast<unsigned>(i)),
                   "r"(std::numeric_limits<int>::max())
                   : "memory");
  }
  // Eight values of one key in shared memory, from `column` on.
  __device__ void check(unsigned address, int position, int column) const {
    const uint4 x = load_shared_16(address);
    constexpr unsigned kExponent = 0x7F807F80, kOne = 0x00800080, kCarry = 0x80008000;
    const auto all_ones = [](unsigned w) { return ((w & kExponent) + kOne) & kCarry; };
    if ((all_ones(x.x) | all_ones(x.y) | all_ones(x.z) | all_ones(x.w)) == 0) return;
    for (unsigned i = 0; i < 8; ++i) {
      unsigned short value;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address + 2 * i) : "memory");
      if ((value & 0x7F80) != 0x7F80) continue;
      asm volatile(
          "red.shared.min.s32 [%0], %1;" ::"r"(first + 4 * (static_cast<unsigned>(column) + i)),
          "r"(position)
          : "memory");
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(address + 2 * i), "h"(std::uint16_t{0})
                   : "memory");
    }
  }
  // What a row at `position` has in a column.
  __device__ float value(float x, int position, int column) const {
    int from;
    asm volatile("ld.shared.s32 %0, [%1];"
                 : "=r"(from)
                 : "r"(first + 4u * static_cast<unsigned>(column))
                 : "memory");
    return position >= from ? std::numeric_limits<float>::quiet_NaN() : x;
  }
};

// Merges the state (m, l) of a further split: the factors of the two, in section 8's words a and b.
__device__ inline void merge(float c, float m, float l, float* merged_m, float* merged_l, float* a,
                             float* b) {
  const float top = m > *merged_m ? m : *merged_m;
  *a = numerics::exp2((*merged_m - top) * c);
  *b = numerics::exp2((m - top) * c);
  *merged_l = numerics::fma(*merged_l, *a, l * *b);
  *merged_m = top;
}

// delta of one row, by a warp; Kv up to 256.
__device__ inline float row_delta(const Bf16* d_out, const Bf16* out, int Kv) {
  const int first = static_cast<int>(threadIdx.x) % 32 * 8;
  float acc = 0;
  if (first < Kv) {
    const uint4 x = *reinterpret_cast<const uint4*>(d_out + first);
    const uint4 y = *reinterpret_cast<const uint4*>(out + first);
    const unsigned xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc =
          numerics::fma(numerics::bits_float(xs[i] << 16), numerics::bits_float(ys[i] << 16), acc);
      acc = numerics::fma(numerics::bits_float(xs[i] & 0xFFFF0000u),
                          numerics::bits_float(ys[i] & 0xFFFF0000u), acc);
    }
  }
  return butterfly_sum(acc);
}

__device__ inline float log_sum2(float c, float m, float l) {
  return numerics::fma(m, c, numerics::log(l) * numerics::kLog2e);
}

}  // namespace lockstep::ops::cuda
