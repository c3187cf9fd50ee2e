#!/usr/bin/env python3
"""Golden training runs of two toys, by PyTorch in float64: losses, gradient norms, the gradients of the first step, the weights
after 20 AdamW steps. `python3 make_train.py DIRECTORY` (needs torch and numpy) writes gpt2.run and llama.run there, and the same with attention
inside the documents of a window: gpt2-documents.run (positions begin anew with each) and llama-documents.run.

Written from the papers and NUMERICS alone: models, order of samples (Philox, Feistel), schedule and first weights are implemented
here a second time. Files: little-endian; f64 losses[20], f64 norms[20], then f32 gradients and f32 weights, tensors in canonical
order, row-major."""
import math
import sys

import numpy
import torch

STEPS = 20
MASK = (1 << 64) - 1


class Numbers:
    """SplitMix64."""

    def __init__(self, state):
        self.state = state

    def u64(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        return z ^ z >> 31

    def uniform(self, low, high):
        return low + (high - low) * ((self.u64() >> 11) * 2.0**-53)


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def window_of(seed, sample, n):
    epoch, half = sample // n, 1
    while 1 << 2 * half < n:
        half += 1
    mask, x = (1 << half) - 1, sample % n
    while True:
        left, right = x >> half, x & mask
        for r in range(6):
            word = philox([right, epoch & 0xFFFFFFFF, epoch >> 32, r], [seed & 0xFFFFFFFF, seed >> 32])[0]
            left, right = right, left ^ (word & mask)
        x = left << half | right
        if x < n:
            return x


def tensors(c):
    """Canonical order: name, shape, is it a norm's weight."""
    w, f, q, kv = c["width"], c["ffn"], c["width"], c["width"] // c["heads"] * c["kv_heads"]
    out = [("embd", (c["vocabulary"], w))]
    if c["family"] == "gpt2":
        out.append(("position", (c["context"], w)))
    for l in range(c["layers"]):
        if c["family"] == "gpt2":
            layer = [("attn_norm", (w,)), ("attn_norm_bias", (w,)), ("q", (q, w)), ("k", (kv, w)), ("v", (kv, w)), ("q_bias", (q,)),
                     ("k_bias", (kv,)), ("v_bias", (kv,)), ("out", (w, q)), ("out_bias", (w,)), ("ffn_norm", (w,)),
                     ("ffn_norm_bias", (w,)), ("up", (f, w)), ("up_bias", (f,)), ("down", (w, f)), ("down_bias", (w,))]
        else:
            layer = [("attn_norm", (w,)), ("q", (q, w)), ("k", (kv, w)), ("v", (kv, w)), ("out", (w, q)), ("ffn_norm", (w,)),
                     ("gate", (f, w)), ("up", (f, w)), ("down", (w, f))]
        out += [(f"{l}.{name}", shape) for name, shape in layer]
    out.append(("output_norm", (w,)))
    if c["family"] == "gpt2":
        out.append(("output_norm_bias", (w,)))
    if c["untied"]:
        out.append(("output", (c["vocabulary"], w)))
    return out


def first_weights(c):
    numbers, weights = Numbers(c["seed"]), {}
    for name, shape in tensors(c):
        centre = 1.0 if name.endswith("_norm") else 0.0
        spread = c.get("spread", 0.25)
        values = [centre + numbers.uniform(-spread, spread) for _ in range(math.prod(shape))]
        exact = numpy.array(values, dtype=numpy.float32).astype(numpy.float64).reshape(shape)
        weights[name] = torch.tensor(exact, requires_grad=True)
    return weights


def rotate(x):
    """x [batch, heads, length, head size]: pairs (2i, 2i + 1) turn by position * base^(-2i / size)."""
    size, length = x.shape[-1], x.shape[-2]
    angle = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], size // 2, 2).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).reshape(x.shape).to(x.dtype)


def rms(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


def logits_of(c, p, tokens, begins):
    """begins [batch, length]: where the document of each position begins."""
    batch, length = tokens.shape
    at = torch.arange(length)
    visible = (at[None, None, :] <= at[None, :, None]) & (at[None, None, :] >= begins[:, :, None])
    size, gpt2 = c["width"] // c["heads"], c["family"] == "gpt2"
    x = torch.nn.functional.embedding(tokens, p["embd"])
    if gpt2:
        x = x + p["position"][at - begins]

    def norm(y, name):
        return torch.nn.functional.layer_norm(y, (c["width"],), p[name], p[name + "_bias"], 1e-5) if gpt2 else rms(y, p[name])

    def linear(y, name):
        return torch.nn.functional.linear(y, p[name], p.get(name + "_bias"))

    for l in range(c["layers"]):
        h = norm(x, f"{l}.attn_norm")
        q = linear(h, f"{l}.q").view(batch, length, c["heads"], size).transpose(1, 2)
        k = linear(h, f"{l}.k").view(batch, length, c["kv_heads"], size).transpose(1, 2)
        v = linear(h, f"{l}.v").view(batch, length, c["kv_heads"], size).transpose(1, 2)
        if not gpt2:
            q, k = rotate(q), rotate(k)
        group = c["heads"] // c["kv_heads"]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        x = x + linear(a.transpose(1, 2).reshape(batch, length, c["width"]), f"{l}.out")
        h = norm(x, f"{l}.ffn_norm")
        if gpt2:
            h = torch.nn.functional.gelu(linear(h, f"{l}.up"), approximate="tanh")
        else:
            h = torch.nn.functional.silu(linear(h, f"{l}.gate")) * linear(h, f"{l}.up")
        x = x + linear(h, f"{l}.down")
    return torch.nn.functional.linear(norm(x, "output_norm"), p["output"] if c["untied"] else p["embd"])


def rate_of(step, rate=3e-3, warmup=5, floor=3e-4):
    if step < warmup:
        return rate * (step + 1) / warmup
    return floor + (rate - floor) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def run(c, path, documents):
    p = first_weights(c)
    numbers = Numbers(c["seed"] + 1)
    n_ids = c["length"] * 40 + 7
    ids = torch.tensor([numbers.u64() % c["vocabulary"] for _ in range(n_ids)])
    windows = (n_ids - 1) // c["length"]
    numbers = Numbers(c["seed"] + 2)
    new = [documents and numbers.u64() % 6 == 0 for _ in range(n_ids)]

    def begins_of(a):
        begins = [0]
        for i in range(1, c["length"]):
            begins.append(i if new[a + i] else begins[-1])
        return torch.tensor(begins)

    groups = [{"params": [x for x in p.values() if x.dim() > 1], "weight_decay": 0.1},
              {"params": [x for x in p.values() if x.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=c["eps"])
    losses, norms, gradients = [], [], None
    for step in range(STEPS):
        at = [window_of(c["order"], step * c["sequences"] + i, windows) * c["length"] for i in range(c["sequences"])]
        tokens = torch.stack([ids[a:a + c["length"]] for a in at])
        targets = torch.stack([ids[a + 1:a + 1 + c["length"]] for a in at])
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits_of(c, p, tokens, torch.stack([begins_of(a) for a in at])).flatten(0, 1), targets.flatten())
        loss.backward()
        if step == 0:
            gradients = [x.grad.clone() for x in p.values()]
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(p.values()), c["clip"])))
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        optimizer.step()
    with open(path, "wb") as out:
        numpy.array(losses, dtype="<f8").tofile(out)
        numpy.array(norms, dtype="<f8").tofile(out)
        for values in (gradients, [x.detach() for x in p.values()]):
            for x in values:
                x.numpy().astype("<f4").tofile(out)
    print(path, losses[0], losses[-1], norms[0], norms[-1])


GPT2 = dict(family="gpt2", layers=2, width=16, heads=4, kv_heads=4, ffn=40, vocabulary=1030, context=24, untied=False, length=20,
            sequences=6, seed=11, order=5, clip=0.5, eps=1e-5)
LLAMA = dict(family="llama", layers=2, width=16, heads=4, kv_heads=2, ffn=72, vocabulary=1030, context=40, untied=True, length=37,
             sequences=5, seed=12, order=1 << 40 | 9, clip=0.5, eps=1e-5)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for documents in (False, True):
        run(GPT2, f"{sys.argv[1]}/gpt2{'-documents' * documents}.run", documents)
        run(LLAMA, f"{sys.argv[1]}/llama{'-documents' * documents}.run", documents)
