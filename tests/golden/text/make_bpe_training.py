#!/usr/bin/env python3
"""Golden data of BPE training: the merges that the tokenizers package (Hugging Face) learns from texts that this script makes.

usage: python3 -m venv V && V/bin/pip install tokenizers && V/bin/python make_bpe_training.py .      (writes bpe-train-*.json)

Of equally frequent pairs both sides take the one with the lowest ids; with the bytes in the order of their characters and nothing before them, ids are the
same on both sides, so merges must be equal one by one.
"""
import json
import random
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def words_text(seed, n):
    r = random.Random(seed)
    stems = ["".join(r.choice("abcdeilmnorst") for _ in range(r.randint(1, 7))) for _ in range(60)]
    out = []
    for _ in range(n):
        word = r.choice(stems) + r.choice(["", "", "s", "ing", "ed", "'s", "er"])
        out.append(word.capitalize() if r.random() < 0.1 else word)
        out.append(r.choice([" "] * 12 + [", ", ". ", "\n", "\n\n", "  ", " - ", "! ", "\t"]))
        if r.random() < 0.05:
            out.append(str(r.randint(0, 2000)) + " ")
    return "".join(out)


TEXTS = {
    "words": (words_text(1, 1500), 600),
    "scripts": ("Größe naïve façade — 你好,世界 你好 世界 😀😀 мир мир мира Ελλάδα ελλάδα नमस्ते नमस्ते 12 12 123\n" * 3 + words_text(2, 200), 420),
    "repeats": ("aaaa aaaaa aaaaaaa abababab bababa abcabcabc " * 4 + "zz zzz zzzz\n\n\n\n    x    x\r\n\r\n", 300),
    "small": ("to be or not to be", 400),
    "none": ("abc", 300),
}


def main():
    for name, (text, size) in TEXTS.items():
        t = Tokenizer(models.BPE())
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(vocab_size=size - 1, min_frequency=2, show_progress=False, special_tokens=[],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        t.train_from_iterator([text], trainer)
        model = json.loads(t.to_str())["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        vocab = sorted(model["vocab"], key=model["vocab"].get)
        golden = {"text": text, "size": size, "merges": merges, "tokens": vocab, "ids": t.encode(text).ids}
        with open(f"{sys.argv[1]}/bpe-train-{name}.json", "w") as file:
            json.dump(golden, file, ensure_ascii=True, indent=None)
            file.write("\n")


main()
