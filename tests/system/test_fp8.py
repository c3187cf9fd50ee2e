"""fp8 checkpoints: Hugging Face directories whose weights are F8_E4M3, with each form of scales, are served; what their widened values give is the measure. Weights of both are
made here, from the formats' descriptions alone."""
import array
import json
import random
import shutil
import struct

from harness import Cluster, folder, run_cases, tiny_model

work = folder("fp8")
weft = Cluster(start=False).weft
# heads of 64: the attention output is cut by 128 columns; FFN 384 is 3 blocks; keys of one head are half a block of rows
source = tiny_model(work, type="F32", layers=2, width=256, heads=4, kv=1, head=64, ffn=384, vocab=1500)
TEXT = work / "text"
TEXT.write_text("weft spreads one model over many hosts, and the bits stay the same. " * 12)


def e4m3(q):
    """OCP 8-bit floating point, E4M3: bias 7, subnormals, no infinities"""
    sign, exponent, mantissa = -1.0 if q & 128 else 1.0, q >> 3 & 15, q & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0**(exponent - 10))


VALUES = [e4m3(q) for q in range(256)]


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bf16(x):
    return f32(x) if x == 0 else struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", x))[0] & 0xffff0000))[0]


def numbers(values, kind):
    """bytes of floats that the type holds exactly"""
    if kind == "BF16":
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    return array.array("f", values).tobytes() if kind == "F32" else struct.pack(f"<{len(values)}e", *values)


def read_file(path):
    data = path.read_bytes()
    n, = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]) for name, t in header.items()}


def write_file(path, tensors):
    header, at = {}, 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))


def directory(name, tensors, quantization=None, files=1):
    path = work / name
    path.mkdir(exist_ok=True)
    for text in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "hf" / text, path / text)
    config = json.loads((work / "hf" / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    index = {}
    for i in range(files):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors"
        write_file(path / file, {n: tensors[n] for n in names[i::files]})
        index.update({n: file for n in names[i::files]})
    if files > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def scale_of(form, rows, columns, rng):
    """(name's end, type, shape, factors, which factor an element has)"""
    def factors(n):
        return [bf16(0.0006 * (1 + rng.random())) for _ in range(n)]
    if form == "tensor":
        shape = rng.choice([[], [1]])
        return "weight_scale", rng.choice(["F32", "BF16"]), shape, factors(1), lambda r, c: 0
    if form == "channel":
        shape = rng.choice([[rows], [rows, 1]])
        return "weight_scale", rng.choice(["F32", "BF16"]), shape, factors(rows), lambda r, c: r
    across = -(-columns // 128)
    return "weight_scale_inv", "F32", [-(-rows // 128), across], factors(-(-rows // 128) * across), lambda r, c: r // 128 * across + c // 128


def quantised(form):
    """The tensors in fp8, and the same widened."""
    rng = random.Random(form)
    fp8, wide = {}, {}
    for name, (kind, shape, data) in read_file(work / "hf" / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            fp8[name] = wide[name] = (kind, shape, data)
            continue
        rows, columns = shape
        # Every bit pattern that is a number; few are large.
        q = bytes(v if v & 127 < 120 else v & 0xbf for v in rng.randbytes(rows * columns))
        end, scale_kind, scale_shape, factors, which = scale_of(form, rows, columns, rng)
        fp8[name] = ("F8_E4M3", shape, q)
        fp8[name[:-len("weight")] + end] = (scale_kind, scale_shape, numbers(factors, scale_kind))
        fp8[name[:-len("weight")] + "input_scale"] = ("F32", [], numbers([0.5], "F32"))
        values = array.array("f", (factors[which(i // columns, i % columns)] * VALUES[v] for i, v in enumerate(q)))
        wide[name] = ("F32", shape, values.tobytes())
    return fp8, wide


CONFIGS = {
    "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "channel": {"quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "targets": ["Linear"]}}},
    "block": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
}
weft("export", source, work / "hf", "-q").ok()


def rows_of(path, name):
    """The logits of a greedy answer, and its digest."""
    file = work / (name + ".logits")
    got = weft("run", path, "-p", "weft spreads one model", "-n", 6, "--temp", 0, "--up", 1, "--logits", file, "--json", "-q").ok().json()
    return array.array("f", file.read_bytes()), got


def check_form(form):
    fp8, wide = quantised(form)
    path = directory(form, fp8, CONFIGS[form], files=2 if form == "block" else 1)
    measure = work / (form + ".gguf")
    weft("export", directory(form + "-wide", wide), measure, "-q").ok()
    got, wanted = rows_of(path, form), rows_of(measure, form + "-wide")
    assert len(got[0]) == len(wanted[0]) > 0
    largest = max(abs(v) for v in wanted[0])
    apart = max(abs(a - b) for a, b in zip(got[0], wanted[0]))
    assert 0 < largest < 1e3 and apart <= 2e-4 * largest, (apart, largest)
    assert got[1]["tokens"] == wanted[1]["tokens"], (got[1], wanted[1])
    scores = [weft("perplexity", p, "-f", TEXT, "--ctx", 64, "--up", 1, "--json", "-q").ok().json()["nll_mean"] for p in (path, measure)]
    assert abs(scores[0] - scores[1]) < 1e-4, scores
    # Widened by weft, they are those values bit for bit.
    weft("export", path, work / (form + "-widened.gguf"), "-q").ok()
    assert rows_of(work / (form + "-widened.gguf"), form)[1]["digest"] == wanted[1]["digest"]


def case_tensor():
    """one scale for each weight: logits and perplexity are those of the widened weights"""
    check_form("tensor")


def case_channel():
    """one scale for each output, compressed-tensors: the same"""
    check_form("channel")


def case_blocks():
    """a scale for each 128 x 128 block, in two files: the same"""
    check_form("block")


def case_layouts():
    """the same digest on every layout; the plan counts a byte a weight and a scale for 128"""
    cluster = Cluster(workers=2)
    plan = cluster.weft("plan", work / "block", "--tp", 1, "--pp", 1, "--json").ok().json()
    held = sum(r["weight_bytes"] for s in plan["stages"] for r in s["ranks"])
    projections = 2 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 384)
    rest = 4 * (1500 * 256 + 5 * 256)
    assert projections * 132 / 128 + rest <= held <= 1.05 * (projections * 132 / 128 + rest) + 1500 * 256 * 4, (held, projections, rest)
    got = cluster.weft("verify", work / "block", "-n", 4, "--json", "-q").ok().json()
    assert got["equal"] is True and len(got["layouts"]) >= 3, got
    cluster.down()


def case_scaled_rotation():
    """llama3's rotation: served from a directory as from a GGUF file that holds its factors, and not as without it"""
    tensors, digests = read_file(work / "hf" / "model.safetensors"), []
    for name in ("turned", "turned-llama3"):
        path = directory(name, tensors)
        if name != "turned":
            config = json.loads((path / "config.json").read_text())
            config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                      "original_max_position_embeddings": 64}
            (path / "config.json").write_text(json.dumps(config))
        weft("export", path, work / (name + ".gguf"), "-q").ok()
        digests.append([rows_of(p, name)[1]["digest"] for p in (path, work / (name + ".gguf"))])
    (plain, plain_file), (scaled, scaled_file) = digests
    assert plain == plain_file and scaled == scaled_file and plain != scaled, digests


def case_refused():
    """what is not read is refused in a line that says what to do"""
    fp8, _ = quantised("tensor")
    name = "model.layers.1.self_attn.o_proj"
    weight, scale = name + ".weight", name + ".weight_scale"

    def refused(words, changed, quantization=CONFIGS["tensor"]):
        tensors = {n: t for n, t in {**fp8, **changed}.items() if t is not None}
        path = directory("refused", tensors, quantization)
        weft("export", path, work / "never.gguf", "-q").fails(2, *words)

    for method, words in (({"quant_method": "gptq", "bits": 4}, ("'gptq'", "take the model in")), ({"quant_method": "awq"}, ("'awq'",)),
                          ({"quant_method": "bitsandbytes"}, ("'bitsandbytes'",)), ({"quant_method": "mxfp4"}, ("'mxfp4'",)),
                          ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("'modelopt' NVFP4",)),
                          ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ("'pack-quantized'",)),
                          ({"quant_method": "compressed-tensors", "format": "naive-quantized",
                            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}}, ("type 'int'",)),
                          ({"quant_method": "fp8", "weight_block_size": [64, 64]}, ("[64,64]",)), ({"quant_method": "fp8", "fmt": "e5m2"}, ("'e5m2'",))):
        refused(words, {}, method)
    refused((weight, "no scale"), {scale: None})
    refused((scale, "no weight " + weight), {weight: None})
    refused((scale, "type F32"), {weight: ("F32", [256, 256], bytes(4 * 256 * 256))})
    refused((scale, "shape [3, 2]", "[256, 256]"), {scale: ("F32", [3, 2], bytes(24))})
    refused((scale, "not finite"), {scale: ("F32", [], struct.pack("<f", float("inf")))})
    refused((scale, "I8"), {scale: ("I8", [1], b"\x01")})
    refused((weight, "both"), {scale + "_inv": ("F32", [2, 2], bytes(16))})
    refused((weight, "F8_E5M2", "F8_E4M3"), {weight: ("F8_E5M2", [256, 256], bytes(256 * 256)), scale: None})
    refused(("model.norm.weight", "only matrices"), {"model.norm.weight": ("F8_E4M3", [256], bytes(256))})
    spoiled = bytearray(fp8[weight][2])
    spoiled[5 * 256 + 130] = 0x7f
    refused((weight, "row 5, column 130"), {weight: ("F8_E4M3", [256, 256], bytes(spoiled))})
    weft("run", work / "refused", "-p", "x", "--up", 1, "-q").fails(2, weight, "row 5, columns 128 to 255", "NaN")


def case_narrow():
    """rows that are no whole blocks are not served; weft export makes a file that is"""
    narrow = tiny_model(work, "narrow.gguf", type="F32", layers=1, width=192, heads=3, kv=3, head=64, ffn=256, vocab=1500)
    shutil.rmtree(work / "hf")
    weft("export", narrow, work / "hf", "-q").ok()
    fp8, _ = quantised("tensor")
    path = directory("narrow", fp8, CONFIGS["tensor"])
    weft("run", path, "-p", "x", "--up", 1, "-q").fails(2, "rows of 192 elements", "weft export")
    weft("export", path, work / "narrow-q8.gguf", "--type", "q8_0", "-q").ok()
    weft("run", work / "narrow-q8.gguf", "-p", "x", "-n", 2, "--up", 1, "-q").ok()


run_cases([case_tensor, case_channel, case_blocks, case_layouts, case_scaled_rotation, case_refused, case_narrow])
