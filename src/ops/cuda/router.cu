#include "ops/cuda/router.cuh"

namespace lockstep::ops::cuda {
namespace {

// Ascending with the value; -0 equals +0. A NaN is 1, below every number; 0 is "not there".
__device__ std::uint32_t order_key(float value) {
  if (numerics::is_nan(value)) return 1;
  const std::uint32_t u = numerics::float_bits(value + 0.0f);
  return (u >> 31) != 0 ? ~u : u | 0x80000000u;
}

// Takes the largest key out, the lowest index (lane + 32 * i) among equals, and returns its index.
template <int kSlots>
__device__ int take_best(std::uint32_t (&keys)[kSlots]) {
  const int lane = threadIdx.x % 32;
  std::uint32_t best = 0;
  int slot = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (keys[i] > best) {
      best = keys[i];
      slot = i;
    }
  const std::uint32_t top = __reduce_max_sync(kFullWarp, best);
  const unsigned index =
      __reduce_min_sync(kFullWarp, best == top ? static_cast<unsigned>(lane + 32 * slot) : ~0u);
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (static_cast<unsigned>(lane + 32 * i) == index) keys[i] = 0;
  return static_cast<int>(index);
}

// Group value: its two best selection values, larger first; a group of one uses that one.
__device__ float group_value(const float* value, int size) {
  if (size == 1) return value[0];
  std::uint32_t first = 0, second = 0;
  float v1 = 0.0f, v2 = 0.0f;
  for (int e = 0; e < size; ++e) {
    const std::uint32_t key = order_key(value[e]);
    if (key > first) {
      second = first;
      v2 = v1;
      first = key;
      v1 = value[e];
    } else if (key > second) {
      second = key;
      v2 = value[e];
    }
  }
  return v1 + v2;
}

// The value that a key stands for, but for the sign of zero.
__device__ float key_value(std::uint32_t key) {
  if (key == 1) return std::numeric_limits<float>::quiet_NaN();
  return numerics::bits_float((key >> 31) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// The groups that take part, as bits, where a group is whole registers of the warp (so there are at
// most 32).
template <int kSlots>
__device__ std::uint32_t best_groups(const std::uint32_t (&keys)[kSlots], int E,
                                     const RouterOptions& options) {
  const int lane = threadIdx.x % 32, slots = E / 32 / options.groups;
  std::uint32_t group_key[1] = {0}, first = 0, second = 0, chosen = 0;
  int group = 0, left = slots;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (i * 32 >= E) continue;
    if (keys[i] > first) {
      second = first;
      first = keys[i];
    } else if (keys[i] > second) {
      second = keys[i];
    }
    if (--left > 0) continue;
    const std::uint32_t best = __reduce_max_sync(kFullWarp, first);
    const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, first == best))) - 1;
    const std::uint32_t next = __reduce_max_sync(kFullWarp, lane == owner ? second : first);
    if (lane == group) group_key[0] = order_key(key_value(best) + key_value(next));
    first = second = 0;
    left = slots;
    ++group;
  }
  for (int i = 0; i < options.top_groups; ++i) chosen |= 1u << take_best(group_key);
  return chosen;
}

struct Router {
  std::int64_t T;
  int E;
  RouterOptions options;
  const float* logits;
  const float* bias;
  float* weights;
  std::int32_t* experts;
};

// A warp a token. Shared memory, for groups that are not a multiple of 32 experts: [warps][E
// values, padded to an odd stride of a group; groups flags].
template <int kSlots>
__global__ void __launch_bounds__(32 * kRouterWarps) router_kernel(Router a) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, E = a.E;
  const std::int64_t t = std::int64_t{blockIdx.x} * kRouterWarps + threadIdx.x / 32;
  if (t >= a.T) return;
  float s[kSlots], value[kSlots];
  std::uint32_t keys[kSlots];
  token_scores(a.logits + t * E, E, a.options.score, s);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + 32 * i;
    value[i] = e < E && a.bias != nullptr ? s[i] + __ldg(a.bias + e) : s[i];
    keys[i] = e < E ? order_key(value[i]) : 0;
  }

  const int groups = a.options.groups;
  if (a.options.top_groups < groups && E / groups % 32 == 0) {
    const std::uint32_t chosen = best_groups(keys, E, a.options);
    const int slots = E / 32 / groups;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if ((chosen >> (i / slots & 31) & 1u) == 0) keys[i] = 0;
  } else if (a.options.top_groups < groups) {
    const int size = E / groups, stride = size | 1;  // odd: lanes walk groups on different banks
    float* values = shared + (threadIdx.x / 32) * (groups * stride + groups);
    auto* takes_part = reinterpret_cast<std::uint32_t*>(values + groups * stride);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + 32 * i;
      if (e < E) values[e / size * stride + e % size] = value[i];
    }
    __syncwarp();
    std::uint32_t group_keys[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int g = lane + 32 * i;
      group_keys[i] = g < groups ? order_key(group_value(values + g * stride, size)) : 0;
      if (g < groups) takes_part[g] = 0;
    }
    for (int i = 0; i < a.options.top_groups; ++i) {
      const int g = take_best(group_keys);
      if (lane == g % 32) takes_part[g] = 1;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + 32 * i;
      if (e < E && takes_part[e / size] == 0) keys[i] = 0;
    }
  }

  const int C = a.options.top_k;
  float* weights = a.weights + t * C;
  std::int32_t* experts = a.experts + t * C;
  float sum = 0.0f;
  for (int c = 0; c < C; ++c) {
    const int index = take_best(keys);
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i == index) score = s[i];
    score = __shfl_sync(kFullWarp, score, index % 32);
    sum = sum + score;
    if (lane == c % 32) {  // divided below by the same lane
      experts[c] = index;
      weights[c] = score;
    }
  }
  const float divisor = sum + divisor_floor(a.options.score);
  for (int c = lane; c < C; c += 32) {
    const float u = a.options.normalize ? weights[c] / divisor : weights[c];
    weights[c] = u * a.options.scaling;
  }
}

}  // namespace

void router(const Context& ctx, const TensorView& logits_TE, const TensorView& bias_E,
            const RouterOptions& options, const TensorView& weights_TC,
            const TensorView& experts_TC) {
  const Router a{logits_TE.dim(0),
                 static_cast<int>(logits_TE.dim(1)),
                 options,
                 logits_TE.as<float>(),
                 bias_E ? bias_E.as<float>() : nullptr,
                 weights_TC.as<float>(),
                 experts_TC.as<std::int32_t>()};
  if (a.T == 0) return;
  std::size_t shared = 0;
  if (options.top_groups < options.groups && a.E / options.groups % 32 != 0)
    shared = sizeof(float) * kRouterWarps * options.groups * ((a.E / options.groups | 1) + 1);
  with_slots(a.E, [&](auto slots) {
    router_kernel<slots()>
        <<<blocks_for(a.T, kRouterWarps), 32 * kRouterWarps, shared, stream_of(ctx)>>>(a);
  });
  LOCKSTEP_CUDA_LAUNCHED("router");
}

}  // namespace lockstep::ops::cuda
