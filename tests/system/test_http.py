"""HTTP as clients expect it: real daemons, `weft serve`, the standard library's http.client, curl, and OpenAI's own client where it is installed."""
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading

import harness
from harness import GUARD_S, WEFT, Cluster, Skip, folder, spawn, tiny_model, wait_for

LIMITS = "stall=1,queue=6,keep-alive-ms=100,body=2M,n=4"
work = folder("http")
CONTEXT = 16384  # long enough for answers that last while something is done to them
model = tiny_model(work, context=CONTEXT)
cluster = Cluster(workers=2, env={"WEFT_HTTP_LIMITS": LIMITS})
serving = {}  # name -> (process, log)


def serve(*arguments, name="tiny"):
    """`weft serve` in the background; returns host:port once it says that it is ready."""
    log = work / f"serve-{len(serving)}-{name}.log"
    process = spawn([WEFT, "serve", model, "--name", name, "--listen", "127.0.0.1:0", "--context", CONTEXT, "--json", *arguments], log, env=cluster.env)
    serving[name] = (process, log)

    def said():
        assert process.poll() is None, f"weft serve ended: {log.read_text()}"
        return next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None)
    answer = wait_for("weft serve", said)
    assert answer["version"] == 1 and answer["model"] == name
    address = answer["address"].split("//")[1]
    wait_for("readiness", lambda: call("GET", "/ready", at=address)[0] == 200)
    return address


def dial(at=None, guard_s=GUARD_S, tls=None):
    host, port = (at or ADDRESS).rsplit(":", 1)
    if tls:
        return http.client.HTTPSConnection(host, int(port), timeout=guard_s, context=tls)
    return http.client.HTTPConnection(host, int(port), timeout=guard_s)


def call(method, path, body=None, headers=None, at=None, tls=None):
    """(status, headers, parsed JSON or text)."""
    connection = dial(at, tls=tls)
    data = json.dumps(body) if isinstance(body, (dict, list)) else body
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    kind = answer.headers.get("Content-Type", "")
    return answer.status, answer.headers, json.loads(text) if kind == "application/json" else text.decode()


def post(path, **body):
    status, _, answer = call("POST", path, body)
    assert status == 200, answer
    return answer


def refused(path, status, param=None, **body):
    got, _, answer = call("POST", path, body)
    assert got == status, (got, answer)
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    return error


def events(path, **body):
    """The frames of a stream, as (comments, frames); [DONE] must be the last."""
    connection = dial()
    connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream"), answer.read()
    blocks = [b for b in answer.read().decode().split("\n\n") if b]
    connection.close()
    assert blocks[-1] == "data: [DONE]", blocks[-3:]
    comments = [b for b in blocks if b.startswith(":")]
    frames = [json.loads(b[len("data: "):]) for b in blocks[:-1] if not b.startswith(":")]
    return comments, frames


def metric(name, **labels):
    _, _, text = call("GET", "/metrics")
    wanted = ",".join(f'{k}="{v}"' for k, v in labels.items())
    total, found = 0.0, False
    for line in text.splitlines():
        if (line.startswith(name + "{") or line.startswith(name + " ")) and all(p in line for p in wanted.split(",") if p):
            total, found = total + float(line.rsplit(" ", 1)[1]), True
    assert found, f"no series {name} {labels}"
    return total


def idle():
    return metric("vllm:num_requests_running") == 0 and metric("vllm:num_requests_waiting") == 0


ADDRESS = serve()
MESSAGES = [{"role": "user", "content": "hello"}]


# ---- answers ----

def case_chat():
    """a chat, gathered and streamed, has the same text; usage and finish reason are told"""
    whole = post("/v1/chat/completions", model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    choice = whole["choices"][0]
    assert whole["object"] == "chat.completion" and choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length", whole
    assert whole["usage"]["completion_tokens"] == 12 and whole["usage"]["prompt_tokens"] > 0
    _, frames = events("/v1/chat/completions", model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, stream_options={"include_usage": True})
    text = "".join(c["delta"].get("content") or "" for f in frames for c in f["choices"])
    assert text == choice["message"]["content"], (text, choice)
    assert frames[0]["choices"][0]["delta"]["role"] == "assistant"
    assert frames[-2]["choices"][0]["finish_reason"] == "length" and frames[-1]["choices"] == []
    assert frames[-1]["usage"] == whole["usage"] and all(f["usage"] is None for f in frames[:-1])
    assert {f["id"] for f in frames} == {frames[0]["id"]} and frames[0]["system_fingerprint"] == whole["system_fingerprint"]


def case_same_as_weft_run():
    """a completion over HTTP is what `weft run` says: the same text of the same prompt"""
    run = cluster.weft("run", model, "-p", "hello there", "-n", 10, "--json", "-q", "--context", CONTEXT).ok().json()
    answer = post("/v1/completions", model="tiny", prompt="hello there", max_tokens=10, temperature=0)
    assert answer["choices"][0]["text"] == run["text"], (answer, run["text"])


def case_choices_and_prompts():
    """n choices of several prompts, streamed and gathered alike; a seed makes them reproducible"""
    body = dict(prompt=["one", "two"], n=2, max_tokens=6, temperature=1, seed=11)
    whole = post("/v1/completions", **body)
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3] and whole["usage"]["completion_tokens"] == 24
    texts = [c["text"] for c in whole["choices"]]
    assert len(set(texts)) > 1, texts
    _, frames = events("/v1/completions", **body)
    streamed = ["", "", "", ""]
    for f in frames:
        for c in f["choices"]:
            streamed[c["index"]] += c["text"]
    assert streamed == texts
    other = [c["text"] for c in post("/v1/completions", **{**body, "seed": 12})["choices"]]
    assert other != texts


def case_context():
    """a prompt that the context cannot hold is refused with the code that clients know it by"""
    long = [7] * CONTEXT
    for path, body in (("/v1/completions", {"prompt": long}), ("/v1/completions", {"prompt": long, "echo": True, "logprobs": 1}),
                       ("/v1/completions", {"prompt": [[7], long + [7]], "echo": True, "logprobs": 1, "max_tokens": 0}),
                       ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * CONTEXT}]})):
        for stream in (False, True):
            error = refused(path, 400, None, **body, stream=stream)
            assert error["code"] == "context_length_exceeded" and error["type"] == "invalid_request_error" and str(CONTEXT) in error["message"], error


def case_stop():
    """a stop string ends the text before it"""
    text = post("/v1/completions", prompt="abc", max_tokens=24, temperature=0)["choices"][0]["text"]
    stop = text[8:11]
    cut = post("/v1/completions", prompt="abc", max_tokens=24, temperature=0, stop=[stop])["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == text[:text.index(stop)], (text, cut)


def case_sampler_settings():
    """logit_bias forces and bans; penalties, top_k, top_p 0 and min_p are obeyed"""
    forced = call("POST", "/tokenize", {"prompt": "q"})[2]["tokens"][0]
    text = post("/v1/completions", prompt="abc", max_tokens=4, temperature=0, logit_bias={str(forced): 100})["choices"][0]["text"]
    assert text == "qqqq", text
    greedy = post("/v1/completions", prompt="abc", max_tokens=6, temperature=0)["choices"][0]["text"]
    for narrow in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert post("/v1/completions", prompt="abc", max_tokens=6, temperature=2, **narrow)["choices"][0]["text"] == greedy, narrow
    penalised = post("/v1/completions", prompt="abc", max_tokens=4, temperature=0, logit_bias={str(forced): 100}, frequency_penalty=2)
    assert penalised["choices"][0]["finish_reason"] == "length"
    refused("/v1/completions", 400, prompt="abc", logit_bias={"999999": 1})


def case_echo_and_logprobs():
    """an echo has the prompt's text and the logprobs of its tokens; offsets fit the text"""
    tokens = call("POST", "/tokenize", {"prompt": "hello there"})[2]["tokens"]
    answer = post("/v1/completions", prompt="hello there", max_tokens=3, temperature=0, echo=True, logprobs=2)
    choice = answer["choices"][0]
    assert choice["text"].startswith("hello there")
    values = choice["logprobs"]
    assert len(values["tokens"]) == len(values["token_logprobs"]) == len(values["text_offset"]) == len(tokens) + 3, values
    assert values["token_logprobs"][0] is None and all(v <= 0 for v in values["token_logprobs"][1:])
    assert all(len(t) >= 2 for t in values["top_logprobs"][1:])
    assert values["text_offset"][1] == len(values["tokens"][0])
    only = post("/v1/completions", prompt="hello there", max_tokens=0, echo=True, logprobs=1)
    assert only["choices"][0]["text"] == "hello there" and only["usage"]["completion_tokens"] == 0
    assert only["choices"][0]["logprobs"]["token_logprobs"] == values["token_logprobs"][:len(tokens)]
    chat = post("/v1/chat/completions", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=3)
    for token in chat["choices"][0]["logprobs"]["content"]:
        best = max(t["logprob"] for t in token["top_logprobs"])
        assert len(token["top_logprobs"]) == 3 and token["logprob"] == best and bytes(token["bytes"]) is not None


def case_tokens():
    """tokenize and detokenize are each other's inverse; messages go through the template"""
    text = "Grüße, 世界! <|im_start|>"
    answer = call("POST", "/tokenize", {"prompt": text})[2]
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == CONTEXT
    assert call("POST", "/detokenize", {"tokens": answer["tokens"]})[2]["prompt"] == text
    messages = call("POST", "/tokenize", {"messages": MESSAGES})[2]["tokens"]
    bare = call("POST", "/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})[2]["tokens"]
    assert messages[:len(bare)] == bare and len(messages) > len(bare)
    refused("/detokenize", 400, tokens=[10**9])


# ---- pages ----

def case_pages():
    """models, health, ready with named checks, version; 404, 405 and 415 are error objects; a request's id comes back"""
    models = call("GET", "/v1/models")[2]
    assert [m["id"] for m in models["data"]] == ["tiny"] and models["data"][0]["max_model_len"] == CONTEXT
    assert call("GET", "/v1/models/tiny")[2]["id"] == "tiny"
    assert call("GET", "/v1/models/none")[0] == 404
    assert call("GET", "/health")[0] == 200
    wait_for("readiness", lambda: call("GET", "/ready")[0] == 200)  # a canary may come late on a crowded machine
    checks = call("GET", "/ready")[2]
    assert "[+]coordinator ok" in checks and "[+]workers ok" in checks and "[+]model tiny ok" in checks
    assert call("GET", "/version")[2]["version"]
    assert call("GET", "/nothing")[0] == 404 and call("GET", "/v1/completions")[0] == 405 and call("POST", "/v1/models", {})[0] == 405
    assert call("POST", "/v1/completions", {"prompt": "x"}, {"Content-Type": "text/plain"})[0] == 415
    assert refused("/v1/embeddings", 400, input="x")["code"] == "unsupported"
    assert refused("/v1/completions", 404, "model", model="none", prompt="x")["code"] == "model_not_found"
    assert call("GET", "/health", headers={"X-Request-Id": "mine-1"})[1]["X-Request-Id"] == "mine-1"
    assert call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, {"X-Request-Id": "trace-7"})[1]["X-Request-Id"] == "trace-7"
    assert " is trace-7 of 127.0.0.1" in cluster.logs()["coordinator.log"]
    own = call("GET", "/health", headers={"X-Request-Id": "not mine"})[1]["X-Request-Id"]
    assert own.startswith("req-"), own


def case_metrics():
    """the series that dashboards ask for, and those of workers, stages and links; counters count"""
    before = metric("vllm:generation_tokens_total", model_name="tiny")
    post("/v1/completions", prompt="count me", max_tokens=7, temperature=0)
    assert metric("vllm:generation_tokens_total", model_name="tiny") == before + 7
    for name in ("vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_bucket",
                 "vllm:e2e_request_latency_seconds_sum", "vllm:request_queue_time_seconds_count", "vllm:request_prefill_time_seconds_count",
                 "vllm:request_decode_time_seconds_count", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
                 "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "weft_worker_up", "weft_worker_compute_seconds_total",
                 "weft_worker_sent_bytes_total", "weft_worker_wait_seconds_total", "weft_stage_layers", "weft_job_epoch", "weft_http_answers_total"):
        metric(name)
    assert metric("vllm:request_success_total", model_name="tiny", finished_reason="length") >= 1
    text = call("GET", "/metrics")[2]
    seen = set()
    for line in text.splitlines():  # each family once, typed, its samples behind it
        if line.startswith("# TYPE"):
            family = line.split()[2]
            assert family not in seen, family
            seen.add(family)
        elif not line.startswith("#"):
            float(line.rsplit(" ", 1)[1])
            name = line.split("{")[0].split(" ")[0]
            assert any(name == f or name.startswith(f + "_") for f in seen), line


# ---- who leaves, who does not fit ----

def open_stream(max_tokens=16000):
    connection = dial()
    body = {"prompt": "go on", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def case_client_that_leaves():
    """a client that leaves, streaming or waiting for the whole, gives back what it had at once"""
    aborted = metric("vllm:request_success_total", finished_reason="abort")
    stream = open_stream()
    stream.getresponse().readline()
    stream.close()
    whole = dial()
    whole.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 16000, "ignore_eos": True, "temperature": 0}),
                  {"Content-Type": "application/json"})
    wait_for("the request to run", lambda: metric("vllm:num_requests_running") >= 1)
    whole.close()
    wait_for("both to be given up", idle)
    assert metric("vllm:request_success_total", finished_reason="abort") == aborted + 2


def case_full():
    """beyond the queue's bound: 429 with Retry-After, and room again when somebody has left"""
    streams = [open_stream() for _ in range(6)]
    for s in streams:
        assert s.getresponse().status == 200
    status, headers, answer = call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert status == 429 and int(headers["Retry-After"]) >= 1 and answer["error"]["type"] == "rate_limit_error", answer
    for s in streams:
        s.close()
    wait_for("room", lambda: call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200)
    wait_for("the streams to be given up", idle)


def holder():
    """The worker that the plan chose: the one that holds something."""
    return next(m["name"] for m in cluster.status()["members"] if m["shards"])


def case_keep_alive():
    """a stream that has nothing to say sends comments"""
    worker = cluster.pid(holder())
    stream = open_stream(3000)
    answer = stream.getresponse()
    answer.readline()
    os.kill(worker, signal.SIGSTOP)
    try:
        def comment():
            return answer.readline().startswith(b": keep-alive")
        wait_for("a comment", comment)
    finally:
        os.kill(worker, signal.SIGCONT)
    rest = answer.read().decode()
    assert rest.endswith("data: [DONE]\n\n") and '"error"' not in rest, rest[-300:]
    wait_for("the end", idle)


# ---- hostile requests ----

def raw(data, path="/v1/completions", headers=b"", guard_s=30):
    """Status line and body of whatever comes back for these bytes of a body."""
    host, port = ADDRESS.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=guard_s) as s:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n" % (
            path.encode(), len(data), headers)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            s.sendall(head + data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := s.recv(65536):
                answer += piece
    return answer


def case_hostile_bodies():
    """bodies that are deep, huge, broken or out of range are 400 or 413, alone; an answer that runs beside them is not changed"""
    expected = post("/v1/completions", prompt="steady", max_tokens=300, temperature=0, ignore_eos=True)["choices"][0]["text"]
    beside = {}

    def run_beside():
        beside["text"] = post("/v1/completions", prompt="steady", max_tokens=300, temperature=0, ignore_eos=True)["choices"][0]["text"]
    thread = threading.Thread(target=run_beside)
    thread.start()
    big = b'{"prompt":"' + b"x" * (3 << 20) + b'"}'
    many = json.dumps({"prompt": ["x"] * 100000}).encode()
    cases = {400: [b"", b"{", b"[]", b"null", b"[" * 100000, b'{"a":' * 100000, b'{"prompt":"\xff\xfe"}', b'{"prompt":"x","temperature":NaN}',
                   b'{"prompt":"x","n":9223372036854775807}', b'{"prompt":"x","n":-1}', b'{"prompt":"x","max_tokens":1e400}',
                   b'{"prompt":"x","seed":99999999999999999999999}', b'{"prompt":"\\u0000"}', many,
                   json.dumps({"prompt": "x", "stop": ["s"] * 1000}).encode(), json.dumps({"prompt": "x", "stop": "s" * 10000}).encode(),
                   json.dumps({"prompt": "x", "logit_bias": {str(i): 1 for i in range(50000)}}).encode(),
                   json.dumps({"prompt": [[4294967295]]}).encode(), json.dumps({"prompt": [2999999999]}).encode(),
                   json.dumps({"prompt": "word " * 50000}).encode()],
             413: [big]}
    for status, bodies in cases.items():
        for body in bodies:
            answer = raw(body)
            assert answer.startswith(b"HTTP/1.1 %d" % status), (status, body[:60], answer[:300])
            assert b'"error":{' in answer, answer[:400]
    answer = raw(b"", headers=b"X-Long: " + b"x" * 60000 + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431"), answer[:200]
    huge = raw(b"x" * (100 << 20))
    assert huge == b"" or huge.startswith(b"HTTP/1.1 413"), huge[:200]
    thread.join(GUARD_S)
    assert beside.get("text") == expected
    assert cluster.weft("status", "--json").ok().json()["jobs"][0]["state"] == "ready"


# ---- keys, TLS, other clients ----

def case_keys():
    """without keys loopback is open; with one every page but the probes needs it; a revoked one is out at once"""
    key = cluster.weft("key", "create", "joe", "-q").ok().out.strip()
    try:
        assert call("GET", "/v1/models")[0] == 401 and call("GET", "/metrics")[0] == 401 and call("GET", "/nothing")[0] == 401
        status, headers, answer = call("POST", "/v1/completions", {"prompt": "x"}, {"Authorization": "Bearer " + key[:-1]})
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer" and answer["error"]["code"] == "invalid_api_key"
        assert call("GET", "/health")[0] == 200 and call("GET", "/ready")[0] in (200, 503)
        with_key = {"Authorization": "Bearer " + key}
        assert call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, with_key)[0] == 200
        assert call("GET", "/v1/models", headers=with_key)[0] == 200
        assert key not in "".join(cluster.logs().values())
        for path in (cluster.state / "coordinator").glob("weft.db*"):
            assert key.encode() not in path.read_bytes(), path
        assert cluster.weft("key", "list", "--json").ok().json()["keys"][0]["name"] == "joe"
        cluster.weft("key", "create", "joe").fails(2, "joe")
        cluster.weft("key", "create", "not a name").fails(2)
    finally:
        cluster.weft("key", "revoke", "joe").ok()
    assert call("GET", "/v1/models", headers={"Authorization": "Bearer " + key})[0] == 200  # open again: no key is left
    cluster.weft("key", "revoke", "joe").fails(3, "joe")


def case_curl():
    """curl, as manuals show it: gathered, streamed, and with an error"""
    curl = shutil.which("curl")
    if not curl:
        raise Skip("curl is not installed")

    def run(*arguments):
        return subprocess.run([curl, "-sS", "--max-time", str(GUARD_S), *arguments], capture_output=True, text=True, check=True).stdout
    url = f"http://{ADDRESS}/v1/chat/completions"
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    answer = json.loads(run(url, "-H", "Content-Type: application/json", "-d", json.dumps(body)))
    assert answer["usage"]["completion_tokens"] == 4
    stream = run("-N", url, "-H", "Content-Type: application/json", "-d", json.dumps({**body, "stream": True}))
    events = [e for e in stream.split("\n\n") if not e.startswith(":")]  # a slow machine lets a comment come first
    assert events[0].startswith("data: {") and events[-2:] == ["data: [DONE]", ""], events
    code = run("-o", "/dev/null", "-w", "%{http_code}", url, "-H", "Content-Type: application/json", "-d", "{")
    assert code == "400"
    large = work / "large.json"
    large.write_bytes(b"x" * (10 << 20))
    said = subprocess.run([curl, "-s", "-o", "/dev/null", "-w", "%{http_code}", url, "-H", "Content-Type: application/json", "--data-binary", f"@{large}"],
                          capture_output=True, text=True, timeout=GUARD_S).stdout
    assert said == "413", said


def openai_client(**more):
    path = os.environ.get("WEFT_TEST_OPENAI", "")
    if path:
        sys.path.insert(0, path)
    try:
        import openai
    except ImportError:
        raise Skip("the Python package openai is not installed (tools/setup openai)") from None
    return openai, openai.OpenAI(base_url=f"http://{ADDRESS}/v1", api_key="none", max_retries=0, timeout=GUARD_S, **more)


def case_openai_client():
    """OpenAI's own Python client: models, chats and completions, gathered and streamed, logprobs, errors by their class"""
    openai, client = openai_client()
    assert [m.id for m in client.models.list()] == ["tiny"]
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=6, temperature=0, logprobs=True, top_logprobs=2, n=2, seed=1)
    assert len(chat.choices) == 2 and chat.usage.completion_tokens == 12 and chat.choices[0].finish_reason == "length"
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    text, usage = "", None
    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, stream=True,
                                                stream_options={"include_usage": True}):
        text += "".join(c.delta.content or "" for c in chunk.choices)
        usage = chunk.usage or usage
    assert text == chat.choices[0].message.content and usage.completion_tokens == 6
    done = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0, echo=True, logprobs=1)
    assert done.choices[0].text.startswith("abc") and done.choices[0].logprobs.token_logprobs[0] is None
    streamed = "".join(c.choices[0].text for c in client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0, stream=True) if c.choices)
    assert "abc" + streamed == done.choices[0].text
    for kind, request in ((openai.NotFoundError, dict(model="none", messages=MESSAGES)), (openai.BadRequestError, dict(model="tiny", messages=MESSAGES, n=99)),
                          (openai.BadRequestError, dict(model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]))):
        try:
            client.chat.completions.create(**request)
            raise AssertionError(f"{kind.__name__} was expected")
        except kind as error:
            assert error.type == "invalid_request_error", error
    cluster.weft("key", "create", "one", "-q").ok()
    try:
        client.models.list()
        raise AssertionError("a key was needed")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"
    finally:
        cluster.weft("key", "revoke", "one", "-q").ok()


def case_two_models():
    """a second name has a listener of its own, and both know both; a taken name is refused; the end of `weft serve` ends it"""
    second = serve(name="other")
    assert sorted(m["id"] for m in call("GET", "/v1/models", at=second)[2]["data"]) == ["other", "tiny"]
    assert post("/v1/completions", model="other", prompt="x", max_tokens=1)["model"] == "other"
    refused("/v1/completions", 400, "model", prompt="x")  # two are served: which?
    cluster.weft("serve", model, "--name", "other", "--listen", "127.0.0.1:0").fails(2, "other")
    cluster.weft("serve", model, "--name", "third", "--listen", ADDRESS).fails(1, ADDRESS.rsplit(":", 1)[1])
    cluster.weft("serve", work / "none.gguf", "--name", "third", "--listen", "127.0.0.1:0", "-q").fails(3)
    process, _ = serving["other"]
    process.send_signal(signal.SIGINT)
    assert process.wait(GUARD_S) == 130
    wait_for("its end", lambda: [m["id"] for m in call("GET", "/v1/models")[2]["data"]] == ["tiny"])

    def closed():
        with contextlib.suppress(OSError):
            dial(second).connect()
            return False
        return True
    wait_for("its listener's end", closed)


def case_worker_killed():
    """a worker is killed while an answer streams: the answer goes on, the same; not ready meanwhile is said as 503"""
    body = dict(prompt="long", max_tokens=4000, temperature=0, ignore_eos=True)
    expected = post("/v1/completions", **body)["choices"][0]["text"]
    got = {}

    def read():
        got["frames"] = events("/v1/completions", **body)[1]
    thread = threading.Thread(target=read)
    thread.start()
    wait_for("the stream", lambda: metric("vllm:num_requests_running") >= 1)
    os.kill(cluster.pid(holder()), signal.SIGKILL)
    thread.join(GUARD_S)
    text = "".join(c["text"] for f in got["frames"] for c in f.get("choices", []))
    assert text == expected, (len(text), len(expected), got["frames"][-1])
    wait_for("readiness", lambda: call("GET", "/ready")[0] == 200)
    seen = {}

    def ask():  # one that was taken before the loss is seen waits, and is served after it
        status, headers, answer = call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
        seen[status] = (headers, answer)
    for name in ("worker-1", "worker-2"):
        os.kill(cluster.pid(name), signal.SIGKILL)
    threads = []

    def is_told():
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        return 503 in seen
    wait_for("503", is_told)
    headers, answer = seen[503]
    assert int(headers["Retry-After"]) >= 1 and answer["error"]["type"] == "server_error", answer
    cluster.weft("up", "-q").ok()
    wait_for("readiness", lambda: call("GET", "/ready")[0] == 200)
    for thread in threads:
        thread.join(GUARD_S)
    assert set(seen) <= {200, 429, 503}, seen
    assert post("/v1/completions", **body)["choices"][0]["text"] == expected


def case_deadline_and_slow_reader():
    """a request that is not answered within its bound is 504; a client that does not read its stream is cut off, alone"""
    other = Cluster(workers=1, env={"WEFT_HTTP_LIMITS": "deadline=1"})
    log = work / "bounds.log"
    process = spawn([WEFT, "serve", model, "--name", "t", "--listen", "127.0.0.1:0", "--json"], log, env=other.env)
    said = wait_for("weft serve", lambda: next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None))
    address = said["address"].split("//")[1]
    worker = other.pid("worker-1")
    os.kill(worker, signal.SIGSTOP)
    try:
        status, _, answer = call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 5}, at=address)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert status == 504 and answer["error"]["code"] == "timeout", answer
    process.send_signal(signal.SIGINT)
    assert process.wait(GUARD_S) == 130
    other.down()

    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stream.connect((ADDRESS.rsplit(":", 1)[0], int(ADDRESS.rsplit(":", 1)[1])))
    body = json.dumps({"messages": MESSAGES, "max_tokens": 16000, "ignore_eos": True, "logprobs": True, "top_logprobs": 20, "stream": True}).encode()
    stream.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    wait_for("the slow reader to be cut off", lambda: "does not read its stream" in cluster.logs()["coordinator.log"])
    wait_for("what it held to be free", idle)
    stream.close()
    post("/v1/completions", prompt="x", max_tokens=2)


def case_error_event():
    """a stream of several prompts whose workers are gone for longer than requests wait ends with an event that says what is missing, and without [DONE]; later
    ones are served; with the only worker drained they are refused"""
    other = Cluster(workers=1, env={"WEFT_RECOVERY_WAIT": "1s"})
    log = work / "event.log"
    process = spawn([WEFT, "serve", model, "--name", "t", "--listen", "127.0.0.1:0", "--context", CONTEXT, "--json"], log, env=other.env)
    said = wait_for("weft serve", lambda: next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None))
    address = said["address"].split("//")[1]
    connection = dial(address)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": ["go on", "and on", "on", "and"], "max_tokens": 16000, "ignore_eos": True, "stream": True}),
                       {"Content-Type": "application/json"})
    stream = connection.getresponse()
    assert stream.status == 200 and stream.readline().startswith(b"data: {"), stream
    worker = other.pid("worker-1")
    os.kill(worker, signal.SIGSTOP)
    try:
        events = [e for e in stream.read().decode().strip().split("\n\n") if e.startswith("data: ")]  # of the first one its empty line is left
    finally:
        os.kill(worker, signal.SIGCONT)
    error = json.loads(events[-1][len("data: "):])["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "server_error" and error["code"] == "not_ready", error
    assert "worker worker-1 lost" in error["message"] and "there is no worker" in error["message"], error
    told = other.logs()["coordinator.log"]
    assert told.count("cancelled: another prompt of its call failed") == 3 and "by its client" not in told, told[-3000:]
    ended = {line.split('finished_reason="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
             for line in call("GET", "/metrics", at=address)[2].splitlines() if line.startswith("vllm:request_success_total{")}
    assert (ended["error"], ended["cancelled"], ended["abort"]) == (1, 3, 0), ended
    wait_for("readiness", lambda: call("GET", "/ready", at=address)[0] == 200)
    ask = {"prompt": "x", "max_tokens": 1}
    assert call("POST", "/v1/completions", ask, at=address)[0] == 200
    other.weft("drain", "worker-1").ok()
    wait_for("no readiness", lambda: call("GET", "/ready", at=address)[0] == 503)
    assert call("POST", "/v1/completions", ask, at=address)[0] == 503
    other.weft("undrain", "worker-1").ok()
    wait_for("readiness", lambda: call("GET", "/ready", at=address)[0] == 200)
    assert call("POST", "/v1/completions", ask, at=address)[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(GUARD_S) == 130
    other.down()


def case_killed_while_not_ready():
    """`weft serve` waits for a coordinator that is killed while nobody can serve, and serves when somebody can again"""
    process, log = serving["tiny"]
    told = log.read_text().count('"address"')
    for name in ("worker-1", "worker-2"):
        cluster.weft("drain", name).ok()
    wait_for("nobody to serve", lambda: call("GET", "/ready")[0] == 503)
    os.kill(cluster.pid("coordinator"), signal.SIGKILL)
    for name in ("worker-1", "worker-2"):
        wait_for("the coordinator to be back", lambda n=name: cluster.weft("undrain", n).code == 0)
    wait_for("weft serve to be back, at another address", lambda: log.read_text().count('"address"') > told or process.poll() is not None)
    assert process.poll() is None, log.read_text()


def case_tls_and_restart():
    """with a certificate every listener speaks TLS; `weft serve` outlives a restart of the coordinator"""
    process, log = serving["tiny"]
    certificate, key = cluster.state / "coordinator/coordinator.crt", cluster.state / "coordinator/coordinator.key"
    for path in (certificate, key):
        shutil.copy(path, work / path.name)
    cluster.weft("down").ok()
    cluster.env.update({"WEFT_HTTP_CERTIFICATE": str(work / "coordinator.crt"), "WEFT_HTTP_KEY": str(work / "coordinator.key")})
    cluster.weft("up", "-q").ok()
    wait_for("weft serve to be back, at an address of TLS", lambda: '"address":"https://' in log.read_text())
    process.send_signal(signal.SIGINT)
    process.wait(GUARD_S)
    log = work / "tls.log"
    process = spawn([WEFT, "serve", model, "--name", "tls", "--listen", "127.0.0.1:0", "--json"], log, env=cluster.env)
    answer = wait_for("weft serve", lambda: next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None))
    assert answer["address"].startswith("https://"), answer
    address = answer["address"].split("//")[1]
    tls = ssl.create_default_context(cafile=str(cluster.state / "coordinator/ca.crt"))
    whole = call("POST", "/v1/completions", {"prompt": "x", "max_tokens": 3, "temperature": 0}, at=address, tls=tls)
    assert whole[0] == 200 and whole[2]["usage"]["completion_tokens"] == 3
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=GUARD_S) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"200" not in plain.recv(4096)
    cluster.weft("down").ok()
    wait_for("weft serve to look for its coordinator", lambda: "trying again: the cluster" in log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(GUARD_S) == 130


harness.run_cases([case_chat, case_same_as_weft_run, case_choices_and_prompts, case_context, case_stop, case_sampler_settings, case_echo_and_logprobs, case_tokens,
                   case_pages, case_metrics, case_client_that_leaves, case_full, case_keep_alive, case_hostile_bodies, case_keys, case_curl,
                   case_openai_client, case_two_models, case_deadline_and_slow_reader,
                   case_worker_killed, case_error_event, case_killed_while_not_ready,
                   case_tls_and_restart])
