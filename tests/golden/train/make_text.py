#!/usr/bin/env python3
"""Losses of the first 200 steps on a real text, by PyTorch in f32 and under bf16 autocast: `python3 make_text.py DIRECTORY` (needs torch
and numpy) writes gpt2.losses and llama.losses there: little-endian f64 f32_losses[200], bf16_losses[200]. The text is Debian's GPL-3
(base-files), a token a byte. Models, order of samples and schedule: make_train.py."""
import hashlib
import sys

import numpy
import torch

import make_train

STEPS = 200
TEXT = "/usr/share/common-licenses/GPL-3"
DIGEST = "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986"
SHAPE = dict(layers=2, width=64, heads=4, ffn=256, vocabulary=256, context=64, untied=False, length=64, sequences=8, spread=0.05)
MODELS = [dict(SHAPE, family="gpt2", kv_heads=4, seed=21, order=7), dict(SHAPE, family="llama", kv_heads=2, seed=22, order=8)]


def losses(c, ids, bf16):
    make_train.STEPS = STEPS
    p = {name: x.detach().float().requires_grad_() for name, x in make_train.first_weights(c).items()}
    windows = (len(ids) - 1) // c["length"]
    groups = [{"params": [x for x in p.values() if x.dim() > 1], "weight_decay": 0.1},
              {"params": [x for x in p.values() if x.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    out = []
    for step in range(STEPS):
        at = [make_train.window_of(c["order"], step * c["sequences"] + i, windows) * c["length"] for i in range(c["sequences"])]
        tokens = torch.stack([ids[a:a + c["length"]] for a in at])
        targets = torch.stack([ids[a + 1:a + 1 + c["length"]] for a in at])
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = make_train.logits_of(c, p, tokens)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
        out.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = make_train.rate_of(step, 1e-3, 10, 1e-4)
        optimizer.step()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = open(TEXT, "rb").read()
    assert hashlib.sha256(text).hexdigest() == DIGEST, "another text"
    ids = torch.tensor(list(text))
    for c in MODELS:
        runs = [losses(c, ids, False), losses(c, ids, True)]
        numpy.array(runs, dtype="<f8").tofile(f"{sys.argv[1]}/{c['family']}.losses")
        apart = max(abs(a - b) for a, b in zip(*runs))
        print(c["family"], runs[0][0], runs[0][-1], runs[1][-1], "apart", apart)
