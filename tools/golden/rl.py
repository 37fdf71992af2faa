#!/usr/bin/env python3
"""Golden values of tests/rl, in float64 and plain Python, written from the published formulas and not from
src/rl. Usage: tools/golden/rl.py > tests/data/rl/golden.json"""
import json
import math
import random
import statistics
import struct

EPS = 1e-8


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def sequences():
    rng = random.Random(20261122)
    out = []
    for i, (prompt, response) in enumerate([(2, 5), (3, 1), (1, 7), (2, 0), (2, 4)]):
        n = prompt + response
        mask = [0.0] * prompt + [1.0] * response
        if i == 2:
            mask[4] = 0.0  # a token in the middle that is not trained on
        gen = [f32(-rng.uniform(0.05, 4)) if k >= prompt else 0.0 for k in range(n)]
        prev = [f32(g + rng.gauss(0, 0.15)) if k >= prompt else 0.0 for k, g in enumerate(gen)]
        curr = [f32(p + rng.gauss(0, 0.35)) if k >= prompt else 0.0 for k, p in enumerate(prev)]
        ref = [f32(p + rng.gauss(0, 0.5)) if k >= prompt else 0.0 for k, p in enumerate(prev)]
        a = f32(rng.choice([-1, 1]) * rng.uniform(0.3, 1.7))
        out.append(dict(loss_mask=mask, generation_logprobs=gen, prev_logprobs=prev, curr_logprobs=curr,
                        reference_logprobs=ref, advantages=[a if m else 0.0 for m in mask],
                        sample_mask=0.0 if i == 4 else 1.0))
    return out


def clamp(x, lo, hi):
    return max(lo, min(hi, x))


def weight(log_w):
    try:
        w = math.exp(log_w)
    except OverflowError:
        return 0.0
    return w if w <= 3.4028234663852886e38 else 0.0


def loss(seqs, c):
    tokens = sum(m * s["sample_mask"] for s in seqs for m in s["loss_mask"][1:])
    nseq = sum(s["sample_mask"] for s in seqs)
    total = kl_total = oob = ratio_sum = 0.0
    for s in seqs:
        if s["sample_mask"] == 0:
            continue
        idx = [t for t in range(1, len(s["loss_mask"])) if s["loss_mask"][t]]
        cur, gen, ref, adv = (s[k] for k in ("curr_logprobs", "generation_logprobs", "reference_logprobs", "advantages"))
        prev = cur if c.get("force_on_policy_ratio") else s["prev_logprobs"]
        n = len(idx)
        seq_level = c.get("sequence_level_importance_ratios", False)
        w = {t: 1.0 for t in idx}
        if c.get("use_importance_sampling_correction"):
            w = {t: weight(prev[t] - gen[t]) for t in idx}
            if seq_level:
                one = weight(sum(prev[t] - gen[t] for t in idx))
                w = {t: one for t in idx}
            kind = c.get("truncated_importance_sampling_type", "off")
            hi = c.get("truncated_importance_sampling_ratio")
            lo = c.get("truncated_importance_sampling_ratio_min", 0.0)
            if kind == "tis":
                oob += sum(not lo <= w[t] <= hi for t in idx)
                w = {t: clamp(w[t], lo, hi) for t in idx}
            elif kind == "icepop":
                oob += sum(not lo <= w[t] <= hi for t in idx)
                w = {t: w[t] if lo <= w[t] <= hi else 0.0 for t in idx}
            elif kind == "seq-mask-tis":
                geo = math.exp(sum(prev[t] - gen[t] for t in idx) / (n + EPS))
                if not lo <= geo <= hi:
                    oob += 1
                    w = {t: 0.0 for t in idx}
        seq_ratio = math.exp(sum(cur[t] - prev[t] for t in idx) / (n + EPS)) if seq_level else None
        acc = kl_acc = 0.0
        for t in idx:
            a = adv[t]
            r = seq_ratio if seq_level else math.exp(cur[t] - prev[t])
            rc = clamp(r, 1 - c.get("ratio_clip_min", 0.2), 1 + c.get("ratio_clip_max", 0.2))
            if c.get("disable_ppo_ratio"):
                r = rc = cur[t]
            ratio_sum += r
            if c.get("use_cispo"):
                term = -a * rc * cur[t]
            else:
                term = max(-a * r, -a * rc)
                if c.get("ratio_clip_c") and a < 0:
                    term = min(term, -a * c["ratio_clip_c"])
            y = clamp(ref[t] - cur[t], -c.get("kl_input_clamp_value", 20), c.get("kl_input_clamp_value", 20))
            kl = {"k1": -y, "k2": y * y / 2, "k3": math.exp(y) - 1 - y}[c.get("reference_policy_kl_type", "k3")]
            kl = clamp(kl, -c.get("kl_output_clamp_value", 10), c.get("kl_output_clamp_value", 10))
            acc += w[t] * term + c.get("reference_policy_kl_penalty", 0) * kl
            kl_acc += kl
        agg = c.get("loss_agg", "token-mean")
        share = {"token-mean": 1 / (tokens + EPS), "seq-mean": 1 / (n + EPS) / (nseq + EPS),
                 "seq-sum-const": 1 / c.get("loss_agg_length", 1) / (nseq + EPS)}[agg]
        total += acc * share
        kl_total += kl_acc * share
    by_seq = c.get("truncated_importance_sampling_type") == "seq-mask-tis"
    return dict(loss=total, kl_penalty=kl_total if c.get("reference_policy_kl_penalty") else 0.0,
                is_oob_ratio=oob / ((nseq if by_seq else tokens) + EPS), probs_ratio=ratio_sum / (tokens + EPS))


def mismatch(seqs):
    pairs, per_seq_abs, per_seq_mult, = [], [], []
    for s in seqs:
        if s["sample_mask"] == 0:
            continue
        own = [(s["generation_logprobs"][t], s["prev_logprobs"][t]) for t in range(1, len(s["loss_mask"])) if s["loss_mask"][t]]
        if own:
            per_seq_abs.append(statistics.fmean(abs(p - g) for g, p in own))
            per_seq_mult.append(statistics.fmean(math.exp(abs(p - g)) for g, p in own))
        pairs += own
    mean = lambda f: statistics.fmean(f(g, p) for g, p in pairs)

    def js(g, p):
        m = math.log(0.5 * math.exp(p) + 0.5 * math.exp(g))
        return 0.5 * (math.exp(p - m) - (p - m) - 1) + 0.5 * (math.exp(g - m) - (g - m) - 1)

    diffs = [abs(math.exp(p) - math.exp(g)) for g, p in pairs]
    return dict(token_mult_prob_error=mean(lambda g, p: math.exp(abs(g - p))),
                gen_kl_error=mean(lambda g, p: math.exp(p - g) - (p - g) - 1),
                policy_kl_error=mean(lambda g, p: math.exp(g - p) - (g - p) - 1),
                js_divergence_error=mean(js),
                sampling_importance_ratio=mean(lambda g, p: math.exp(p - g)),
                approx_entropy=-mean(lambda g, p: math.exp(p - g) * p),
                is_oob_ratio=mean(lambda g, p: float(not 0.9 <= math.exp(p - g) <= 1.1)),
                rollout_probs_diff_max=max(diffs), rollout_probs_diff_mean=statistics.fmean(diffs),
                rollout_probs_diff_std=statistics.stdev(diffs),
                train_rollout_logprob_abs_diff=statistics.fmean(per_seq_abs),
                seq_mult_prob_error_mean=statistics.fmean(per_seq_mult), seq_mult_prob_error_max=max(per_seq_mult),
                logprobs_compared=len(pairs), logprobs_different=sum(g != p for g, p in pairs), logprobs_nonfinite=0)


def advantages(rewards, normalize, leave_one_out):
    out = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1:] if leave_one_out else rewards
        if len(rewards) < 2:
            out.append(0.0)
            continue
        std = statistics.stdev(others) if len(others) > 1 else 0.0
        a = r - statistics.fmean(others)
        out.append(a / (std + 1e-6) if normalize and std > 0 else a)
    return out


IS = dict(use_importance_sampling_correction=True)
TIS = "truncated_importance_sampling_type"
HI, LO = "truncated_importance_sampling_ratio", "truncated_importance_sampling_ratio_min"
SEQ = dict(sequence_level_importance_ratios=True, loss_agg="seq-mean")
CONFIGS = {
    "clipped": {},
    "clip_higher": dict(ratio_clip_min=0.2, ratio_clip_max=0.28),
    "dual_clip": dict(ratio_clip_min=0.1, ratio_clip_max=0.1, ratio_clip_c=1.15),
    "seq_mean": dict(loss_agg="seq-mean"),
    "seq_sum_const": dict(loss_agg="seq-sum-const", loss_agg_length=16),
    "gspo": dict(ratio_clip_min=3e-4, ratio_clip_max=4e-4, **SEQ),
    "gspo_wide": dict(ratio_clip_min=0.9, ratio_clip_max=3, **SEQ),
    "gspo_is": dict(ratio_clip_min=0.9, ratio_clip_max=3, **SEQ, **IS),
    "gspo_tis": dict(ratio_clip_min=0.9, ratio_clip_max=3, **SEQ, **IS, **{TIS: "tis", HI: 1.05}),
    "cispo": dict(use_cispo=True, ratio_clip_min=1, ratio_clip_max=0.28),
    "reinforce": dict(disable_ppo_ratio=True),
    "reinforce_is": dict(disable_ppo_ratio=True, **IS),
    "on_policy": dict(force_on_policy_ratio=True),
    "on_policy_is": dict(force_on_policy_ratio=True, **IS),
    "kl_k1": dict(reference_policy_kl_penalty=0.1, reference_policy_kl_type="k1"),
    "kl_k2": dict(reference_policy_kl_penalty=0.1, reference_policy_kl_type="k2"),
    "kl_k3": dict(reference_policy_kl_penalty=0.1, reference_policy_kl_type="k3"),
    "kl_k3_clamped": dict(reference_policy_kl_penalty=0.1, kl_input_clamp_value=0.4, kl_output_clamp_value=0.05),
    "kl_k3_seq_mean": dict(reference_policy_kl_penalty=0.1, loss_agg="seq-mean"),
    "is": IS,
    "tis": dict(**IS, **{TIS: "tis", HI: 1.05}),
    "tis_low": dict(**IS, **{TIS: "tis", HI: 1.05, LO: 0.95}),
    "icepop": dict(**IS, **{TIS: "icepop", HI: 1.1, LO: 0.9}),
    "seq_mask_tis": dict(**IS, **{TIS: "seq-mask-tis", HI: 1.1, LO: 0.9}),
    "all_at_once": dict(ratio_clip_max=0.28, ratio_clip_c=3, reference_policy_kl_penalty=0.05, loss_agg="seq-mean",
                        **IS, **{TIS: "icepop", HI: 1.1, LO: 0.9}),
}
REWARDS = [[1, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [3.5], [1, 0], [0.25, -1, 2, 0.5, 0.5], [1, 0, 0, 0, 0, 0, 0, 0]]

seqs = sequences()
print(json.dumps(dict(
    sequences=seqs,
    loss={name: dict(config=c, **loss(seqs, c)) for name, c in CONFIGS.items()},
    mismatch=mismatch(seqs),
    advantages=[dict(rewards=r, normalize_rewards=n, use_leave_one_out_baseline=l, advantages=advantages(r, n, l))
                for r in REWARDS for n in (True, False) for l in (True, False)]), indent=1))
