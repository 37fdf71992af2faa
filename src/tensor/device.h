// Memory and order of work on a device: what code above the ops needs to know of CUDA. A build
// without CUDA has these functions, too; there the only device is the CPU.
#pragma once

#include <cstring>
#include <functional>
#include <span>
#include <string>

#include "tensor/tensor.h"

namespace lockstep::tensor {

// Why this process cannot use a GPU: no CUDA in the build, no driver, no device, a device that is
// not of compute capability 9.0. Empty where it can.
std::string cuda_problem();

// "13.0": the CUDA runtime in this build; empty where it has none.
std::string cuda_runtime_version();

// Work on GPU 0, in order, on a stream of its own. SystemError with cuda_problem() where there is
// none.
Context cuda_context(Arena& workspace);

// "cuda: NVIDIA H200, 139.8 GiB", or "cpu: avx512, 2 threads".
std::string device_text(const Context& ctx);

// Copies the bytes of `from` to `to` (same count and dtype), on any devices, in order with the
// context's other work. When it returns, host memory that was read may be changed, and host memory
// that was written holds the data.
void copy(const Context& ctx, const TensorView& from, const TensorView& to);

// Sets every byte.
void fill_bytes(const Context& ctx, const TensorView& to, int byte);

// Waits for the context's work. A failure of work that was launched before shows here at the
// latest, as a SystemError.
void synchronize(const Context& ctx);

// Free and total memory of the context's device, in bytes; {0, 0} for the CPU.
struct DeviceMemory {
  std::size_t free = 0, total = 0;
};
DeviceMemory device_memory(const Context& ctx);

// Host values as a tensor of the context's device, [count], in `arena` (of that device).
TensorView upload(const Context& ctx, Arena& arena, DType dtype, const void* from,
                  std::int64_t count);
template <typename T>
TensorView upload(const Context& ctx, Arena& arena, std::span<const T> values) {
  return upload(ctx, arena, DTypeOf<T>::value, values.data(),
                static_cast<std::int64_t>(values.size()));
}

// Brings a tensor's bytes to host memory that holds at least as many.
void download(const Context& ctx, const TensorView& from, void* to);

// Plain structs on the context's device, as bytes.
template <typename T>
T* take_structs(Arena& arena, std::int64_t count) {
  static_assert(std::is_trivially_copyable_v<T>);
  return static_cast<T*>(
      arena.take(DType::kE4m3, {count * static_cast<std::int64_t>(sizeof(T))}).data);
}
void copy_bytes(const Context& ctx, const void* from, Device from_device, void* to,
                Device to_device, std::size_t bytes);

// The bytes of a tensor in host memory of their own, after all work of its device.
Tensor to_host(const TensorView& from);

// Calls `read` with the tensor's bytes in order, piece by piece, after all work of its device:
// those of the CPU in one piece, those of a GPU in pieces of 32 MiB, of which the next one travels
// to pinned memory while one is read.
void read_pieces(const TensorView& from,
                 const std::function<void(std::span<const std::byte>)>& read);

// For Tensor: memory that is zero, 256-byte aligned on a GPU, 64-byte aligned on the CPU.
void* allocate(Device device, std::size_t bytes);
void release(Device device, void* memory);

}  // namespace lockstep::tensor
