#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/philox.h"
#include "model/device_limits.h"
#include "tensor/device.h"

namespace lockstep::model {

using numerics::Bf16;
using ops::Fp8Weight;
using ops::Scaling;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::Shape;
using tensor::Tensor;
using tensor::TensorView;

Weights make_weights(const ModelConfig& config) {
  Weights w;
  w.config = config;
  w.table = build_param_table(config);
  w.slab = Tensor(Device::kCpu, DType::kBf16, {w.table.count});
  w.router_bias = Tensor(Device::kCpu, DType::kFp32,
                         {config.num_layers, std::max<std::int64_t>(1, config.num_experts)});
  return w;
}

Weights on_host(const Weights& weights) {
  Weights w = weights;
  w.quantized.clear();
  if (!w.slab.view().on_host()) w.slab = tensor::to_host(w.slab);
  if (!w.router_bias.view().on_host()) w.router_bias = tensor::to_host(w.router_bias);
  return w;
}

void move_to(const Context& ctx, Weights& weights) {
  LOCKSTEP_CHECK(weights.quantized.empty(), "weights move before they are quantized");
  check_widths(ctx.device, weights.config, weights.table, {});
  for (Tensor* t : {&weights.slab, &weights.router_bias}) {
    if (t->view().device == ctx.device) continue;
    Tensor moved(ctx.device, t->view().dtype, t->view().shape);
    tensor::copy(ctx, *t, moved);
    *t = std::move(moved);
  }
}

void initialize(Weights& weights, std::uint64_t seed) {
  for (std::size_t p = 0; p < weights.table.params.size(); ++p) {
    const Param& param = weights.table.params[p];
    const TensorView view = weights.view(static_cast<int>(p));
    Bf16* data = view.as<Bf16>();
    if (param.kind == ParamKind::kNorm) {
      std::fill_n(data, view.count(), numerics::to_bf16(1.0f));
      continue;
    }
    if (param.kind == ParamKind::kBias) continue;  // zero
    const std::int64_t K = param.shape[param.shape.rank - 1];
    const std::int64_t N = param.shape[param.shape.rank - 2];
    for (const ParamPart& part : param.parts)
#pragma omp parallel for schedule(static)
      for (std::int64_t n = 0; n < part.rows; ++n)
        for (std::int64_t k = 0; k < part.columns; ++k) {
          const std::int64_t i = (part.expert * N + part.row + n) * K + k;
          const auto words = base::philox4x32(seed, p, static_cast<std::uint64_t>(i));
          const double u1 = (words.word[0] + 0.5) * 0x1p-32, u2 = (words.word[1] + 0.5) * 0x1p-32;
          const double normal =
              std::sqrt(-2.0 * std::log(u1)) * std::cos(2.0 * std::numbers::pi * u2);
          data[i] =
              numerics::to_bf16(static_cast<float>(weights.config.initializer_range * normal));
        }
  }
}

namespace {

Shape scales_shape(const Shape& codes, Scaling scaling) {
  const auto blocks = [](std::int64_t n) { return (n + 127) / 128; };
  if (scaling == Scaling::kRow) return {codes[0], codes[1]};
  return {codes[0], blocks(codes[1]), blocks(codes[2])};
}

void fill(const Context& ctx, const Weights& weights, QuantizedWeights& q) {
  const tensor::ArenaScope scratch(*ctx.workspace);
  ops::QuantStats* stats = begin_stats(ctx);
  for (std::size_t p = 0; p < q.fp8.size(); ++p)
    if (q.fp8[p])
      ops::quantize_weight(ctx, weights.view(static_cast<int>(p)), q.precision.weight_scales(),
                           q.precision.weight_pow2, weights.table.params[p].part_rows, q.forward[p],
                           q.transposed[p], stats);
  end_stats(ctx, stats, q);
}

}  // namespace

ops::QuantStats* begin_stats(const Context& ctx) {
  const TensorView stats =
      ctx.workspace->take(DType::kInt64, {std::int64_t{sizeof(ops::QuantStats)} / 8});
  tensor::fill_bytes(ctx, stats, 0);
  return static_cast<ops::QuantStats*>(stats.data);
}

void end_stats(const Context& ctx, const ops::QuantStats* stats, QuantizedWeights& q) {
  tensor::copy_bytes(ctx, stats, ctx.device, &q.stats, Device::kCpu, sizeof q.stats);
}

std::shared_ptr<QuantizedWeights> quantized_for(const Context& ctx, Weights& weights,
                                                const Precision& precision) {
  LOCKSTEP_CHECK(weights.slab.view().device == ctx.device, "weights are on another device");
  for (const auto& q : weights.quantized)
    if (q->precision == precision) return q;
  auto q = std::make_shared<QuantizedWeights>();
  q->precision = precision;
  q->fp8 = fp8_params(weights.table, weights.config, precision);
  check_widths(ctx.device, weights.config, weights.table, q->fp8);
  q->forward.resize(q->fp8.size());
  q->transposed.resize(q->fp8.size());
  for (std::size_t p = 0; p < q->fp8.size(); ++p) {
    if (!q->fp8[p]) continue;
    const Shape& s = weights.table.params[p].shape;
    for (const bool swapped : {false, true}) {
      const Shape shape = swapped ? Shape{s[0], s[2], s[1]} : s;
      Tensor codes(ctx.device, DType::kE4m3, shape),
          scales(ctx.device, DType::kFp32, scales_shape(shape, precision.scaling()));
      (swapped ? q->transposed : q->forward)[p] = Fp8Weight{codes, scales, precision.scaling()};
      q->memory.push_back(std::move(codes));
      q->memory.push_back(std::move(scales));
    }
  }
  fill(ctx, weights, *q);
  weights.quantized.push_back(q);
  return q;
}

void requantize(const Context& ctx, Weights& weights, const QuantizedWeights* except) {
  for (const auto& q : weights.quantized) {
    q->stored.clear(), q->stored_memory.clear();
    if (q.get() != except) fill(ctx, weights, *q);
  }
}

}  // namespace lockstep::model
