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
pair = Cluster(workers=1, env={"WEFT_DEVICE": "cpu:2", "WEFT_FAILPOINT": f"device-group-fail=file:{fails},device-beside={100 << 20}"})
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
    """class exact over devices: one digest for every layout, chunk and neighbour; a trivial device's is the host's, for its bits are"""
    prompt = ["-p", "The sky is " * 20, "--seed", 7, "--numerics", "exact", "--temp", 0.8, "--context", 256, "-q", "--json"]
    alone = host.weft("run", model, *prompt, "-n", 10).ok().json()
    for layout in ([], ["--tp", 2], ["--pp", 2], ["--tp", 1, "--pp", 1]):
        got = pair.weft("run", model, *prompt, "-n", 10, *layout).ok().json()
        assert (got["digest"], got["tokens"], got["definition"]) == (alone["digest"], alone["tokens"], alone["definition"]), (layout, got, alone)


def case_kinds():
    """devices whose exact bits are their own: alone they make exact plans, whose definition names them; with others of another kind, or
    hosts, none, and the refusal says what there is and what is legal; class fast mixes them"""
    kinds = Cluster(workers=1, env={"WEFT_DEVICE": "cpu:3", "WEFT_FAILPOINT": "device-kind-0=1,device-kind-1=1,device-kind-2=2"})
    try:
        assert [d["exact_kind"] for d in kinds.status()["members"][0]["devices"]] == ["trivial, kind 1", "trivial, kind 1", "trivial, kind 2"]
        prompt = ["-p", "The sky is", "--seed", 7, "--numerics", "exact", "--context", 256, "-q", "--json", "-n", 10]
        alone = host.weft("run", model, *prompt).ok().json()
        results = [kinds.weft("run", model, *prompt, *layout).ok().json() for layout in (["--tp", 2], ["--pp", 2], ["--tp", 1, "--pp", 1])]
        assert len({r["digest"] for r in results}) == 1 and results[0]["digest"] == alone["digest"], results
        assert len({r["definition"] for r in results}) == 1 and results[0]["definition"] != alone["definition"], results
        verified = kinds.weft("verify", model, "--context", 256, "--json", "-q").ok().json()
        ran = [v for v in verified["layouts"] if v["digest"]]
        assert verified["equal"] and {v["layout"] for v in ran} == {"dp1 pp1 tp1", "dp1 pp1 tp2", "dp1 pp2 tp1", "dp2 pp1 tp1"}, verified
        text = kinds.weft("plan", model, "--tp", 2, "--numerics", "exact").ok().out
        assert "numerics exact: the bits of trivial, kind 1" in text and "an exact plan is of one kind" in text, text
        kinds.weft("plan", model, "--pp", 3, "--numerics", "exact").fails(2, "an exact plan is of one kind of workers, and here are: trivial, kind 1 (2), trivial, kind 2 (1)",
                                                   "--pp 3 --tp 1 --numerics fast")
        mixed = kinds.weft("plan", model, "--pp", 3, "--numerics", "fast", "--json").ok().json()
        assert len(mixed["stages"]) == 3, mixed
    finally:
        kinds.down()


def case_seen():
    """what a device was seen to hold beside what is allocated there stands in the next plan, in the estimate's place"""
    pair.weft("run", model, *PROMPT, "-n", 10, "--tp", 2).ok()
    wait_for("what the devices hold", lambda: pair.weft("plan", model, "--numerics", "fast", "--tp", 2).ok().out.count(
        "100 MiB beside all that is counted, as it was seen to hold") == 2)
    kinds = host.weft("plan", model, "--numerics", "fast").ok().out
    assert "beside all that is counted" not in kinds, kinds


def case_default():
    """where nothing is asked a plan with devices is fast, one of cores exact; plan, answer, perplexity and status say which; an explicit class wins"""
    text = work / "words.txt"
    text.write_text("The sky is blue and the sea is deep. " * 20)
    for cluster, numerics in ((pair, "fast"), (host, "exact")):
        got = cluster.weft("run", model, "-p", "The sky is", "--context", 256, "-q", "--json", "-n", 4).ok().json()
        planned = cluster.weft("plan", model, "--context", 256, "--json").ok().json()
        scored = cluster.weft("perplexity", model, "-f", text, "--ctx", 32, "--context", 256, "-q", "--json").ok().json()
        assert [one["numerics"] for one in (got, planned, scored)] == [numerics] * 3, (got, planned, scored)
        assert got["definition"] == planned["definition"]
        assert any(reason.startswith(f"numerics {numerics}: so it is on") for reason in planned["reasons"]), planned["reasons"]
        assert f", numerics {numerics}\n" in cluster.weft("plan", model).ok().out
        assert any(job["numerics"] == numerics and job["state"] == "ready" for job in cluster.status()["jobs"]), cluster.status()["jobs"]
        other = "exact" if numerics == "fast" else "fast"
        asked = cluster.weft("run", model, "-p", "The sky is", "--context", 256, "-q", "--json", "-n", 4, "--numerics", other).ok().json()
        assert asked["numerics"] == other and asked["tokens"] == got["tokens"], asked


def case_recovery():
    """a group that ends takes its epoch with it, by name, and the stream goes on"""
    start = host.weft("run", model, "-p", "The sky is", "--seed", 7, "--numerics", "fast", "-n", 12).ok().out.strip()
    said, told, log = work / "run.out", work / "run.err", pair.state / "worker-1.log"
    with open(said, "wb") as out, open(told, "wb") as err:
        process = subprocess.Popen([str(w) for w in (WEFT, "run", model, "-p", "The sky is", "--seed", 7, "--numerics", "fast", "-n", 32000, "--context", 32768, "--tp", 2)],
                                   env=clean_environment(pair.env), stdout=out, stderr=err)
    harness._processes.append(process)

    def written(least):
        assert process.poll() is None, (process.poll(), told.read_text(), said.read_text(errors="replace")[-200:])
        return said.stat().st_size > least
    wait_for("the answer to begin", lambda: written(len(start)))
    fails.touch()
    wait_for("the failure to be named", lambda: "rank 0: fail point device-group-fail" in log.read_text())
    fails.unlink()
    wait_for("the stream to go on", lambda: b"goes on in epoch" in told.read_bytes())
    before = said.stat().st_size
    wait_for("more text", lambda: written(before))
    process.terminate()
    process.wait()
    assert said.read_text(errors="replace").startswith(start), (start, said.read_text(errors="replace")[:200])
    assert "its group of devices has ended" in log.read_text() and "stage 0 rank " in log.read_text()


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
