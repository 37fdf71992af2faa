#include "ops/cuda/copy_rows.cuh"
#include "ops/cuda/permute.h"
#include "ops/cuda/stable_sort.cuh"

namespace lockstep::ops::cuda {
namespace {

struct RoutedSlots {
  const std::int32_t* experts;
  std::int32_t* row;
  std::int32_t* token;
  int E, C;
  __device__ int key(int i) const { return clamp_index(experts[i], E); }
  __device__ void place(int i, int r) const {
    row[i] = r;
    token[r] = i / C;
  }
};

}  // namespace

void plan_permutation(const Context& ctx, const TensorView& experts_TC, const Segments& segments,
                      const TensorView& row_TC, const TensorView& token_M) {
  const int E = static_cast<int>(segments.experts());
  const Bins bins{E, segments.offsets_E1.as<std::int32_t>(),
                  segments.padded_offsets_E1.as<std::int32_t>()};
  const RoutedSlots slots{experts_TC.as<std::int32_t>(), row_TC.as<std::int32_t>(),
                          token_M.as<std::int32_t>(), E, static_cast<int>(experts_TC.dim(1))};
  const tensor::ArenaScope scope(*ctx.workspace);
  stable_sort(ctx, slots, experts_TC.count(), bins);
}

void permute(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
             const TensorView& out_MD) {
  gather_rows(ctx, h_TD, token_M, out_MD);
}

}  // namespace lockstep::ops::cuda
