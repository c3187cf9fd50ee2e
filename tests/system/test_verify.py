"""verify names the first site where a worker computes other bits: a worker with fail point engine-flip=2 flips a bit of x after the feed-forward of layer 2."""
import os

from harness import WORKER, Cluster, Skip, folder, run_cases, spawn, tiny_model

work = folder("verify")


def case_flip():
    """one flipped bit on one of two workers: exit 1, and the site and the worker are named"""
    if os.environ["WEFT_FAILPOINTS"] != "true":
        raise Skip("built without fail points (-Dfailpoints=true)")
    model = tiny_model(work, "f32.gguf", type="F32")
    cluster = Cluster(workers=1)
    token = cluster.weft("token", "create", "--json").ok().json()
    spawn([WORKER, "--join", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"], "--name", "wrong", "--state", work / "wrong",
           "--cache", work / "cache", "--threads", 1, "--memory", "1G", "--listen", "127.0.0.1:0"], work / "log", {"WEFT_FAILPOINT": "engine-flip=2"})
    cluster.wait_members(2)
    got = cluster.weft("verify", model, "-n", 4, "--layouts", "tp1,tp2", "--json", "-q")
    assert got.code == 1, got
    assert got.json()["equal"] is False, got
    (differs,) = [v for v in got.json()["layouts"] if not v["equal"]]
    assert differs["first_difference"]["site"] == "layer 2 feed-forward", got
    assert "wrong" in differs["first_difference"]["text"], got
    table = cluster.weft("verify", model, "-n", 4, "--layouts", "tp1,tp2", "-q")
    assert table.code == 1 and "differs, first at layer 2 feed-forward of token " in table.out, table
    cluster.down()


def case_equal():
    """without one: equal, exit 0, no difference told"""
    model = tiny_model(work, "q8.gguf", type="Q8_0")
    got = Cluster(workers=2).weft("verify", model, "-n", 3, "--temp", 1.0, "--json", "-q").ok().json()
    assert got["equal"] is True and all(v["equal"] and "first_difference" not in v for v in got["layouts"]), got


run_cases([case_flip, case_equal])
