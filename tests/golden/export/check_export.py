#!/usr/bin/env python3
"""Holds exported models to the packages of others: a Hugging Face directory goes through weft to a directory, to GGUF and back to a directory, and transformers
must compute the same logits (float64) from the first and the last; GGUF files of every type, read by the gguf package, must hold the weights within the step of
their type.

usage: python3 -m venv V && V/bin/pip install torch transformers gguf && V/bin/python check_export.py WEFT [MODEL...]

WEFT: the built program. MODEL: checkpoints, directories or GGUF files; without one, a GPT-2 and a Llama of random weights are made by transformers first.
Not part of the suite: the packages take gigabytes. Prints one line a comparison and ends with 1 if one fails.
"""
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

failed = 0


def report(name, ok, what):
    global failed
    failed += not ok
    print(f"{'ok' if ok else 'NOT OK'} {name}: {what}")


def weft(*words):
    subprocess.run([*map(str, words), "-q"], check=True, stdout=subprocess.DEVNULL)


def logits(path, ids):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double().eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def tensors(path):
    return {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in GGUFReader(path).tensors}


def make_models(folder):
    torch.manual_seed(1)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=32, vocab_size=300))
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
                                         vocab_size=300, max_position_embeddings=64, rope_theta=50000.0))
    for name, model in (("gpt2", gpt2), ("llama", llama)):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        model.save_pretrained(folder / name)
        yield folder / name


def check_model(program, source, folder):
    name, ids = pathlib.Path(source).name, [5, 17, 200, 3, 99, 42, 7, 250]
    weft(program, "export", source, folder / "hf")
    weft(program, "export", folder / "hf", folder / "f32.gguf", "--type", "f32")
    weft(program, "export", folder / "f32.gguf", folder / "again")
    got = logits(folder / "again", ids)
    want = logits(source, ids) if (pathlib.Path(source) / "config.json").exists() else logits(folder / "hf", ids)
    worst = np.abs(got - want).max() / np.abs(want).max()
    report(name, worst < 1e-6, f"logits after directory, GGUF, directory differ by {worst:.1e} (relative)")
    plain = tensors(folder / "f32.gguf")
    for kind, step in (("f16", 2.0**-11), ("bf16", 2.0**-8), ("q8_0", 1 / 254), ("q4_0", 1 / 8), ("q4_1", 1 / 15)):
        weft(program, "quantize", folder / "f32.gguf", folder / f"{kind}.gguf", kind)
        other = tensors(folder / f"{kind}.gguf")
        worst = max(np.abs(other[n] - plain[n]).max() / np.abs(plain[n]).max() for n in plain)
        report(name, set(other) == set(plain) and worst <= step * 1.05, f"{kind}: worst error {worst:.4f} of the largest weight")


def main():
    with tempfile.TemporaryDirectory() as top:
        top = pathlib.Path(top)
        sources = sys.argv[2:] or list(make_models(top))
        for i, source in enumerate(sources):
            folder = top / f"work-{i}"
            folder.mkdir()
            check_model(sys.argv[1], source, folder)
    sys.exit(failed > 0)


main()
