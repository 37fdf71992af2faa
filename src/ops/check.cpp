#include "ops/check.h"

#include "numerics/contract.h"

namespace lockstep::ops {

using numerics::kQuantBlock;
using tensor::DType;
using tensor::require;

void require_rows(const Fp8Rows& x, std::int64_t M, std::int64_t K, const char* name) {
  require(x.codes_MK, DType::kE4m3, {M, K}, name);
  if (x.scaling == Scaling::kBlock)
    require(x.scales, DType::kFp32, {ceil_div(K, kQuantBlock), M}, name);
  else
    require(x.scales, DType::kFp32, {M}, name);
}

void require_weight(const Fp8Weight& w, std::int64_t E, std::int64_t N, std::int64_t K,
                    const char* name) {
  require(w.codes_ENK, DType::kE4m3, {E, N, K}, name);
  if (w.scaling == Scaling::kBlock)
    require(w.scales, DType::kFp32, {E, ceil_div(N, kQuantBlock), ceil_div(K, kQuantBlock)}, name);
  else
    require(w.scales, DType::kFp32, {E, N}, name);
}

void require_columns(const Fp8Columns& x, std::int64_t E, std::int64_t N, const char* name) {
  require(x.codes_NR, DType::kE4m3, {N, -1}, name);
  const std::int64_t R = x.codes_NR.dim(1);
  LOCKSTEP_CHECK(R % kQuantBlock == 0, "{}: {} padded rows, not a multiple of {}", name, R,
                 kQuantBlock);
  if (x.scaling == Scaling::kBlock)
    require(x.scales, DType::kFp32, {R / kQuantBlock, N}, name);
  else
    require(x.scales, DType::kFp32, {E, N}, name);
}

void require_same_scaling(const Fp8Rows& rows, const Fp8Columns* columns, const char* name) {
  LOCKSTEP_CHECK(columns == nullptr || columns->scaling == rows.scaling,
                 "{}: rows and columns are scaled differently", name);
}

void require_segments(const Segments& segments, std::int64_t M, std::int64_t capacity) {
  require(segments.offsets_E1, DType::kInt32, {-1}, "segments.offsets");
  LOCKSTEP_CHECK(segments.offsets_E1.dim(0) >= 1, "segments.offsets: at least one entry is needed");
  const std::int64_t E = segments.experts();
  require(segments.padded_offsets_E1, DType::kInt32, {E + 1}, "segments.padded_offsets");
  if (!segments.offsets_E1.on_host()) return;
  const auto* offsets = segments.offsets_E1.as<std::int32_t>();
  const auto* padded = segments.padded_offsets_E1.as<std::int32_t>();
  LOCKSTEP_CHECK(offsets[0] == 0 && padded[0] == 0, "segments start at {} and {}, not at 0",
                 offsets[0], padded[0]);
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t rows = std::int64_t{offsets[e + 1]} - offsets[e];
    const std::int64_t room = std::int64_t{padded[e + 1]} - padded[e];
    LOCKSTEP_CHECK(rows >= 0 && room >= rows && room % kQuantBlock == 0,
                   "expert {}: {} rows in a padded segment of {}", e, rows, room);
  }
  LOCKSTEP_CHECK(offsets[E] <= M && padded[E] <= capacity,
                 "segments end at {} of {} rows and {} of {} padded rows", offsets[E], M, padded[E],
                 capacity);
}

void require_full_segments(const Segments& segments, std::int64_t M, std::int64_t capacity) {
  require_segments(segments, M, capacity);
  if (!segments.offsets_E1.on_host()) return;
  const std::int32_t rows = segments.offsets_E1.as<std::int32_t>()[segments.experts()];
  LOCKSTEP_CHECK(rows == M, "segments hold {} of {} rows; row and column codes need all", rows, M);
}

}  // namespace lockstep::ops
