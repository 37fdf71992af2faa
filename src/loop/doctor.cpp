#include "loop/doctor.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <sched.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "base/env.h"
#include "base/error.h"
#include "numerics/contract.h"
#include "tensor/device.h"

namespace lockstep::loop {

namespace fs = std::filesystem;
using tensor::Isa;

namespace {

// The rest of the first line that starts with `key`, after ':' and spaces; "" when there is none.
std::string field(const fs::path& path, const std::string& key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key)) continue;
    const std::size_t at = line.find_first_not_of(" \t:", key.size());
    return at == std::string::npos ? "" : line.substr(at);
  }
  return "";
}

std::string first_line(const fs::path& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

std::string gib(double bytes) { return fmt::format("{:.1f} GiB", bytes / (1 << 30)); }

// "16384 kB" as GiB.
std::string meminfo(const std::string& key) {
  const std::string text = field("/proc/meminfo", key);
  return text.empty() ? "unknown" : gib(1024 * std::stod(text));
}

void processor(std::vector<Finding>& out) {
  const std::string model = field("/proc/cpuinfo", "model name");
  out.push_back({"processor", "model", model.empty() ? "unknown" : model});
  cpu_set_t set;
  CPU_ZERO(&set);
  const int usable = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
  std::string cores = fmt::format("{} of {}", usable, std::thread::hardware_concurrency());
  const std::string quota =
      first_line("/sys/fs/cgroup/cpu.max");  // "max 100000" or "200000 100000"
  if (!quota.empty() && !quota.starts_with("max"))
    cores += fmt::format(", container quota {:.1f}",
                         std::stod(quota) / std::stod(quota.substr(quota.find(' '))));
  out.push_back({"processor", "cores usable", cores});
  std::string isas;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (tensor::isa_supported(isa))
      isas += (isas.empty() ? "" : ", ") + std::string(tensor::isa_name(isa));
  out.push_back({"processor", "code paths", isas});
  try {
    out.push_back({"processor", "code path chosen", tensor::isa_name(tensor::best_isa())});
  } catch (const base::InputError& e) {
    out.push_back({"processor", "code path chosen", e.what(), true});
  }
}

void memory(std::vector<Finding>& out) {
  out.push_back({"memory", "total", meminfo("MemTotal")});
  out.push_back({"memory", "available", meminfo("MemAvailable")});
  const std::string limit = first_line("/sys/fs/cgroup/memory.max");
  if (!limit.empty() && limit != "max")
    out.push_back({"memory", "container limit", gib(std::stod(limit))});
  std::error_code error;
  const fs::space_info space = fs::space(".", error);
  if (!error)
    out.push_back({"memory", "disk free here", gib(static_cast<double>(space.available))});
}

// The GPUs that the driver's library knows, opened by hand so that the binary needs no driver to
// start, and whether this build can use the first of them.
void gpus(std::vector<Finding>& out) {
  const std::string kernel_driver = first_line("/proc/driver/nvidia/version");
  out.push_back({"GPU", "kernel driver", kernel_driver.empty() ? "none" : kernel_driver});
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    out.push_back({"GPU", "devices", "none (libcuda.so.1 is not installed)"});
  } else {
    const auto init = reinterpret_cast<int (*)(unsigned)>(::dlsym(library, "cuInit"));
    const auto count_of = reinterpret_cast<int (*)(int*)>(::dlsym(library, "cuDeviceGetCount"));
    const auto name_of =
        reinterpret_cast<int (*)(char*, int, int)>(::dlsym(library, "cuDeviceGetName"));
    const auto bytes_of =
        reinterpret_cast<int (*)(std::size_t*, int)>(::dlsym(library, "cuDeviceTotalMem_v2"));
    const auto driver = reinterpret_cast<int (*)(int*)>(::dlsym(library, "cuDriverGetVersion"));
    int version = 0, count = 0;
    if (driver != nullptr && driver(&version) == 0)
      out.push_back(
          {"GPU", "CUDA of the driver", fmt::format("{}.{}", version / 1000, version % 1000 / 10)});
    if (init == nullptr || count_of == nullptr || init(0) != 0 || count_of(&count) != 0) count = 0;
    out.push_back({"GPU", "devices", count == 0 ? "none" : std::to_string(count)});
    for (int i = 0; i < count; ++i) {
      char name[128] = {};
      std::size_t bytes = 0;
      if (name_of == nullptr || name_of(name, sizeof(name) - 1, i) != 0) continue;
      std::string text = name;
      if (bytes_of != nullptr && bytes_of(&bytes, i) == 0)
        text += ", " + gib(static_cast<double>(bytes));
      out.push_back({"GPU", fmt::format("device {}", i), text});
    }
  }
  if (const std::string problem = tensor::cuda_problem(); !problem.empty()) {
    out.push_back({"GPU", "device: cuda", "cannot be used: " + problem});
    return;
  }
  tensor::Arena none(tensor::Device::kCuda);
  const tensor::Context ctx = tensor::cuda_context(none);
  out.push_back({"GPU", "device: cuda",
                 fmt::format("{}, {} free", tensor::device_text(ctx),
                             gib(static_cast<double>(tensor::device_memory(ctx).free)))});
}

void libraries(std::vector<Finding>& out) {
  std::string toolkit = "not found";
  for (const char* path : {"/usr/local/cuda/bin/nvcc", "/usr/bin/nvcc"})
    if (fs::exists(path)) {
      toolkit = path;
      break;
    }
  out.push_back({"libraries", "CUDA toolkit (nvcc)", toolkit});
  const auto look = [&](const char* name, std::initializer_list<const char*> files) {
    std::string found = "not found";
    for (const char* file : files)
      if (void* library = ::dlopen(file, RTLD_LAZY | RTLD_LOCAL)) {
        found = file;
        ::dlclose(library);
        break;
      }
    out.push_back({"libraries", name, found});
  };
  look("NCCL", {"libnccl.so.2"});
  look("MPI", {"libmpi.so.40", "libmpi.so.12"});
}

void build(std::vector<Finding>& out, const std::string& version) {
  out.push_back({"build", "lockstep", version});
  out.push_back(
      {"build", "numerics contract", fmt::format("version {}", numerics::kContractVersion)});
  out.push_back({"build", "compiler", "g++ " __VERSION__});
  const std::string runtime = tensor::cuda_runtime_version();
  out.push_back({"build", "backends",
                 runtime.empty() ? "cpu" : fmt::format("cpu, cuda (runtime {}, sm_90a)", runtime)});
#if defined(__SANITIZE_ADDRESS__)
  out.push_back({"build", "sanitizer", "address"});
#elif defined(__SANITIZE_THREAD__)
  out.push_back({"build", "sanitizer", "thread"});
#endif
}

void environment(std::vector<Finding>& out) {
  for (const base::EnvVariable& v : base::env_registry()) {
    const auto value = base::env_choice(v.name, {});
    out.push_back(
        {"environment", v.name,
         fmt::format("{}: {} ({})", value ? "'" + *value + "'" : "not set", v.meaning, v.values)});
  }
}

}  // namespace

std::vector<Finding> diagnose(const std::string& version) {
  std::vector<Finding> out;
  build(out, version);
  processor(out);
  memory(out);
  gpus(out);
  libraries(out);
  environment(out);
  for (Finding& f : self_check()) out.push_back(std::move(f));
  return out;
}

}  // namespace lockstep::loop
