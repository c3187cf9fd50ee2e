"""Peers on two processes of one core each, for tools/bench/workers: llama.cpp with two RPC servers, distributed-llama with two nodes. Decode only.

llama.cpp reads the same file. distributed-llama has a format of its own: a model of the same shape in its Q40 (blocks as Q4_0) with random weights
is written once into WEFT_PEERS/models; it is for Q4_0 files of the Llama family alone. Its sources are WEFT_PEERS/distributed-llama, built by its Makefile.
"""
import json
import os
import random
import re
import struct
import subprocess
import time

import llama_programs
import started
from llama_programs import PEERS

READY_S = 60
RUN_S = 600
PROMPT = "abcdefgh"


def listens(port):
    """Without connecting: some serve one connection alone."""
    with open("/proc/net/tcp") as f:
        return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in f.readlines()[1:])


def wait_for_port(port, process):
    limit = time.monotonic() + READY_S
    while not listens(port):
        if time.monotonic() > limit or process.process.poll() is not None:
            raise RuntimeError(f"{process.process.args[3]} does not listen")
        time.sleep(0.05)


def pinned(cpu, command):
    return started.Process(["taskset", "-c", str(cpu), *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def answer(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=RUN_S)
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout


# ---- llama.cpp


def llama_rpc(model, n_servers, n_tokens, runs):
    """Tokens per second of each run; 0 servers: one core, alone."""
    server, bench = llama_programs.programs("llama-rpc", ["ggml-rpc-server", "llama-bench"], ["-DGGML_RPC=ON"])
    servers, ports = [], [started.free_port() for _ in range(n_servers)]
    try:
        for cpu, port in enumerate(ports):
            servers.append(pinned(cpu, [server, "-H", "127.0.0.1", "-p", port, "-t", 1]))
            wait_for_port(port, servers[-1])
        rpc = ["--rpc", ",".join(f"127.0.0.1:{p}" for p in ports), "-ngl", "99"] if ports else []
        command = [bench, "-m", model, "-p", 0, "-n", n_tokens, "-r", runs, "-t", 1, "-o", "json", *rpc]
        return json.loads(answer(["taskset", "-c", "0-1" if ports else "0", *command]))[0]["samples_ts"]
    finally:
        for one in servers:
            one.stop()


# ---- distributed-llama: header keys and their values, then tensors without names, in the order of its loader

KEYS = {"version": 0, "arch_type": 1, "dim": 2, "hidden_dim": 3, "n_layers": 4, "n_heads": 5, "n_kv_heads": 6, "n_experts": 7, "n_active_experts": 8,
        "vocab_size": 9, "max_seq_len": 10, "hidden_act": 11, "rope_theta": 12, "weights_float_type": 13, "rope_type": 18, "norm_epsilon": 20}
ARCH_LLAMA, ACT_SILU, TYPE_Q40, MODEL_MAGIC, TOKENIZER_MAGIC = 0xABCD00, 1, 2, 0xA00ABCD, 0x567124


def key_values(magic, pairs):
    body = b"".join(struct.pack("<ii", key, value) for key, value in pairs)
    return struct.pack("<ii", magic, 8 + len(body)) + body


def write_tokenizer(path, n_vocab):
    """A token for each byte, and others that no text has."""
    with open(path, "wb") as f:
        f.write(key_values(TOKENIZER_MAGIC, ((0, 1), (1, n_vocab), (2, 8), (3, n_vocab - 2), (9, 1), (10, 1))))
        f.write(struct.pack("<i", n_vocab - 1))
        for i in range(n_vocab):
            token = bytes([i]) if 0 < i < 256 else f"\x01{i:06d}".encode()
            f.write(struct.pack("<fI", 0.0, len(token)) + token)


def write_model(path, about, tensors):
    """Of the shape of a GGUF file's tensors."""
    dims = {name: d for name, d, _ in tensors}
    width, n_vocab = dims["token_embd.weight"]
    hidden = dims["blk.0.ffn_gate.weight"][1]
    heads = about["heads"]
    values = {"version": 0, "arch_type": ARCH_LLAMA, "dim": width, "hidden_dim": hidden, "n_layers": about["layers"], "n_heads": heads,
              "n_kv_heads": about["kv_width"] * heads // width, "n_experts": 0, "n_active_experts": 0, "vocab_size": n_vocab, "max_seq_len": 2048,
              "hidden_act": ACT_SILU, "rope_theta": 10000, "weights_float_type": TYPE_Q40, "rope_type": 0, "norm_epsilon": 5}
    draw = random.Random(1)
    scale = struct.pack("<e", 0.003)

    def q40(n):
        for first in range(0, n // 32, 4096):
            quants = draw.randbytes(16 * min(4096, n // 32 - first))
            f.write(b"".join(scale + quants[i:i + 16] for i in range(0, len(quants), 16)))

    with open(path + ".part", "wb") as f:
        f.write(key_values(MODEL_MAGIC, [(KEYS[k], v) for k, v in values.items()]))
        f.write(struct.pack("<f", 0.02) * (width * n_vocab))
        for _ in range(about["layers"]):
            for n in (width * width, width * about["kv_width"], width * about["kv_width"], width * width, width * hidden, hidden * width, width * hidden):
                q40(n)
            f.write(struct.pack("<f", 1.0) * (2 * width))
        f.write(struct.pack("<f", 1.0) * width)
        q40(width * n_vocab)
    os.rename(path + ".part", path)


def dllama_model(model, describe):
    about, tensors = describe(model)
    path = os.path.join(PEERS, "models", os.path.splitext(os.path.basename(model))[0] + ".dllama")
    if not os.path.exists(path + ".m"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_tokenizer(path + ".t", next(d[1] for name, d, _ in tensors if name == "token_embd.weight"))
        write_model(path + ".m", about, tensors)
    return path


def dllama(model, describe, n_nodes, n_tokens, runs):
    """Tokens per second of each run; 1 node: one core, alone."""
    program = os.path.join(PEERS, "distributed-llama", "dllama")
    if not os.path.exists(program):
        raise RuntimeError("WEFT_PEERS/distributed-llama/dllama is not there: run make dllama in its sources")
    path = dllama_model(model, describe)
    speeds = []
    for _ in range(runs):
        nodes, ports = [], [started.free_port() for _ in range(n_nodes - 1)]
        try:
            for i, port in enumerate(ports):
                nodes.append(pinned(1 + i, [program, "worker", "--port", port, "--nthreads", 1]))
                wait_for_port(port, nodes[-1])
            command = ["taskset", "-c", "0", program, "inference", "--model", path + ".m", "--tokenizer", path + ".t", "--prompt", PROMPT, "--nthreads", 1,
                       "--steps", len(PROMPT) + n_tokens, "--temperature", "0", "--buffer-float-type", "q80", "--max-seq-len", 1024]
            said = answer(command + (["--workers", *(f"127.0.0.1:{p}" for p in ports)] if ports else []))
            speeds.append(float(re.search(r"Prediction.*?tokens/s: ([0-9.]+)", said, re.DOTALL)[1]))
        finally:
            for node in nodes:
                node.stop()
    return speeds
