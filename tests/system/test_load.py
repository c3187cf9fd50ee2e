"""Clients that misbehave: connections that are never read, slow readers, requests left in the middle, hostile bodies, and each cap of --http-limits. The
scenes are those of tools/bench/load, with modest numbers; what is asserted are answers, order and memory, no times."""
import contextlib
import http.client
import importlib.machinery
import importlib.util
import itertools
import json
import os
import pathlib
import select
import signal
import socket
import sys
import time

import harness
from harness import BUILD, GUARD_S, WEFT, Cluster, folder, spawn, tiny_model, wait_for

os.environ["BUILD"] = str(BUILD)
BENCH = pathlib.Path(__file__).resolve().parents[2] / "tools/bench"
sys.path.insert(0, str(BENCH))
loader = importlib.machinery.SourceFileLoader("load", str(BENCH / "load"))
load = importlib.util.module_from_spec(importlib.util.spec_from_loader("load", loader))
loader.exec_module(load)
load.PATIENCE_S = GUARD_S

work = folder("load")
model = tiny_model(work, context=4096)
numbers = itertools.count()
STEADY = ["--requests", 40, "--concurrency", 2, "-n", 16]


def serve(limits, served=model, more=(), env={}):
    """A cluster with these limits that serves the model; its Server, which has it as .cluster."""
    cluster = Cluster(workers=1, env={"WEFT_HTTP_LIMITS": limits, **env})
    log = work / f"serve-{next(numbers)}.log"
    process = spawn([WEFT, "serve", served, *more, "--listen", "127.0.0.1:0", "--name", "tiny", "--json"], log, env=cluster.env)

    def said():
        assert process.poll() is None, f"weft serve ended: {log.read_text()}"
        return next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None)
    address = wait_for("weft serve", said)["address"].split("//")[1]
    server = load.Server(address, {n: cluster.pid(n) for n in ("coordinator", "worker-1")})
    server.cluster, server.process = cluster, process
    return server


def stop(server):
    server.process.send_signal(signal.SIGINT)
    server.process.wait(GUARD_S)
    server.cluster.down()


SANITIZED = b"__asan_init" in WEFT.read_bytes() or b"__tsan_init" in WEFT.read_bytes()  # has an allocator of its own, and looks for leaks itself
blocks = folder("blocks")
server = serve(load.LIMITS, env={} if SANITIZED else {"LD_PRELOAD": str(BUILD / "tests/system/live-blocks.so"), "WEFT_LIVE_BLOCKS": str(blocks)})


def live():
    """Allocations that are alive in each process (live_blocks.c)."""
    return {name: int.from_bytes((blocks / str(pid)).read_bytes(), sys.byteorder, signed=True) for name, pid in server.pids.items()}


def stays_flat(wave, n_requests):
    """What a request leaves behind it leaves in every wave; what caches and pools grow by they do not: in one of a few waves no process has more
    allocations afterwards than before, but for less than one of four requests."""
    wave()
    if SANITIZED:
        return
    seen = [live()]
    for _ in range(6):
        wave()
        seen.append(live())
        if all(seen[-1][p] - seen[-2][p] < n_requests / 4 for p in seen[-1]):
            return
    raise AssertionError(f"allocations stay: {seen}")


def unharmed():
    assert server.call("GET", "/ready")[0] == 200
    assert all(os.path.exists(f"/proc/{pid}/exe") for pid in server.pids.values())
    assert {m["state"] for m in server.cluster.status()["members"]} <= {"ready", "serving"}


def case_never_read():
    """streams that nobody reads give back what they held, and memory stays flat; the others finish meanwhile"""
    def wave():
        steady = load.bench(server, *STEADY)
        load.never_read(server, 30, 300)
        result = steady()
        assert (result["completed"], result["failed"]) == (40, 0), result
    stays_flat(wave, 70)
    unharmed()


def case_slow_readers():
    """who reads slowly gets the whole answer"""
    expected = load.slow_readers(server, 1, 100)
    assert expected[0], expected
    assert load.slow_readers(server, 12, 100) == expected * 12
    unharmed()


def case_cancelled():
    """of many requests half are left in the middle: the rest get their whole answers, no page and no memory stays behind"""
    expected = load.cancel_some(server, 2, 12)[0][0]
    assert expected

    def wave():
        texts, left = load.cancel_some(server, 200, 12, concurrency=16)
        assert left == 100 and texts == [expected] * 100, (left, [t for t in texts if t != expected][:3])
    stays_flat(wave, 200)
    unharmed()


def case_hostile():
    """each hostile body is refused as it should be, and alone"""
    steady = load.bench(server, *STEADY)
    for what, data, right in load.hostile_bodies():
        status, _ = load.send_hostile(server, data)
        assert status in right or (status == 0 and right == {413}), (what, status)
    result = steady()
    assert (result["completed"], result["failed"]) == (40, 0), result
    unharmed()


# ---- caps ----

def refused(at, body, path="/v1/completions"):
    status, text = at.call("POST", path, body)
    assert status == 400 and b'"invalid_request_error"' in text, (body, status, text)


def taken(at, body, path="/v1/completions"):
    status, text = at.call("POST", path, {"max_tokens": 1, **body})
    assert status == 200, (body, status, text)


def case_caps_of_bodies():
    """body, json, depth, values, strings, messages, prompts, n, stops, stop-bytes, logprobs, logit-bias, header: what is at the cap is taken, one more is not"""
    at = serve("body=8k,json=6k,depth=4,values=200,strings=64,messages=2,prompts=2,n=2,stops=1,stop-bytes=4,logprobs=2,logit-bias=2,header=2k")
    chat = "/v1/chat/completions"
    say = {"role": "user", "content": "x"}
    pairs = [({"prompt": "x", "n": 2}, {"prompt": "x", "n": 3}), ({"prompt": ["x"] * 2}, {"prompt": ["x"] * 3}),
             ({"prompt": "x", "stop": ["a"]}, {"prompt": "x", "stop": ["a", "b"]}), ({"prompt": "x", "stop": "abcd"}, {"prompt": "x", "stop": "abcde"}),
             ({"prompt": "x", "logprobs": 2}, {"prompt": "x", "logprobs": 3}),
             ({"prompt": "x", "logit_bias": {"1": 1, "2": 1}}, {"prompt": "x", "logit_bias": {"1": 1, "2": 1, "3": 1}}),
             ({"prompt": "x", "metadata": {"a": [[1]]}}, {"prompt": "x", "metadata": {"a": [[[1]]]}}),
             ({"prompt": "x", "metadata": {"a": [1] * 150}}, {"prompt": "x", "metadata": {"a": [1] * 250}}),
             ({"prompt": "x", "metadata": {"a": ["s"] * 50}}, {"prompt": "x", "metadata": {"a": ["s"] * 70}})]
    for good, bad in pairs:
        taken(at, good)
        refused(at, bad)
    taken(at, {"messages": [say] * 2}, chat)
    refused(at, {"messages": [say] * 3}, chat)
    taken(at, {"prompt": "x", "user": "u" * 5000})
    refused(at, {"prompt": "x", "user": "u" * 7000})
    assert at.call("POST", "/v1/completions", {"prompt": "x", "user": "u" * 9000})[0] == 413
    for size, status in ((1000, b"200"), (3000, b"431")):
        s = at.dial()
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Long: " + b"x" * size + b"\r\n\r\n")
        assert s.recv(4096).split(b" ")[1] == status, size
        s.close()
    stop(at)


def asks(s):
    """The status of GET /health on this socket, None if it is closed."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = s.recv(65536)
        return int(answer.split(b" ")[1]) if answer else None
    return None


def full_queue(at):
    """What a third request gets while two are there."""
    streams = [at.dial() for _ in range(2)]
    for s in streams:
        s.sendall(load.request(load.stream_body(3000)))
        assert s.recv(100).startswith(b"HTTP/1.1 200")
    status = at.call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})[0]
    for s in streams:
        s.close()
    at.wait_idle()
    return status


def case_caps_of_sockets():
    """queue: beyond it 429; source: one address has no more sockets; connections: one more waits until one has gone"""
    at = serve("queue=2,source=6")
    wait_for("a full queue", lambda: full_queue(at) == 429)  # a fast worker may be through with the two
    at.wait_idle()
    taken(at, {"prompt": "x"})
    sockets = [at.dial() for _ in range(12)]
    answers = [asks(s) for s in sockets]
    assert 1 <= answers.count(200) <= 6 and set(answers) == {200, None}, answers
    for s in sockets:
        s.close()
    wait_for("room for a socket", lambda: asks(at.dial()) == 200)
    stop(at)
    at = serve("connections=2")
    first, second = wait_for("two sockets", lambda: [p for p in [(at.dial(), at.dial())] if all(asks(s) == 200 for s in p)])[0]
    third = at.dial()
    third.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    for s in (first, second):
        assert asks(s) == 200
    third.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        raise AssertionError(f"the third was answered: {third.recv(100)}")
    third.settimeout(GUARD_S)
    first.close()
    assert third.recv(100).startswith(b"HTTP/1.1 200")
    for s in (second, third):
        s.close()
    stop(at)


def case_full_leader():
    """a leader whose queue is full says so: 429 with Retry-After, streamed or not; it serves what comes later"""
    at = serve("queue=10000,n=1024,prompts=16")
    for stream in (False, True):
        crowd = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3000, "n": 1024, "ignore_eos": True, "stream": stream}
        sockets = [at.dial() for _ in range(3)]
        for s in sockets:
            s.sendall(load.request(crowd, "/v1/chat/completions"))
        left, answer = list(sockets), b""
        while not answer.startswith(b"HTTP/1.1 429"):  # the first may have begun its stream
            s = select.select(left, [], [], GUARD_S)[0][0]
            left.remove(s)
            answer = s.recv(65536)
        assert b"Retry-After: " in answer and b"queue_full" in answer, answer[:1000]
        for s in sockets:
            s.close()
        at.wait_idle()
    taken(at, {"prompt": "x"})
    stop(at)


def case_left_while_encoded():
    """whoever leaves while his prompt is made into ids takes nobody along"""
    if os.environ.get("WEFT_FAILPOINTS") != "true":
        return
    at = serve("queue=64", env={"WEFT_FAILPOINT": "encode-slow=1000"})
    for _ in range(3):
        s = at.dial()
        s.sendall(load.request(load.stream_body(4)))
        wait_for("the request", lambda: at.metric("vllm:num_requests_waiting") > 0)
        s.close()
        at.wait_idle()
    taken(at, {"prompt": "x"})
    stop(at)


def begun(s):
    """A stream whose first bytes are there."""
    s.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return s.recv(100).startswith(b"HTTP/1.1 200")
    return False


def case_keys_in_turn():
    """one key's flood takes neither every turn nor every place: another key's request is next, and has a place in the queue"""
    at = serve("queue=64,reader=1G", served=tiny_model(folder("turns"), context=65536), more=["--context", 65536])
    keys = {name: at.cluster.weft("key", "create", name, "-q").ok().out.strip() for name in ("joe", "ann")}

    def post(name, body):
        s = at.dial()
        s.sendall(load.request(body).replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer " + keys[name].encode()))
        return s

    def waiting():
        return next((r["waiting"] for r in at.cluster.weft("top", "--json").ok().json()["replicas"]), 0)
    flood = [post("joe", load.stream_body(4000)) for _ in range(56)]  # sixteen run at once, for a while
    wait_for("a flood", lambda: waiting() >= 40)
    refused = post("joe", {"prompt": "x", "max_tokens": 1})  # 56 places of 64 are a key's
    assert refused.recv(1000).startswith(b"HTTP/1.1 429")
    other = post("ann", {"prompt": "x", "max_tokens": 1})
    wait_for("the other one to wait", lambda: waiting() >= 41)
    next(s for s in flood if begun(s)).close()
    assert other.recv(100).startswith(b"HTTP/1.1 200")
    n = sum(begun(s) for s in flood if s.fileno() >= 0)
    assert n < 32, f"{n} of the flood came first"
    for s in (*flood, refused, other):
        s.close()
    stop(at)


def hits_of_each(at):
    """How many tokens the prefix cache had of the same prompt for joe, then ann, then joe again."""
    keys = {name: at.cluster.weft("key", "create", name, "-q").ok().out.strip() for name in ("joe", "ann")}

    def ask(method, path, name, body=None):
        connection = http.client.HTTPConnection(at.host, at.port, timeout=GUARD_S)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json", "Authorization": "Bearer " + keys[name]})
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, (answer.status, text)
        connection.close()
        return text

    def total(name):
        return sum(float(line.rsplit(" ", 1)[1]) for line in ask("GET", "/metrics", "joe").splitlines() if line.startswith(f"vllm:prefix_cache_{name}_total{{"))
    hits = []
    for name in ("joe", "ann", "joe"):
        asked, had = total("queries"), total("hits")
        ask("POST", "/v1/completions", name, {"prompt": "what was said before " * 20, "max_tokens": 1})
        wait_for("the leader's next report", lambda: total("queries") > asked)
        hits.append(total("hits") - had)
    return hits


def case_cached_prefixes():
    """a prompt that was read serves every key; with --http-cache key only the key that sent it"""
    for cache, expected in (("shared", [False, True, True]), ("key", [False, False, True])):
        at = serve("queue=64", env={"WEFT_HTTP_CACHE": cache})
        hits = hits_of_each(at)
        assert [h > 0 for h in hits] == expected, (cache, hits)
        stop(at)


def case_caps_of_times():
    """idle: a socket on which nothing moves is closed; request: one that dribbles, too"""
    at = serve("idle=1,request=2")
    begun = time.monotonic()
    silent = at.dial()
    assert silent.recv(100) == b"" and time.monotonic() - begun >= 0.5
    dribble = at.dial()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        dribble.sendall(b"GET /health HTTP/1.1\r\n")
        dribble.settimeout(0.2)
        while True:
            dribble.sendall(b"X: y\r\n")
            with contextlib.suppress(TimeoutError):
                assert dribble.recv(100) == b""
                break
    stop(at)


def case_caps_are_named():
    """--help has each of them; an unknown one, and one out of range, is exit 2"""
    shown = harness.command([harness.COORDINATOR, "--help"]).ok().out
    for name in ("body", "json", "depth", "values", "strings", "messages", "prompts", "n", "stops", "stop-bytes", "logprobs", "logit-bias", "queue", "reader", "stall",
                 "connections", "source", "header", "idle", "request", "deadline", "keep-alive-ms"):
        assert f"{name}=" in shown, name
    for bad in ("bodi=1M", "n=0", "n"):
        harness.command([harness.COORDINATOR, "--http-limits", bad, "--state", work / "none", "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0"]).fails(2)


harness.run_cases([case_never_read, case_slow_readers, case_cancelled, case_hostile, case_caps_of_bodies, case_caps_of_sockets, case_full_leader, case_left_while_encoded, case_keys_in_turn,
                   case_cached_prefixes, case_caps_of_times, case_caps_are_named])
