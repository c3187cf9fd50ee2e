"""What workers hold that serve a model: their slices, the keys and values of the tokens, and at most 64 MB; while they load it, never a second copy."""
from harness import (COORDINATOR, WEFT, WORKER, Cluster, Skip, command, folder, forget_peak, peak, resident, resident_is_what_was_asked, run_cases, spawn,
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

    def __init__(self, workers, environment=None):
        self.environment = dict(environment or {})
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
                                     "--memory", "2G", "--listen", "127.0.0.1:0"], self.home / f"{name}.log", self.environment) for name in self.names}
        wait_for("workers that are ready", lambda: sorted(m["name"] for m in self.weft("status", "--json").ok().json()["members"] if m["state"] == "ready")
                 == self.names)

    def start_again(self, environment=None):
        self.environment.update(environment or {})
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

    def logged(self, name, words):
        return (self.home / f"{name}.log").read_text().count(words)

    def packed(self):
        """The files of packed weights."""
        return sorted(self.home.glob("*.cache/packed/*"))

    def down(self):
        for process in (*self.workers.values(), self.coordinator):
            process.terminate()
            process.wait()


def serve_and_look(cluster, turn, names, layout):
    """A request's digest; what each worker holds then."""
    path = model()
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


def holds_its_slices(workers, *layout):
    resident_is_what_was_asked()
    names = [f"worker-{i + 1}" for i in range(workers)]
    cluster = Cluster(workers=workers)
    digests = [serve_and_look(cluster, "from files of its own", names, layout)]
    cached = [f for f in (cluster.state / "cache").glob("**/*") if f.is_file() and f.parent.name != "packed"]
    assert not cached, "a worker with files of its own cached slices"
    cluster.down()
    apart = Apart(workers)
    digests.append(serve_and_look(apart, "from the coordinator", names, layout))
    assert apart.cached() > 150e6, apart.cached()
    apart.start_again({"WEFT_NO_PACKED": "true"})
    digests.append(serve_and_look(apart, "from the cache of slices", names, layout))
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


def case_packed():
    """weights that are kept as they are packed, mapped by the next start, damaged, refused"""
    resident_is_what_was_asked()
    mapped, refused = "weights are packed on the disk", "weights are packed anew at each start"
    layout = ("--pp", "1", "--tp", "1")  # one worker: what several hold follows what they measure, and is another part after another start
    apart = Apart(1, {"WEFT_PACKED_AFTER": "0s"})
    names, name = apart.names, apart.names[0]
    digests = [serve_and_look(apart, "packed", names, layout)]
    wait_for("packed weights", lambda: apart.logged(name, " written") or apart.logged(name, refused))
    if apart.logged(name, refused):
        raise Skip("this system lets no packed weights be: " + (apart.home / f"{name}.log").read_text().split(refused)[1].splitlines()[0])
    image, = apart.packed()
    assert image.stat().st_mode & 0o777 == 0o400, image
    assert resident(apart.pid(name), "VmLck") > 150e6
    digests.append(serve_and_look(apart, "kept", names, layout))
    apart.start_again()
    digests.append(serve_and_look(apart, "mapped", names, layout))
    assert apart.logged(name, mapped) == 1 and apart.logged(name, " written") == 1

    image.chmod(0o600)
    with open(image, "r+b") as f:
        f.seek(5 << 20)
        byte = f.read(1)[0]
        f.seek(5 << 20)
        f.write(bytes([byte ^ 4]))
    image.chmod(0o400)
    apart.start_again()
    digests.append(serve_and_look(apart, "damaged", names, layout))
    assert apart.logged(name, "is damaged: removed") == 1 and apart.logged(name, mapped) == 1
    wait_for("the damaged file's successor", lambda: apart.logged(name, " written") == 2)
    apart.start_again()
    digests.append(serve_and_look(apart, "mapped again", names, layout))
    assert apart.logged(name, mapped) == 2
    apart.start_again({"WEFT_NO_PACKED": "true"})
    digests.append(serve_and_look(apart, "packed anew", names, layout))
    assert apart.logged(name, mapped) == 2 and apart.packed() == [image]
    apart.down()
    assert len(set(digests)) == 1, digests


run_cases([case_alone, case_stages, case_tensor, case_packed])
