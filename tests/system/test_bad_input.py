"""Bad input: one clear line each, the documented exit code, the daemons alive after."""
import contextlib
import os
import pathlib
import random
import socket
import struct
import threading

import harness
from harness import Cluster, folder, tiny_model

work = folder("bad")
model = tiny_model(work)
good = model.read_bytes()
cluster = Cluster(workers=2)
weft = cluster.weft


def refused(name, data, *words, code=2):
    """plan and run on these bytes are refused alike."""
    path = work / f"{name}.gguf"
    path.write_bytes(data)
    weft("plan", path).fails(code, *words)
    weft("run", path, "-p", "x", "-n", 2, "-q").fails(code, *words)


def patched(offset, form, value):
    data = bytearray(good)
    struct.pack_into(form, data, offset, value)
    return bytes(data)


def tensor_at(name):
    """Offsets in the file of a tensor's number of dimensions, first dimension, type and data offset."""
    at = good.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    n = struct.unpack_from("<I", good, at)[0]
    return at, at + 4, at + 4 + 8 * n, at + 8 + 8 * n


def key_at(name):
    """Offset of a key's value."""
    return good.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4


def case_no_file():
    """no such file, a folder, a file outside --models"""
    for path in ("none.gguf", "/none/none.gguf"):
        weft("run", path, "-p", "x", "-q").fails(3, path)
        weft("plan", path).fails(3, path)
        weft("perplexity", path, "-f", __file__, "-q").fails(3, path)
        weft("bench", path, "-q").fails(3, path)
        weft("verify", path, "-q").fails(3, path)
    weft("run", work, "-p", "x", "-q").fails(2, str(work))
    weft("run", model, "-f", "/none/prompt").fails(3, "/none/prompt")
    weft("perplexity", model, "-f", "/none/text").fails(3, "/none/text")


def case_not_gguf():
    """not a GGUF file, an empty one, another version"""
    refused("words", b"hello, this is not a model" * 100, "GGUF")
    refused("empty", b"", "empty.gguf")
    refused("version1", patched(4, "<I", 1), "version 1")
    refused("version99", patched(4, "<I", 99), "version 99")
    refused("bigendian", patched(4, "<I", 3 << 24), "version")


def case_truncated():
    """truncated anywhere: in the header, in a string, in the tensor list, in the data"""
    for keep in (3, 7, 15, 23, 24, 40, 200, 5000, tensor_at("blk.0.attn_q.weight")[1] + 3, len(good) // 2, len(good) - 1):
        refused("truncated", good[:keep], "truncated.gguf")


def case_hostile_counts():
    """counts that overflow: tensors, keys, strings, arrays, dimensions"""
    for huge in (1 << 63, (1 << 64) - 1, 1 << 40, 1 << 32):
        refused("tensors", patched(8, "<Q", huge), "tensors")
        refused("keys", patched(16, "<Q", huge), "keys")
        refused("string", patched(24, "<Q", huge), "string.gguf")
        refused("array", patched(key_at("tokenizer.ggml.tokens") + 4, "<Q", huge), "tokens")
        refused("dimension", patched(tensor_at("blk.0.attn_q.weight")[1], "<Q", huge), "attn_q")
        refused("offset", patched(tensor_at("blk.0.attn_q.weight")[3], "<Q", huge), "attn_q")
    refused("dimensions", patched(tensor_at("blk.0.attn_q.weight")[0], "<I", 200), "attn_q")


def case_hostile_values():
    """values that no model has: 0 layers, 0 heads, KV heads that do not divide, a huge width, NaN"""
    for key, form, values in (("llama.block_count", "<I", (0, 0xFFFFFFFF)), ("llama.attention.head_count", "<I", (0, 7, 0xFFFFFFFF)),
                              ("llama.embedding_length", "<I", (0, 191, 0xFFFFFFFF)),
                              ("llama.feed_forward_length", "<I", (0, 513, 0xFFFFFFFF)), ("llama.context_length", "<I", (0,)),):
        for value in values:
            refused("value", patched(key_at(key), form, value), "weft: ")
    refused("kv", patched(key_at("llama.attention.head_count_kv"), "<I", 4), "KV heads")
    refused("eps", patched(key_at("llama.attention.layer_norm_rms_epsilon"), "<f", float("nan")), "eps")


def case_unsupported():
    """unsupported architecture and weight type are named"""
    refused("architecture", good.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"bloom", 1), "bloom")
    for number in (16, 99, 0xFFFFFFFF):
        refused("type", patched(tensor_at("blk.1.ffn_up.weight")[2], "<I", number), "ffn_up", str(number))


def case_bit_flips():
    """flipped bits anywhere in the header: refused in one line, or a model that runs"""
    flips = random.Random(7)
    header = tensor_at("output_norm.weight")[3]
    for _ in range(60):
        data = bytearray(good)
        data[flips.randrange(header)] ^= 1 << flips.randrange(8)
        path = work / "flipped.gguf"
        path.write_bytes(data)
        got = weft("plan", path)
        assert got.code in (0, 2), got
        if got.code != 0:
            got.fails(2, "weft: ")


def case_flipped_weights():
    """flipped bits in the weights: other numbers, or an error that names layer and op; never a hang"""
    data = bytearray(good)
    start = len(good) // 2
    for i in range(start, start + 4000, 2):
        data[i] ^= 0x7C
    path = work / "weights.gguf"
    path.write_bytes(data)
    got = weft("run", path, "-p", "x", "-n", 3, "-q")
    assert got.code in (0, 1), got
    if got.code == 1:
        got.fails(1, "layer")


def case_changed_weights():
    """weights that changed under a manifest that is kept: the slice is named, the coordinator is not called unreachable"""
    def change(path, byte):
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(len(good) // 2)
            file.write(bytes([byte]) * 64)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def tokens(path):
        return weft("run", path, "-p", "x", "-n", 3, "--json", "-q").ok().json()["tokens"]
    path = work / "changed.gguf"
    path.write_bytes(good)
    change(path, 1)
    weft("plan", path).ok()  # the manifest, which serves for files of this size and time
    change(path, 2)
    got = weft("run", path, "-p", "x", "-n", 2, "-q").fails(1, "slice", "tensor", "changed.gguf", "hash")
    assert "is it running" not in got.err, got
    fresh = work / "fresh.gguf"
    fresh.write_bytes(path.read_bytes())
    assert tokens(path) == tokens(fresh)  # read anew

    twin = work / "twin.gguf"  # the same bytes under two names: the right one serves
    for name in (path, twin):
        name.write_bytes(good)
        change(name, 3)
        weft("plan", name).ok()
    change(path, 4)
    assert tokens(path) == tokens(twin)


def case_range():
    """n, temperature, top-p and the like out of range or no numbers"""
    for option, values in (("-n", ("0", "-1", "x", "99999999999", "1.5")), ("--temp", ("-0.1", "nan", "inf", "hot", "1e9")), ("--top-p", ("-0.1", "1.01", "nan")),
                           ("--min-p", ("-1", "2")), ("--top-k", ("-1", "x")), ("--repeat-penalty", ("0", "-1", "nan")), ("--seed", ("-1", "x", "1e3", "")),
                           ("--context", ("0", "999999999", "x")), ("--tp", ("0", "65", "x")), ("--pp", ("0",)), ("--dp", ("0",)), ("--numerics", ("close",))):
        for value in values:
            weft("run", model, "-p", "x", option, value).fails(2)
    weft("run", model, "-p", "x", "-n", "0").fails(2, "tokens 0", "1 to 16777216")


def case_prompt():
    """a prompt longer than the context says both; none, or an empty one, too"""
    weft("run", model, "-p", "word " * 400, "-q").fails(2, "context of 256")
    weft("run", model, "-p", "abc " * 60, "--context", 32, "-q").fails(2, "context of 32")
    weft("run", model, "-p", "x", "--context", 257, "-q").fails(2, "257", "256")
    weft("run", model).fails(2, "-p TEXT")
    weft("run", model, "-p", "", "-q").fails(2, "prompt")
    weft("perplexity", model, "-f", "/dev/null", "-q").fails(2)


def case_context_end():
    """more tokens than the context holds: the answer ends there with finish reason length"""
    got = weft("run", model, "-p", "x", "-n", 5000, "--json", "-q").ok().json()
    assert got["finish_reason"] == "length" and got["prompt_tokens"] + len(got["tokens"]) in (256, 257), got


def case_layout():
    """layouts that cannot be had, with the nearest that can"""
    weft("run", model, "-p", "x", "--tp", 3, "-q").fails(2, "3 workers", "--tp 2")
    weft("run", model, "-p", "x", "--tp", 7, "-q").fails(2, "6 attention units")
    weft("run", model, "-p", "x", "--pp", 5, "-q").fails(2, "4 layers")
    weft("run", model, "-p", "x", "--dp", 2, "--pp", 2, "-q").fails(2, "4 workers")


def case_unknown():
    """unknown verbs and flags, with the nearest that there is"""
    weft("stauts").fails(2, "'status'")
    weft("trian", model).fails(2, "'trian'", "'train'")
    weft("train", model).fails(2, model.name)
    weft("run", model, "--promt", "x").fails(2, "--promt", "--prompt")
    weft("run", model, "-p", "x", "--json=3").fails(2, "json")
    weft("run", model, "-p").fails(2, "-p TEXT")
    weft("run", model, model, "-p", "x").fails(2, "one model")
    weft("status", "extra").fails(2, "extra")
    weft("down", "extra").fails(2, "extra")
    weft("doctor", "extra").fails(2, "extra")
    weft("drain").fails(2, "node")
    weft("token", "make").fails(2, "create")
    harness.command([harness.COORDINATOR, "--modles", "/"]).fails(2, "--modles", "--models")
    harness.command([harness.WORKER, "--thread", "2"]).fails(2, "--thread", "--threads")
    harness.command([harness.WORKER, "--threads", "0"]).fails(2, "threads 0")
    harness.command([harness.WORKER, "--isa", "sse9"]).fails(2, "isa", "avx2")
    check = pathlib.Path(__file__).resolve().parents[2] / "tools/gpu-check"
    for arguments, said in ((["--quik"], "see --help"), (["--bundle", "/nowhere"], "/nowhere")):
        got = harness.command([check, *arguments])
        assert got.code == 2 and len(got.err.splitlines()) == 1 and said in got.err, got
    for device in ("gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"):
        harness.command([harness.WORKER, "--device", device]).fails(2, repr(device), "cpu, cuda, cuda:N (N from 0), several as in cuda:0,1 or cuda:all, or auto")


def case_configuration():
    """a configuration file: options from it, all its errors at once with lines"""
    path = work / "weft.yaml"
    path.write_text("tokens: 3\nseed: 5\n")
    assert len(weft("run", model, "-p", "x", "--config", path, "--json", "-q").ok().json()["tokens"]) == 3
    assert len(weft("run", model, "-p", "x", "--config", path, "-n", 2, "--json", "-q").ok().json()["tokens"]) == 2
    path.write_text("tokens: 3\ntop_q: 1\ntemp: warm\n")
    got = weft("run", model, "-p", "x", "--config", path)
    assert got.code == 2 and "top_q" in got.err and "temp" in got.err and "2" in got.err and "3" in got.err, got
    weft("run", model, "-p", "x", "--config", "/none.yaml").fails(3, "/none.yaml")


def case_nodes():
    """nodes that are not there: exit 3"""
    for verb in ("drain", "undrain", "revoke"):
        weft(verb, "nobody").fails(3, "nobody")


def case_unreachable():
    """no coordinator where one is said to be: exit 5; plain HTTP and noise on its port change nothing"""
    weft("status", "--cluster", "127.0.0.1:1").fails(5, "127.0.0.1:1", "refused")
    weft("status", "--cluster", "nowhere.invalid:1").fails(5, "nowhere.invalid")
    weft("status", "--cluster", "no-port").fails(2, "no-port")
    for key in ("control", "join"):
        host, port = cluster.endpoint(key).split(":")
        for words in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100), random.Random(3).randbytes(5000), b"\x16\x03\x01\xff\xff"):
            try:
                with socket.create_connection((host, int(port)), timeout=harness.GUARD_S) as connection:
                    connection.sendall(words)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
            except ConnectionError:
                pass  # the join port is closed while no token is valid; a reset is an answer too
    weft("status").ok()


def case_busy_coordinator():
    """a coordinator that takes a connection but not the time for its handshake is asked again"""
    host, port = cluster.endpoint("control").rsplit(":", 1)
    held, taken = [], []

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        sink.close()

    def stand_before(listener):
        held.append(listener.accept()[0])
        with contextlib.suppress(OSError):  # the end of the case closes the listener
            while True:
                taken.append(listener.accept()[0])
                onward = socket.create_connection((host, int(port)))
                for ends in ((taken[-1], onward), (onward, taken[-1])):
                    threading.Thread(target=pump, args=ends, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=stand_before, args=(listener,), daemon=True).start()
        weft("status", "--cluster", "127.0.0.1:%d" % listener.getsockname()[1]).ok()
    assert held and taken


def case_memory():
    """a model too large for the members says how much is missing"""
    large = tiny_model(work, "large.gguf", layers=24, width=768, heads=12, kv=3, ffn=3072, vocab=8000)
    small = Cluster(start=False)
    small.weft("up", "-q", "--workers", 2, "--memory", "32M").ok()
    got = small.weft("run", large, "-p", "x", "-q").fails(2, "MiB", "missing")
    assert "large.gguf" in got.err or "memory" in got.err, got
    small.weft("plan", large).fails(2, "MiB")
    small.weft("run", model, "-p", "x", "-n", 2, "-q").ok()
    small.down()


def case_alive():
    """after all that the daemons are the ones that were started, and serve"""
    weft("run", model, "-p", "x", "-n", 3, "--tp", 2, "-q").ok()
    status = cluster.status()
    assert status["generation"] == 1 and all(m["state"] in ("ready", "serving") for m in status["members"]), status
    for name, text in cluster.logs().items():
        for word in ("CRITICAL", "assert", "ERROR:"):
            assert word not in text, f"{word} in {name}: {text[-800:]}"


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
