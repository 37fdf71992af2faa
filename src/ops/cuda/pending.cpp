#include "ops/cuda/columns.h"
#include "ops/cuda/head_gemm.h"

namespace lockstep::ops::cuda {

void head_gemm(const Context&, const Columns&, const HeadRows&, BLayout, const Columns&) {
  base::fail<base::ContractError>("head_gemm: not on a GPU yet");
}
void head_weight_gradient(const Context&, const Columns&, const Columns&, bool, const HeadRows&) {
  base::fail<base::ContractError>("head_weight_gradient: not on a GPU yet");
}
void rms_norm_columns(const Context&, const Columns&, const TensorView&, float, const Columns&,
                      const TensorView&) {
  base::fail<base::ContractError>("rms_norm_columns: not on a GPU yet");
}
void rms_norm_columns_backward(const Context&, const Columns&, const Columns&, const TensorView&,
                               const TensorView&, const Columns&, const TensorView&) {
  base::fail<base::ContractError>("rms_norm_columns_backward: not on a GPU yet");
}
void rope_columns(const Context&, const Columns&, std::int64_t, RopePairs, const TensorView&,
                  const TensorView&, const TensorView&, const Columns&) {
  base::fail<base::ContractError>("rope_columns: not on a GPU yet");
}
void rope_columns_backward(const Context&, const Columns&, std::int64_t, RopePairs,
                           const TensorView&, const TensorView&, const TensorView&,
                           const Columns&) {
  base::fail<base::ContractError>("rope_columns_backward: not on a GPU yet");
}

}  // namespace lockstep::ops::cuda
