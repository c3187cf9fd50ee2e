"""Every verb once on a cluster of three workers: exit codes, what is printed where, the objects that --json prints (CONTRACT)."""
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import harness
from harness import Cluster, WEFT, WORKER, clean_environment, command, folder, tiny_model, wait_for

work = folder("verbs")
model = tiny_model(work)
cluster = Cluster(start=False)
weft = cluster.weft
LAYOUT = {"dp": int, "pp": int, "tp": int}
ALONE = ("--dp", 1, "--pp", 1, "--tp", 1)
SECRETS = []  # tokens and prompts of this run; none may be in a log


def shape(value, wanted, path="object"):
    """Every key of `wanted` is in value with this type, or shape, or (in a list of one) shape of each element."""
    if isinstance(wanted, dict):
        assert isinstance(value, dict), f"{path} is {value!r}"
        for key, inner in wanted.items():
            assert key in value, f"{path} lacks '{key}': it has {list(value)}"
            shape(value[key], inner, f"{path}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(value, list) and value, f"{path} is {value!r}"
        for i, element in enumerate(value):
            shape(element, wanted[0], f"{path}[{i}]")
    else:
        kinds = (int, float) if wanted is float else (wanted,)
        assert isinstance(value, kinds) and (wanted is bool or not isinstance(value, bool)), f"{path} is {value!r}, not {wanted.__name__}"


def narrow(text):
    for line in text.splitlines():
        assert len(line) <= 80, f"a line of {len(line)} columns: {line}"


def case_no_cluster():
    """verbs that need a cluster say how to start one and exit with 5"""
    for words in (["status"], ["run", model, "-p", "x"], ["plan", model], ["drain", "worker-1"], ["token", "create"]):
        weft(*words).fails(5, "weft up")


def case_dry_up():
    """up --dry-run starts nothing"""
    assert "3 workers" in weft("up", "--workers", 3, "--dry-run", "-q").ok().out
    assert not (cluster.state / "up").exists()


def case_up():
    """up starts three ready workers, --json says so"""
    up = weft("up", "--workers", 3, "--json", "-q").ok()
    shape(up.json(), {"state": str, "workers": int})
    assert up.err == "", up


def case_up_on_given_cpus():
    """up on some of the host's CPUs: its workers have no more threads than those, and none runs elsewhere"""
    cpu = max(os.sched_getaffinity(0))
    small = Cluster(start=False)
    command(["taskset", "-c", cpu, WEFT, "up", "-q"], env=small.env).ok()
    assert small.member("worker-1")["threads"] == 1
    for status in pathlib.Path(f"/proc/{small.pid('worker-1')}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gRPC's threads come and go
            assert f"Cpus_allowed_list:\t{cpu}\n" in status.read_text(), status
    small.weft("down", "-q").ok()


def case_up_again():
    """up again is a no-op that says so"""
    before = cluster.pid("coordinator")
    assert "running already" in weft("up", "--workers", 3).ok().err
    assert cluster.pid("coordinator") == before


def case_status():
    """status: every member with every field, exit 0"""
    status = weft("status", "--json").ok().json()
    shape(status, {"cluster": str, "generation": int, "release": str, "ca_hash": str, "jobs": list,
                   "members": [{"name": str, "state": str, "address": str, "epoch": int, "isa": str, "threads": int, "memory_bytes": int, "shards": list}]})
    assert sorted(m["name"] for m in status["members"]) == ["worker-1", "worker-2", "worker-3"]
    assert all(m["state"] == "ready" for m in status["members"]), status


def case_plan():
    """plan: layout, stages, prediction; nothing is loaded"""
    plan = weft("plan", model, "--json").ok().json()
    shape(plan, {"layout": LAYOUT, "violations": list, "definition": str,
                 "predicted": {"prefill_tokens_per_s": float, "decode_tokens_per_s": float, "bound": str},
                 "stages": [{"layers": [int], "ranks": [{"worker": str, "units": dict, "weight_bytes": int, "kv_bytes_per_token": int, "peak_bytes": int}]}]})
    assert plan["predicted"]["bound"] in ("memory", "compute", "link")
    assert plan["stages"][0]["layers"][0] == 0 and plan["stages"][-1]["layers"][1] == 3
    assert cluster.status()["jobs"] == []
    text = weft("plan", model, "--pp", 2, "--tp", 1).ok().out
    assert "layout dp1 pp2 tp1,1" in text and "predicted:" in text, text


def case_plan_impossible():
    """plan: an impossible layout is exit 2 with the legal ones near it; --json has the violations"""
    weft("plan", model, "--tp", 4).fails(2, "4 workers", "--tp 3")
    refused = weft("plan", model, "--tp", 40, "--json")
    assert refused.code == 2 and refused.json()["violations"], refused


def case_run():
    """run: text on stdout, progress and speed on stderr"""
    SECRETS.append("xylophone quartz")
    answer = weft("run", model, "-p", "xylophone quartz", "-n", 8).ok()
    assert answer.out.strip() and "digest" in answer.err and "digest" not in answer.out, answer
    assert "\x1b" not in answer.err and "\r" not in answer.err, "terminal sequences on a file"


def case_run_json():
    """run --json: one object with every field; the same seed gives the same tokens"""
    words = ["run", model, "-p", "hello there", "-n", 6, "--temp", 0.9, "--seed", 42, "--json"]
    one = weft(*words).ok().json()
    shape(one, {"model": str, "text": str, "tokens": [int], "prompt_tokens": int, "finish_reason": str, "digest": str, "layout": LAYOUT, "workers": [str],
                "definition": str, "seed": int,
                "timings": {"load_s": float, "prefill_s": float, "prefill_tokens_per_s": float, "decode_tokens_per_s": float}})
    assert one["seed"] == 42 and one["finish_reason"] in ("stop", "length") and re.fullmatch("[0-9a-f]{32}", one["digest"]), one
    two = weft(*words).ok().json()
    assert (two["tokens"], two["digest"]) == (one["tokens"], one["digest"])
    other = weft(*words[:-3], "--seed", 43, "--json").ok().json()
    assert other["tokens"] != one["tokens"]


def case_run_top_logprobs():
    """run --top-logprobs: the best at each token, in order, with their texts, the same on every layout; without --json refused"""
    words = ["run", model, "-p", "hello there", "-n", 6, "--top-logprobs", 3, "--json"]
    one = weft(*words).ok().json()
    shape(one, {"logprobs": [{"id": int, "logprob": float, "top": [{"id": int, "logprob": float, "text": str}]}]})
    assert [p["id"] for p in one["logprobs"]] == one["tokens"], one
    for place in one["logprobs"]:
        best = [t["logprob"] for t in place["top"]]
        assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] < 0, place
        assert (place["top"][0]["id"], best[0]) == (place["id"], place["logprob"]), place  # greedy
    assert "".join(p["top"][0]["text"] for p in one["logprobs"]) == one["text"], one
    assert weft(*words, "--tp", 3).ok().json()["logprobs"] == one["logprobs"]
    assert "logprobs" not in weft("run", model, "-p", "x", "-n", 2, "--json").ok().json()
    weft("run", model, "-p", "x", "--top-logprobs", 3).fails(2, "--json")


def case_quiet():
    """run --quiet prints nothing on stderr"""
    assert weft("run", model, "-p", "hello", "-n", 3, "--quiet").ok().err == ""


def case_run_file():
    """run -f: a prompt from a file and from stdin give the same digest as -p"""
    path = work / "prompt.txt"
    path.write_text("the very same")
    digests = {weft("run", model, "-n", 3, "--json", *more).ok().json()["digest"] for more in (["-p", "the very same"], ["-f", path])}
    digests.add(weft("run", model, "-n", 3, "--json", "-f", "-", stdin=b"the very same").ok().json()["digest"])
    assert len(digests) == 1, digests


def case_run_bad_prompt():
    """run: a prompt with a NUL byte, one that cannot be read and two of them are refused, none is cut or dropped"""
    path = work / "cut.txt"
    path.write_bytes(b"the first\0the rest")
    weft("run", model, "-f", path, "-q").fails(2, "byte 9", "NUL")
    weft("run", model, "-f", "-", "-q", stdin=b"\0").fails(2, "byte 0", "NUL")
    weft("chat", model, "-q", stdin=b"one\0two\n").fails(2, "byte 3", "NUL")
    weft("run", model, "-p", "one", "-f", path, "-q").fails(2, "not both")
    unreadable = os.open(work, os.O_RDONLY)
    got = subprocess.run([str(WEFT), "run", str(model), "-f", "-", "-q"], env=clean_environment(cluster.env), stdin=unreadable, capture_output=True,
                         timeout=harness.GUARD_S)
    os.close(unreadable)
    assert got.returncode == 2 and b"directory" in got.stderr, got


def case_no_dry_run():
    """--dry-run is refused by verbs that would have to ignore it"""
    for verb in ("run", "chat", "bench", "verify", "perplexity"):
        weft(verb, model, "--dry-run").fails(2, "dry-run")
    assert "would" in weft("login", "nowhere:1", "--token", "t", "--ca-hash", "h", "--dry-run").ok().out


def case_run_stop():
    """run --stop ends the answer before the stop text"""
    whole = weft("run", model, "-p", "abc", "-n", 12, "--json").ok().json()["text"]
    stop = whole[len(whole) // 2:][:2]
    cut = weft("run", model, "-p", "abc", "-n", 12, "--stop", stop, "--json").ok().json()
    assert cut["finish_reason"] == "stop" and cut["text"] == whole[:whole.index(stop)], (whole, stop, cut)


def case_job_columns():
    """status: tables fit 80 columns with several jobs"""
    weft("run", model, "-p", "x", "-n", 2, "--pp", 3, "-q").ok()
    status = weft("status").ok()
    narrow(status.out)
    assert status.out.splitlines()[0].startswith("NAME") and status.out.splitlines()[0].endswith("AGE"), status
    shape(cluster.status(), {"jobs": [{"id": str, "kind": str, "state": str, "layout": str, "epoch": int, "model": str}]})
    assert any(m["shards"] for m in cluster.status()["members"])


def case_top():
    """top: once where it is no terminal, at most 80 columns; --json is one sample"""
    text = weft("top").ok().out
    narrow(text)
    assert [line.split()[0] for line in text.splitlines() if line and line.split()[0].isupper()] == ["WORKER", "REPLICA", "JOB"], text
    sample = weft("top", "--json").ok().json()
    shape(sample, {
        "cluster": str, "generation": int, "uptime_ms": int, "requests": {"running": int, "waiting": int}, "loop_lag_ms": float,
        "workers": [{"name": str, "state": str, "stalls": list}],
        "replicas": [{"job": str, "replica": int, "epoch": int, "leader": str, "running": int, "waiting": int, "slots": int, "kv_pages": int,
                      "kv_pages_used": int, "kv_pages_cached": int, "preemptions": int}],
        "jobs": [{"id": str, "state": str, "layout": str, "epoch": int, "active_requests": int, "model": str}]})
    assert {w["name"] for w in sample["workers"]} == {"worker-1", "worker-2", "worker-3"}, sample
    for worker in sample["workers"]:
        assert all(worker[k + "_share"] is None or worker[k + "_share"] >= 0 for k in ("compute", "wait", "wire", "seal")), worker
    weft("top", "worker-1").fails(2, "not expected")


def case_chat():
    """chat: a line a message, the history goes along, it ends with the input"""
    answer = weft("chat", model, "-n", 6, "-q", stdin=b"Say hello.\nAgain.\n").ok()
    assert len([line for line in answer.out.splitlines() if line]) >= 2, answer
    one = weft("chat", model, "-n", 6, "-q", stdin=b"Again.\n").ok()
    assert not answer.out.endswith(one.out), "the second answer does not depend on what was said before"


def case_chat_template():
    """chat and run --chat on a model without a template are refused with what to do"""
    path = work / "plain.gguf"
    path.write_bytes(model.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.else_template"))
    weft("run", path, "-p", "x", "--chat", "-q").fails(2, "chat template")
    weft("chat", path, "-q", stdin=b"x\n").fails(2, "chat template")


def case_perplexity():
    """perplexity: --json has its three figures, and they fit each other"""
    text = work / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    got = weft("perplexity", model, "-f", text, "--ctx", 64, "--json").ok().json()
    shape(got, {"perplexity": float, "nll_mean": float, "tokens_scored": int, "definition": str})
    assert abs(got["perplexity"] / 2.718281828459045 ** got["nll_mean"] - 1) < 1e-6 and got["tokens_scored"] > 0, got
    same = weft("perplexity", model, "-f", text, "--ctx", 64, "--json", "--pp", 2).ok().json()
    assert same["nll_mean"] == got["nll_mean"], "the layout changed a result"
    assert "perplexity" in weft("perplexity", model, "-f", text, "--ctx", 64, "-q").ok().out


def case_bench():
    """bench: machine and rows with every field"""
    got = weft("bench", model, "-p", 32, "-n", 8, "-r", 2, "--json", "-q").ok().json()
    shape(got, {"machine": {"cpu": str, "isa": str, "threads": int, "read_bytes_per_s": float}, "definition": str,
                "rows": [{"test": str, "depth": int, "streams": int, "layout": str, "threads": int, "tokens_per_s": float, "tokens_per_s_all": [float],
                          "wire_bytes_per_token": float}]})
    assert [r["test"] for r in got["rows"]] == ["pp32", "tg8"]
    shape(got["rows"][1], {"roof_tokens_per_s": float, "roof_fraction": float})
    narrow(weft("bench", model, "-p", 16, "-n", 4, "-r", 1, "-q").ok().out.split("\n\n")[0])
    weft("bench", model, "-p", 0, "-n", 0).fails(2)
    counts = list(range(1, min(2, len(os.sched_getaffinity(0))) + 1))
    got = weft("bench", model, "-p", 16, "-n", 4, "-r", 1, "--threads", ",".join(map(str, counts)), "--json", "-q").ok().json()
    assert [(r["test"], r["threads"]) for r in got["rows"]] == [(test, n) for n in counts for test in ("pp16", "tg4")]
    for wrong in ("0", "1,", "two", "100000"):
        weft("bench", model, "-t", wrong).fails(2, "--threads", wrong)


def bench_until(n):
    """A long bench on one worker; SIGTERM when n of its requests are done: it ends, and they do."""
    log = cluster.state / "coordinator.log"
    at = log.stat().st_size
    process = subprocess.Popen([str(w) for w in (WEFT, "bench", model, "-p", 16, "-n", 200, "-r", 1000, *ALONE, "-q")],
                               env=clean_environment(cluster.env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    harness._processes.append(process)
    wait_for(f"{n} requests", lambda: process.poll() is not None or log.read_bytes()[at:].count(b" prompt tokens, ") >= n)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=harness.GUARD_S)
    assert (process.returncode, out, err) == (130, b"", b"weft: interrupted\n"), (process.returncode, out, err)
    wait_for("its requests to end", lambda: weft("top", "--json").ok().json()["requests"] == {"running": 0, "waiting": 0})


def case_bench_interrupted():
    """bench: SIGTERM ends it with 130, while it computes and while it waits for the members' counters"""
    used = weft("run", model, "-p", "x", "-n", 1, *ALONE, "--json").ok().json()["workers"]
    silent = cluster.pid(next(name for name in ("worker-1", "worker-2", "worker-3") if name not in used))
    bench_until(5)
    os.kill(silent, signal.SIGSTOP)  # its counters are waited for, between the first request and the second
    try:
        bench_until(1)
    finally:
        os.kill(silent, signal.SIGCONT)
    cluster.wait_members(3)


def case_verify():
    """verify: every layout that three workers allow, one digest"""
    got = weft("verify", model, "-n", 4, "--json", "-q").ok().json()
    shape(got, {"layouts": [{"layout": str}], "equal": bool, "definition": str})
    ran = [v["layout"] for v in got["layouts"] if v["digest"]]
    assert got["equal"] and {"dp1 pp1 tp1", "dp1 pp1 tp2", "dp1 pp1 tp3", "dp1 pp2 tp1", "dp1 pp3 tp1", "dp2 pp1 tp1"} <= set(ran), got
    assert len({v["digest"] for v in got["layouts"] if v["digest"]}) == 1


def case_verify_refused():
    """verify --layouts LIST: one that is impossible is exit 2, told in the table"""
    got = weft("verify", model, "-n", 2, "--layouts", "tp1,tp40", "-q")
    assert got.code == 2 and "attention units" in got.out and len(got.err.splitlines()) == 1, got
    weft("verify", model, "--layouts", "fast").fails(2, "pp2tp3")


def case_drain():
    """drain: the worker takes no new work and says why, be it in bytes that are no UTF-8; undrain gives it back"""
    weft("drain", "worker-2", "--reason", "not \udcff text", "-q").ok()  # the byte 0xff
    assert cluster.member("worker-2")["reason"] == "not \ufffd text" and "not \ufffd text" in weft("status").ok().out
    weft("drain", "worker-2", "--reason", "new memory", "-q").ok()
    cluster.wait_states({"worker-2": ("draining",)}, "worker-2 to drain")
    assert cluster.member("worker-2")["reason"] == "new memory"
    assert "new memory" in weft("status").out
    got = weft("run", model, "-p", "x", "-n", 2, "--tp", 2, "--json", "-q").ok().json()
    assert "worker-2" not in got["workers"], got
    weft("run", model, "-p", "x", "-n", 2, "--tp", 3, "-q").fails(2, "3 workers")
    weft("undrain", "worker-2", "-q").ok()
    cluster.wait_states({"worker-2": ("ready", "serving")}, "worker-2 to be back")
    assert weft("run", model, "-p", "x", "-n", 2, "--tp", 3, "--json", "-q").ok().json()["layout"]["tp"] == 3


def case_up_drained():
    """up waits for no worker that is drained: it names them, and is exit 4 where all are; the cluster is up, so that undrain can be said"""
    drained = Cluster(workers=2)
    drained.weft("drain", "worker-1", "-q").ok()
    drained.weft("down", "-q").ok()
    assert drained.weft("up", "--workers", 2, "--json").ok().json()["drained"] == ["worker-1"]
    drained.weft("drain", "worker-2", "-q").ok()
    drained.weft("down", "-q").ok()
    drained.weft("up", "--workers", 2, "-q").fails(4, "weft undrain worker-")
    drained.weft("undrain", "worker-2", "-q").ok()
    drained.wait_states({"worker-1": ("draining",), "worker-2": ("ready",)}, "worker-2 to be back")
    assert "running already" in drained.weft("up").ok().err
    drained.down()


def case_token():
    """token create: the complete line, --json with its parts; --dry-run makes none"""
    line = weft("token", "create", "-q").ok().out.split()
    assert line[0] == "weft-worker" and line[1::2] == ["--join", "--token", "--ca-hash"] and line[6].startswith("sha256:"), line
    SECRETS.append(line[4])
    login = weft("token", "create", "--role", "admin", "--ttl", "5s").ok().out.split()
    assert login[:2] == ["weft", "login"] and login[3::2] == ["--token", "--ca-hash"], login
    SECRETS.append(login[4])
    parts = weft("token", "create", "--json").ok().json()
    shape(parts, {"token": str, "ca_hash": str, "join_address": str, "role": str, "expires": int})
    SECRETS.append(parts["token"])
    assert parts["ca_hash"] == line[6]
    assert "would" in weft("token", "create", "--dry-run").ok().out


def case_login():
    """login makes another account an admin; without its certificate it is nobody"""
    home = folder("login")
    elsewhere = {"WEFT_STATE": str(home)}
    token = weft("token", "create", "--role", "admin", "--json").ok().json()
    SECRETS.append(token["token"])
    weft("status", env=elsewhere).fails(5)
    weft("login", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"], env=elsewhere).ok()
    assert len(weft("status", "--json", env=elsewhere).ok().json()["members"]) == 3
    for path in home.rglob("*.key"):
        assert path.stat().st_mode & 0o077 == 0, f"{path} is readable by others"


def case_submit_role():
    """a submit certificate may run and look, not administer: exit 6"""
    elsewhere = {"WEFT_STATE": str(folder("submit"))}
    token = weft("token", "create", "--role", "submit", "--json").ok().json()
    weft("login", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"], "-q", env=elsewhere).ok()
    weft("run", model, "-p", "x", "-n", 2, "-q", env=elsewhere).ok()
    weft("status", "-q", env=elsewhere).ok()
    weft("token", "create", env=elsewhere).fails(6)
    weft("drain", "worker-1", env=elsewhere).fails(6)


def case_probe():
    """probe: 0 serving, 1 arguments, 2 connect, 3 rpc, as grpc_health_probe"""
    control = cluster.endpoint("control")
    assert weft("probe", control).ok().out == "status: SERVING\n"
    weft("run", model, "-p", "x", "-n", 2, "--tp", 3, "-q").ok()
    for member in cluster.status()["members"]:
        weft("probe", member["address"]).ok()
    weft("probe").fails(1)
    weft("probe", "127.0.0.1:1").fails(2, "127.0.0.1:1")
    weft("probe", control, "--service", "no.such.Service").fails(3, "no.such.Service")
    weft("probe", control, env={"WEFT_STATE": str(work / "nobody")}).fails(3, "weft login")


def case_doctor():
    """doctor: a line a check, --json the same, exit 0 while nothing is wrong"""
    got = weft("doctor", "--json").ok().json()
    shape(got, {"checks": [{"check": str, "ok": bool, "text": str}], "problems": int})
    assert all(0 <= time.time() - m["measured"]["since"] < 3600 for m in cluster.status()["members"])
    assert {f"member worker-{i}" for i in (1, 2, 3)} <= {c["check"] for c in got["checks"]}
    assert weft("doctor").ok().out.startswith("CHECK")
    bf16 = [c["text"] for c in got["checks"] if c["check"] == "bf16"]
    assert len(bf16) == 1 and bf16[0].startswith(("vdpbf16ps (", "two f32 fma a pair (")), bf16
    gpu = [c for c in got["checks"] if c["check"] == "gpu"]
    devices = command([WORKER, "--devices"]).ok().out.splitlines()
    assert [c["text"] for c in gpu] == devices and devices, (gpu, devices)
    if not pathlib.Path("/dev/nvidiactl").exists():
        assert len(gpu) == 1 and gpu[0]["ok"] and gpu[0]["text"].startswith("no device: no CUDA driver: libcuda.so.1"), gpu
        command([WORKER, "--device", "cuda"]).fails(3, "no device", "libcuda.so.1")


def case_help():
    """--help of every verb, --version of every program, exit 0"""
    overview = weft("--help").ok().out
    verbs = re.findall(r"^  (\S+) ", overview, re.M)
    assert {"up", "down", "token", "revoke", "login", "status", "top", "doctor", "plan", "run", "chat", "verify", "perplexity", "bench", "drain", "undrain",
            "probe"} <= set(verbs)
    for verb in verbs:
        assert f"weft {verb}" in weft(verb, "--help").ok().out
    for program in (WEFT, harness.COORDINATOR, harness.WORKER):
        version = harness.command([program, "--version"]).ok().out
        assert re.search(r"\d+\.\d+\.\d+", version) and "protocol" in version and "numerics" in version, version
        assert "libraries: gRPC" in version, version
    assert "UCX" in version and "instruction sets: generic" in version and "CUDA" in version, version
    assert "WEFT_THREADS" in harness.command([harness.WORKER, "--help"]).ok().out


def case_interrupt():
    """SIGINT cancels the request on the cluster, not only the client: exit 130"""
    slow = tiny_model(work, "slow.gguf", context=65536)
    process = subprocess.Popen([str(WEFT), "run", str(slow), "-p", "go", "-n", "60000", "-q"], env=clean_environment(cluster.env), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.read(1), process.stderr.read()
    assert any(j["active_requests"] for j in cluster.status()["jobs"])
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # a second one changes nothing
    out, err = process.communicate(timeout=harness.GUARD_S)
    assert process.returncode == 130 and len(err.decode().strip().splitlines()) == 1, (process.returncode, err)
    wait_for("the cluster to drop the request", lambda: not any(j["active_requests"] for j in cluster.status()["jobs"]))


def case_chat_interrupt():
    """chat is left at its prompt by SIGINT and SIGTERM: exit 130"""
    for number in (signal.SIGINT, signal.SIGTERM):
        terminal, end = os.openpty()
        process = subprocess.Popen([str(WEFT), "chat", str(model), "-q"], env=clean_environment(cluster.env), stdin=end, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        assert process.stderr.read(1) == b">"
        process.send_signal(number)
        err = process.communicate(timeout=harness.GUARD_S)[1]
        assert process.returncode == 130 and b"interrupted" in err, (process.returncode, err)
        os.close(end)
        os.close(terminal)


def case_own_cluster():
    """run --up 2 has a cluster for itself and leaves nothing"""
    before = set(os.listdir("/tmp"))
    got = weft("run", model, "-p", "x", "-n", 3, "--up", 2, "--tp", 2, "--json", "-q", env={"WEFT_STATE": str(work / "none")}).ok().json()
    assert sorted(got["workers"]) == ["worker-1", "worker-2"]
    left = [n for n in set(os.listdir("/tmp")) - before if n.startswith("weft-up-")]
    assert not left, left


def beside_weft(place, **daemons):
    """A weft in a folder of its own, with these beside it: a program of the build, or None: one that writes its pid and never comes up."""
    place.mkdir(parents=True)
    shutil.copy(WEFT, place / "weft")
    for name, program in daemons.items():
        path = place / f"weft-{name}"
        if program is not None:
            path.symlink_to(program)
        else:
            path.write_text(f"#!/bin/sh\necho $$ >{place}/pid.new && mv {place}/pid.new {place}/pid && exec sleep 300\n")
            path.chmod(0o755)
    return place / "weft"


def interrupted_start(place, numbers, *words, **daemons):
    """A verb that starts daemons, until the one that never comes up is there; then the signals. Nothing is left of what it started."""
    temporary, state, pid = place / "tmp", place / "state", place / "pid"
    program = beside_weft(place, **daemons)
    temporary.mkdir()
    process = subprocess.Popen([str(w) for w in (program, *words, "-q")], env=clean_environment({"TMPDIR": str(temporary), "WEFT_STATE": str(state)}),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    harness._processes.append(process)
    wait_for("the daemon", lambda: process.poll() is not None or pid.exists())
    started = int(pid.read_text())
    for number in numbers:
        process.send_signal(number)
    out, err = process.communicate(timeout=harness.GUARD_S)
    assert (process.returncode, out, err) == (130, b"", b"weft: interrupted\n"), (words, process.returncode, out, err)
    assert not os.path.exists(f"/proc/{started}/exe"), words
    assert not list(temporary.iterdir()) and not (state / "up").exists(), words


def case_start_interrupted():
    """a signal while daemons come up: exit 130, and nothing is left of them"""
    run = ("run", model, "-p", "x", "--up", 1)
    for numbers in ((signal.SIGINT,), (signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT)):
        place = work / "-".join(map(str, ("interrupted", *numbers)))
        interrupted_start(place / "run", numbers, *run, coordinator=None)
        interrupted_start(place / "up", numbers, "up", "--workers", 1, coordinator=None)
        interrupted_start(place / "worker", numbers, *run, coordinator=harness.COORDINATOR, worker=None)


def case_no_secrets():
    """no prompt, token or key is in any log"""
    logs = cluster.logs()
    assert set(logs) >= {"coordinator.log", "worker-1.log", "worker-2.log", "worker-3.log"}, sorted(logs)
    for name, text in logs.items():
        assert "PRIVATE KEY" not in text, name
        for secret in SECRETS:
            assert secret not in text, f"{secret} is in {name}"


def case_alive():
    """all daemons are the ones that were started"""
    members = {m["name"]: m["state"] for m in cluster.status()["members"]}
    assert set(members) == {"worker-1", "worker-2", "worker-3"} and set(members.values()) <= {"ready", "serving"}, members
    assert cluster.status()["generation"] == 1


def case_down():
    """down stops all of them, again says that nothing runs"""
    pids = [cluster.pid(n) for n in ("coordinator", "worker-1", "worker-2", "worker-3")]
    weft("down", "-q").ok()
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)
    assert "no cluster" in weft("down").ok().err
    weft("status").fails(5, "weft up")


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
