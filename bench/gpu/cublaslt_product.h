// cuBLASLt as the baseline of a bench: one dense product d = op(a) op(b) + beta d of BF16 or E4M3
// (one scale of 1 a tensor), column-major as the library has it. The library is looked for at run
// time; without it the baseline is left out.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <string>

#include "tensor/cuda_check.h"

namespace lockstep::bench {

class CublasLibrary {
 public:
  // LD_LIBRARY_PATH, the toolkit, or the path given.
  explicit CublasLibrary(const std::string& path = "") {
    for (const std::string& p : {path, std::string("libcublasLt.so.13"),
                                 std::string("/usr/local/cuda/lib64/libcublasLt.so.13")})
      if (library_ == nullptr && !p.empty()) library_ = dlopen(p.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) return;
    call<decltype(&cublasLtCreate)>("cublasLtCreate")(&handle);
    tensor::check_cuda(cudaMalloc(&workspace, kWorkspace), "cuBLASLt workspace");
  }
  bool found() const { return handle != nullptr; }
  template <typename Function>
  Function call(const char* name) const {
    void* found = dlsym(library_, name);
    LOCKSTEP_CHECK(found != nullptr, "libcublasLt has no {}", name);
    return reinterpret_cast<Function>(found);
  }

  static constexpr std::size_t kWorkspace = std::size_t{64} << 20;
  cublasLtHandle_t handle = nullptr;
  void* workspace = nullptr;

 private:
  void* library_ = nullptr;
};

// d is [rows, columns], the contraction `depth` long. A transposed operand lies with the
// contraction contiguous.
struct CublasShape {
  cudaDataType inputs, output;
  bool transpose_a, transpose_b;
  std::int64_t rows, columns, depth;
  std::int64_t stride_a, stride_b;  // leading dimensions
};

class CublasProduct {
 public:
  // found() is false where the library has no algorithm for it.
  CublasProduct(const CublasLibrary& library, const CublasShape& s) : library_(library) {
    if (!library.found() || s.depth == 0) return;
    auto set =
        library.call<decltype(&cublasLtMatmulDescSetAttribute)>("cublasLtMatmulDescSetAttribute");
    auto layout = library.call<decltype(&cublasLtMatrixLayoutCreate)>("cublasLtMatrixLayoutCreate");
    library.call<decltype(&cublasLtMatmulDescCreate)>("cublasLtMatmulDescCreate")(
        &operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const cublasOperation_t a = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                            b = s.transpose_b ? CUBLAS_OP_N : CUBLAS_OP_T;
    set(operation_, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof(a));
    set(operation_, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof(b));
    const auto matrix = [&](cublasLtMatrixLayout_t* out, cudaDataType type, std::int64_t rows,
                            std::int64_t columns, std::int64_t stride) {
      layout(out, type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns),
             stride);
    };
    s.transpose_a ? matrix(&a_, s.inputs, s.depth, s.rows, s.stride_a)
                  : matrix(&a_, s.inputs, s.rows, s.depth, s.stride_a);
    s.transpose_b ? matrix(&b_, s.inputs, s.depth, s.columns, s.stride_b)
                  : matrix(&b_, s.inputs, s.columns, s.depth, s.stride_b);
    matrix(&d_, s.output, s.rows, s.columns, s.rows);
    cublasLtMatmulPreference_t preference = nullptr;
    library.call<decltype(&cublasLtMatmulPreferenceCreate)>("cublasLtMatmulPreferenceCreate")(
        &preference);
    const std::size_t bytes = CublasLibrary::kWorkspace;
    library.call<decltype(&cublasLtMatmulPreferenceSetAttribute)>(
        "cublasLtMatmulPreferenceSetAttribute")(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
    int count = 0;
    const auto status =
        library.call<decltype(&cublasLtMatmulAlgoGetHeuristic)>("cublasLtMatmulAlgoGetHeuristic")(
            library.handle, operation_, a_, b_, d_, d_, preference, 1, &choice_, &count);
    found_ = status == CUBLAS_STATUS_SUCCESS && count > 0;
    library.call<decltype(&cublasLtMatmulPreferenceDestroy)>("cublasLtMatmulPreferenceDestroy")(
        preference);
  }
  bool found() const { return found_; }
  void run(const void* a, const void* b, float beta, void* d, cudaStream_t stream) const {
    if (!found_) return;
    const float one = 1.0f;
    const auto status = library_.call<decltype(&cublasLtMatmul)>("cublasLtMatmul")(
        library_.handle, operation_, &one, a, a_, b, b_, &beta, d, d_, d, d_, &choice_.algo,
        library_.workspace, CublasLibrary::kWorkspace, stream);
    LOCKSTEP_CHECK(status == CUBLAS_STATUS_SUCCESS, "cublasLtMatmul: {}", static_cast<int>(status));
  }

 private:
  const CublasLibrary& library_;
  bool found_ = false;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, d_ = nullptr;
  cublasLtMatmulHeuristicResult_t choice_{};
};

}  // namespace lockstep::bench
