"""One digest over layouts and worker counts, recomputed from the dumped logits (NUMERICS 13), for a random model and for the real one."""
import os
import socket
import time

import harness
from harness import Cluster, folder, recomputed_digest, tiny_model

work = folder("layouts")
model = tiny_model(work)
three = Cluster(workers=3)
one = Cluster(workers=1)
LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (1, 3, 1), (2, 1, 1), (3, 1, 1)]


def run(cluster, path, *more):
    return cluster.weft("run", path, "-p", "The sky is", "--seed", 7, "--json", "-q", *more).ok().json()


def case_tiny():
    """a random model: one digest over dp, pp and tp, for the most likely and for drawn tokens"""
    for sampler in (["-n", 12], ["-n", 12, "--temp", 1.1, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--repeat-penalty", 1.2]):
        results = [run(three, model, *sampler, "--dp", dp, "--pp", pp, "--tp", tp) for dp, pp, tp in LAYOUTS]
        assert [tuple(r["layout"].values()) for r in results] == LAYOUTS, "other layouts than asked for"
        assert len({(r["digest"], tuple(r["tokens"]), r["definition"]) for r in results}) == 1, results


def case_workers():
    """a cluster of one worker gives the digest that three give"""
    assert run(one, model, "-n", 12)["digest"] == run(three, model, "-n", 12, "--tp", 3)["digest"]


def case_turns():
    """stages on one CPU compute in turns; whoever never gives his back is not waited for for ever, and no bit changes"""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        crowded = Cluster(workers=2)
    finally:
        os.sched_setaffinity(0, mine)
    want = run(one, model, "-n", 12)["digest"]
    assert run(crowded, model, "-n", 12, "--pp", 2)["digest"] == want
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        while True:  # a stage may just have it
            try:
                holder.bind(f"\0weft-cpus-{min(mine)}")
                break
            except OSError:
                time.sleep(0.001)
        start = time.monotonic()
        assert run(crowded, model, "-n", 12, "--pp", 2)["digest"] == want
        assert time.monotonic() - start >= 1.0, "no stage waited for its turn"
    crowded.down().ok()


def case_recomputed():
    """the digest is what anybody can recompute from --logits"""
    for layout in (["--tp", 1], ["--tp", 3], ["--pp", 2]):
        path = work / "logits"
        got = run(three, model, "-n", 5, "--logits", path, *layout)
        assert path.stat().st_size == len(got["tokens"]) * 3000 * 4, "not one row a token"
        assert recomputed_digest(path, 3000) == got["digest"]


def case_types():
    """every weight type: one digest on one worker and on three"""
    for name, more in [("F32", {}), ("F16", {}), ("BF16", {}), ("Q8_0", {}), ("Q4_0", {}), ("Q4_1", {}), ("Q5_0", {}), ("Q5_1", {}),
                       ("Q4_K", {"width": 256, "heads": 8, "kv": 2}), ("Q5_K", {"width": 256, "heads": 8, "kv": 2}),
                       ("Q6_K", {"width": 256, "heads": 8, "kv": 2})]:
        path = tiny_model(work, f"{name}.gguf", type=name, layers=3, **more)
        digests = {run(three, path, "-n", 4, *layout)["digest"] for layout in (["--tp", 1], ["--pp", 3])}
        assert len(digests) == 1, (name, digests)


def case_real():
    """the real model: one digest over layouts, recomputed from its logits"""
    path = harness.real_model()
    results = [run(three, path, "-n", 6, *layout) for layout in (["--tp", 1], ["--tp", 3], ["--pp", 3], ["--pp", 2])]
    assert len({r["digest"] for r in results}) == 1, results
    logits = work / "real"
    assert run(one, path, "-n", 6, "--logits", logits)["digest"] == results[0]["digest"]
    assert recomputed_digest(logits, 49152) == results[0]["digest"]


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
