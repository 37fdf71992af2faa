// Memory with a type and a shape. TensorView looks, Tensor owns, Arena hands out views that live
// until it is reset. All tensors are contiguous, the last axis fastest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "numerics/formats.h"

namespace lockstep::tensor {

enum class DType { kFp32, kFp64, kBf16, kE4m3, kE5m2, kInt32, kInt64 };
enum class Device { kCpu, kCuda };

std::size_t dtype_size(DType dtype);
const char* dtype_name(DType dtype);

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFp32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFp64;
};
template <>
struct DTypeOf<numerics::Bf16> {
  static constexpr DType value = DType::kBf16;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::kInt32;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::kInt64;
};

inline constexpr int kMaxRank = 4;

struct Shape {
  int rank = 0;
  std::int64_t dim[kMaxRank] = {};

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims);
  std::int64_t count() const;
  std::int64_t operator[](int axis) const { return dim[axis]; }
  bool operator==(const Shape& other) const;
  std::string text() const;  // "[3, 128]"
};

// A window on memory that somebody else owns. A default view is empty: `if (view)` asks for it.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFp32;
  Device device = Device::kCpu;
  Shape shape;

  explicit operator bool() const { return data != nullptr || shape.rank > 0; }
  std::int64_t dim(int axis) const { return shape.dim[axis]; }
  std::int64_t count() const { return shape.count(); }
  std::size_t bytes() const { return static_cast<std::size_t>(count()) * dtype_size(dtype); }

  // Typed pointer; a dtype that does not match is a ContractError. FP8 codes are read with fp8().
  template <typename T>
  T* as() const {
    LOCKSTEP_CHECK(dtype == DTypeOf<T>::value, "tensor of {} read as {}", dtype_name(dtype),
                   dtype_name(DTypeOf<T>::value));
    return static_cast<T*>(data);
  }
  numerics::Fp8* fp8() const {
    LOCKSTEP_CHECK(dtype == DType::kE4m3 || dtype == DType::kE5m2, "tensor of {} read as FP8",
                   dtype_name(dtype));
    return static_cast<numerics::Fp8*>(data);
  }

  // Whether this process may look at the values.
  bool on_host() const { return device == Device::kCpu; }

  // Rows [begin, begin + count) of the first axis.
  TensorView rows(std::int64_t begin, std::int64_t count) const;
  // The same memory with another shape of the same count.
  TensorView reshape(const Shape& shape) const;
};

// Throws ContractError unless the view has this dtype and shape; -1 in `shape` matches any size.
void require(const TensorView& view, DType dtype, const Shape& shape, const char* name);

// Owns zero-filled memory, aligned to 64 bytes or more.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Device device, DType dtype, const Shape& shape);
  const TensorView& view() const { return view_; }
  operator const TensorView&() const {
    return view_;
  }  // NOLINT: a tensor is used as its view everywhere
  explicit operator bool() const { return static_cast<bool>(view_); }
  template <typename T>
  T* as() const {
    return view_.as<T>();
  }

 private:
  std::shared_ptr<void> memory_;
  TensorView view_;
};

// Bump allocation for tensors that live for one pass. Memory is kept for the next pass; contents
// are not cleared.
class Arena {
 public:
  explicit Arena(Device device = Device::kCpu) : device_(device) {}
  Device device() const { return device_; }
  TensorView take(DType dtype, const Shape& shape);

  struct Mark {
    std::size_t chunk = 0, offset = 0, taken = 0;
  };
  Mark mark() const { return {chunk_, offset_, taken_}; }
  void release(const Mark& mark);  // frees everything taken since
  void reset() { release({}); }
  std::size_t peak_bytes() const { return peak_; }  // taken at once, without what chunks left over
  // Gets one piece as large as the peak so far, so that a pass like the largest one takes no more
  // memory, and returns its bytes; the peak counts anew. Nothing may be taken when it is called;
  // views taken before are gone.
  std::size_t consolidate();

 private:
  Device device_;
  std::vector<Tensor> chunks_;
  std::size_t chunk_ = 0, offset_ = 0, taken_ = 0, peak_ = 0;
};

// Releases what was taken from an arena inside a scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

// The instruction sets that the CPU backend is compiled for. All give the same bits.
enum class Isa { kPortable, kAvx2, kAvx512 };
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this processor
Isa best_isa();               // the widest supported one, or what LOCKSTEP_CPU_ISA forces

class OpProfile;

// What an op needs besides its operands: where to run, how wide, and scratch memory. First
// parameter of every op.
struct Context {
  Device device = Device::kCpu;
  Isa isa = Isa::kPortable;
  int threads = 1;
  Arena* workspace = nullptr;    // of this device
  void* stream = nullptr;        // CUDA: the stream that orders the work
  OpProfile* profile = nullptr;  // CUDA: times the ops where it is set (tensor/op_profile.h)
  unsigned* tickets = nullptr;   // CUDA: a counter that is zero between two kernels of the stream
};

// threads = 0: as many as OpenMP would take: OMP_NUM_THREADS, or else one for each core that this
// process may use.
Context cpu_context(Arena& workspace, int threads = 0);

}  // namespace lockstep::tensor
