#!/usr/bin/env python3
"""Golden folders of DeepSeek-V3 variants in tests/data/hf: tiny random checkpoints written by transformers, and what
PyTorch computes for them in FP32 on a CPU. Needs torch, transformers and safetensors.
Usage: tools/golden/deepseek.py tests/data/hf"""
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

COMMON = dict(vocab_size=64, hidden_size=80, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
              kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=40, moe_intermediate_size=40,
              intermediate_size=88, initializer_range=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=0,
              rms_norm_eps=1e-5, dtype="bfloat16")


def yarn(mscale):
    return dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0,
                beta_slow=1.0, mscale=mscale, mscale_all_dim=1.0)


VARIANTS = {
    # Queries without a latent, three of five experts, two shared experts, yarn whose two factors differ.
    "deepseek_v3_no_q_lora": dict(q_lora_rank=None, n_routed_experts=5, num_experts_per_tok=3, n_group=1, topk_group=1,
                                  n_shared_experts=2, first_k_dense_replace=0, max_position_embeddings=128,
                                  rope_parameters=yarn(0.7), routed_scaling_factor=1.5),
    # Rotation of halves, two of three groups, weights not normalised, tied embeddings, a dense first layer.
    "deepseek_v3_halves": dict(q_lora_rank=72, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2,
                               n_shared_experts=1, first_k_dense_replace=1, max_position_embeddings=128,
                               rope_interleave=False, rope_parameters=yarn(1.0), norm_topk_prob=False,
                               tie_word_embeddings=True, routed_scaling_factor=2.5),
}


def make(name, options, folder, seed):
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON, **options)).float().eval()
    with torch.no_grad():
        for key, p in list(model.named_parameters()) + [(k, b) for k, b in model.named_buffers() if "e_score" in k]:
            if "norm" in key:
                p.copy_(1 + 0.1 * torch.randn_like(p))
            elif "e_score" in key:
                p.copy_(0.1 * torch.randn_like(p))
            else:
                p.copy_(0.05 * torch.randn_like(p))
            p.copy_(p.bfloat16().float())  # the checkpoint holds these values
    inverse = model.model.rotary_emb.inv_freq.clone()

    ids = torch.randint(3, COMMON["vocab_size"], (2, 48))
    golden = {"input_ids": ids, "inverse_frequencies": inverse}
    out = model(ids, labels=ids)
    golden["logits_fp32"] = out.logits.detach()
    golden["loss"] = out.loss.detach().reshape(1)
    out.loss.backward()
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    gradients = {}
    for key, p in model.named_parameters():
        golden["grad_norm/" + key] = p.grad.norm().reshape(1)
        gradients[key] = p.grad.clone()
    if options.get("tie_word_embeddings"):
        gradients["lm_head.weight"] = gradients["model.embed_tokens.weight"]

    tokens = ids[:1]
    for _ in range(24):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    golden["greedy"] = tokens

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    golden["adamw_losses"] = torch.tensor(losses)

    # Saved by transformers itself, so that names and layout are its own: the weights, then the gradients in their place.
    for values, file in ((state, "model.safetensors"), ({**state, **gradients}, "gradients.safetensors")):
        model.load_state_dict(values)
        model.to(torch.bfloat16).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        model.float()
        if file != "model.safetensors":
            save_file({k: v for k, v in tensors.items() if "e_score" not in k}, folder / file, metadata={"format": "pt"})
            continue
        kept = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(kept)
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "reference.safetensors")
    print(name, json.dumps(dict(loss=golden["loss"].item(), adamw=losses[-1])))


if __name__ == "__main__":
    for i, (name, options) in enumerate(VARIANTS.items()):
        folder = pathlib.Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        make(name, options, folder, 1000 + i)
