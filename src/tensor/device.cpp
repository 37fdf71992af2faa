#include "tensor/device.h"

#include <algorithm>
#include <cstdlib>

#ifdef LOCKSTEP_HAVE_CUDA
#include "tensor/cuda_check.h"
#endif

namespace lockstep::tensor {

using base::fail;
using base::SystemError;

#ifdef LOCKSTEP_HAVE_CUDA

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorMemoryAllocation) {
    std::size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    cudaGetLastError();  // an allocation that failed leaves the device usable
    fail<SystemError>(
        "{}: out of GPU memory ({:.2f} GiB free of {:.2f}). Lower policy.train_micro_batch_size, "
        "policy.generation.max_num_seqs or policy.generation.num_blocks (pretrain: "
        "pretrain.micro_batch_size), or set policy.activation_checkpointing",
        what, static_cast<double>(free) / 0x1p30, static_cast<double>(total) / 0x1p30);
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    fail<SystemError>(
        "{}: {}. The kernels are built for compute capability 9.0 (H100, H200); run with "
        "device=cpu",
        what, cudaGetErrorString(status));
  fail<SystemError>(
      "{}: CUDA error {} ({}). The GPU's state in this process is lost; start again (a run goes on "
      "from its last checkpoint with --resume auto)",
      what, cudaGetErrorName(status), cudaGetErrorString(status));
}

namespace {

cudaMemcpyKind kind_of(Device from, Device to) {
  if (from == Device::kCpu)
    return to == Device::kCpu ? cudaMemcpyHostToHost : cudaMemcpyHostToDevice;
  return to == Device::kCpu ? cudaMemcpyDeviceToHost : cudaMemcpyDeviceToDevice;
}

}  // namespace

std::string cuda_problem() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
      return "no GPU driver is installed";
    return fmt::format("no usable GPU driver ({})", cudaGetErrorString(status));
  }
  if (count == 0) return "no GPU";
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  if (properties.major != 9 || properties.minor != 0)
    return fmt::format(
        "GPU 0 is a {} of compute capability {}.{}; the kernels are built for 9.0 (H100, H200)",
        properties.name, properties.major, properties.minor);
  return {};
}

std::string cuda_runtime_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

Context cuda_context(Arena& workspace) {
  if (const std::string problem = cuda_problem(); !problem.empty())
    fail<SystemError>("device cuda: {}", problem);
  check_cuda(cudaSetDevice(0), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Context ctx = cpu_context(workspace);
  ctx.device = Device::kCuda;
  ctx.stream = stream;
  ctx.tickets = static_cast<unsigned*>(allocate(Device::kCuda, sizeof(unsigned)));
  return ctx;
}

DeviceMemory device_memory(const Context& ctx) {
  DeviceMemory m;
  if (ctx.device == Device::kCuda) check_cuda(cudaMemGetInfo(&m.free, &m.total), "cudaMemGetInfo");
  return m;
}

std::string device_text(const Context& ctx) {
  if (ctx.device == Device::kCpu)
    return fmt::format("cpu: {}, {} thread{}", isa_name(ctx.isa), ctx.threads,
                       ctx.threads == 1 ? "" : "s");
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return fmt::format("cuda: {}, {:.1f} GiB", properties.name,
                     static_cast<double>(properties.totalGlobalMem) / 0x1p30);
}

void copy_bytes(const Context& ctx, const void* from, Device from_device, void* to,
                Device to_device, std::size_t bytes) {
  if (bytes == 0) return;
  if (from_device == Device::kCpu && to_device == Device::kCpu) {
    std::memcpy(to, from, bytes);
    return;
  }
  check_cuda(cudaMemcpyAsync(to, from, bytes, kind_of(from_device, to_device), stream_of(ctx)),
             "copy");
  // From pageable memory the call returns when the source has been read.
  if (to_device == Device::kCpu) synchronize(ctx);
}

void fill_bytes(const Context& ctx, const TensorView& to, int byte) {
  if (to.bytes() == 0) return;
  if (to.device == Device::kCpu)
    std::memset(to.data, byte, to.bytes());
  else
    check_cuda(cudaMemsetAsync(to.data, byte, to.bytes(), stream_of(ctx)), "fill");
}

void synchronize(const Context& ctx) {
  if (ctx.device == Device::kCuda)
    check_cuda(cudaStreamSynchronize(stream_of(ctx)), "work on the GPU");
}

#else

std::string cuda_problem() { return "this build has no CUDA backend"; }

std::string cuda_runtime_version() { return {}; }

Context cuda_context(Arena&) { fail<SystemError>("device cuda: {}", cuda_problem()); }

DeviceMemory device_memory(const Context&) { return {}; }

std::string device_text(const Context& ctx) {
  return fmt::format("cpu: {}, {} thread{}", isa_name(ctx.isa), ctx.threads,
                     ctx.threads == 1 ? "" : "s");
}

void copy_bytes(const Context&, const void* from, Device, void* to, Device, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void fill_bytes(const Context&, const TensorView& to, int byte) {
  if (to.bytes() > 0) std::memset(to.data, byte, to.bytes());
}

void synchronize(const Context&) {}

#endif

void copy(const Context& ctx, const TensorView& from, const TensorView& to) {
  LOCKSTEP_CHECK(from.dtype == to.dtype && from.count() == to.count(), "copy of {} {} to {} {}",
                 dtype_name(from.dtype), from.shape.text(), dtype_name(to.dtype), to.shape.text());
  copy_bytes(ctx, from.data, from.device, to.data, to.device, from.bytes());
}

TensorView upload(const Context& ctx, Arena& arena, DType dtype, const void* from,
                  std::int64_t count) {
  const TensorView to = arena.take(dtype, {count});
  copy_bytes(ctx, from, Device::kCpu, to.data, to.device, to.bytes());
  return to;
}

void download(const Context& ctx, const TensorView& from, void* to) {
  copy_bytes(ctx, from.data, from.device, to, Device::kCpu, from.bytes());
}

#ifdef LOCKSTEP_HAVE_CUDA
namespace {

// Two pinned buffers, filled in turn.
class PinnedRing {
 public:
  static constexpr std::size_t kBytes = std::size_t{32} << 20;

  PinnedRing() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "copy");
    for (int i = 0; i < 2; ++i) {
      check_cuda(cudaMallocHost(&memory_[i], kBytes), "pinned memory");
      check_cuda(cudaEventCreateWithFlags(&filled_[i], cudaEventDisableTiming), "copy");
    }
  }
  ~PinnedRing() {
    for (int i = 0; i < 2; ++i) cudaFreeHost(memory_[i]), cudaEventDestroy(filled_[i]);
    cudaStreamDestroy(stream_);
  }
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;

  void fill(int i, const std::byte* from, std::size_t bytes) {
    check_cuda(cudaMemcpyAsync(memory_[i], from, bytes, cudaMemcpyDeviceToHost, stream_), "copy");
    check_cuda(cudaEventRecord(filled_[i], stream_), "copy");
  }
  const std::byte* wait(int i) {
    check_cuda(cudaEventSynchronize(filled_[i]), "copy");
    return static_cast<const std::byte*>(memory_[i]);
  }

 private:
  cudaStream_t stream_ = nullptr;
  void* memory_[2] = {};
  cudaEvent_t filled_[2] = {};
};

}  // namespace
#endif

void read_pieces(const TensorView& from,
                 const std::function<void(std::span<const std::byte>)>& read) {
  const auto* bytes = static_cast<const std::byte*>(from.data);
  const std::size_t size = from.bytes();
  if (from.on_host()) {
    read({bytes, size});
    return;
  }
#ifdef LOCKSTEP_HAVE_CUDA
  static PinnedRing ring;  // pinned memory takes longer to get than most tensors to copy
  check_cuda(cudaDeviceSynchronize(), "work on the GPU");
  const auto piece = [&](std::size_t at) { return std::min(PinnedRing::kBytes, size - at); };
  if (size > 0) ring.fill(0, bytes, piece(0));
  int i = 0;
  for (std::size_t at = 0; at < size; at += PinnedRing::kBytes, i ^= 1) {
    const std::byte* data = ring.wait(i);
    const std::size_t next = at + PinnedRing::kBytes;
    if (next < size) ring.fill(i ^ 1, bytes + next, piece(next));
    read({data, piece(at)});
  }
#endif
}

Tensor to_host(const TensorView& from) {
  Tensor host(Device::kCpu, from.dtype, from.shape);
  auto* to = static_cast<std::byte*>(host.view().data);
  read_pieces(from, [&](std::span<const std::byte> piece) {
    if (!piece.empty()) std::memcpy(to, piece.data(), piece.size());
    to += piece.size();
  });
  return host;
}

void* allocate(Device device, std::size_t bytes) {
#ifdef LOCKSTEP_HAVE_CUDA
  if (device == Device::kCuda) {
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes), "memory for a tensor");
    check_cuda(cudaMemset(memory, 0, bytes), "memory for a tensor");
    check_cuda(cudaDeviceSynchronize(), "memory for a tensor");  // other streams may use it at once
    return memory;
  }
#endif
  LOCKSTEP_CHECK(device == Device::kCpu, "{}", cuda_problem());
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) fail<SystemError>("out of memory: {} bytes for a tensor", bytes);
  std::memset(memory, 0, bytes);
  return memory;
}

void release(Device device, void* memory) {
#ifdef LOCKSTEP_HAVE_CUDA
  if (device == Device::kCuda) {
    cudaFree(memory);  // at the end of a process the driver may be gone already: nothing to report
    return;
  }
#endif
  if (device == Device::kCpu) std::free(memory);
}

}  // namespace lockstep::tensor
