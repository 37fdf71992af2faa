// cuBLASLt's FP8 products as the baseline of a bench: D[M, N] = A[M, K] B[N, K]^T, dense, BF16 out.
// The library is looked for at run time; without it the baseline is left out.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "tensor/cuda_check.h"

namespace lockstep::bench {

class CublasLt {
 public:
  // LD_LIBRARY_PATH, the toolkit, or the path given.
  explicit CublasLt(const std::string& path) {
    for (const std::string& p : {path, std::string("libcublasLt.so.13"),
                                 std::string("/usr/local/cuda/lib64/libcublasLt.so.13")})
      if (library_ == nullptr && !p.empty()) library_ = dlopen(p.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) return;
    call<decltype(&cublasLtCreate)>("cublasLtCreate")(&handle_);
    tensor::check_cuda(cudaMalloc(&workspace_, kWorkspace), "cuBLASLt workspace");
  }
  bool found() const { return handle_ != nullptr; }

  enum class Scales { kBlock, kRow };

  // Prepares a product; false where the library has no algorithm for it.
  bool prepare(std::int64_t M, std::int64_t N, std::int64_t K, Scales scales, const float* a_scales,
               const float* b_scales) {
    release();
    auto create = call<decltype(&cublasLtMatmulDescCreate)>("cublasLtMatmulDescCreate");
    auto set = call<decltype(&cublasLtMatmulDescSetAttribute)>("cublasLtMatmulDescSetAttribute");
    auto layout = call<decltype(&cublasLtMatrixLayoutCreate)>("cublasLtMatrixLayoutCreate");
    create(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    // Column-major: D^T [N, M] = op(B) A^T, the weights come first.
    const cublasOperation_t transpose = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    set(operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose));
    set(operation_, CUBLASLT_MATMUL_DESC_TRANSB, &plain, sizeof(plain));
    const cublasLtMatmulMatrixScale_t row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
                                      block = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F,
                                      vector = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    const bool blocks = scales == Scales::kBlock;
    set(operation_, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, blocks ? &block : &row, sizeof(row));
    set(operation_, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, blocks ? &vector : &row, sizeof(row));
    set(operation_, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &b_scales, sizeof(b_scales));
    set(operation_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a_scales, sizeof(a_scales));
    layout(&b_, CUDA_R_8F_E4M3, static_cast<std::uint64_t>(K), static_cast<std::uint64_t>(N), K);
    layout(&a_, CUDA_R_8F_E4M3, static_cast<std::uint64_t>(K), static_cast<std::uint64_t>(M), K);
    layout(&d_, CUDA_R_16BF, static_cast<std::uint64_t>(N), static_cast<std::uint64_t>(M), N);
    cublasLtMatmulPreference_t preference = nullptr;
    call<decltype(&cublasLtMatmulPreferenceCreate)>("cublasLtMatmulPreferenceCreate")(&preference);
    const std::size_t bytes = kWorkspace;
    call<decltype(&cublasLtMatmulPreferenceSetAttribute)>("cublasLtMatmulPreferenceSetAttribute")(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
    int count = 0;
    const auto status =
        call<decltype(&cublasLtMatmulAlgoGetHeuristic)>("cublasLtMatmulAlgoGetHeuristic")(
            handle_, operation_, b_, a_, d_, d_, preference, 1, &choice_, &count);
    return status == CUBLAS_STATUS_SUCCESS && count > 0;
  }
  void run(const void* a, const void* b, void* d, cudaStream_t stream) {
    const float one = 1.0f, zero = 0.0f;
    const auto status = call<decltype(&cublasLtMatmul)>("cublasLtMatmul")(
        handle_, operation_, &one, b, b_, a, a_, &zero, d, d_, d, d_, &choice_.algo, workspace_,
        kWorkspace, stream);
    LOCKSTEP_CHECK(status == CUBLAS_STATUS_SUCCESS, "cublasLtMatmul: {}", static_cast<int>(status));
  }

 private:
  static constexpr std::size_t kWorkspace = std::size_t{64} << 20;

  template <typename Function>
  Function call(const char* name) {
    void* found = dlsym(library_, name);
    LOCKSTEP_CHECK(found != nullptr, "libcublasLt has no {}", name);
    return reinterpret_cast<Function>(found);
  }
  void release() {
    if (operation_ == nullptr) return;
    call<decltype(&cublasLtMatmulDescDestroy)>("cublasLtMatmulDescDestroy")(operation_);
    for (const auto layout : {a_, b_, d_})
      call<decltype(&cublasLtMatrixLayoutDestroy)>("cublasLtMatrixLayoutDestroy")(layout);
    operation_ = nullptr;
  }

  void* library_ = nullptr;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, d_ = nullptr;
  cublasLtMatmulHeuristicResult_t choice_{};
};

}  // namespace lockstep::bench
