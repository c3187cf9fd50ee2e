"""Daemons that are killed and come back: nothing that was known is forgotten, nobody has to be told."""
import os
import pathlib
import signal
import socket

import harness
from harness import COORDINATOR, WEFT, WORKER, Cluster, command, folder, spawn, tiny_model, wait_for

work = folder("restart")
model = tiny_model(work)
state, logs = work / "coordinator", work / "logs"
logs.mkdir()


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


LISTEN, JOIN = free_address(), free_address()


def start_coordinator():
    (state / "endpoint").unlink(missing_ok=True)
    process = spawn([COORDINATOR, "--listen", LISTEN, "--join-listen", JOIN, "--models", work, "--state", state], logs / "coordinator.log")
    wait_for("the coordinator's endpoint file", lambda: (state / "endpoint").exists())
    return process


def start_worker(name, parts=None):
    joining = ["--join", parts["join_address"], "--token", parts["token"], "--ca-hash", parts["ca_hash"], "--name", name] if parts else []
    return spawn([WORKER, *joining, "--state", work / name, "--cache", work / "cache", "--threads", 1, "--memory", "1G", "--listen", "127.0.0.1:0"],
                 logs / f"{name}.log")


def weft(*arguments):
    return command([WEFT, *arguments], env={"WEFT_STATE": str(state)})


def status():
    return weft("status", "--json").ok().json()


def states():
    return {m["name"]: m["state"] for m in status()["members"]}


def run(*more):
    return weft("run", model, "-p", "the same", "-n", 4, "--json", "-q", *more)


coordinator = start_coordinator()
parts = weft("token", "create", "--uses", 2, "--json").ok().json()
workers = {name: start_worker(name, parts) for name in ("alpha", "beta")}
wait_for("both workers", lambda: states() == {"alpha": "ready", "beta": "ready"})
before = run("--pp", 2).ok().json()
known = status()


def case_coordinator_killed():
    """the coordinator is killed and started again: members, jobs and shards are found, a new generation, the same bits"""
    global coordinator
    coordinator.kill()
    coordinator.wait()
    weft("status").fails(5, "not running")
    coordinator = start_coordinator()
    wait_for("the workers to come back", lambda: set(states().values()) <= {"ready", "serving"} and len(states()) == 2)
    now = status()
    assert now["generation"] > known["generation"] and now["cluster"] == known["cluster"] and now["ca_hash"] == known["ca_hash"]
    assert {j["id"] for j in known["jobs"]} <= {j["id"] for j in now["jobs"]}, now["jobs"]
    assert sorted(m["name"] for m in now["members"]) == ["alpha", "beta"]
    after = run("--pp", 2).ok().json()
    assert (after["digest"], after["tokens"]) == (before["digest"], before["tokens"])
    same = next(j for j in status()["jobs"] if j["id"] == known["jobs"][0]["id"])
    assert same["epoch"] >= known["jobs"][0]["epoch"], same
    assert all(m["shards"] for m in status()["members"])
    assert all(p.poll() is None for p in workers.values()), "a worker was restarted"


def case_coordinator_stopped():
    """the same after an orderly stop"""
    global coordinator
    generation = status()["generation"]
    coordinator.send_signal(signal.SIGTERM)
    assert coordinator.wait(harness.GUARD_S) == 0
    coordinator = start_coordinator()
    wait_for("the workers to come back", lambda: set(states().values()) <= {"ready", "serving"} and len(states()) == 2)
    assert status()["generation"] > generation
    assert run("--pp", 2).ok().json()["digest"] == before["digest"]


def case_token_survives():
    """a token outlives the coordinator that made it"""
    global coordinator
    fresh = weft("token", "create", "--json").ok().json()
    coordinator.kill()
    coordinator.wait()
    coordinator = start_coordinator()
    workers["gamma"] = start_worker("gamma", fresh)
    wait_for("gamma", lambda: states().get("gamma") in ("ready", "serving"))


def case_worker_killed():
    """a killed worker is lost, started again without a token it is itself, with its slices"""
    workers["beta"].kill()
    workers["beta"].wait()
    wait_for("beta to be lost", lambda: states()["beta"] == "lost")
    assert run("--pp", 3).fails(2, "3 workers")
    assert run("--tp", 2).ok().json()["digest"] == before["digest"]
    workers["beta"] = start_worker("beta")
    wait_for("beta to be back", lambda: states()["beta"] in ("ready", "serving"))
    assert run("--pp", 3).ok().json()["digest"] == before["digest"]
    assert len(states()) == 3


def case_frozen():
    """a frozen worker is lost, thawed it comes back by itself"""
    workers["gamma"].send_signal(signal.SIGSTOP)
    wait_for("gamma to be lost", lambda: states()["gamma"] == "lost")
    assert run("--tp", 2).ok().json()["digest"] == before["digest"]
    workers["gamma"].send_signal(signal.SIGCONT)
    wait_for("gamma to be back", lambda: states()["gamma"] in ("ready", "serving"))
    assert run("--tp", 3).ok().json()["digest"] == before["digest"]


def case_drain_survives():
    """a drained worker stays drained when the coordinator restarts"""
    global coordinator
    weft("drain", "gamma", "--reason", "disk", "-q").ok()
    wait_for("gamma to drain", lambda: states()["gamma"] == "draining")
    coordinator.kill()
    coordinator.wait()
    coordinator = start_coordinator()
    wait_for("the workers to come back", lambda: {states()[n] for n in ("alpha", "beta")} <= {"ready", "serving"} and states()["gamma"] == "draining")
    weft("undrain", "gamma", "-q").ok()
    wait_for("gamma to be back", lambda: states()["gamma"] in ("ready", "serving"))


def case_revoked_survives():
    """a revoked worker stays out when the coordinator restarts"""
    global coordinator
    weft("revoke", "gamma", "-q").ok()
    assert workers["gamma"].wait(harness.GUARD_S) == 6
    coordinator.kill()
    coordinator.wait()
    coordinator = start_coordinator()
    again = start_worker("gamma")
    assert again.wait(harness.GUARD_S) in (5, 6)
    assert states()["gamma"] == "revoked"


def case_supervised():
    """weft up leaves a supervisor: a killed coordinator and a killed worker come back with nothing done; the job was kept; down ends all of it"""
    cluster = Cluster(workers=2)
    pids = {name: cluster.pid(name) for name in ("coordinator", "worker-1", "worker-2", "supervisor")}
    run = ("run", model, "-p", "the same", "-n", 4, "--pp", 2, "--json", "-q")
    assert cluster.weft(*run).ok().json()["digest"] == before["digest"]
    os.kill(pids["coordinator"], signal.SIGKILL)
    wait_for("another coordinator", lambda: cluster.pid("coordinator") != pids["coordinator"])
    wait_for("an answer", lambda: cluster.weft("status", "-q").code == 0)
    cluster.wait_states({"worker-1": ("serving",), "worker-2": ("serving",)}, "the job to be adopted")
    assert cluster.weft(*run).ok().json()["timings"]["load_s"] == 0
    os.kill(pids["worker-1"], signal.SIGKILL)
    wait_for("another worker-1", lambda: cluster.pid("worker-1") != pids["worker-1"])
    assert cluster.weft(*run).ok().json()["digest"] == before["digest"]  # waits for it
    assert cluster.pid("worker-2") == pids["worker-2"]
    os.kill(pids["supervisor"], signal.SIGKILL)
    cluster.weft("up", "--workers", 2, "-q").ok()
    assert cluster.pid("supervisor") != pids["supervisor"]
    pids = {name: cluster.pid(name) for name in pids}
    cluster.down()
    for name, pid in pids.items():
        assert not os.path.exists(f"/proc/{pid}/exe"), f"{name} outlives weft down"


def case_pins():
    """weft up pins every worker; where there are fewer CPUs, neighbours have one between them"""
    mine = sorted(os.sched_getaffinity(0))
    for cpus, options, want in ((mine[:1], ["--workers", 1], mine[:1]), (mine[:1], ["--workers", 2], mine[:1] * 2),
                                (mine[:2], ["--workers", 3], [mine[0], mine[0], mine[1]] if len(mine) > 1 else mine * 3)):
        crowded = Cluster(start=False)
        os.sched_setaffinity(0, cpus)
        try:
            crowded.weft("up", *options, "-q").ok()
        finally:
            os.sched_setaffinity(0, mine)
        for i, cpu in enumerate(want):
            words = pathlib.Path(f"/proc/{crowded.pid(f'worker-{i + 1}')}/cmdline").read_text().split("\0")
            assert words[words.index("--cpu-list") + 1] == str(cpu), words
        crowded.down().ok()


def case_up_after_deaths():
    """weft up: what died of its cluster is started again, what lives is kept; down and up find the same members"""
    cluster = Cluster(workers=2)
    digest = cluster.weft("run", model, "-p", "the same", "-n", 4, "--json", "-q").ok().json()["digest"]
    assert digest == before["digest"]
    os.kill(cluster.pid("coordinator"), signal.SIGKILL)
    cluster.weft("up", "--workers", 2, "-q").ok()
    cluster.wait_states({"worker-1": ("ready", "serving"), "worker-2": ("ready", "serving")}, "the workers after the coordinator died")
    os.kill(cluster.pid("worker-1"), signal.SIGKILL)
    cluster.weft("up", "--workers", 2, "-q").ok()
    cluster.wait_states({"worker-1": ("ready", "serving"), "worker-2": ("ready", "serving")}, "worker-1 again")
    cluster.weft("down", "-q").ok()
    harness._clusters.append(cluster)
    cluster.weft("up", "--workers", 2, "-q").ok()
    assert sorted(m["name"] for m in cluster.status()["members"]) == ["worker-1", "worker-2"]
    assert cluster.weft("run", model, "-p", "the same", "-n", 4, "--tp", 2, "--json", "-q").ok().json()["digest"] == digest
    cluster.down()


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
