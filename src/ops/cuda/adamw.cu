#include "ops/cuda/adamw_values.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/optimizer.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;

constexpr int kThreads = 256;

template <typename M, typename V>
__device__ void step_one(const float* grad, const AdamwFactors& f, float* master, M* m, V* v,
                         Bf16* w, std::int64_t i) {
  float x = master[i];
  adamw_step(grad[i], f, x, m[i], v[i]);
  master[i] = x;
  w[i] = numerics::to_bf16(x);
}

// The first `wide` values (a multiple of kStepValues) with 16-byte accesses, the others one by one.
template <typename M, typename V>
__global__ __launch_bounds__(kThreads) void adamw_kernel(const float* grad, AdamwFactors f,
                                                         float* master, M* m, V* v, Bf16* w,
                                                         std::int64_t n, std::int64_t wide) {
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = first; i < wide / kStepValues; i += stride) {
    const auto g = reinterpret_cast<const StepValues<float>*>(grad)[i];
    auto x = reinterpret_cast<StepValues<float>*>(master)[i];
    auto mv = reinterpret_cast<StepValues<M>*>(m)[i];
    auto vv = reinterpret_cast<StepValues<V>*>(v)[i];
    StepValues<Bf16> wv;
#pragma unroll
    for (int k = 0; k < kStepValues; ++k) {
      adamw_step(g.x[k], f, x.x[k], mv.x[k], vv.x[k]);
      wv.x[k] = numerics::to_bf16(x.x[k]);
    }
    reinterpret_cast<StepValues<float>*>(master)[i] = x;
    reinterpret_cast<StepValues<M>*>(m)[i] = mv;
    reinterpret_cast<StepValues<V>*>(v)[i] = vv;
    reinterpret_cast<StepValues<Bf16>*>(w)[i] = wv;
  }
  for (std::int64_t i = wide + first; i < n; i += stride) step_one(grad, f, master, m, v, w, i);
}

bool aligned(const TensorView& x) { return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0; }

template <typename M, typename V>
void launch(const Context& ctx, const TensorView& grad, const AdamwFactors& f,
            const TensorView& master, const TensorView& m, const TensorView& v,
            const TensorView& w) {
  const std::int64_t n = grad.count();
  const bool wide = aligned(grad) && aligned(master) && aligned(m) && aligned(v) && aligned(w);
  const Grid grid = elementwise_grid(wide ? (n + kStepValues - 1) / kStepValues : n, kThreads);
  adamw_kernel<M, V><<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(
      grad.as<float>(), f, master.as<float>(), m.as<M>(), v.as<V>(), w.as<Bf16>(), n,
      wide ? n / kStepValues * kStepValues : 0);
  LOCKSTEP_CUDA_LAUNCHED("adamw");
}

}  // namespace

void adamw(const Context& ctx, const TensorView& grad, const AdamwFactors& factors,
           const TensorView& master, const TensorView& m, const TensorView& v,
           const TensorView& w) {
  if (grad.count() == 0) return;
  const bool m_short = m.dtype == tensor::DType::kBf16, v_short = v.dtype == tensor::DType::kBf16;
  const auto run = m_short ? (v_short ? launch<Bf16, Bf16> : launch<Bf16, float>)
                           : (v_short ? launch<float, Bf16> : launch<float, float>);
  run(ctx, grad, factors, master, m, v, w);
}

}  // namespace lockstep::ops::cuda
