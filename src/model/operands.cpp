#include "model/operands.h"

#include <algorithm>

namespace lockstep::model {

using ops::Scaling;
using tensor::DType;
using tensor::Shape;

ops::Fp8Rows take_rows(tensor::Arena& arena, std::int64_t M, std::int64_t K, Scaling scaling) {
  const Shape scales = scaling == Scaling::kBlock ? Shape{(K + 127) / 128, M} : Shape{M};
  return {arena.take(DType::kE4m3, {M, K}), arena.take(DType::kFp32, scales), scaling};
}

std::int64_t padded_capacity(std::int64_t M, std::int64_t experts) {
  return (M + 127 * std::min(experts, M)) / 128 * 128;
}

ops::Fp8Columns take_columns(tensor::Arena& arena, std::int64_t N, std::int64_t M,
                             std::int64_t experts, Scaling scaling) {
  const std::int64_t R = padded_capacity(M, experts);
  const Shape scales = scaling == Scaling::kBlock ? Shape{R / 128, N} : Shape{experts, N};
  return {arena.take(DType::kE4m3, {N, R}), arena.take(DType::kFp32, scales), scaling};
}

}  // namespace lockstep::model
