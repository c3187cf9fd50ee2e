"""`weft bench serve`: against weft's own HTTP, and against a small server that answers as servers should not. Nothing here is about speed: what is asserted
are counts, names and the shape of what is printed; the one time is a lower bound."""
import contextlib
import http.server
import json
import re
import signal
import socket
import socketserver
import subprocess
import threading

import harness
from harness import GUARD_S, WEFT, Cluster, clean_environment, command, folder, spawn, tiny_model, wait_for

work = folder("bench-serve")
KEYS = ["version", "url", "model", "api", "requests", "concurrency", "rate", "max_tokens", "seed", "duration_s", "interrupted", "completed", "failed", "cancelled",
        "prompt_tokens", "output_tokens", "uncounted", "requests_per_s", "output_tokens_per_s", "ttft_s", "inter_token_s", "e2e_s"]


def weft(*arguments, env=None):
    return command([WEFT, *arguments], env=env)


def bench(url, *arguments, model="m"):
    return weft("bench", "serve", url, "--json", "-q", *(["--model", model] if model else []), *arguments)


def errors(result):
    return {e["status"]: (e["count"], e["first"]) for e in result["errors"]}


# ---- a server that misbehaves, as the model's name says ----

def chunk(text="", **more):
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}], **more}).encode() + b"\n\n"


USAGE = chunk(usage={"prompt_tokens": 7, "completion_tokens": 3})
GOOD = [chunk(), chunk("a"), chunk("b"), chunk("c"), USAGE, b"data: [DONE]\n\n"]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bodies = []      # of all requests
    hold = threading.Event()  # what those wait for that do not end
    waiting = threading.Semaphore(0)  # one up for each request that waits

    def log_message(self, *_):
        pass

    def begin(self, status=200, kind="text/event-stream", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def chunks(self, pieces, ends=True):
        """As chunked encoding; without the end the connection breaks."""
        self.begin(Transfer_Encoding="chunked")
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
        if ends:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def whole(self, status, kind, body, **headers):
        self.begin(status, kind, Content_Length=str(len(body)), **headers)
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            self.whole(200, "application/json", b'{"object":"list","data":[{"id":"good"},{"id":"other"}]}')
        elif self.path == "/denied/models":
            self.whole(401, "application/json", b'{"error":{"message":"who are you?"}}')
        else:
            self.whole(200, "text/html", b"<html>a page</html>")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["_path"], body["_key"] = self.path, self.headers.get("Authorization")
        self.bodies.append(body)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, "as_" + body["model"])()

    def as_good(self):
        self.chunks(GOOD)

    def as_pieces(self):
        """Several frames a write, frames cut anywhere, comments, all ends of lines, a byte order mark."""
        text = b"\xef\xbb\xbf: hello\r\n\r\n" + b"".join(GOOD[:3]).replace(b"\n", b"\r\n") + b": keep-alive\n\n" + b"".join(GOOD[3:])
        self.chunks([text[i:i + 5] for i in range(0, len(text), 5)])

    def as_single(self):
        self.chunks([b"".join(GOOD)])

    def as_uncounted(self):
        self.chunks(GOOD[:4] + GOOD[5:])

    def as_truncated(self):
        self.chunks(GOOD[:3], ends=False)

    def as_unfinished(self):
        self.chunks(GOOD[:3])

    def as_event(self):
        self.chunks(GOOD[:2] + [b'data: {"error":{"message":"worker \\u001b[1m lost","code":"x"}}\n\n'] + GOOD[5:])

    def as_full(self):
        self.whole(429, "application/json", b'{"error":{"message":"too many"}}', Retry_After="1")

    def as_broken(self):
        self.whole(500, "text/html", b"<h1>\xff no</h1>\n" * 1000)

    def as_html(self):
        self.whole(200, "text/html", b"<html>hello</html>")

    def as_garbage(self):
        self.chunks(GOOD[:2] + [b"data: {no json\n\n"])

    def as_endless(self):
        self.chunks([b"data: " + b"x" * (1 << 16)] * 20)

    def as_late(self):
        self.hold.wait(GUARD_S)
        self.close_connection = True

    def as_slow(self):
        self.begin(Transfer_Encoding="chunked")
        for piece in GOOD[:2]:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.flush()
        self.waiting.release()
        self.hold.wait(GUARD_S)
        self.close_connection = True


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        pass


server = Server(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
URL = f"http://127.0.0.1:{server.server_address[1]}"


# ---- what is counted ----

def case_answers_in_pieces():
    """frames several a read, cut anywhere, with comments and every end of line: tokens as the server's usage says"""
    for name in ("good", "pieces", "single"):
        got = bench(URL, "--requests", 12, "--concurrency", 3, model=name).ok().json()
        assert list(got)[:len(KEYS)] == KEYS, list(got)
        assert (got["completed"], got["failed"], got["errors"]) == (12, 0, []), (name, got)
        assert (got["prompt_tokens"], got["output_tokens"], got["uncounted"]) == (12 * 7, 12 * 3, 0), (name, got)
        assert got["ttft_s"]["n"] == got["e2e_s"]["n"] == 12 and got["inter_token_s"]["n"] == 24, (name, got)
        for times in (got["ttft_s"], got["e2e_s"]):
            assert 0 < times["median"] <= times["p90"] <= times["p99"] <= times["max"], times
        assert got["ttft_s"]["max"] <= got["e2e_s"]["max"] <= got["duration_s"], got
    got = bench(URL, "--requests", 2, model="uncounted").ok().json()
    assert (got["output_tokens"], got["uncounted"]) == (2 * 3, 2), got


def case_what_is_sent():
    """bodies: the API's path, prompts in order from a file, fields of --body over them, seed, key"""
    prompts = work / "prompts.txt"
    prompts.write_text("one\n\n  two Grüße \n")
    Handler.bodies.clear()
    bench(URL, "--requests", 3, "--concurrency", 1, "-f", prompts, "-n", 9, "--seed", 5, "--key", "sk-1", model="good").ok()
    assert [b["messages"] for b in Handler.bodies] == [[{"role": "user", "content": p}] for p in ("one", "  two Grüße", "one")], Handler.bodies
    first = Handler.bodies[0]
    assert first["_path"] == "/v1/chat/completions" and first["_key"] == "Bearer sk-1" and first["stream"] is True and first["max_tokens"] == 9, first
    assert first["stream_options"] == {"include_usage": True} and [b["seed"] for b in Handler.bodies] == [5, 6, 7]
    Handler.bodies.clear()
    lines = work / "prompts.jsonl"
    lines.write_text('{"prompt":"p"}\n')
    bench(URL + "/other/", "--requests", 1, "-f", lines, "--api", "completions", "--body", '{"ignore_eos":true,"seed":null,"max_tokens":2}', model="good").ok()
    assert Handler.bodies[0]["prompt"] == "p" and Handler.bodies[0]["_path"] == "/other/completions", Handler.bodies
    assert Handler.bodies[0]["ignore_eos"] is True and "seed" not in Handler.bodies[0] and Handler.bodies[0]["max_tokens"] == 2, Handler.bodies
    Handler.bodies.clear()
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines.write_text(json.dumps({"messages": messages}))
    assert bench(URL, "--requests", 1, "-f", lines, model=None).ok().json()["model"] == "good"  # the first that the server offers
    assert Handler.bodies[0]["messages"] == messages
    Handler.bodies.clear()
    bench(URL, "--requests", 4, "--words", 20, "--concurrency", 1, model="good").ok()
    made = [b["messages"][0]["content"] for b in Handler.bodies]
    assert len(set(made)) == 4 and all(len(m.split()) == 20 for m in made), made
    Handler.bodies.clear()
    bench(URL, "--requests", 4, "--words", 20, "--concurrency", 1, model="good").ok()
    assert [b["messages"][0]["content"] for b in Handler.bodies] == made  # the seed's


def case_poisson():
    """arrivals at random times: all are sent, also when fewer clients than arrivals are there"""
    for clients in ([], ["--concurrency", 1]):
        got = bench(URL, "--requests", 20, "--rate", 2000, *clients, model="good").ok().json()
        assert got["completed"] == 20 and got["rate"] == 2000 and got["concurrency"] == (1 if clients else 20), got


def case_failures():
    """truncated, unfinished, error event, 429, 500, a page, no JSON, an event without end: each is counted under its name, with what was said"""
    expected = {"truncated": ("truncated", "2 events with text"), "unfinished": ("truncated", "without [DONE]"), "event": ("error event", "worker  [1m lost"),
                "full": ("429", "too many"), "broken": ("500", "<h1>"), "html": ("malformed", "no event stream"), "garbage": ("malformed", "{no json"),
                "endless": ("malformed", "longer than")}
    for name, (status, words) in expected.items():
        result = bench(URL, "--requests", 2, "--concurrency", 2, model=name)
        assert result.code == 1, result
        got = result.json()
        count, first = errors(got).get(status, (0, ""))
        assert (got["completed"], got["failed"], count) == (0, 2, 2) and words in first, (name, got)
    shown = weft("bench", "serve", URL, "--requests", 2, "--model", "full", "-q")
    assert shown.code == 1 and re.search(r"^429 +2 +too many$", shown.out, re.M), shown


def case_retry_after():
    """a client that is told Retry-After waits as long before its next request"""
    got = bench(URL, "--requests", 3, "--concurrency", 1, model="full").json()
    assert errors(got)["429"][0] == 3 and got["duration_s"] >= 2, got


def case_slow():
    """a request that takes too long is a timeout; SIGINT prints what there is and ends with 130"""
    got = bench(URL, "--requests", 1, "--timeout", "300ms", model="late").json()
    assert errors(got)["timeout"][0] == 1, got
    process = subprocess.Popen([str(WEFT), "bench", "serve", URL, "--model", "slow", "--json", "-q", "--concurrency", "2"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=clean_environment())
    for _ in range(2):
        assert Handler.waiting.acquire(timeout=GUARD_S)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=GUARD_S)
    got = json.loads(out)
    assert process.returncode == 130 and got["interrupted"] and (got["completed"], got["failed"], got["cancelled"]) == (0, 0, 2), (process.returncode, got, err)
    Handler.hold.set()


def case_goodput():
    """goodput counts the requests within all limits: none within a microsecond, all within an hour"""
    for limits, good in (("ttft=1h,itl=1h,e2e=1h", 4), ("ttft=1us", 0), ("ttft=1h,e2e=1us", 0)):
        got = bench(URL, "--requests", 4, "--slo", limits, model="good").ok().json()
        assert got["good"] == good and (got["goodput_requests_per_s"] > 0) == (good > 0), (limits, got)
    assert "goodput" in weft("bench", "serve", URL, "--requests", 2, "--slo", "e2e=1h", "-q").ok().out


def case_usage():
    """what is wrong on the command line is 2; nobody there 5, denied 6, no file 3"""
    weft("bench", "serve").fails(2, "usage: weft bench serve URL")
    for bad in (["ftp://x"], [URL, "--slo", "fast"], [URL, "--api", "images"], [URL, "--body", "[1]"], [URL, "--key", "a b"], [URL, "--requests", 0],
                [URL, "--model", b"\xff".decode(errors="surrogateescape")]):
        weft("bench", "serve", *bad).fails(2)
    weft("bench", "serve", URL, "-f", work / "none.txt").fails(3, "none.txt")
    wrong = work / "wrong.jsonl"
    wrong.write_text('{"prompt":"x"}\n{"text":"y"}\n')
    weft("bench", "serve", URL, "-f", wrong).fails(2, "line 2")
    (work / "bytes.txt").write_bytes(b"ok\n\xff\n")
    weft("bench", "serve", URL, "-f", work / "bytes.txt").fails(2, "line 2")
    weft("bench", "serve", URL + "/denied").fails(6, "who are you?")
    weft("bench", "serve", URL + "/page").fails(1, "--model")
    with socket.socket() as nobody:  # bound, so that the port is nobody else's, but not listening
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        weft("bench", "serve", f"127.0.0.1:{port}").fails(5, str(port))
        assert bench(f"127.0.0.1:{port}", "--requests", 2).code == 5
    assert URL in weft("bench", "serve", URL, "--dry-run").ok().out
    assert "Poisson" in weft("bench", "serve", "--help").ok().out
    assert "libcurl" in weft("--version").ok().out


def case_weft():
    """weft's own HTTP: chat and completions, counted as its metrics count"""
    model = tiny_model(work)
    cluster = Cluster(workers=1)
    log = work / "serve.log"
    process = spawn([WEFT, "serve", model, "--name", "tiny", "--listen", "127.0.0.1:0", "--json"], log, env=cluster.env)
    said = wait_for("weft serve", lambda: next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None))
    for api in ("chat", "completions"):
        got = bench(said["address"], "--requests", 20, "--concurrency", 6, "-n", 8, "--words", 5, "--api", api, "--body", '{"ignore_eos":true}', model=None).ok().json()
        assert (got["model"], got["completed"], got["output_tokens"], got["errors"]) == ("tiny", 20, 160, []), got
        assert got["uncounted"] == 0 and got["prompt_tokens"] > 0 and got["system_fingerprint"].startswith("fp_"), got
    table = weft("bench", "serve", said["address"], "--requests", 4, "-n", 2, "--words", 5, "-q").ok().out
    assert re.search(r"^first token +\d", table, re.M) and "4 of 4 requests completed" in table, table
    got = bench(said["address"], "--requests", 2, model="none").json()
    assert errors(got)["404"][0] == 2, got
    process.send_signal(signal.SIGINT)
    process.wait(GUARD_S)
    cluster.down()


harness.run_cases([case_answers_in_pieces, case_what_is_sent, case_poisson, case_failures, case_retry_after, case_slow, case_goodput, case_usage, case_weft])
