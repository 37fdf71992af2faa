// Shared by the tests and benches of ops/: seeded random tensors, outputs that start as NaN between
// guard rows, and comparisons by bytes.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tensor/tensor.h"

namespace lockstep::ops::test {

using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Isa;
using tensor::Shape;
using tensor::Tensor;
using tensor::TensorView;

using Rng = std::mt19937_64;

// Uniform in [low, high) and standard normal, the same on every standard library.
inline double uniform(Rng& rng, double low = 0.0, double high = 1.0) {
  return low + (high - low) * (static_cast<double>(rng() >> 11) * 0x1p-53);
}
inline std::int64_t uniform_int(Rng& rng, std::int64_t low, std::int64_t high) {  // inclusive
  return low + static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(high - low + 1));
}
inline float normal(Rng& rng) {
  const double r = std::sqrt(-2.0 * std::log(1.0 - uniform(rng)));
  return static_cast<float>(r * std::cos(6.283185307179586 * uniform(rng)));
}

inline Tensor empty(DType dtype, const Shape& shape) { return {Device::kCpu, dtype, shape}; }

// Writes value i of a tensor of FP32, BF16, E4M3, E5M2 or FP64, rounding to the type.
inline void set_value(const TensorView& x, std::int64_t i, double value) {
  const float f = static_cast<float>(value);
  switch (x.dtype) {
    case DType::kFp32:
      static_cast<float*>(x.data)[i] = f;
      return;
    case DType::kFp64:
      static_cast<double*>(x.data)[i] = value;
      return;
    case DType::kBf16:
      static_cast<numerics::Bf16*>(x.data)[i] = numerics::to_bf16(f);
      return;
    case DType::kE4m3:
      static_cast<numerics::Fp8*>(x.data)[i] = numerics::to_e4m3(f);
      return;
    case DType::kE5m2:
      static_cast<numerics::Fp8*>(x.data)[i] = numerics::to_e5m2(f);
      return;
    default:
      base::fail<base::ContractError>("set_value on {}", tensor::dtype_name(x.dtype));
  }
}

// Reads value i of a tensor as a double (exact for all its types).
inline double get_value(const TensorView& x, std::int64_t i) {
  switch (x.dtype) {
    case DType::kFp32:
      return static_cast<const float*>(x.data)[i];
    case DType::kFp64:
      return static_cast<const double*>(x.data)[i];
    case DType::kBf16:
      return numerics::to_float(static_cast<const numerics::Bf16*>(x.data)[i]);
    case DType::kE4m3:
      return numerics::e4m3_to_float(static_cast<const numerics::Fp8*>(x.data)[i]);
    case DType::kE5m2:
      return numerics::e5m2_to_float(static_cast<const numerics::Fp8*>(x.data)[i]);
    case DType::kInt32:
      return static_cast<const std::int32_t*>(x.data)[i];
    case DType::kInt64:
      return static_cast<double>(static_cast<const std::int64_t*>(x.data)[i]);
  }
  return 0;
}

inline std::vector<double> values(const TensorView& x) {
  std::vector<double> out(static_cast<std::size_t>(x.count()));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = get_value(x, static_cast<std::int64_t>(i));
  return out;
}

inline Tensor random_normal(Rng& rng, DType dtype, const Shape& shape, double deviation = 1.0) {
  Tensor out = empty(dtype, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i)
    set_value(out.view(), i, deviation * static_cast<double>(normal(rng)));
  return out;
}

inline Tensor int32_tensor(const std::vector<std::int32_t>& v) {
  Tensor out = empty(DType::kInt32, {static_cast<std::int64_t>(v.size())});
  if (!v.empty()) std::memcpy(out.view().data, v.data(), v.size() * sizeof(std::int32_t));
  return out;
}

// An output that starts as NaN (all bits set) with guard bytes before and behind it.
class Poisoned {
 public:
  Poisoned(DType dtype, const Shape& shape)
      : memory_(
            Device::kCpu, DType::kE4m3,
            {2 * kGuard + shape.count() * static_cast<std::int64_t>(tensor::dtype_size(dtype))}) {
    view_ = TensorView{bytes() + kGuard, dtype, Device::kCpu, shape};
    std::memset(bytes(), 0xA5, memory_.view().bytes());
    std::memset(view_.data, 0xFF, view_.bytes());
  }
  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }  // NOLINT: used as its view
  bool guards_intact() const {
    for (std::int64_t i = 0; i < kGuard; ++i)
      if (bytes()[i] != 0xA5 || bytes()[memory_.view().count() - 1 - i] != 0xA5) return false;
    return true;
  }
  // No element was left as it was (all bits set is a NaN that no op writes).
  bool all_written() const {
    const std::size_t size = tensor::dtype_size(view_.dtype);
    const auto* p = static_cast<const std::uint8_t*>(view_.data);
    for (std::size_t i = 0; i < view_.bytes(); i += size) {
      bool poison = true;
      for (std::size_t k = 0; k < size; ++k) poison = poison && p[i + k] == 0xFF;
      if (poison) return false;
    }
    return true;
  }

 private:
  static constexpr std::int64_t kGuard = 1024;
  std::uint8_t* bytes() const { return static_cast<std::uint8_t*>(memory_.view().data); }
  Tensor memory_;
  TensorView view_;
};

// How many elements differ, by bytes. Shapes and dtypes must agree.
inline std::int64_t count_different(const TensorView& a, const TensorView& b) {
  LOCKSTEP_CHECK(a.dtype == b.dtype && a.shape == b.shape, "{} {} against {} {}",
                 tensor::dtype_name(a.dtype), a.shape.text(), tensor::dtype_name(b.dtype),
                 b.shape.text());
  const std::size_t size = tensor::dtype_size(a.dtype);
  const auto* p = static_cast<const std::uint8_t*>(a.data);
  const auto* q = static_cast<const std::uint8_t*>(b.data);
  std::int64_t different = 0;
  for (std::size_t i = 0; i < a.bytes(); i += size)
    different += std::memcmp(p + i, q + i, size) != 0 ? 1 : 0;
  return different;
}

inline ::testing::AssertionResult bytes_equal(const TensorView& a, const TensorView& b) {
  if (a.dtype != b.dtype || !(a.shape == b.shape))
    return ::testing::AssertionFailure()
           << "dtype or shape differ: " << a.shape.text() << " against " << b.shape.text();
  const std::int64_t different = count_different(a, b);
  if (different == 0) return ::testing::AssertionSuccess();
  const std::size_t size = tensor::dtype_size(a.dtype);
  std::int64_t first = 0;
  while (std::memcmp(
             static_cast<const std::uint8_t*>(a.data) + first * static_cast<std::int64_t>(size),
             static_cast<const std::uint8_t*>(b.data) + first * static_cast<std::int64_t>(size),
             size) == 0)
    ++first;
  return ::testing::AssertionFailure()
         << different << " of " << a.count() << " elements differ, first at " << first << ": "
         << get_value(a, first) << " against " << get_value(b, first);
}

// The instruction sets that this processor can run, portable first.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (tensor::isa_supported(isa)) out.push_back(isa);
  return out;
}

inline Context context(tensor::Arena& arena, Isa isa, int threads = 1) {
  Context ctx = tensor::cpu_context(arena, threads);
  ctx.isa = isa;
  return ctx;
}

}  // namespace lockstep::ops::test
