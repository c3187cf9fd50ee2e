"""What workers come to hold while they train, at the highest, beside the plan: within 5 % for every layout, with a checkpoint on the way."""
import os
import pathlib

from harness import Cluster, Skip, folder, run_cases

work = folder("train-memory")
TEXT = work / "text.txt"
TEXT.write_text("\n".join(path.read_text() for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))))
MODELS = {"gpt2": "{family: gpt2, layers: 6, width: 512, heads: 8, context: 128}",
          "llama": "{family: llama, layers: 6, width: 512, heads: 8, kv_heads: 4, ffn: 1536, context: 128}"}
MOST = 0.05
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def forget_peak(pid):
    """What the kernel noted so far: a worker that starts measures the machine, with 256 MiB."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def holds_what_is_planned(family, workers, layout, name):
    """Each worker's highest resident size beside its planned peak, on a cluster that has done nothing else."""
    if os.environ.get("WEFT_SANITIZE", "none") != "none":
        raise Skip("a sanitizer's own memory is beside the process's")
    if HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text():
        raise Skip("transparent_hugepage is 'always': the kernel gives 2 MiB where a page was asked")
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
