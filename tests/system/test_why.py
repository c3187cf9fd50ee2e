"""`weft top`, and `weft why`: who waits for what, since when, of requests and jobs of a cluster whose one worker is frozen or whose engine is held."""
import contextlib
import http.client
import json
import os
import pty
import signal
import subprocess

import harness
from harness import GUARD_S, WEFT, Cluster, Skip, clean_environment, folder, spawn, tiny_model, wait_for

work = folder("why")
model = tiny_model(work, context=32768, layers=24)  # an answer of so many tokens is still under way when it is asked about
hold = work / "hold"
cluster = Cluster(workers=1, env={"WEFT_FAILPOINT": f"engine-hold=file:{hold}"})
weft = cluster.weft


class Request:
    """A `weft run` that goes on for as long as a test needs it."""

    def __init__(self, name):
        self.said, self.told = work / f"{name}.out", work / f"{name}.err"
        with open(self.said, "wb") as out, open(self.told, "wb") as err:
            self.process = subprocess.Popen([str(WEFT), "run", str(model), "-p", "go", "-n", "32000", "--context", "32768"], env=clean_environment(cluster.env), stdout=out, stderr=err)
        harness._processes.append(self.process)
        wait_for("the answer to begin", lambda: self.said.stat().st_size > 0)
        self.id = wait_for("the request to be listed", lambda: [r["id"] for r in reasons() if r["kind"] == "request"])[0]

    def why(self):
        got = reasons(self.id)
        assert len(got) == 1 and got[0]["id"] == self.id and got[0]["kind"] == "request", got
        return got[0]

    def goes_on(self):
        wait_for("the request to go on", lambda: b"goes on in epoch" in self.told.read_bytes())

    def end(self):
        self.process.terminate()
        self.process.wait()
        wait_for("no request to be open", lambda: not [r for r in reasons() if r["kind"] == "request"])


def reasons(*what):
    return weft("why", *what, "--json").ok().json()["reasons"]


def narrow(text):
    for line in text[text.index("WAITER"):].splitlines() if "WAITER" in text else text.splitlines():
        assert len(line) <= 80, f"a line of {len(line)} columns: {line}"


def case_nothing():
    """why of what nobody knows: exit 3; of two things: exit 2; of an idle cluster: an empty list"""
    weft("why", "r-00000000").fails(3, "r-00000000", "weft why")
    weft("why", "a", "b").fails(2, "one request or job")
    assert reasons() == []
    weft("why", "r-00000000", env={"WEFT_STATE": str(work / "nobody")}).fails(5)


def case_running():
    """a running request waits for its leader's next token; its job serves; a name that is nearly right is corrected"""
    request = Request("running")
    try:
        why = request.why()
        assert why["state"] == "running" and why["resume"] is None and why["tokens"] > 0 and why["epoch"] >= 1, why
        first = why["waits"][0]
        assert (first["waiter"], first["waits_for"]) == (request.id, "worker-1") and first["what"].startswith("token "), why
        job = reasons(why["job"])[0]
        assert (job["kind"], job["id"], job["state"]) == ("job", why["job"], "serving") and "1 requests have a replica" in job["text"], job
        weft("why", request.id[:-1]).fails(3, f"did you mean {request.id}?")
        text = weft("why", request.id).ok().out
        assert text.startswith(f"request {request.id} is running for ") and "WAITER" in text, text
        narrow(text)
        listed = weft("why").ok().out
        narrow(listed)
        assert {line.split()[0] for line in listed.splitlines()} == {"NAME", request.id, why["job"]}, listed
    finally:
        request.end()


def case_top():
    """top --json has the rates of a request that runs; on a terminal top draws again until SIGINT ends it"""
    request = Request("top")
    try:
        sample = wait_for("the rates", lambda: next((s for s in [weft("top", "--json").ok().json()] if s["replicas"] and s["replicas"][0]["tokens_per_s"]), None))
        replica, worker, job = sample["replicas"][0], sample["workers"][0], sample["jobs"][0]
        assert replica["tokens_per_s"] > 0 and replica["running"] == 1 and replica["kv_pages_used"] > 0 and replica["leader"] == "worker-1", sample
        assert job["tokens_per_s"] == replica["tokens_per_s"] and job["active_requests"] == 1 and sample["requests"] == {"running": 1, "waiting": 0}, sample
        assert worker["compute_share"] > 0 and worker["rows_per_s"] > 0, sample
    finally:
        request.end()
    screen, terminal = pty.openpty()
    process = subprocess.Popen([str(WEFT), "top"], env=clean_environment(cluster.env), stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.PIPE)
    harness._processes.append(process)
    os.close(terminal)
    seen = b""
    while seen.count(b"\033[H\033[2J") < 3:
        seen += os.read(screen, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while os.read(screen, 4096):
            pass
    assert process.wait(GUARD_S) == 0 and b"WORKER" in seen, seen
    os.close(screen)


def case_submit_role():
    """a submit certificate may ask"""
    elsewhere = {"WEFT_STATE": str(folder("submit"))}
    token = weft("token", "create", "--role", "submit", "--json").ok().json()
    weft("login", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"], "-q", env=elsewhere).ok()
    assert "reasons" in weft("why", "--json", env=elsewhere).ok().json()


def case_frozen_worker():
    """the only worker is frozen: once it is lost the request resumes, and what is missing is named, until it is back"""
    request = Request("frozen")
    pid = cluster.pid("worker-1")
    os.kill(pid, signal.SIGSTOP)
    try:
        why = wait_for("the loss", lambda: next((w for w in [request.why()] if w["resume"] and w["state"] == "resuming"), None))
        assert "worker worker-1 lost" in why["resume"]["cause"] and why["resume"]["stalled_ms"] > 4000, why
        why = wait_for("the search for workers", lambda: next((w for w in [request.why()] if "for workers" in w["text"]), None))
        missing = [w for w in why["waits"] if w["waits_for"] == "worker-1"]
        assert missing and missing[0]["waiter"] == why["job"] and "lost" in missing[0]["what"], why
        assert reasons(why["job"])[0]["state"] == "waiting", why
        text = weft("why", request.id).ok().out
        assert "after: worker worker-1 lost" in text and "stalled for" in text, text
        narrow(text)
    finally:
        os.kill(pid, signal.SIGCONT)
    request.goes_on()
    wait_for("the resume to be over", lambda: request.why()["state"] == "running")
    request.end()


def case_held_engine():
    """an engine that stands still with work pending is named as the reason"""
    if os.environ.get("WEFT_FAILPOINTS") == "false":
        raise Skip("built without fail points")
    request = Request("held")
    hold.touch()
    try:
        why = wait_for("the engine to be named", lambda: next((w for w in [request.why()] if w["resume"]), None))
        assert "worker-1" in why["resume"]["cause"] and "stands still" in why["resume"]["cause"], why
    finally:
        hold.unlink()
    request.goes_on()
    request.end()


def case_over_http():
    """a request over HTTP is known by the X-Request-Id that its client has"""
    log = work / "serve.log"
    process = spawn([WEFT, "serve", model, "--listen", "127.0.0.1:0", "--context", "32768", "--json"], log, env=cluster.env)
    said = wait_for("weft serve", lambda: next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None))
    host, port = said["address"].split("//")[1].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=GUARD_S)
    body = {"model": said["model"], "prompt": "go", "max_tokens": 32000, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", "X-Request-Id": "ticket-4711"})
    why = wait_for("the request", lambda: [r for r in reasons() if r.get("client_id") == "ticket-4711"])
    assert len(why) == 1 and why[0]["id"].startswith("r-"), why
    assert [r["id"] for r in reasons("ticket-4711")] == [why[0]["id"]]
    weft("why", "ticket-4712").fails(3, "did you mean ticket-4711?")
    connection.close()
    wait_for("the client's leaving to be noticed", lambda: weft("why", "ticket-4711").code == 3)
    process.terminate()
    process.wait()


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
