// The largest magnitudes of whole columns, found while rows go by: what a scale of a column of a
// segment needs before its first code.
#pragma once

#include "ops/cuda/quantize_launch.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kLaneEights = 4;  // of a row, on each lane of a warp
inline constexpr int kWarpEights = 32 * kLaneEights;

// This lane's eights of a row: first, first + 32 ..; those from `end` on are behind the row.
struct LanePart {
  int first, end;
  __device__ bool has(int i) const { return first + 32 * i < end; }
};

// A lane's four eights in shared memory, which no other lane touches; a warp's lie together.
struct LaneSlots {
  uint4* first;
  __device__ uint4& at(int i) const { return first[32 * i]; }
};

// Where they go: largest[e * K + column], by segments that hold all rows. Null: not wanted.
struct LargestColumns {
  std::uint32_t* largest = nullptr;
  const std::int32_t* offsets = nullptr;
};

// Those of a lane's columns over the rows of one segment, two to a word.
struct ColumnMaxima {
  LaneSlots slots;
  int segment, end;  // end: of its rows

  // With the segment of `row`, which is this one or a later one.
  __device__ void start(const LargestColumns& to, int row) {
    while (__ldg(to.offsets + segment + 1) <= row) ++segment;
    end = __ldg(to.offsets + segment + 1);
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) slots.at(i) = {};
  }
  __device__ void add(const Bf16x8 (&x)[kLaneEights]) const {
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      const uint4 m = slots.at(i);
      slots.at(i) = {larger2(m.x, x[i].w[0]), larger2(m.y, x[i].w[1]), larger2(m.z, x[i].w[2]),
                     larger2(m.w, x[i].w[3])};
    }
  }
  // Lanes take neighbouring columns of their warp. Most columns have a larger magnitude already.
  __device__ void flush(const LargestColumns& to, const LanePart& part, std::int64_t K) const {
    constexpr int kBatch = 4;
    const int lane = static_cast<int>(threadIdx.x) % 32, first = part.first - lane;
    std::uint32_t* segment_largest = to.largest + segment * K;
    __syncwarp();
    for (int j = 0; j < 4 * kLaneEights; j += kBatch) {
      std::uint32_t found[kBatch][2];
      uint2 known[kBatch];
      uint2* column[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        // Two columns: c and c + 1 of the eight at `place` among the warp's.
        const int place = 8 * (j + b) + lane / 4, c = lane % 4 * 2;
        const uint4* eight = slots.first - lane + place;
        const std::uint32_t pair =
            reinterpret_cast<const std::uint32_t*>(eight)[c / 2] & kMagnitudes;
        found[b][0] = pair << 16, found[b][1] = pair & 0xFFFF0000u;
        column[b] = reinterpret_cast<uint2*>(segment_largest + (first + place) * 8 + c);
        known[b] = first + place < part.end ? __ldcg(column[b]) : uint2{~0u, ~0u};
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (found[b][0] > known[b].x) atomicMax(&column[b]->x, found[b][0]);
        if (found[b][1] > known[b].y) atomicMax(&column[b]->y, found[b][1]);
      }
    }
    __syncwarp();
  }
};

// The column codes of a source of M rows and K columns where a scale covers a whole column of a
// segment and its largest magnitude is known.
template <typename Source>
void encode_columns(const Context& ctx, const Source& source, std::int64_t M, std::int64_t K,
                    const Segments& segments, bool pow2, std::uint32_t* largest,
                    const Fp8Columns& columns) {
  TilePlan plan;
  plan.M = M, plan.K = K, plan.pow2 = pow2;
  plan.column_codes = columns.codes_NR.fp8();
  plan.column_scales = columns.scales.template as<float>();
  plan.column_stride = columns.codes_NR.dim(1);
  plan.row_tiles = plan.column_stride / kQuantBlock;
  plan.offsets = segments.offsets_E1.template as<std::int32_t>();
  plan.padded = segments.padded_offsets_E1.template as<std::int32_t>();
  plan.experts = segments.experts();
  plan.column_largest = largest;
  launch_tiles<Pass::kEncode>(ctx, source, plan,
                              K % 8 == 0 && source.aligned() && aligned16(plan.column_codes));
}

}  // namespace lockstep::ops::cuda
