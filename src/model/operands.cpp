#include "model/operands.h"

namespace lockstep::model {

using ops::Scaling;
using tensor::DType;
using tensor::Shape;

ops::Fp8Rows take_rows(tensor::Arena& arena, std::int64_t M, std::int64_t K, Scaling scaling) {
  const Shape scales = scaling == Scaling::kBlock ? Shape{(K + 127) / 128, M} : Shape{M};
  return {arena.take(DType::kE4m3, {M, K}), arena.take(DType::kFp32, scales), scaling};
}

ops::Fp8Columns take_columns(tensor::Arena& arena, std::int64_t N, const ops::Segments& segments,
                             Scaling scaling) {
  const std::int64_t R = segments.padded_offsets_E1.as<std::int32_t>()[segments.experts()];
  const Shape scales =
      scaling == Scaling::kBlock ? Shape{R / 128, N} : Shape{segments.experts(), N};
  return {arena.take(DType::kE4m3, {N, R}), arena.take(DType::kFp32, scales), scaling};
}

}  // namespace lockstep::model
