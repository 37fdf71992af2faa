#!/usr/bin/env python3
"""Golden checkpoints of tests/data/hf that hold options beyond the plain families, with PyTorch in FP32 on a CPU.

  hf.py FOLDER [NAME...]     writes FOLDER/NAME/{config.json, generation_config.json, model, reference, gradients}.safetensors

Written with torch 2.11.0 and transformers 5.17.0 (python3 -m venv venv; pip install torch transformers safetensors).
Weights are random, rounded to BF16, and computed with in FP32; rotary frequencies are those that transformers computes.
What the files hold: tests/data/hf/README.md.
"""
import json
import os
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

ROWS, LENGTH, NEW = 3, 24, 24
COMMON = dict(vocab_size=150, hidden_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
CASES = {
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=24, intermediate_size=100, attention_bias=True, rope_parameters=YARN),
    "llama": lambda: LlamaConfig(**COMMON, intermediate_size=90, tie_word_embeddings=True, attention_bias=True,
                                 rope_parameters=LLAMA3),
    "llama_plain": lambda: LlamaConfig(**{**COMMON, "num_key_value_heads": 4}, intermediate_size=90, rope_parameters=PLAIN),
    "qwen2": lambda: Qwen2Config(**COMMON, intermediate_size=100, tie_word_embeddings=True, rope_parameters=PLAIN),
    "qwen3_moe_mixed": lambda: Qwen3MoeConfig(**{**COMMON, "num_hidden_layers": 3}, head_dim=16, num_experts=5,
                                              num_experts_per_tok=3, moe_intermediate_size=20, intermediate_size=70,
                                              mlp_only_layers=[1], decoder_sparse_step=1, norm_topk_prob=True,
                                              tie_word_embeddings=True, rope_parameters=PLAIN),
    "qwen3_moe_step": lambda: Qwen3MoeConfig(**COMMON, head_dim=16, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24,
                                             intermediate_size=70, decoder_sparse_step=2, norm_topk_prob=False,
                                             attention_bias=True, rope_parameters=PLAIN),
    "mixtral_tied": lambda: MixtralConfig(**COMMON, num_local_experts=5, num_experts_per_tok=3, intermediate_size=24,
                                          tie_word_embeddings=True, sliding_window=None, rope_parameters=PLAIN),
    "olmoe_clip": lambda: OlmoeConfig(**COMMON, num_experts=5, num_experts_per_tok=3, intermediate_size=24, clip_qkv=0.75,
                                      attention_bias=True, norm_topk_prob=False, rope_parameters=PLAIN),
}


def checkpoint_tensors(model):
    """The model's tensors under their names in a file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(os.path.join(folder, "model.safetensors"))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def write(name, folder):
    torch.manual_seed(sum(map(ord, name)))
    config = CASES[name]()
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for key, p in model.named_parameters():
        with torch.no_grad():
            if key.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            elif key.endswith(".bias"):
                p.normal_(0, 0.3)
            else:
                p.normal_(0, 0.1)
            p.copy_(p.to(torch.bfloat16).float())
    ids = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    out = {"input_ids": ids, "inverse_frequencies": model.model.rotary_emb.inv_freq.float().clone()}
    with torch.no_grad():
        out["logits_fp32"] = model(input_ids=ids, use_cache=False).logits
        tokens = ids[:1]
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        out["greedy"] = tokens[0]
    loss = loss_of(model, ids)
    loss.backward()
    out["loss"] = loss.detach().reshape(1)
    for key, p in model.named_parameters():
        out["grad_norm/" + key.removesuffix(".weight") if ".experts." in key else "grad_norm/" + key] = p.grad.norm().reshape(1)

    path = os.path.join(folder, name)
    os.makedirs(path, exist_ok=True)
    # Two copies of the values: the gradients in place of the weights give each its name in a file.
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.copy_(p.grad)
    gradients = {k: v.to(torch.bfloat16) for k, v in checkpoint_tensors(model).items()}
    with torch.no_grad():
        for k, p in model.named_parameters():
            p.copy_(weights[k])
    tensors = {k: v.to(torch.bfloat16) for k, v in checkpoint_tensors(model).items()}
    save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    save_file(gradients, os.path.join(path, "gradients.safetensors"))
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(path)
    model.generation_config.save_pretrained(path)

    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out["adamw_losses"] = torch.tensor(losses)
    save_file({k: v.contiguous() for k, v in out.items()}, os.path.join(path, "reference.safetensors"))
    sizes = {f: os.path.getsize(os.path.join(path, f)) for f in sorted(os.listdir(path))}
    print(name, json.dumps(sizes), f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def main(arguments):
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for name in arguments[1:] or CASES:
        write(name, arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
