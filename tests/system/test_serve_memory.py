"""What workers hold that serve a model: their slices, the keys and values of the tokens, and at most 64 MB; while they load it, never a second copy."""
from harness import Cluster, folder, forget_peak, peak, resident, resident_is_what_was_asked, run_cases, tiny_model

work = folder("serve-memory")
BESIDE, BESIDE_LOADING = 64 << 20, 96 << 20
N_TOKENS = 8
PROMPT = "a prompt of some words " * 8
PAGE = 32  # positions of a KV page
_model = []


def model():
    """200 MB of weights: a second copy of a worker's part would show."""
    if not _model:
        _model.append(tiny_model(work, layers=4, width=1536, heads=12, kv=6, head=128, ffn=6144, vocab=4096, context=512, type="Q8_0"))
    return _model[0]


def holds_its_slices(workers, *layout):
    resident_is_what_was_asked()
    path = model()
    cluster = Cluster(workers=workers)
    names = sorted(f"worker-{i + 1}" for i in range(workers))
    ranks = [rank for stage in cluster.weft("plan", path, *layout, "--json").ok().json()["stages"] for rank in stage["ranks"]]
    assert sorted(r["worker"] for r in ranks) == names and sum(r["weight_bytes"] for r in ranks) > 150e6, ranks
    for turn in ("from the file", "from the cache of slices"):
        if turn != "from the file":
            cluster.weft("down").ok()
            cluster.weft("up", "--workers", workers, "-q").ok()
        pids = {name: cluster.pid(name) for name in names}
        for pid in pids.values():
            forget_peak(pid)
        done = cluster.weft("run", path, "-p", PROMPT, "-n", N_TOKENS, *layout, "--json").ok().json()
        positions = (done["prompt_tokens"] + N_TOKENS + 2 * PAGE - 1) // PAGE * PAGE
        for rank in ranks:
            own = rank["weight_bytes"] + positions * rank["kv_bytes_per_token"]
            held, highest = resident(pids[rank["worker"]]), peak(pids[rank["worker"]])
            print(f"# {' '.join(layout)} {turn}: {rank['worker']}: {own / 1e6:.1f} MB of slices, keys and values; {(held - own) / 1e6:.1f} beside, "
                  f"at the highest {(highest - own) / 1e6:.1f}", flush=True)
            assert 0 < held - own <= BESIDE and highest - own <= BESIDE_LOADING, (turn, rank, held, highest)
    cluster.down()


def case_alone():
    """one worker"""
    holds_its_slices(1, "--pp", "1", "--tp", "1")


def case_stages():
    """two stages"""
    holds_its_slices(2, "--pp", "2", "--tp", "1")


def case_tensor():
    """two tensor ranks"""
    holds_its_slices(2, "--pp", "1", "--tp", "2")


run_cases([case_alone, case_stages, case_tensor])
