// The version of docs/numerics.md that this build implements. Checkpoints and trajectories carry
// it.
#pragma once

namespace lockstep::numerics {

inline constexpr int kContractVersion = 1;

inline constexpr int kQuantBlock =
    128;  // section 5: values that share a scale along the contraction
inline constexpr float kE4m3Max = 448.0f;
inline constexpr float kE5m2Max = 57344.0f;
inline constexpr float kScaleFloor = 0x1p-100f;  // section 5: keeps 1/s finite
// Section 4: a tensor-core step aligns its terms to this exponent or a larger one.
inline constexpr int kLowestAlignment = -133;
inline constexpr int kAttentionBlock = 128;   // section 8: keys a block
inline constexpr int kAttentionSplit = 2048;  // section 8: keys a split
inline constexpr int kVocabBlock = 128;       // section 10
inline constexpr int kHeadChunk = 1024;  // section 10: rows a chunk of the head's weight gradient
inline constexpr int kRowBlock = 128;    // section 11: rows a block of a norm weight's gradient
inline constexpr int kNormChunk = 4096;  // section 13

}  // namespace lockstep::numerics
