// Weights on disk: a folder in Hugging Face's layout (config.json, generation_config.json,
// model.safetensors or shards with model.safetensors.index.json, tokenizer.json).
#pragma once

#include <filesystem>

#include "model/tokenizer.h"
#include "model/weights.h"

namespace lockstep::model {

// Tensors are BF16, or F32 and F16 that are rounded to BF16 (nearest, ties to even). The files must
// hold exactly the tensors of the config: a missing, additional, misshaped or otherwise typed
// tensor, one with a NaN or an infinity (after rounding), a shard outside of the folder, or a shard
// that disagrees with the index is an InputError naming file and tensor. Two may be there or not:
// with tied embeddings a lm_head.weight with the embedding's bytes, and a selection bias of the
// routers (model.layers.N.mlp.gate.e_score_correction_bias, F32, all layers or none), which is
// written when it is not zero. Nothing is allocated before all headers have passed.
Weights load_checkpoint(const std::filesystem::path& folder);

// Writes the folder whole or not at all: a temporary folder beside it, then one rename. An existing
// folder is exchanged in one step, and must hold nothing but files of a checkpoint written here
// (else InputError: nothing of the user's is deleted). The tokenizer may be null. The bytes depend
// on the weights alone, so load and save give the same file.
void save_checkpoint(const Weights& weights, const Tokenizer* tokenizer,
                     const std::filesystem::path& folder);

}  // namespace lockstep::model
