#include "ops/cast.h"

#include "ops/cpu/cast.h"
#include "ops/cuda/call.h"
#include "ops/cuda/cast.h"

namespace lockstep::ops {

using tensor::DType;

void cast(const Context& ctx, const TensorView& from, const TensorView& to) {
  const bool widens = from.dtype == DType::kBf16 && to.dtype == DType::kFp32;
  const bool narrows = from.dtype == DType::kFp32 && to.dtype == DType::kBf16;
  LOCKSTEP_CHECK((widens || narrows) && from.count() == to.count(), "cast: {} {} to {} {}",
                 tensor::dtype_name(from.dtype), from.shape.text(), tensor::dtype_name(to.dtype),
                 to.shape.text());
  LOCKSTEP_CUDA_CALL(ctx, cast, ctx, from, to);
  LOCKSTEP_CPU_CALL(ctx, cast, ctx, from, to);
}

}  // namespace lockstep::ops
