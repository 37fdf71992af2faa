// cuDNN's attention as the baseline of a bench: packed causal sequences of one length, BF16,
// forward with the statistics that the backward needs. Built where its frontend is
// (tools/cudnn_frontend.sh); the library is looked for at run time.
#pragma once

#include <functional>
#include <string>

#include "tensor/tensor.h"

namespace lockstep::bench {

// q, d_q, out, d_out: [sequences * length, H, K]; k, v, d_k, d_v: [sequences * length, J, K].
struct CudnnAttentionCase {
  std::int64_t sequences, length, H, J, K;
  double scale;
  tensor::TensorView q, k, v, d_out;
};

// What cuDNN writes; stats: natural log-sum-exp of a query and head.
struct CudnnAttention {
  std::string problem;  // not empty: it is not here or refuses the case, and nothing below is set
  std::string version;
  tensor::Tensor out, stats, d_q, d_k, d_v;
  std::function<void()> forward, backward;  // on the context's stream
};
CudnnAttention cudnn_attention(const tensor::Context& ctx, const CudnnAttentionCase& c);

}  // namespace lockstep::bench
