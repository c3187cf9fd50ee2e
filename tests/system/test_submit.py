"""submit, jobs, logs, cancel: a job of kind serve is kept by the coordinator, through its own death too, until it is cancelled."""
import http.client
import json
import os
import signal
import subprocess

import harness
from harness import GUARD_S, WEFT, Cluster, clean_environment, folder, run_cases, tiny_model, wait_for

work = folder("submit")
model = tiny_model(work, context=16384, layers=16)
cluster = Cluster(workers=2)
weft = cluster.weft


def spec(name, text=None, **more):
    path = work / f"{name}.yaml"
    path.write_text(text or f"kind: serve\nname: {name}\nmodel: {{from: {more.pop('model', 'tiny.gguf')}}}\n" + "".join(f"{k}: {v}\n" for k, v in more.items()))
    return path


def jobs():
    return {j["name"]: j for j in weft("jobs", "--json").ok().json()["jobs"]}


def ready(name):
    return wait_for(f"{name} to be ready", lambda: next((j for j in jobs().values() if j["name"] == name and j["state"] == "ready"), None))


def complete(job, **body):
    host, port = job["address"].split("//")[1].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=GUARD_S)
    connection.request("POST", "/v1/completions", json.dumps({"model": job["name"], "prompt": "hello", "max_tokens": 6, "temperature": 0, **body}),
                       {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text)


def case_dry_run():
    """submit --dry-run prints the file with every default, and reading that gives the same again; bad files are refused with lines and near names"""
    path = spec("assistant", layout="{pp: 2}", limits="{context: 4096, streams: 4, queue: 8}", kv="{type: bf16, memory: 64M}")
    printed = weft("submit", path, "--dry-run").ok().out
    for word in ("kind: serve", "name: assistant", "context: 4096", "queue: 8", "bf16", str(model)):
        assert word in printed, printed
    again = work / "again.yaml"
    again.write_text(printed)
    assert weft("submit", again, "--dry-run").ok().out == printed
    weft("submit", spec("bad", f"kind: serve\nname: bad\nmodel: {{from: {model}}}\nlimts: {{context: 12}}\n")).fails(2, "limts", "limits")
    weft("submit", work / "none.yaml").fails(3, "none.yaml")
    weft("submit").fails(2, "one job file")
    assert jobs() == {}


def case_a_job_is_served():
    """a submitted job is deployed as its file says, listed, offered over HTTP, explained and logged"""
    assert weft("submit", work / "assistant.yaml", "-q").ok().out == "assistant\n"
    job = ready("assistant")
    assert job["kind"] == "serve" and job["owner"] and job["reason"] == "" and job["model"] == str(model) and job["job"], job
    deployment = next(j for j in cluster.status()["jobs"] if j["id"] == job["job"])
    assert deployment["layout"].startswith("dp1 pp2 tp1"), deployment
    status, answer = complete(job)
    assert status == 200 and answer["usage"]["completion_tokens"] == 6, answer
    same = weft("run", model, "-p", "hello", "-n", 6, "--context", 4096, "--kv", "bf16", "--json", "-q").ok().json()
    assert same["text"] == answer["choices"][0]["text"], (same, answer)
    table = weft("jobs").ok().out
    assert table.splitlines()[0].split() == ["NAME", "KIND", "STATE", "JOB", "OWNER", "REASON", "AGE"] and job["address"] in table, table
    assert all(len(line) <= 80 for line in table.splitlines()), table
    lines = [line.split(" ", 1)[1] for line in weft("logs", "assistant").ok().out.splitlines()]
    assert lines[0].startswith("submitted by ") and lines[-1] == f"ready: job {job['job']}", lines
    assert weft("why", "assistant", "--json").ok().json()["reasons"][0]["state"] == "serving"
    weft("submit", work / "assistant.yaml").fails(2, "assistant", "another name")


def case_survives_the_coordinator():
    """killed and started again, the coordinator has the job back, ready and offered, under the same deployment"""
    before = jobs()["assistant"]
    pid = cluster.pid("coordinator")
    os.kill(pid, signal.SIGKILL)
    wait_for("another coordinator", lambda: cluster.pid("coordinator") != pid and weft("status").code == 0)
    after = ready("assistant")
    assert (after["job"], after["submitted"], after["owner"]) == (before["job"], before["submitted"], before["owner"]), (before, after)
    assert complete(after)[0] == 200
    assert any("start of the coordinator" in line for line in weft("logs", "assistant").ok().out.splitlines())


def case_waits_for_what_it_needs():
    """a job that needs more workers than there are waits and says what is missing; one whose model is not there has failed; both can be cancelled"""
    weft("submit", spec("large", layout="{pp: 2, tp: 2}"), "-q").ok()
    large = wait_for("the reason", lambda: next((j for j in jobs().values() if j["name"] == "large" and j["state"] == "waiting"), None))
    assert "4 workers" in large["reason"], large
    weft("submit", spec("absent", model="/no/such/model.gguf"), "-q").ok()
    absent = wait_for("the failure", lambda: next((j for j in jobs().values() if j["name"] == "absent" and j["state"] == "failed"), None))
    assert "model.gguf" in absent["reason"], absent
    assert weft("why", "absent", "--json").ok().json()["reasons"][0]["state"] == "failed"
    weft("cancel", "large", "-q").ok()
    weft("cancel", "absent", "-q").ok()
    assert set(jobs()) == {"assistant"}


def case_limits():
    """kv.memory bounds the pages of each worker; limits.streams and limits.queue bound what is open: more is 429"""
    weft("submit", spec("narrow", limits="{context: 16384, streams: 1, queue: 1}", layout="{pp: 1}"), "-q").ok()
    job = ready("narrow")
    host, port = job["address"].split("//")[1].split(":")
    streams = []
    for _ in range(2):
        connection = http.client.HTTPConnection(host, int(port), timeout=GUARD_S)
        body = {"model": "narrow", "prompt": "go", "max_tokens": 16000, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        streams.append((connection, connection.getresponse()))
    assert [answer.status for _, answer in streams] == [200, 200]
    status, refusal = complete(job)
    assert status == 429 and refusal["error"]["code"] == "queue_full" and "limits.queue" in refusal["error"]["message"], refusal
    assert complete(jobs()["assistant"])[0] == 200
    for connection, answer in streams:
        answer.close()
        connection.close()
    wait_for("room", lambda: complete(job)[0] == 200)
    weft("cancel", "narrow", "-q").ok()
    weft("submit", spec("little", limits="{context: 512}", layout="{pp: 1}", kv="{memory: 4M}"), "-q").ok()
    little = ready("little")
    replica = wait_for("its leader's report", lambda: next((r for r in weft("top", "--json").ok().json()["replicas"] if r["job"] == little["job"]), None))
    plan = weft("plan", model, "--pp", 1, "--context", 512, "--json").ok().json()
    page = 32 * plan["stages"][0]["ranks"][0]["kv_bytes_per_token"]
    assert replica["kv_pages"] == 4 * 1024 * 1024 // page, (replica, page)
    weft("cancel", "little", "-q").ok()


def case_cancel():
    """who follows the log sees the end; open requests end; the name is free; a cancelled job stays away after a restart"""
    job = ready("assistant")
    follower = subprocess.Popen([str(WEFT), "logs", "assistant", "-f"], env=clean_environment(cluster.env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    harness._processes.append(follower)
    assert follower.stdout.readline()
    assert weft("cancel", "assistant", "--dry-run").ok().out == "would cancel assistant\n" and "assistant" in jobs()
    weft("cancel", "assistnt").fails(3, "did you mean assistant?")
    weft("cancel", job["job"], "-q").ok()
    assert follower.stdout.read().splitlines()[-1].endswith(" cancelled") and follower.wait(GUARD_S) == 0
    assert jobs() == {} and complete(job)[0] == 404
    weft("logs", "assistant").fails(3, "assistant")
    pid = cluster.pid("coordinator")
    os.kill(pid, signal.SIGKILL)
    wait_for("another coordinator", lambda: cluster.pid("coordinator") != pid and weft("status").code == 0)
    assert jobs() == {}


def case_roles():
    """a submit certificate submits, sees all and cancels its own only"""
    home = {"WEFT_STATE": str(folder("submitter"))}
    token = weft("token", "create", "--role", "submit", "--json").ok().json()
    weft("login", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"], "-q", env=home).ok()
    weft("submit", spec("mine"), "-q", env=home).ok()
    weft("submit", spec("theirs"), "-q").ok()
    assert set(jobs()) == {"mine", "theirs"}
    weft("cancel", "theirs", env=home).fails(6, "theirs", "administrator")
    weft("cancel", "mine", "-q", env=home).ok()
    weft("cancel", "theirs", "-q").ok()


run_cases([case_dry_run, case_a_job_is_served, case_survives_the_coordinator, case_waits_for_what_it_needs, case_limits, case_cancel, case_roles])
