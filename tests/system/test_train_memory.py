"""What workers come to hold while they train, at the highest, beside the plan: within 5 % for every layout, with a checkpoint on the way."""
import pathlib

from harness import Cluster, folder, forget_peak, peak, resident_is_what_was_asked, run_cases

work = folder("train-memory")
TEXT = work / "text.txt"
TEXT.write_text("\n".join(path.read_text() for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))))
MODELS = {"gpt2": "{family: gpt2, layers: 6, width: 512, heads: 8, context: 128}",
          "llama": "{family: llama, layers: 6, width: 512, heads: 8, kv_heads: 4, ffn: 1536, context: 128}"}
MOST = 0.05


def holds_what_is_planned(family, workers, layout, name):
    """Each worker's highest resident size beside its planned peak, on a cluster that has done nothing else."""
    resident_is_what_was_asked()
    path = work / "job.yaml"
    path.write_text(f"kind: train\nname: job\nmodel: {{config: {MODELS[family]}}}\ndata: {{train: {TEXT}, tokenizer: {{train: 2048}}}}\n"
                    "batch: {sequences: 8, length: 96}\nsteps: 2\nseed: 1\noptimizer: {name: adamw, lr: 1e-4, schedule: constant}\n"
                    f"checkpoint: {{directory: ck-{name}, every: 2}}\nlayout: {layout}\n")
    cluster = Cluster(workers=workers)
    pids = [cluster.pid(f"worker-{i + 1}") for i in range(workers)]
    for pid in pids:
        forget_peak(pid)
    planned = [rank for stage in cluster.weft("plan", path, "--json").ok().json()["stages"] for rank in stage["ranks"]]
    cluster.weft("train", path, "-q").ok()
    peaks = {f"worker-{i + 1}": peak(pid) for i, pid in enumerate(pids)}
    cluster.down()
    apart = {rank["worker"]: peaks[rank["worker"]] / rank["peak_bytes"] - 1 for rank in planned}
    for rank in planned:
        print(f"# {family} {layout}: {rank['worker']}: planned {rank['peak_bytes'] / 2**20:.0f} MiB, of them {rank['buffer_bytes'] / 2**20:.0f} of buffers; "
              f"at the highest {peaks[rank['worker']] / 2**20:.0f} MiB: {100 * apart[rank['worker']]:+.1f} %", flush=True)
    assert len(apart) == workers and all(abs(a) <= MOST for a in apart.values()), (apart, planned)


def case_alone():
    """one worker"""
    holds_what_is_planned("gpt2", 1, "{dp: 1, pp: 1, tp: 1}", "alone")


def case_replicas():
    """replicas"""
    holds_what_is_planned("llama", 2, "{dp: 2, pp: 1, tp: 1, zero: 1}", "sharded")


def case_stages():
    """stages by 1F1B with recomputation"""
    holds_what_is_planned("gpt2", 2, "{dp: 1, pp: 2, tp: 1, micro: 4, recompute: selective}", "1f1b")


def case_tensor():
    """uneven tensor ranks with large micro-batches"""
    holds_what_is_planned("gpt2", 3, "{dp: 1, pp: 1, tp: 3, micro: 1}", "uneven")


def case_mixes():
    """all ways at once, zero-bubble"""
    holds_what_is_planned("llama", 8, "{dp: 2, pp: 2, tp: 2, micro: 4, schedule: zero-bubble}", "dp-pp-tp")


run_cases([case_alone, case_replicas, case_stages, case_tensor, case_mixes])
