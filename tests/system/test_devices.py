"""One worker that leads several devices: a tensor rank on each, sums over their group. The devices are trivial ones (test builds: --device cpu:N), the daemons real."""
import os
import subprocess

import harness
from harness import WEFT, Cluster, Skip, clean_environment, folder, tiny_model, wait_for

if os.environ.get("WEFT_FAILPOINTS") != "true":
    harness.run_cases([])
    raise SystemExit(0)

work = folder("devices")
model = tiny_model(work, type="F32", context=32768)
fails = work / "fails"
host = Cluster(workers=1)
pair = Cluster(workers=1, env={"WEFT_DEVICE": "cpu:2", "WEFT_FAILPOINT": f"device-group-fail=file:{fails}"})
PROMPT = ["-p", "The sky is", "--seed", 7, "--numerics", "fast", "--context", 256, "-q", "--json"]


def case_listed():
    """the cluster knows both devices, and the worker is one member"""
    members = pair.status()["members"]
    assert len(members) == 1 and [(d["kind"], d["index"]) for d in members[0]["devices"]] == [("cpu", 0), ("cpu", 1)], members


def case_text():
    """two devices of one worker give the text of a host, as tensor ranks and as stages"""
    alone = host.weft("run", model, *PROMPT, "-n", 10).ok().json()
    for layout in (["--tp", 2], ["--pp", 2], ["--tp", 1]):
        got = pair.weft("run", model, *PROMPT, "-n", 10, *layout).ok().json()
        assert got["tokens"] == alone["tokens"], (layout, got, alone)
        assert set(got["workers"]) == {"worker-1"}


def case_plan():
    """a plan gives each device a rank, names both, and never two ranks to one"""
    text = pair.weft("plan", model, "--numerics", "fast", "--tp", 2).ok().out
    assert "worker worker-1 computes on cpu:0" in text and "worker worker-1 computes on cpu:1" in text, text
    pair.weft("plan", model, "--numerics", "fast", "--tp", 3).fails(2, "needs 3 workers and 2 can be used")


def case_exact():
    """a device offers class fast: exact is refused with what to do"""
    pair.weft("run", model, "-p", "go", "-n", 1, "-q", "--numerics", "exact").fails(2, "--numerics fast")


def case_recovery():
    """a group that ends takes its epoch with it, by name, and the stream goes on"""
    start = host.weft("run", model, "-p", "The sky is", "--seed", 7, "--numerics", "fast", "-n", 12).ok().out.strip()
    said, told, log = work / "run.out", work / "run.err", pair.state / "worker-1.log"
    with open(said, "wb") as out, open(told, "wb") as err:
        process = subprocess.Popen([str(w) for w in (WEFT, "run", model, "-p", "The sky is", "--seed", 7, "--numerics", "fast", "-n", 32000, "--context", 32768, "--tp", 2)],
                                   env=clean_environment(pair.env), stdout=out, stderr=err)
    harness._processes.append(process)
    wait_for("the answer to begin", lambda: said.stat().st_size > len(start))
    fails.touch()
    wait_for("the failure to be named", lambda: "rank 0: fail point device-group-fail" in log.read_text())
    fails.unlink()
    wait_for("the stream to go on", lambda: b"goes on in epoch" in told.read_bytes())
    before = said.stat().st_size
    wait_for("more text", lambda: said.stat().st_size > before)
    process.terminate()
    process.wait()
    assert said.read_text(errors="replace").startswith(start), (start, said.read_text(errors="replace")[:200])
    assert "its group of devices has ended" in log.read_text() and "stage 0 rank " in log.read_text()


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
