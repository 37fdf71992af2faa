// A matrix of weights as it lies in a file, read piece by piece: rows as BF16, or the FP8 codes and
// scales as they are. The same for safetensors and GGUF, for a tensor of its own and for a slice of
// a slab of experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "numerics/formats.h"

namespace lockstep::model {

enum class StoredType {
  kBf16,
  kF16,
  kF32,
  kE4m3,  // with scales
  kE8m0,  // scales only: 2^(byte - 127), 255 is a NaN
  kQ4_1,  // GGUF: 32 values a block: FP16 d and m, 16 bytes of nibbles (low half first): d*q + m
  kQ8_0,  // GGUF: 32 values a block: FP16 d, 32 signed bytes: d*q
};

// Bytes of `columns` values; the caller has checked that they are whole blocks.
std::int64_t stored_bytes(StoredType type, std::int64_t columns);
inline constexpr std::int64_t kGgufBlock = 32;

struct StoredMatrix {
  StoredType type = StoredType::kBf16;
  std::int64_t rows = 0, columns = 0;
  const std::byte* data = nullptr;
  std::int64_t row_bytes = 0;     // from one row to the next
  std::int64_t column_bytes = 0;  // from one value to the next; types of GGUF blocks lie dense
  // When not 0, the rows come in groups of this many, and row i of a group's first half lies at 2i,
  // of its second half at 2i + 1: query and key rows of a GGUF file (model/gguf_model.h).
  std::int64_t interleaved = 0;
};

// A weight of a checkpoint. `file` and `name` stand in messages.
struct StoredWeight {
  StoredMatrix values;
  StoredMatrix scales;  // kE4m3: [ceil(rows / 128), ceil(columns / 128)], value = code * scale
  std::string file, name;
  bool fp8() const { return values.type == StoredType::kE4m3; }
};

// Rows [begin, begin + count) as BF16, each rounded once from FP32 (nearest, ties to even), at
// `to`, `stride` values from one row to the next. A value that is a NaN or an infinity after the
// rounding, and a scale that is not positive and finite, are InputErrors naming file, tensor and
// place.
void read_rows(const StoredWeight& w, std::int64_t begin, std::int64_t count, numerics::Bf16* to,
               std::int64_t stride);

// A vector of BF16, F16 or F32 as FP32, exactly; finite values only.
void read_vector(const StoredWeight& w, float* to);

// FP8: the codes of these rows (a NaN code is an InputError), and all scales row by row in FP32.
void read_codes(const StoredWeight& w, std::int64_t begin, std::int64_t count, numerics::Fp8* to,
                std::int64_t stride);
void read_scales(const StoredWeight& w, float* to);

}  // namespace lockstep::model
