"""Logits of Llama and GPT-2 models in float64: an implementation of its own, from the papers and the description of the file format; it shares no code with weft.

The file: GGUF v2/v3. The forward pass: RMS norm (Zhang and Sennrich 2019), rotary embedding on adjacent pairs (Su et al. 2021) with linear interpolation (Chen et al.
2023), YaRN (Peng et al. 2023) or the file's factors, grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020). GPT-2 (Radford et al. 2019): layer norm
(Ba et al. 2016), learned positions, GELU in its tanh form
(Hendrycks and Gimpel 2016), biases.

`Rounding` repeats in float64 the two roundings that weft's definition prescribes (NUMERICS: activations before a product, keys and values in the cache). What is left between
it and weft is float32 arithmetic alone, so the comparison is a thousand times tighter than with the unrounded numbers.
"""
import struct

import numpy as np

# ---- the file ----

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# ggml type number: (name, elements of a block, bytes of a block)
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
         12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2)}


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, code):
        value, = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self):
        n = self.take("Q")
        self.at += n
        return self.data[self.at - n:self.at].decode("utf-8", "replace")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, n = self.take("I"), self.take("Q")
            return [self.value(kind) for _ in range(n)]
        return self.take(SCALARS[kind])


class File:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.data = file.read()
        r = Reader(self.data)
        assert self.data[:4] == b"GGUF"
        r.at = 4
        assert r.take("I") in (2, 3)
        n_tensors, n_keys = r.take("Q"), r.take("Q")
        self.keys = {}
        for _ in range(n_keys):
            name = r.text()
            self.keys[name] = r.value(r.take("I"))
        self.tensors = {}
        for _ in range(n_tensors):
            name = r.text()
            dims = [r.take("Q") for _ in range(r.take("I"))]
            self.tensors[name] = (r.take("I"), dims, r.take("Q"))
        alignment = self.keys.get("general.alignment", 32)
        self.start = (r.at + alignment - 1) // alignment * alignment

    def type_of(self, name):
        return TYPES[self.tensors[name][0]][0]

    def tensor(self, name):
        """float64, rows x columns (1-D: columns); None when the file has none of that name."""
        if name not in self.tensors:
            return None
        kind, dims, offset = self.tensors[name]
        label, block, size = TYPES[kind]
        n = int(np.prod(dims))
        raw = np.frombuffer(self.data, np.uint8, n // block * size, self.start + offset)
        values = dequantise(label, raw.reshape(-1, size)).reshape(-1)
        return values.reshape(dims[1], dims[0]) if len(dims) > 1 else values


# ---- block types: raw is blocks x bytes ----

def half(raw, at):
    """The f16 at byte `at` of every block, as a column of float64."""
    return np.ascontiguousarray(raw[:, at:at + 2]).view("<f2").astype(np.float64)


def nibbles(q):
    """Low nibbles of all bytes, then the high ones."""
    return np.concatenate([q & 15, q >> 4], axis=-1)


def fifth_bits(raw, at):
    word = np.ascontiguousarray(raw[:, at:at + 4]).view("<u4")
    return (word >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8) << 4


def six_bit_scales(raw):
    """Eight scales and eight minimums in the 12 bytes at 4: the first four of each in the low six bits of bytes 0-3 and 4-7; the other four have their low nibble in
    bytes 8-11 and their upper two bits on top of the first ones."""
    s = raw[:, 4:16]
    scales = np.concatenate([s[:, 0:4] & 63, s[:, 8:12] & 15 | s[:, 0:4] >> 6 << 4], axis=1)
    least = np.concatenate([s[:, 4:8] & 63, s[:, 8:12] >> 4 | s[:, 4:8] >> 6 << 4], axis=1)
    return scales.astype(np.float64), least.astype(np.float64)


def dequantise_k(raw, has_fifth):
    scales, least = six_bit_scales(raw)
    q = raw[:, 48:176] if has_fifth else raw[:, 16:144]
    values = nibbles(q.reshape(-1, 4, 32)).reshape(-1, 8, 32)  # 64 values from 32 bytes: low nibbles are the first half
    if has_fifth:
        bits = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        values = values | bits << 4
    d, dmin = half(raw, 0), half(raw, 2)
    return (d * scales)[:, :, None] * values - (dmin * least)[:, :, None]


def dequantise_q6_k(raw):
    low = raw[:, :128].reshape(-1, 2, 2, 32)  # half of the block, which 32 bytes, byte
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    quarter = np.concatenate([low & 15, low >> 4], axis=2)  # quarters of each half: low, low, high, high
    q = (quarter | high << 4).reshape(-1, 256).astype(np.float64) - 32
    scales = np.repeat(raw[:, 192:208].view(np.int8).astype(np.float64), 16, axis=1)
    return half(raw, 208) * scales * q


def dequantise(label, raw):
    if label == "F32":
        return np.ascontiguousarray(raw).view("<f4").astype(np.float64)
    if label == "F16":
        return np.ascontiguousarray(raw).view("<f2").astype(np.float64)
    if label == "BF16":
        return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if label == "Q8_0":
        return half(raw, 0) * raw[:, 2:].view(np.int8)
    if label == "Q4_0":
        return half(raw, 0) * (nibbles(raw[:, 2:]).astype(np.float64) - 8)
    if label == "Q4_1":
        return half(raw, 0) * nibbles(raw[:, 4:]) + half(raw, 2)
    if label == "Q5_0":
        return half(raw, 0) * ((nibbles(raw[:, 6:]) | fifth_bits(raw, 2)).astype(np.float64) - 16)
    if label == "Q5_1":
        return half(raw, 0) * (nibbles(raw[:, 8:]) | fifth_bits(raw, 4)) + half(raw, 2)
    if label in ("Q4_K", "Q5_K"):
        return dequantise_k(raw, label == "Q5_K")
    assert label == "Q6_K"
    return dequantise_q6_k(raw)


# ---- roundings of the definition ----

def to_bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16).view(np.float32).astype(np.float64)


def to_f16(x):
    return x.astype(np.float32).astype(np.float16).astype(np.float64)


def to_q8(x, block):
    f = x.astype(np.float32).reshape(x.shape[0], -1, block)
    amax = np.abs(f).max(axis=2, keepdims=True)
    d, inverse = amax / np.float32(127), np.float32(127) / amax
    return (np.rint(f * inverse).astype(np.float64) * d.astype(np.float64)).reshape(x.shape)


class Exact:
    """No rounding at all."""

    def activations(self, x, weight_type):
        return x

    def cache(self, x):
        return x


class Rounding:
    def __init__(self, cache):
        self.cache = {"f32": lambda x: x.astype(np.float32).astype(np.float64), "f16": to_f16, "bf16": to_bf16}[cache]

    def activations(self, x, weight_type):
        if weight_type in ("F32", "F16"):
            return x
        return to_bf16(x) if weight_type == "BF16" else to_q8(x, 256 if weight_type.endswith("_K") else 32)


# ---- rotary angles ----

def rope(keys, factors, head_size, positions):
    """cos and sin [positions][pairs], the magnitude multiplied in."""
    dims = keys.get("llama.rope.dimension_count", head_size)
    base = float(keys.get("llama.rope.freq_base", 10000.0))
    i = np.arange(dims // 2)
    speed = base ** (-2.0 * i / dims)
    magnitude = 1.0
    scaling = keys.get("llama.rope.scaling.type", "none")
    factor = float(keys.get("llama.rope.scaling.factor", 1.0))
    if factors is not None:
        speed = speed / factors
    elif scaling == "linear":
        speed = speed / factor
    elif scaling == "yarn":
        original = keys["llama.rope.scaling.original_context_length"]
        turns = lambda n: dims * np.log(original / (n * 2 * np.pi)) / (2 * np.log(base))  # the pair that turns n times within the original context
        low = max(np.floor(turns(keys.get("llama.rope.scaling.yarn_beta_fast", 32.0))), 0)
        high = min(np.ceil(turns(keys.get("llama.rope.scaling.yarn_beta_slow", 1.0))), dims - 1)
        keep = 1 - np.clip((i - low) / max(high - low, 0.001), 0, 1)
        speed = speed / factor * (1 - keep) + speed * keep
        magnitude = 0.1 * np.log(factor) + 1.0
    angle = np.outer(positions, speed)
    return np.cos(angle) * magnitude, np.sin(angle) * magnitude


def rotate(x, cos, sin):
    """x [positions][heads][head size]: pairs (0,1), (2,3), ... of the first 2 x pairs elements."""
    out = x.copy()
    n = 2 * cos.shape[1]
    a, b = x[:, :, 0:n:2], x[:, :, 1:n:2]
    out[:, :, 0:n:2] = a * cos[:, None] - b * sin[:, None]
    out[:, :, 1:n:2] = a * sin[:, None] + b * cos[:, None]
    return out


# ---- the model ----

def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def attend(q, k, v):
    """Causal softmax attention; q [positions][heads][head size], k and v [positions][KV heads][head size]."""
    n, heads, size = q.shape
    out = np.empty_like(q)
    later = np.triu(np.ones((n, n), bool), 1)
    for i in range(heads):
        shared = i // (heads // k.shape[1])
        scores = q[:, i] @ k[:, shared].T / np.sqrt(size)
        scores[later] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, i] = p / p.sum(axis=1, keepdims=True) @ v[:, shared]
    return out.reshape(n, -1)


class Model:
    def __init__(self, file):
        self.file = file

    def product(self, x, name, rounding):
        y = rounding.activations(x, self.file.type_of(name + ".weight")) @ self.file.tensor(name + ".weight").T
        bias = self.file.tensor(name + ".bias")
        return y if bias is None else y + bias

    def head_name(self):
        return "output" if "output.weight" in self.file.tensors else "token_embd"


class Llama(Model):
    def __init__(self, file):
        super().__init__(file)
        key = lambda name: self.file.keys["llama." + name]
        self.n_layers, self.width, self.n_heads = key("block_count"), key("embedding_length"), key("attention.head_count")
        self.n_kv = self.file.keys.get("llama.attention.head_count_kv", self.n_heads)
        self.head = self.file.keys.get("llama.attention.key_length", self.width // self.n_heads)
        self.eps = key("attention.layer_norm_rms_epsilon")

    def attention(self, h, block, cos, sin, rounding):
        n = h.shape[0]
        split = lambda name, heads: self.product(h, block + name, rounding).reshape(n, heads, self.head)
        q = rotate(split("attn_q", self.n_heads), cos, sin)
        k = rounding.cache(rotate(split("attn_k", self.n_kv), cos, sin))
        v = rounding.cache(split("attn_v", self.n_kv))
        return self.product(attend(q, k, v), block + "attn_output", rounding)

    def logits(self, ids, rows, rounding):
        """[rows][vocabulary] after each of the positions `rows` of `ids`."""
        norm = lambda x, name: rms_norm(x, self.file.tensor(name + ".weight"), self.eps)
        embedding = self.file.tensor("token_embd.weight")
        x = embedding[ids]
        cos, sin = rope(self.file.keys, self.file.tensor("rope_freqs.weight"), self.head, np.arange(len(ids)))
        for i in range(self.n_layers):
            block = f"blk.{i}."
            x = x + self.attention(norm(x, block + "attn_norm"), block, cos, sin, rounding)
            h = norm(x, block + "ffn_norm")
            gate = self.product(h, block + "ffn_gate", rounding)
            up = self.product(h, block + "ffn_up", rounding)
            x = x + self.product(gate / (1 + np.exp(-gate)) * up, block + "ffn_down", rounding)
        return self.product(norm(x[rows], "output_norm"), self.head_name(), rounding)


class Gpt2(Model):
    def __init__(self, file):
        super().__init__(file)
        key = lambda name: file.keys["gpt2." + name]
        self.n_layers, self.n_heads, self.eps = key("block_count"), key("attention.head_count"), key("attention.layer_norm_epsilon")

    def norm(self, x, name):
        return layer_norm(x, self.file.tensor(name + ".weight"), self.file.tensor(name + ".bias"), self.eps)

    def attention(self, h, block, rounding):
        q, k, v = np.split(self.product(h, block + "attn_qkv", rounding), 3, axis=1)
        split = lambda x: x.reshape(len(x), self.n_heads, -1)
        return self.product(attend(split(q), rounding.cache(split(k)), rounding.cache(split(v))), block + "attn_output", rounding)

    def logits(self, ids, rows, rounding):
        x = self.file.tensor("token_embd.weight")[ids] + self.file.tensor("position_embd.weight")[:len(ids)]
        for i in range(self.n_layers):
            block = f"blk.{i}."
            x = x + self.attention(self.norm(x, block + "attn_norm"), block, rounding)
            h = gelu(self.product(self.norm(x, block + "ffn_norm"), block + "ffn_up", rounding))
            x = x + self.product(h, block + "ffn_down", rounding)
        return self.product(self.norm(x[rows], "output_norm"), self.head_name(), rounding)


def open_model(path):
    file = File(path)
    return {"llama": Llama, "gpt2": Gpt2}[file.keys["general.architecture"]](file)
