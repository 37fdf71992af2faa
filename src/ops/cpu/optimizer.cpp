#include "ops/cpu/optimizer.h"

#include <algorithm>

#include "numerics/reduce.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

using numerics::Bf16;
using numerics::kNormChunk;

template <typename T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

float load(float x) { return x; }
float load(Bf16 x) { return numerics::to_float(x); }
void store(float x, float& to) { to = x; }
void store(float x, Bf16& to) { to = numerics::to_bf16(x); }

template <typename M, typename V>
void adamw_of(const Context& ctx, const TensorView& grad_view, const AdamwFactors& f,
              const TensorView& master_view, const TensorView& m_view, const TensorView& v_view,
              const TensorView& w_view) {
  const std::int64_t n = grad_view.count();
  const float* grad = data<const float>(grad_view);
  float* master = data<float>(master_view);
  M* m = data<M>(m_view);
  V* v = data<V>(v_view);
  Bf16* w = data<Bf16>(w_view);
#pragma omp parallel for simd schedule(static) num_threads(ctx.threads)
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * f.clip;
    const float mi = numerics::fma(f.beta1, load(m[i]), (1.0f - f.beta1) * g);
    const float vi = numerics::fma(f.beta2, load(v[i]), (1.0f - f.beta2) * (g * g));
    const float mhat = mi * f.correction1, vhat = vi * f.correction2;
    const float decayed = numerics::fma(-f.decay, master[i], master[i]);
    const float x = decayed - f.lr * (mhat / (__builtin_sqrtf(vhat) + f.eps));
    store(mi, m[i]);
    store(vi, v[i]);
    master[i] = x;
    w[i] = numerics::to_bf16(x);
  }
}

// Sum of terms over one chunk.
double chunk_squares(const float* x, std::int64_t n) {
  return numerics::lane_sum<double>(n, [x](std::int64_t i, double acc) {
    const double g = static_cast<double>(x[i]);
    return acc + g * g;  // g * g is exact
  });
}
double chunk_total(const double* x, std::int64_t n) {
  return numerics::lane_sum<double>(n, [x](std::int64_t i, double acc) { return acc + x[i]; });
}

std::int64_t chunks_of(std::int64_t n) { return (n + kNormChunk - 1) / kNormChunk; }

}  // namespace

void adamw(const Context& ctx, const TensorView& grad, const AdamwFactors& factors,
           const TensorView& master, const TensorView& m, const TensorView& v,
           const TensorView& w) {
  const bool m_short = m.dtype == tensor::DType::kBf16, v_short = v.dtype == tensor::DType::kBf16;
  const auto run = m_short ? (v_short ? adamw_of<Bf16, Bf16> : adamw_of<Bf16, float>)
                           : (v_short ? adamw_of<float, Bf16> : adamw_of<float, float>);
  run(ctx, grad, factors, master, m, v, w);
}

double sum_of_squares(const Context& ctx, const TensorView* grads, std::int64_t count) {
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < count; ++i) n += chunks_of(grads[i].count());
  if (n == 0) return 0.0;
  const tensor::ArenaScope scope(*ctx.workspace);
  double* sums = data<double>(ctx.workspace->take(tensor::DType::kFp64, {n}));
  double* next = sums;
  for (std::int64_t i = 0; i < count; ++i) {
    const float* x = data<const float>(grads[i]);
    const std::int64_t size = grads[i].count(), chunks = chunks_of(size);
#pragma omp parallel for schedule(static) num_threads(ctx.threads) if (chunks > 1)
    for (std::int64_t c = 0; c < chunks; ++c)
      next[c] = chunk_squares(x + c * kNormChunk,
                              std::min<std::int64_t>(kNormChunk, size - c * kNormChunk));
    next += chunks;
  }
  for (; n > 1; n = chunks_of(n))  // in place: a chunk is read before its sum overwrites it
    for (std::int64_t c = 0; c < chunks_of(n); ++c)
      sums[c] = chunk_total(sums + c * kNormChunk,
                            std::min<std::int64_t>(kNormChunk, n - c * kNormChunk));
  return sums[0];
}

std::int64_t count_nonfinite(const Context& ctx, const TensorView& x) {
  const std::int64_t n = x.count();
  std::int64_t found = 0;
  if (x.dtype == tensor::DType::kBf16) {
    const Bf16* p = data<const Bf16>(x);
#pragma omp parallel for simd schedule(static) num_threads(ctx.threads) reduction(+ : found)
    for (std::int64_t i = 0; i < n; ++i) found += (p[i].bits & 0x7F80u) == 0x7F80u ? 1 : 0;
  } else {
    const float* p = data<const float>(x);
#pragma omp parallel for simd schedule(static) num_threads(ctx.threads) reduction(+ : found)
    for (std::int64_t i = 0; i < n; ++i) found += numerics::is_finite(p[i]) ? 0 : 1;
  }
  return found;
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
