#!/usr/bin/env python3
"""Golden logits. Reference: logits_reference.py, float64.

usage: make_logits.py MAKE_TINY_MODEL OUT_DIR [MODEL.gguf ...]     needs: numpy (tokenizers and gguf for MODEL files; with gguf, dequantisation is checked against it)

Writes
  NAME.logits   for each tiny model that MAKE_TINY_MODEL (built from make_tiny_model.c) writes. Little-endian: "WEFTGOLD"; SHA-256 of the model file; u32 tokens, rows,
                vocabulary, sets; u32 ids[tokens]; u32 position[rows]; f32 logits[sets][rows][vocabulary]. Set 0: no rounding. Set 1, where the definition rounds
                anything: activations and cache rounded as it says.
  FILE.top      for each MODEL: its SHA-256, then per real text a line "text" with ids, and per scored position a line "row" with position, log-sum-exp, and the 20
                greatest logits as id:value, without rounding. (With 30 layers of 8-bit activations the first quant that falls to its neighbour moves all later
                ones: two roundings of the same model lie no nearer to each other than to the exact one.)
"""
import hashlib
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import logits_reference as ref

N_TOKENS = 72             # more than two blocks of 32 keys
ROWS = [0, 1, 30, 32, 71]  # a lone token, the ends of a block, an unfinished block
TOP = 20
TEXTS = [
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nThe sky appears blue because of a phenomenon called Rayleigh scattering. When sunlight "
    "enters the Earth's atmosphere, it collides with the molecules of the air, and the shorter wavelengths of light, which are blue, are scattered",
]


def check_dequantise():
    """Against a second implementation, where it is installed."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        return
    rng = np.random.default_rng(3)
    for label, block, size in ref.TYPES.values():
        raw = rng.integers(0, 256, (64, size), dtype=np.uint8)
        if block > 1:
            for at in {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(label, [0]):
                raw[:, at:at + 2] = rng.uniform(-1, 1, (64, 1)).astype("<f2").view(np.uint8)
            other = quants.dequantize(raw, GGMLQuantizationType[label]).astype(np.float64)
            assert np.allclose(ref.dequantise(label, raw).reshape(other.shape), other, rtol=1e-6, atol=1e-5), label


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).digest()


def write_tiny(out, path, name, cache):
    model = ref.open_model(path)
    vocabulary = model.file.tensors["token_embd.weight"][1][1]
    ids = np.random.default_rng(len(name) + vocabulary).integers(0, vocabulary, N_TOKENS)
    sets = [ref.Exact()]
    kinds = {model.file.type_of(t) for t in model.file.tensors}
    if cache != "f32" or not kinds <= {"F32", "F16"}:
        sets.append(ref.Rounding(cache))
    logits = [model.logits(ids, ROWS, s) for s in sets]
    with open(os.path.join(out, name + ".logits"), "wb") as file:
        file.write(b"WEFTGOLD" + sha256(path) + struct.pack("<4I", N_TOKENS, len(ROWS), vocabulary, len(sets)))
        file.write(ids.astype("<u4").tobytes() + np.array(ROWS, "<u4").tobytes() + np.array(logits).astype("<f4").tobytes())


def tokenizer_of(model):
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "text"))
    import make_tokenizer
    return make_tokenizer.encoder(model.file.path)


def write_real(out, path):
    model = ref.open_model(path)
    encode = tokenizer_of(model)
    with open(os.path.join(out, os.path.basename(path).removesuffix(".gguf") + ".top"), "w") as file:
        file.write(f"sha256 {sha256(path).hex()}\n")
        for text in TEXTS:
            ids = encode(text.encode())
            rows = sorted({0, len(ids) // 3, 2 * len(ids) // 3, len(ids) - 1})
            file.write("text " + " ".join(map(str, ids)) + "\n")
            for row, z in zip(rows, model.logits(ids, rows, ref.Exact())):
                top = np.argsort(-z, kind="stable")[:TOP]
                lse = z.max() + np.log(np.exp(z - z.max()).sum())
                file.write(f"row {row} {lse:.9g} " + " ".join(f"{i}:{z[i]:.9g}" for i in top) + "\n")


def main():
    make_tiny_model, out = sys.argv[1:3]
    check_dequantise()
    with tempfile.TemporaryDirectory() as folder:
        listing = subprocess.run([make_tiny_model, folder], check=True, capture_output=True, text=True).stdout
        for name, cache in (line.split() for line in listing.splitlines()):
            write_tiny(out, os.path.join(folder, name + ".gguf"), name, cache)
    for path in sys.argv[3:]:
        write_real(out, path)


if __name__ == "__main__":
    main()
