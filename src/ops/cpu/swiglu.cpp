#include "ops/cpu/swiglu.h"

#include "numerics/math.h"
#include "ops/cpu/quantize.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

using numerics::Bf16;
using numerics::to_bf16;
using numerics::to_float;

template <typename T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

float product(Bf16 gate, Bf16 up) { return numerics::silu(to_float(gate)) * to_float(up); }

}  // namespace

void swiglu(const Context& ctx, const TensorView& gate_up, const TensorView& a_MF) {
  const std::int64_t M = a_MF.dim(0), F = a_MF.dim(1);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t m = 0; m < M; ++m) {
    const Bf16* gate = data<const Bf16>(gate_up) + m * 2 * F;
    Bf16* a = data<Bf16>(a_MF) + m * F;
    for (std::int64_t f = 0; f < F; ++f) a[f] = to_bf16(product(gate[f], gate[F + f]));
  }
}

// The products are kept in FP32 for the time of the call, because the scales need a pass over them.
void swiglu_quantize(const Context& ctx, const TensorView& gate_up, const Segments& segments,
                     bool pow2, const Fp8Rows& rows, const Fp8Columns* columns, QuantStats* stats) {
  const std::int64_t M = gate_up.dim(0), F = gate_up.dim(1) / 2;
  const tensor::ArenaScope scope(*ctx.workspace);
  const TensorView a_MF = ctx.workspace->take(tensor::DType::kFp32, {M, F});
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t m = 0; m < M; ++m) {
    const Bf16* gate = data<const Bf16>(gate_up) + m * 2 * F;
    float* a = data<float>(a_MF) + m * F;
    for (std::int64_t f = 0; f < F; ++f) a[f] = product(gate[f], gate[F + f]);
  }
  LOCKSTEP_ISA::quantize_rows(ctx, a_MF, pow2, rows, stats);
  if (columns != nullptr)
    LOCKSTEP_ISA::quantize_columns(ctx, a_MF, segments, pow2, *columns, nullptr);
}

void swiglu_backward(const Context& ctx, const TensorView& gate_up, const TensorView& d_a_MF,
                     const TensorView& d_gate_up) {
  const std::int64_t M = d_a_MF.dim(0), F = d_a_MF.dim(1);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t m = 0; m < M; ++m) {
    const Bf16* gate = data<const Bf16>(gate_up) + m * 2 * F;
    const Bf16* d_a = data<const Bf16>(d_a_MF) + m * F;
    Bf16* d_gate = data<Bf16>(d_gate_up) + m * 2 * F;
    for (std::int64_t f = 0; f < F; ++f) {
      const float g = to_float(gate[f]), u = to_float(gate[F + f]), d = to_float(d_a[f]);
      const float sg = numerics::sigmoid(g);
      d_gate[f] = to_bf16(((d * u) * sg) * numerics::fma(g, 1.0f - sg, 1.0f));
      d_gate[F + f] = to_bf16(d * (g * sg));
    }
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA
