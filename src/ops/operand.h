// FP8 operands: codes with their scales, as the quantizers write them and the GEMMs read them
// (docs/numerics.md, 5 and 6).
#pragma once

#include "tensor/tensor.h"

namespace lockstep::ops {

using tensor::Context;
using tensor::TensorView;

// How a contraction's scales are laid out.
enum class Scaling {
  kBlock,  // recipe blockwise: one scale per 128 of the contraction (and, for weights, per 128
           // rows)
  kRow,    // recipes rowwise and tensorwise: one scale per row for the whole contraction
};

// Rows of activations or gradients, contraction axis last. G = ceil(K / 128).
struct Fp8Rows {
  TensorView codes_MK;
  TensorView
      scales;  // kBlock: [G, M] (a block's scales of neighbouring rows are neighbours); kRow: [M]
  Scaling scaling = Scaling::kBlock;
};

// Weights of E experts (E = 1 for a plain linear), contraction axis last.
struct Fp8Weight {
  TensorView codes_ENK;
  TensorView scales;  // kBlock: [E, ceil(N/128), G]; kRow: [E, N]
  Scaling scaling = Scaling::kBlock;
};

// Operand of a weight gradient: columns of [M, N] as rows, tokens last, each expert's segment
// starting at a multiple of 128 (padded_offsets_E1) and filled up with zero codes. R is room: a
// multiple of 128, at least the padded row count (on a GPU an upper bound from the shapes, because
// the count itself is a device value). What lies behind the last segment is never read or written.
struct Fp8Columns {
  TensorView codes_NR;
  TensorView scales;  // kBlock: [R / 128, N], segments as in the codes; kRow: [E, N]
  Scaling scaling = Scaling::kBlock;
};

// Where each expert's rows lie. offsets_E1[e] .. offsets_E1[e+1] are rows of the unpadded tensors,
// padded_offsets_E1 the same segments in Fp8Columns. Both int32, both on the device. A dense linear
// is the case E = 1.
struct Segments {
  TensorView offsets_E1;
  TensorView padded_offsets_E1;
  std::int64_t experts() const { return offsets_E1.dim(0) - 1; }
};

}  // namespace lockstep::ops
