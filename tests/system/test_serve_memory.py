"""What workers hold that serve a model: their slices, the keys and values of the tokens, and at most 64 MB; while they load it, never a second copy."""
from harness import (COORDINATOR, WEFT, WORKER, Cluster, command, folder, forget_peak, peak, resident, resident_is_what_was_asked, run_cases, spawn,
                     tiny_model, wait_for)

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


class Apart:
    """Daemons whose workers have no files of models: slices come from the coordinator, and when the workers are started again from their cache."""

    def __init__(self, workers):
        self.home = folder("apart")
        self.names = [f"worker-{i + 1}" for i in range(workers)]
        self.env = {"WEFT_STATE": str(self.home / "coordinator")}
        self.coordinator = spawn([COORDINATOR, "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0", "--models", work, "--state", self.home / "coordinator"],
                                 self.home / "coordinator.log")
        wait_for("the coordinator's endpoint file", lambda: (self.home / "coordinator/endpoint").exists())
        token = self.weft("token", "create", "--uses", workers, "--json").ok().json()
        self.start("--join", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"])

    def start(self, *joining):
        self.workers = {name: spawn([WORKER, *joining, "--name", name, "--state", self.home / name, "--cache", self.home / f"{name}.cache", "--threads", 1,
                                     "--memory", "2G", "--listen", "127.0.0.1:0"], self.home / f"{name}.log") for name in self.names}
        wait_for("workers that are ready", lambda: sorted(m["name"] for m in self.weft("status", "--json").ok().json()["members"] if m["state"] == "ready")
                 == self.names)

    def start_again(self):
        for process in self.workers.values():
            process.terminate()
            process.wait()
        self.start()

    def weft(self, *arguments):
        return command([WEFT, *arguments], env=self.env)

    def pid(self, name):
        return self.workers[name].pid

    def cached(self):
        return sum(f.stat().st_size for f in self.home.glob("*.cache/**/*") if f.is_file())

    def down(self):
        for process in (*self.workers.values(), self.coordinator):
            process.terminate()
            process.wait()


def holds_its_slices(workers, *layout):
    resident_is_what_was_asked()
    path = model()
    names = [f"worker-{i + 1}" for i in range(workers)]

    def serve_and_look(cluster, turn):
        ranks = [rank for stage in cluster.weft("plan", path, *layout, "--json").ok().json()["stages"] for rank in stage["ranks"]]
        assert sorted(r["worker"] for r in ranks) == names and sum(r["weight_bytes"] for r in ranks) > 150e6, ranks
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
        return done["digest"]

    cluster = Cluster(workers=workers)
    digests = [serve_and_look(cluster, "from files of its own")]
    assert not [f for f in (cluster.state / "cache").glob("**/*") if f.is_file()], "a worker with files of its own cached slices"
    cluster.down()
    apart = Apart(workers)
    digests.append(serve_and_look(apart, "from the coordinator"))
    assert apart.cached() > 150e6, apart.cached()
    apart.start_again()
    digests.append(serve_and_look(apart, "from the cache of slices"))
    apart.down()
    assert len(set(digests)) == 1, digests


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
