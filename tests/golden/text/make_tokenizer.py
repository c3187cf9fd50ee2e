#!/usr/bin/env python3
"""Golden data of the tokenizers. References: the packages `tokenizers` and `sentencepiece`, which are independent implementations.

usage: make_tokenizer.py OUT_DIR [MODEL.gguf ...]     needs: tokenizers, sentencepiece, gguf

Writes
  words-NAME.txt            pre-tokenizer NAME: one line a text, hex bytes, then the byte length of each word
  bpe-NAME.gguf, .ids       a small byte-level BPE vocabulary and ids of texts under it
  spm-NAME.gguf, .ids       the same for SentencePiece
  spm-json-RULE.json, .ids  a SentencePiece vocabulary as tokenizer.json has it, by how spaces are marked; ids by `tokenizers`
  FILE.ids                  ids of texts under each MODEL's own vocabulary
An .ids line: p (special tokens are parsed) or - , hex bytes, ids.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import gguf_write as gw
import texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


STAGES = {
    "gpt-2": [split(GPT2)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), split(GPT2)],
    "llama-bpe": [split(LLAMA3 % r"\p{N}{1,3}")],
    "qwen2": [split(LLAMA3 % r"\p{N}")],
    "deepseek-coder": [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
                       pre_tokenizers.Digits(individual_digits=True)],
    "deepseek-v3": [split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(DEEPSEEK3)],
    "default": [split(r"[\p{P}\$\+<=>\^~\|]+"), split(GPT2), split(r"\p{N}+"), split("[0-9][0-9][0-9]")],
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def char_of_byte():
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    table, extra = {}, 256
    for byte in range(256):
        if byte in keep:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(extra)
            extra += 1
    return table


BYTE_CHAR = char_of_byte()


def write_words(out):
    for name, stages in STAGES.items():
        pre = pre_tokenizers.Sequence(stages)
        with open(os.path.join(out, f"words-{name}.txt"), "w") as file:
            for text in texts.AWKWARD + texts.random_texts(11, 250):
                lengths = [len(word.encode()) for word, _ in pre.pre_tokenize_str(text)] if text else []
                file.write(f"{text.encode().hex()} {' '.join(map(str, lengths))}\n")


def reference(name, vocab, merges, control, user_defined):
    """(tokenizer that parses special tokens, tokenizer that does not)"""
    made = []
    for parse in (True, False):
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe")
        tok = Tokenizer(model)
        if name == "qwen2":
            tok.normalizer = normalizers.NFC()
        tok.pre_tokenizer = pre_tokenizers.Sequence(STAGES[name] + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tok.decoder = decoders.ByteLevel()
        if parse:
            tok.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in control])
        tok.add_tokens([AddedToken(u, normalized=False) for u in user_defined])
        made.append(tok)
    return made


def encode(tok, vocab, data):
    """Ids of any bytes: well-formed runs by the reference, other bytes by the byte alphabet (missing ones are dropped)."""
    ids, run = [], ""
    for c in data.decode("utf-8", "surrogateescape"):
        if "\udc80" <= c <= "\udcff":
            ids += tok.encode(run, add_special_tokens=False).ids if run else []
            run = ""
            char = BYTE_CHAR[ord(c) - 0xDC00]
            ids += [vocab[char]] if char in vocab else []
        else:
            run += c
    return ids + (tok.encode(run, add_special_tokens=False).ids if run else [])


def write_ids(path, encode_parsed, encode_plain, n_random, longs=True):
    samples = [t.encode() for t in texts.AWKWARD + texts.SPECIAL + texts.random_texts(23, n_random)] + texts.INVALID
    if longs:
        samples += [b"a" * 3000, b"ab" * 1500, b" " * 700, b"\n" * 300, b"9" * 400, "\u4f60\u597d".encode() * 300, b"antidisestablishmentarianism" * 40]
    with open(path, "w") as file:
        for data in samples:
            file.write(f"p {data.hex()} {' '.join(map(str, encode_parsed(data)))}\n")
            if b"<" in data:
                file.write(f"- {data.hex()} {' '.join(map(str, encode_plain(data)))}\n")


def write_bpe(out, name):
    tok = Tokenizer(models.BPE())
    if name == "qwen2":
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(STAGES[name] + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train_from_iterator(texts.corpus(), trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                               special_tokens=CONTROL + ["<file_sep>"], show_progress=False))
    import json
    model = json.loads(tok.to_str())["model"]
    vocab = model["vocab"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if t in CONTROL else 4 if t == "<file_sep>" else 1 for t in tokens]
    gw.write(os.path.join(out, f"bpe-{name}.gguf"), [
        ("general.architecture", gw.STRING, "llama"),
        ("tokenizer.ggml.model", gw.STRING, "gpt2"),
        ("tokenizer.ggml.pre", gw.STRING, name),
        ("tokenizer.ggml.tokens", (gw.ARRAY, gw.STRING), tokens),
        ("tokenizer.ggml.token_type", (gw.ARRAY, gw.I32), kinds),
        ("tokenizer.ggml.merges", (gw.ARRAY, gw.STRING), [f"{a} {b}" for a, b in merges]),
        ("tokenizer.ggml.bos_token_id", gw.U32, vocab["<|im_start|>"]),
        ("tokenizer.ggml.eos_token_id", gw.U32, vocab["<|im_end|>"]),
        ("tokenizer.ggml.add_bos_token", gw.BOOL, False),
    ])
    parsed, plain = reference(name, vocab, merges, CONTROL, ["<file_sep>"])
    write_ids(os.path.join(out, f"bpe-{name}.ids"), lambda d: encode(parsed, vocab, d), lambda d: encode(plain, vocab, d), 60, longs=False)


def real_references(path):
    from gguf import GGUFReader
    fields = GGUFReader(path).fields
    get = lambda key: fields["tokenizer.ggml." + key].contents()
    tokens, kinds = get("tokens"), get("token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [tuple(m.split(" ")) for m in get("merges")]
    control = [t for t, k in zip(tokens, kinds) if k == 3]
    return vocab, *reference(get("pre"), vocab, merges, control, [t for t, k in zip(tokens, kinds) if k == 4])


def encoder(path):
    """From text bytes to ids under the model file's own vocabulary, special tokens parsed."""
    vocab, parsed, _ = real_references(path)
    return lambda data: encode(parsed, vocab, data)


def write_real(out, path):
    vocab, parsed, plain = real_references(path)
    name = os.path.basename(path).removesuffix(".gguf")
    write_ids(os.path.join(out, name + ".ids"), lambda d: encode(parsed, vocab, d), lambda d: encode(plain, vocab, d), 150)


def write_spm(out, name, byte_fallback, unused, dummy_prefix):
    import io
    import sentencepiece as sp
    from sentencepiece import sentencepiece_model_pb2 as pb
    buffer = io.BytesIO()
    lines = [t for t in texts.corpus() if t.strip() and "\u0000" not in t]
    sp.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=buffer, model_type="bpe", vocab_size=700 if byte_fallback else 440,
                                  character_coverage=0.98, byte_fallback=byte_fallback, normalization_rule_name="identity",
                                  remove_extra_whitespaces=False, add_dummy_prefix=dummy_prefix, split_digits=True, minloglevel=2,
                                  allow_whitespace_only_pieces=True, num_threads=1)
    proto = pb.ModelProto()
    proto.ParseFromString(buffer.getvalue())
    if unused:
        normal = [p for p in proto.pieces if p.type == 1 and len(p.piece) > 2]
        for piece in normal[::3]:
            piece.type = 5
    processor = sp.SentencePieceProcessor(model_proto=proto.SerializeToString())
    gw.write(os.path.join(out, f"spm-{name}.gguf"), [
        ("general.architecture", gw.STRING, "llama"),
        ("tokenizer.ggml.model", gw.STRING, "llama"),
        ("tokenizer.ggml.tokens", (gw.ARRAY, gw.STRING), [p.piece for p in proto.pieces]),
        ("tokenizer.ggml.scores", (gw.ARRAY, gw.F32), [p.score for p in proto.pieces]),
        ("tokenizer.ggml.token_type", (gw.ARRAY, gw.I32), [p.type for p in proto.pieces]),
        ("tokenizer.ggml.bos_token_id", gw.U32, 1),
        ("tokenizer.ggml.eos_token_id", gw.U32, 2),
        ("tokenizer.ggml.unknown_token_id", gw.U32, 0),
        ("tokenizer.ggml.add_space_prefix", gw.BOOL, dummy_prefix),
    ])
    with open(os.path.join(out, f"spm-{name}.ids"), "w") as file:
        for text in texts.AWKWARD + texts.random_texts(31, 120) + ["a" * 3000, "ab " * 500, " " * 500, "\u4f60" * 300]:
            if "\u0000" not in text:
                file.write(f"- {text.encode().hex()} {' '.join(map(str, processor.encode(text)))}\n")


SPACE_RULES = {
    "prepend": (normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None),
    "replace": (normalizers.Replace(" ", "\u2581"), None),
    "first": (None, pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)),
}


def write_spm_json(out, rule):
    """As transformers converts SentencePiece's models: a merge for each way to make a piece of two, best piece first."""
    sys.path.insert(0, os.path.dirname(__file__))
    from gguf import GGUFReader
    fields = GGUFReader(os.path.join(out, "spm-bytes.gguf")).fields
    get = lambda key: fields["tokenizer.ggml." + key].contents()
    tokens, scores, kinds = get("tokens"), get("scores"), get("token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    for piece, score in zip(tokens, scores):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(pair, score) for pair in sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges = [pair for pair, _ in sorted(merges, key=lambda merge: -merge[1])]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre = SPACE_RULES[rule]
    if normalizer is not None:
        tok.normalizer = normalizer
    if pre is not None:
        tok.pre_tokenizer = pre
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind in (2, 3)])
    tok.save(os.path.join(out, f"spm-json-{rule}.json"), pretty=False)
    samples = texts.AWKWARD + texts.random_texts(37, 120) + ["a" * 3000, "ab " * 500, " " * 500, "\u4f60" * 300, "</s>after", "before</s> between <s>", "<s> x"]
    with open(os.path.join(out, f"spm-json-{rule}.ids"), "w") as file:
        for text in samples:
            file.write(f"p {text.encode().hex()} {' '.join(map(str, tok.encode(text, add_special_tokens=False).ids))}\n")


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    write_words(out)
    for name in ("gpt-2", "llama-bpe", "qwen2", "deepseek-v3"):
        write_bpe(out, name)
    write_spm(out, "bytes", True, False, True)
    write_spm(out, "unknown", False, False, True)
    write_spm(out, "unused", True, True, False)
    for rule in SPACE_RULES:
        write_spm_json(out, rule)
    for path in sys.argv[2:]:
        write_real(out, path)


if __name__ == "__main__":
    main()
