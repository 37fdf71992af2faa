"""FlashAttention-2 through torch on the shapes of attention_bench: causal forward and backward, BF16.

FLOP as there: visible keys only, backward 2.5 times the forward. Prints one line a shape."""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_seconds(run, samples=9, inner=2):
    for _ in range(4):
        run()
    times = []
    for _ in range(samples):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / inner)
    return statistics.median(times)


def measure(batch, length, heads, kv_heads, width):
    def tensor(count):
        return torch.randn(batch, length, count, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = (tensor(n).detach().requires_grad_() for n in (heads, kv_heads, kv_heads))
    d_out = tensor(heads)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        def attend():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

        out = attend()
        forward = median_seconds(attend)
        backward = median_seconds(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
    flop = length * (length + 1) / 2 * batch * heads * 4 * width
    return flop / forward * 1e-12, 2.5 * flop / backward * 1e-12


print(torch.__version__, torch.cuda.get_device_name())
for shape in [(2, 8192, 32, 32, 128), (2, 8192, 32, 4, 128), (8, 2048, 32, 4, 128), (16, 1024, 32, 4, 128),
              (4, 4096, 32, 32, 64)]:
    forward, backward = measure(*shape)
    print("b %d s %d H %d J %d d %d: forward %.1f backward %.1f TFLOPS" % (*shape, forward, backward))
