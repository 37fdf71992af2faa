#include "ops/cuda/launch.cuh"
#include "ops/cuda/optimizer.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;

constexpr int kValues = 8;  // a thread's: 16 bytes of BF16, twice 16 bytes of FP32
constexpr int kThreads = 256;

__device__ float load(float x) { return x; }
__device__ float load(Bf16 x) { return numerics::to_float(x); }
__device__ void store(float x, float& to) { to = x; }
__device__ void store(float x, Bf16& to) { to = numerics::to_bf16(x); }

template <typename T>
struct alignas(16) Values {
  T x[kValues];
};
static_assert(sizeof(Values<Bf16>) == 16 && sizeof(Values<float>) == 32);

__device__ void update(float grad, const AdamwFactors& f, float& master, float& m, float& v) {
  const float g = grad * f.clip;
  m = numerics::fma(f.beta1, m, (1.0f - f.beta1) * g);
  v = numerics::fma(f.beta2, v, (1.0f - f.beta2) * (g * g));
  const float mhat = m * f.correction1, vhat = v * f.correction2;
  const float decayed = numerics::fma(-f.decay, master, master);
  master = decayed - f.lr * (mhat / (sqrtf(vhat) + f.eps));
}

template <typename M, typename V>
__device__ void update_one(const float* grad, const AdamwFactors& f, float* master, M* m, V* v,
                           Bf16* w, std::int64_t i) {
  float x = master[i], mi = load(m[i]), vi = load(v[i]);
  update(grad[i], f, x, mi, vi);
  master[i] = x;
  store(mi, m[i]);
  store(vi, v[i]);
  w[i] = numerics::to_bf16(x);
}

// The first `wide` values (a multiple of kValues) with 16-byte accesses, the others one by one.
template <typename M, typename V>
__global__ __launch_bounds__(kThreads) void adamw_kernel(const float* grad, AdamwFactors f,
                                                         float* master, M* m, V* v, Bf16* w,
                                                         std::int64_t n, std::int64_t wide) {
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = first; i < wide / kValues; i += stride) {
    const auto g = reinterpret_cast<const Values<float>*>(grad)[i];
    auto x = reinterpret_cast<Values<float>*>(master)[i];
    auto mv = reinterpret_cast<Values<M>*>(m)[i];
    auto vv = reinterpret_cast<Values<V>*>(v)[i];
    Values<Bf16> wv;
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      float mi = load(mv.x[k]), vi = load(vv.x[k]);
      update(g.x[k], f, x.x[k], mi, vi);
      store(mi, mv.x[k]);
      store(vi, vv.x[k]);
      wv.x[k] = numerics::to_bf16(x.x[k]);
    }
    reinterpret_cast<Values<float>*>(master)[i] = x;
    reinterpret_cast<Values<M>*>(m)[i] = mv;
    reinterpret_cast<Values<V>*>(v)[i] = vv;
    reinterpret_cast<Values<Bf16>*>(w)[i] = wv;
  }
  for (std::int64_t i = wide + first; i < n; i += stride) update_one(grad, f, master, m, v, w, i);
}

bool aligned(const TensorView& x) { return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0; }

template <typename M, typename V>
void launch(const Context& ctx, const TensorView& grad, const AdamwFactors& f,
            const TensorView& master, const TensorView& m, const TensorView& v,
            const TensorView& w) {
  const std::int64_t n = grad.count();
  const bool wide = aligned(grad) && aligned(master) && aligned(m) && aligned(v) && aligned(w);
  const Grid grid = elementwise_grid(wide ? (n + kValues - 1) / kValues : n, kThreads);
  adamw_kernel<M, V><<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(
      grad.as<float>(), f, master.as<float>(), m.as<M>(), v.as<V>(), w.as<Bf16>(), n,
      wide ? n / kValues * kValues : 0);
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
