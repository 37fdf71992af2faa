#include "tensor/tensor.h"

#include <omp.h>

#include <utility>

#include "base/env.h"
#include "tensor/device.h"

namespace lockstep::tensor {

using base::ContractError;

std::size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return 4;
    case DType::kFp64:
      return 8;
    case DType::kBf16:
      return 2;
    case DType::kE4m3:
      return 1;
    case DType::kE5m2:
      return 1;
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
  }
  base::fail<ContractError>("unknown dtype {}", static_cast<int>(dtype));
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return "fp32";
    case DType::kFp64:
      return "fp64";
    case DType::kBf16:
      return "bf16";
    case DType::kE4m3:
      return "e4m3";
    case DType::kE5m2:
      return "e5m2";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
  }
  return "unknown";
}

Shape::Shape(std::initializer_list<std::int64_t> dims) {
  LOCKSTEP_CHECK(dims.size() <= kMaxRank, "rank {} is above {}", dims.size(), kMaxRank);
  for (const std::int64_t d : dims) dim[rank++] = d;
}

std::int64_t Shape::count() const {
  std::int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= dim[i];
  return n;
}

bool Shape::operator==(const Shape& other) const {
  if (rank != other.rank) return false;
  for (int i = 0; i < rank; ++i)
    if (dim[i] != other.dim[i]) return false;
  return true;
}

std::string Shape::text() const {
  std::string out = "[";
  for (int i = 0; i < rank; ++i) out += fmt::format("{}{}", i == 0 ? "" : ", ", dim[i]);
  return out + "]";
}

TensorView TensorView::rows(std::int64_t begin, std::int64_t count) const {
  LOCKSTEP_CHECK(shape.rank >= 1 && begin >= 0 && count >= 0 && begin + count <= shape[0],
                 "rows {}+{} of {}", begin, count, shape.text());
  TensorView out = *this;
  out.shape.dim[0] = count;
  const std::int64_t row = shape[0] == 0 ? 0 : shape.count() / shape[0];
  out.data =
      static_cast<std::byte*>(data) + begin * row * static_cast<std::int64_t>(dtype_size(dtype));
  return out;
}

TensorView TensorView::reshape(const Shape& to) const {
  LOCKSTEP_CHECK(to.count() == count(), "reshape {} to {}", shape.text(), to.text());
  TensorView out = *this;
  out.shape = to;
  return out;
}

void require(const TensorView& view, DType dtype, const Shape& shape, const char* name) {
  bool fits = view.dtype == dtype && view.shape.rank == shape.rank;
  for (int i = 0; fits && i < shape.rank; ++i) fits = shape[i] < 0 || shape[i] == view.shape[i];
  if (!fits)
    base::fail<ContractError>("{}: expected {} {}, got {} {}", name, dtype_name(dtype),
                              shape.text(), dtype_name(view.dtype), view.shape.text());
}

Tensor::Tensor(Device device, DType dtype, const Shape& shape) {
  std::int64_t bytes = static_cast<std::int64_t>(dtype_size(dtype));
  for (int i = 0; i < shape.rank; ++i) {
    const bool overflows = shape[i] < 0 || __builtin_mul_overflow(bytes, shape[i], &bytes);
    LOCKSTEP_CHECK(!overflows, "tensor of shape {} is too large", shape.text());
  }
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + 63) / 64 * 64 + 64;
  void* memory = allocate(device, rounded);
  memory_ = std::shared_ptr<void>(memory, [device](void* p) { release(device, p); });
  view_ = TensorView{memory, dtype, device, shape};
}

TensorView Arena::take(DType dtype, const Shape& shape) {
  constexpr std::size_t kChunkBytes = std::size_t{64} << 20;
  constexpr std::size_t kAlignment = 256;  // what the widest loads of a GPU and its copy engine ask
  const std::size_t bytes =
      (static_cast<std::size_t>(shape.count()) * dtype_size(dtype) + kAlignment - 1) / kAlignment *
      kAlignment;
  while (chunk_ < chunks_.size() && offset_ + bytes > chunks_[chunk_].view().bytes()) {
    ++chunk_;
    offset_ = 0;
  }
  if (chunk_ == chunks_.size()) {
    const std::size_t size = bytes > kChunkBytes ? bytes : kChunkBytes;
    chunks_.emplace_back(device_, DType::kE4m3, Shape{static_cast<std::int64_t>(size)});
    offset_ = 0;
  }
  TensorView view{static_cast<std::byte*>(chunks_[chunk_].view().data) + offset_, dtype, device_,
                  shape};
  offset_ += bytes;
  taken_ += bytes;
  peak_ = taken_ > peak_ ? taken_ : peak_;
  return view;
}

std::size_t Arena::consolidate() {
  LOCKSTEP_CHECK(chunk_ == 0 && offset_ == 0, "consolidate: something is taken");
  const std::size_t bytes = std::exchange(peak_, 0);
  if (chunks_.size() <= 1) return bytes;
  chunks_.clear();  // before the new piece: both may not fit
  chunks_.emplace_back(device_, DType::kE4m3, Shape{static_cast<std::int64_t>(bytes)});
  return bytes;
}

void Arena::release(const Mark& mark) {
  chunk_ = mark.chunk;
  offset_ = mark.offset;
  taken_ = mark.taken;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case Isa::kAvx512:
      return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

Isa best_isa() {
  const auto forced = base::env_choice("LOCKSTEP_CPU_ISA", {"avx512", "avx2", "portable"});
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kPortable}) {
    if (forced && *forced != isa_name(isa)) continue;
    if (isa_supported(isa)) return isa;
    if (forced)
      base::fail<base::InputError>("LOCKSTEP_CPU_ISA={}: this processor does not have it", *forced);
  }
  return Isa::kPortable;
}

Context cpu_context(Arena& workspace, int threads) {
  return {Device::kCpu, best_isa(), threads > 0 ? threads : omp_get_max_threads(),
          &workspace,   nullptr,    nullptr};
}

}  // namespace lockstep::tensor
