// The quantizer's arithmetic on a GPU (docs/numerics.md, section 5): eight neighbouring values of a
// row at a time, as they come from one 16-byte load of BF16, or as FP32 products. Magnitudes are
// compared as integers, so that an infinity or a NaN is always the largest. A block with a NaN
// scale needs no care: the product is a NaN, and its code 0x7F.
#pragma once

#include "numerics/math.h"
#include "ops/quantize.h"

namespace lockstep::ops::cuda {

using numerics::Bf16;
using numerics::Fp8;
using numerics::kQuantBlock;

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Bf16x8 {
  std::uint32_t w[4];  // columns 2i (low half) and 2i + 1
};
struct Float8 {
  float v[8];
};

inline constexpr std::uint32_t kMagnitudes = 0x7FFF7FFFu;

// The larger magnitudes of two pairs of BF16, a NaN where there is one, under signs of no meaning:
// kMagnitudes has to follow the last of several.
__device__ inline std::uint32_t larger2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t d;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ inline float value(const Bf16x8& x, int c) {
  const std::uint32_t w = x.w[c / 2];
  return numerics::bits_float(c % 2 != 0 ? w & 0xFFFF0000u : w << 16);
}
__device__ inline float value(const Float8& x, int c) { return x.v[c]; }

__device__ inline int nonzero_codes(std::uint32_t four) {
  return __popc(((four & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
}

// The highest bit of each byte: whether neither of its two codes is +-0.
__device__ inline std::uint32_t nonzero_mask(uint2 codes) {
  return ((codes.x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & ((codes.y & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) &
         0x80808080u;
}

// How many of eight values are +-0.
__device__ inline int zeros(const Bf16x8& x) {
  std::uint32_t nonzero = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    nonzero = nonzero >> 1 | (((x.w[i] & 0x7FFF7FFFu) + 0x7FFF7FFFu) & 0x80008000u);
  return 8 - __popc(nonzero);
}
__device__ inline int zeros(const Float8& x) {
  int n = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) n += x.v[c] == 0.0f ? 1 : 0;
  return n;
}

// Values that are not zero but have a code of +-0; all have the same scale (where it is a NaN no
// code is zero).
template <typename Values>
__device__ inline int flushed(const Values& x, uint2 codes) {
  if (nonzero_mask(codes) == 0x80808080u) return 0;
  return 8 - nonzero_codes(codes.x) - nonzero_codes(codes.y) - zeros(x);
}

// Codes of a, b, c, d; a in the lowest byte.
__device__ inline std::uint32_t encode4(float a, float b, float c, float d) {
  std::uint32_t r;
  asm("{\n\t.reg .b16 lo, hi;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n\t"
      "mov.b32 %0, {lo, hi};\n\t}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}
template <typename Values>
__device__ inline uint2 encode8(const Values& x, float inv) {
  return {encode4(value(x, 0) * inv, value(x, 1) * inv, value(x, 2) * inv, value(x, 3) * inv),
          encode4(value(x, 4) * inv, value(x, 5) * inv, value(x, 6) * inv, value(x, 7) * inv)};
}

// |x| as bits, in the pipe of the additions: that of the integers has more to do.
__device__ inline std::uint32_t magnitude(float x) {
  float y;
  asm("abs.f32 %0, %1;" : "=f"(y) : "f"(x));
  return numerics::float_bits(y);
}

// a in the low half.
__device__ inline std::uint32_t pack_bf16(float a, float b) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
  return r;
}

// The larger of x and the lane's partner.
__device__ inline std::uint32_t partner_larger2(std::uint32_t x, std::uint32_t send, int d) {
  return larger2(x, __shfl_xor_sync(kAllLanes, send, d));
}
__device__ inline std::uint32_t partner_max(std::uint32_t x, std::uint32_t send, int d) {
  return max(x, __shfl_xor_sync(kAllLanes, send, d));
}

// Of the even and of the odd columns, as larger2 has it.
__device__ inline std::uint32_t largest2(const Bf16x8& x) {
  return larger2(larger2(x.w[0], x.w[1]), larger2(x.w[2], x.w[3]));
}

// Bits of the largest magnitude as FP32.
__device__ inline std::uint32_t largest(const Bf16x8& x) {
  const std::uint32_t m = largest2(x) & kMagnitudes;
  return max(m & 0xFFFF0000u, m << 16);
}
__device__ inline std::uint32_t largest(const Float8& x) {
  std::uint32_t m = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) m = max(m, magnitude(x.v[c]));
  return m;
}

// 16 lanes hold 128 columns of eight rows. Lane l of them gets the largest magnitude of row
// (l % 16) / 2: a butterfly in which the lanes share out the rows, five shuffles in place of 32.
__device__ inline std::uint32_t row_largest(const Bf16x8 (&x)[8]) {
  const int lane = threadIdx.x % 32;
  std::uint32_t pair[4];  // rows 2i (low half) and 2i + 1
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t a = largest2(x[2 * i]), b = largest2(x[2 * i + 1]);
    pair[i] = larger2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
  }
  const bool upper = (lane & 8) != 0;
  const std::uint32_t p = partner_larger2(upper ? pair[2] : pair[0], upper ? pair[0] : pair[2], 8);
  const std::uint32_t q = partner_larger2(upper ? pair[3] : pair[1], upper ? pair[1] : pair[3], 8);
  const bool second = (lane & 4) != 0;
  std::uint32_t m = partner_larger2(second ? q : p, second ? p : q, 4);
  m = partner_larger2(m, m, 2);
  m = partner_larger2(m, m, 1);
  return ((lane & 2) != 0 ? m & 0xFFFF0000u : m << 16) & 0x7FFFFFFFu;
}
__device__ inline std::uint32_t row_largest(const Float8 (&x)[8]) {
  const int lane = threadIdx.x % 32;
  std::uint32_t row[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) row[i] = largest(x[i]);
#pragma unroll
  for (int d = 8, n = 4; d >= 2; d /= 2, n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool upper = (lane & d) != 0;
      row[i] = partner_max(upper ? row[i + n] : row[i], upper ? row[i] : row[i + n], d);
    }
  return partner_max(row[0], row[0], 1);
}

// Largest magnitudes of eight columns over eight rows, then over the warp's lane l and l ^ 16.
// In shared memory a warp has a row of 128 columns: 16-bit (BF16) or 32-bit (FP32) magnitudes.
__device__ inline void store_column_largest(const Bf16x8 (&x)[8], std::uint32_t* row) {
  std::uint32_t m[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    m[i] = x[0].w[i];
#pragma unroll
    for (int r = 1; r < 8; ++r) m[i] = larger2(m[i], x[r].w[i]);
    m[i] = partner_larger2(m[i], m[i], 16) & kMagnitudes;
  }
  if (threadIdx.x % 32 < 16)
    *reinterpret_cast<uint4*>(row + threadIdx.x % 16 * 4) = make_uint4(m[0], m[1], m[2], m[3]);
}
__device__ inline void store_column_largest(const Float8 (&x)[8], std::uint32_t* row) {
  std::uint32_t m[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    m[c] = 0;
#pragma unroll
    for (int r = 0; r < 8; ++r) m[c] = max(m[c], magnitude(x[r].v[c]));
    m[c] = partner_max(m[c], m[c], 16);
  }
  if (threadIdx.x % 32 < 16) {
    auto* to = reinterpret_cast<uint4*>(row + threadIdx.x % 16 * 8);
    to[0] = make_uint4(m[0], m[1], m[2], m[3]);
    to[1] = make_uint4(m[4], m[5], m[6], m[7]);
  }
}
template <typename Values>
__device__ inline std::uint32_t load_column_largest(const std::uint32_t* row, int column) {
  if constexpr (sizeof(Values) == sizeof(Bf16x8))
    return (column % 2 != 0 ? row[column / 2] >> 16 : row[column / 2] & 0xFFFFu) << 16;
  else
    return row[column];
}

// Eight values at `from`, those from `n` on as zeros. kVector: `from` is 16-byte aligned and n is 8
// or less than 1.
template <bool kVector>
__device__ inline Bf16x8 load8(const Bf16* from, std::int64_t n) {
  Bf16x8 x{};
  if constexpr (kVector) {
    if (n > 0) {
      const uint4 w = __ldg(reinterpret_cast<const uint4*>(from));
      x = {{w.x, w.y, w.z, w.w}};
    }
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < n) x.w[c / 2] |= static_cast<std::uint32_t>(from[c].bits) << (c % 2 * 16);
  }
  return x;
}
template <bool kVector>
__device__ inline void store8(Bf16* to, const Bf16x8& x, std::int64_t n) {
  if constexpr (kVector) {
    if (n > 0) *reinterpret_cast<uint4*>(to) = make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]);
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < n) to[c].bits = static_cast<std::uint16_t>(x.w[c / 2] >> (c % 2 * 16));
  }
}
// The first n of eight codes, n > 0. kVector: all of them, and `to` is aligned.
template <bool kVector>
__device__ inline void store_codes(Fp8* to, uint2 codes, std::int64_t n) {
  if constexpr (kVector) {
    *reinterpret_cast<uint2*>(to) = codes;
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < n) to[c] = static_cast<Fp8>((c < 4 ? codes.x : codes.y) >> (c % 4 * 8));
  }
}

// Sixteen tokens of a column, of which n are wanted. kVector: `to` is 16-byte aligned and n >= 16.
template <bool kVector>
__device__ inline void store_column_codes(Fp8* to, uint4 codes, int n) {
  if constexpr (kVector) {
    *reinterpret_cast<uint4*>(to) = codes;
  } else {
    const std::uint32_t part[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i < n) to[i] = static_cast<Fp8>(part[i / 4] >> (i % 4 * 8));
  }
}

__device__ inline Bf16x8 shared8(const uint4* at) {
  const uint4 v = *at;
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline uint4 shared8(const Bf16x8& x) { return {x.w[0], x.w[1], x.w[2], x.w[3]}; }

__device__ inline float scale_of(std::uint32_t amax, bool pow2) {
  return numerics::quant_scale(numerics::bits_float(amax), pow2);
}

}  // namespace lockstep::ops::cuda
