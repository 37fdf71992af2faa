// FP8 codes and scales between files and QuantizedWeights, byte for byte.
#pragma once

#include <memory>
#include <string>

#include "model/checkpoint.h"

namespace lockstep::model {

// The quantized set of `weights` for this precision, with the codes and scales of the file wherever
// it has them, not quantized again: projection by projection, for a parameter that runs in FP8 in
// this precision. Call it after read_weights and before the first use of the set. What does not
// match is said to `log` in one line a kind: a parameter that the file has in FP8 and the precision
// in BF16 runs on the dequantized BF16 weights; one that the file has in BF16 is quantized from
// them; a recipe other than blockwise, and power-of-two scales where the file has others, quantize
// everything from the dequantized weights. When a training step has changed the weights, requantize
// replaces all codes. Codes of weights that run in BF16 in every precision (kv_b_proj of latent
// attention, ADR 0008) are kept in the set's `stored`.
std::shared_ptr<QuantizedWeights> import_fp8(const tensor::Context& ctx,
                                             const Checkpoint& checkpoint, Weights& weights,
                                             const Precision& precision, const Log& log = nullptr);

// The same for the folder that `weights` were loaded from. Does nothing for a folder without FP8.
void import_folder_fp8(const tensor::Context& ctx, const std::filesystem::path& folder,
                       Weights& weights, const Precision& precision, const Log& log = nullptr);

// The codes of one projection, rows x columns, and its grid of scales, without the slab's padding.
void export_codes(const tensor::Context& ctx, const ops::Fp8Weight& w, const ParamPart& part,
                  numerics::Fp8* to);
void export_scales(const tensor::Context& ctx, const ops::Fp8Weight& w, const ParamPart& part,
                   float* to);

// Shape of a projection's scales in a file.
std::vector<std::int64_t> scale_shape(const ParamPart& part);

// FP32 scales as F32, BF16 or F8_E8M0 bytes; InputError naming the tensor when one of them is not
// held exactly.
void store_scales(const std::vector<float>& scales, FileDtype dtype, const std::string& name,
                  std::span<std::byte> to);

}  // namespace lockstep::model
