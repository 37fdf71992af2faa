#include "policy/gradients.h"

#include "tensor/device.h"

namespace lockstep::policy {

using model::Param;
using model::ParamKind;

namespace {

// Its gradient comes from products that together write all of it.
bool is_matrix(const model::ParamTable& table, std::size_t p) {
  switch (table.params[p].kind) {
    case ParamKind::kEmbedding:
      return table.head == static_cast<int>(p);  // the head's product comes first
    case ParamKind::kRouter:
    case ParamKind::kLinear:
    case ParamKind::kHeads:
    case ParamKind::kHead:
      return true;
    case ParamKind::kNorm:
    case ParamKind::kBias:
      return false;
  }
  return false;
}

}  // namespace

void zero_sums(const tensor::Context& ctx, const model::ParamTable& table,
               const tensor::TensorView& slab) {
  std::int64_t done = 0;
  const auto zero_until = [&](std::int64_t end) {
    if (done < end) tensor::fill_bytes(ctx, slab.rows(done, end - done), 0);
  };
  for (std::size_t i = 0; i < table.params.size(); ++i) {
    if (!is_matrix(table, i)) continue;
    const Param& matrix = table.params[i];
    zero_until(matrix.offset);
    done = matrix.offset + matrix.shape.count();
  }
  zero_until(table.count);
}

}  // namespace lockstep::policy
