// Checksums of tensors where they lie, so that a step can prove what the rollout reads without
// bringing gigabytes to the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/operand.h"

namespace lockstep::ops {

inline constexpr std::size_t kChecksumPiece = 65536;  // bytes

// XXH3-64 (xxhash 0.8, no seed) of each piece of 64 KiB of the tensors' bytes, tensor by tensor. A
// tensor's last piece is as long as what is left; an empty tensor has none. After all work of the
// tensors' device. The same values on the CPU and on a GPU.
std::vector<std::uint64_t> piece_checksums(std::span<const TensorView> tensors);

}  // namespace lockstep::ops
