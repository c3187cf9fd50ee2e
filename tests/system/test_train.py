"""weft train over real daemons: any layout, and whatever dies on the way, gives the losses and weights of one process."""
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
from xml.etree import ElementTree

import harness
from harness import GUARD_S, WEFT, Cluster, Skip, clean_environment, folder, run_cases, wait_for

work = folder("train")
cluster = Cluster(workers=2)
weft = cluster.weft
TEXT = pathlib.Path(__file__).parents[2] / "README.md"
DEEP = "{family: gpt2, layers: 4, width: 32, heads: 4, context: 32}"
MODELS = {"gpt2": "{family: gpt2, layers: 2, width: 32, heads: 4, context: 32}",
          "llama": "{family: llama, layers: 2, width: 32, heads: 4, kv_heads: 2, ffn: 72, context: 32}"}
LONG = 400  # steps of a run that is disturbed: it is hit long before its end
known = {}


def spec(name, family="gpt2", steps=12, layout="{dp: 1, pp: 1, tp: 1}", every=5, model=None, **more):
    path = work / f"{name}.yaml"
    path.write_text(f"kind: train\nname: {name}\nmodel: {{config: {model or MODELS[family]}}}\ndata: {{train: {TEXT}, validation: {TEXT}}}\n"
                    f"batch: {{sequences: 6, length: 32, leaves: 4}}\nsteps: {steps}\nseed: 3\n"
                    "optimizer: {name: adamw, lr: 3e-3, schedule: cosine, warmup: 4}\n"
                    f"checkpoint: {{directory: ck-{name}, every: {every}, keep: 2}}\nvalidation: {{every: {steps // 2}, sequences: 4}}\nlayout: {layout}\n"
                    + "".join(f"{k}: {v}\n" for k, v in more.items()))
    return path


def result(out):
    """(losses by step, validation losses, last object) of JSON lines; every step once, in order."""
    lines = [json.loads(line) for line in out.splitlines()]
    steps, end = lines[:-1], lines[-1]
    assert [s["step"] for s in steps] == list(range(1, end["steps"] + 1)), [s["step"] for s in steps]
    assert all(s["version"] == 1 and s["tokens_per_s"] > 0 and s["samples_seen"] == 6 * s["step"] for s in steps), steps[0]
    assert all(s["definition"] == end["definition"] for s in steps) and len(end["definition"]) == 32, (steps[0], end)
    return [(s["loss"], s["grad_norm"]) for s in steps], [s["validation_loss"] for s in steps if "validation_loss" in s], end


def reference(family, steps):
    if (family, steps) not in known:
        known[family, steps] = result(weft("train", spec(f"alone-{family}-{steps}", family, steps, every=steps), "--json", "-q").ok().out)
    return known[family, steps]


def assert_same(got, want):
    assert got[0] == want[0] and got[1] == want[1], (got, want)
    assert got[2]["weights_digest"] == want[2]["weights_digest"], (got[2], want[2])
    assert (got[2]["definition"] == want[2]["definition"]) == (got[2]["numerics"] == want[2]["numerics"]), (got[2], want[2])


class Run:
    """weft train in the background, its lines as they come."""

    def __init__(self, path, on=cluster):
        self.process = subprocess.Popen([WEFT, "train", path, "--json"], env=clean_environment(on.env), stdout=subprocess.PIPE,
                                        stderr=open(work / f"{path.stem}.err", "w"), text=True)
        self.lines, self.errors = [], work / f"{path.stem}.err"

    def until_step(self, step):
        for line in self.process.stdout:
            self.lines.append(line)
            if json.loads(line).get("step", 0) >= step:
                return
        raise AssertionError(f"ended before step {step}: {self.errors.read_text()}")

    def end(self):
        self.lines += self.process.stdout.readlines()
        assert self.process.wait(GUARD_S) == 0, self.errors.read_text()
        return result("".join(self.lines))


def case_device():
    """workers on a device (the trivial one) train class fast, and exact where that is asked: the host's losses and weights, alone, in replicas, stages
    and tensor ranks"""
    if os.environ.get("WEFT_FAILPOINTS") != "true":
        raise Skip("built without fail points")
    want = reference("gpt2", 12)
    devices = Cluster(workers=2, env={"WEFT_DEVICE": "cpu:1"})
    try:
        for i, layout in enumerate(("{dp: 1, pp: 1, tp: 1}", "{dp: 2, pp: 1, tp: 1}", "{dp: 1, pp: 2, tp: 1}", "{dp: 1, pp: 1, tp: 2}")):
            path = spec(f"device-{i}", layout=layout, numerics="fast")
            assert_same(result(devices.weft("train", path, "--json", "-q").ok().out), want)
        plan = devices.weft("plan", path, "--json").ok().json()
        assert any("numerics fast: 2 of 2 ranks compute on devices" in reason for reason in plan["reasons"]), plan["reasons"]
        assert all(rank["host_bytes"] > rank["weight_bytes"] for stage in plan["stages"] for rank in stage["ranks"]), plan
        open_class = spec("device-open", layout=layout)
        assert devices.weft("plan", open_class, "--json").ok().json()["numerics"] == "fast"
        assert_same(result(devices.weft("train", open_class, "--json", "-q").ok().out), want)
        for i, (layout, precision) in enumerate((("{dp: 2, pp: 1, tp: 1}", "f32"), ("{dp: 1, pp: 1, tp: 2}", "bf16"))):
            path = spec(f"device-exact-{i}", layout=layout, numerics="exact", precision=precision)
            plan = devices.weft("plan", path, "--json").ok().json()
            assert any("numerics exact: 2 of 2 ranks compute on devices" in reason for reason in plan["reasons"]), plan["reasons"]
            alone = want if precision == "f32" else result(weft("train", spec("alone-bf16", precision=precision), "--json", "-q").ok().out)
            assert_same(result(devices.weft("train", path, "--json", "-q").ok().out), alone)
    finally:
        devices.down()


def case_definition():
    """a run that goes on under other settings than it began with says so"""
    said = "settings that define the result"
    path = spec("moved", steps=4, every=2)
    whole = weft("train", path, "--json").ok()
    assert said not in whole.err, whole
    assert result(whole.out)[2]["definition"] in (work / "ck-moved/step-0000000004/manifest.json").read_text()
    path.write_text(path.read_text().replace("steps: 4", "steps: 6").replace("lr: 3e-3", "lr: 2e-3"))
    assert said in weft("train", path).ok().err


def case_devices_of_one_worker():
    """a worker that leads three devices trains exactly on all of them, a rank on each: replicas, stages and tensor ranks, losses and weights as on a host; a
    layout that needs more is refused"""
    if os.environ.get("WEFT_FAILPOINTS") != "true":
        raise Skip("built without fail points")
    want = reference("gpt2", 12)
    devices = Cluster(workers=1, env={"WEFT_DEVICE": "cpu:3"})
    try:
        for i, (layout, n) in enumerate((("{dp: 3, pp: 1, tp: 1}", 3), ("{dp: 1, pp: 2, tp: 1}", 2), ("{dp: 1, pp: 1, tp: 3}", 3), ("auto", 3))):
            path = spec(f"devices-{i}", layout=layout, numerics="exact")
            plan = devices.weft("plan", path, "--json").ok().json()
            assert any(f"numerics exact: {n} of {n} ranks compute on devices" in reason for reason in plan["reasons"]), plan["reasons"]
            assert_same(result(devices.weft("train", path, "--json", "-q").ok().out), want)
        devices.weft("plan", spec("devices-more", layout="{dp: 4, pp: 1, tp: 1}")).fails(2, "4")
    finally:
        devices.down()


def case_layouts():
    """one process, two replicas, two stages and two tensor ranks give the same losses, validation losses and weights; GPT-2 and Llama"""
    for family in MODELS:
        want = reference(family, 12)
        assert want[0][-1][0] < want[0][0][0] and len(want[1]) == 2, want
        for layout in ("{dp: 2, pp: 1, tp: 1}", "{dp: 1, pp: 2, tp: 1, micro: 3}", "{dp: 1, pp: 1, tp: 2}", "auto"):
            assert_same(result(weft("train", spec("layout", family, layout=layout), "--json", "-q").ok().out), want)
            for path in (work / "ck-layout").rglob("*"):
                path.is_file() and path.unlink()
            for path in (work / "ck-layout").iterdir():
                path.rmdir()


def case_shown():
    """a job that is done is listed, logged and gives its name to the next one; its checkpoint is whole; it is exported, and trained on from the file, the Hugging Face directory or the checkpoint; without --json the steps are text"""
    job = next(j for j in weft("jobs", "--json").ok().json()["jobs"] if j["name"] == "alone-gpt2-12")
    assert (job["kind"], job["state"]) == ("train", "done"), job
    assert known["gpt2", 12][2]["weights_digest"] in weft("logs", "alone-gpt2-12").ok().out
    assert pathlib.Path(known["gpt2", 12][2]["checkpoint"]).name == "step-0000000012"
    curves = pathlib.Path(known["gpt2", 12][2]["curves"])
    svg = "{http://www.w3.org/2000/svg}"
    assert curves == work / "ck-alone-gpt2-12/alone-gpt2-12.svg" and len(ElementTree.parse(curves).findall(svg + "polyline")) == 4
    assert len(ElementTree.parse(curves).findall(svg + "circle")) == len(known["gpt2", 12][1])
    assert weft("plot", "alone-gpt2-12", "-o", work / "plot.svg", "--json").ok().json()["steps"] == 12
    assert (work / "plot.svg").read_text() == curves.read_text() == weft("plot", "alone-gpt2-12", "-o", "-").ok().out
    weft("plot", "alone-gpt2-13").fails(3, "alone-gpt2-12")
    weft("plot", "alone-gpt2-12", "-o", work / "none/plot.svg").fails(1, "none/plot.svg")
    again = weft("train", work / "alone-gpt2-12.yaml").ok()  # from its last checkpoint: nothing is left to do
    assert again.out.startswith("done: weights " + known["gpt2", 12][2]["weights_digest"]), again
    assert "step 12/12: loss" in weft("train", spec("words")).ok().out
    weft("export", work / "ck-words", work / "words.gguf", "-q").ok()
    weft("export", work / "ck-words", work / "words", "-q").ok()
    tune = spec("tune").read_text().replace(f"config: {MODELS['gpt2']}", "from: words.gguf").replace("ck-tune", "ck-tuned")
    (work / "tune.yaml").write_text(tune)
    by_file = result(weft("train", work / "tune.yaml", "--json", "-q").ok().out)
    assert by_file[0][0][0] < known["gpt2", 12][0][0][0], by_file
    for start in ("ck-words", "words"):
        (work / "tune.yaml").write_text(tune.replace("words.gguf", start).replace("ck-tuned", f"ck-tuned-{start}").replace("pp: 1", "pp: 2"))
        assert_same(result(weft("train", work / "tune.yaml", "--json", "-q").ok().out), by_file)


def case_served():
    """GPT-2 that was just trained, by way of its checkpoint or of its Hugging Face directory: the same digest on every layout, and a perplexity"""
    path = spec("told")
    path.write_text(path.read_text().replace(f"train: {TEXT},", f"train: {TEXT}, tokenizer: {{train: 400}},").replace("context: 32", "context: 96"))
    weft("train", path, "-q").ok()
    weft("export", work / "ck-told", work / "told", "-q").ok()
    weft("export", work / "ck-told", work / "told.gguf", "-q").ok()
    weft("export", work / "told", work / "again.gguf", "-q").ok()
    for kind in ("f16", "q8_0", "q4_1"):
        weft("quantize", work / "told.gguf", work / f"told-{kind}.gguf", kind, "-q").ok()
    run = lambda model, *args: weft("run", work / model, "-p", "weft runs large", "-n", 20, "--json", "-q", *args).ok().json()
    digests = {run(model, *args)["digest"] for model in ("told.gguf", "again.gguf") for args in ((), ("--pp", "2"), ("--tp", "2"), ("--dp", "2"))}
    assert len(digests) == 1, digests
    for kind in ("f16", "q8_0", "q4_1"):
        told = weft("verify", work / f"told-{kind}.gguf", "--json", "-q").ok().json()
        assert told["equal"], told
    score = weft("perplexity", work / "told.gguf", "-f", TEXT, "--ctx", 96, "--json", "-q").ok().json()
    assert 1 < score["perplexity"] < 400, score


def case_documents():
    """attention and positions inside documents: another result than without, the same on every layout and however leaves share micro-batches; a text that is sampled on the way is one document"""
    keys = 'format: text, separator: "\\n\\n", packing: documents'
    texts = {}

    def within(name, more, layout="{dp: 1, pp: 1, tp: 1}", family="llama"):
        out = weft("train", documents_spec(name, f"{keys}{more}", layout, family), "--json", "-q").ok().out
        texts[name] = [line["sample"] for line in map(json.loads, out.splitlines()) if "sample" in line]
        return result(out)

    def documents_spec(name, data, layout, family="llama"):
        path = spec(name, family, layout=layout, sample="{every: 12, prompt: The, tokens: 12, temperature: 0.8}")
        path.write_text(path.read_text().replace(f"validation: {TEXT}}}", f"validation: {TEXT}, {data}}}"))
        return path

    plain = within("over", "")
    attention = within("within", ", attention: documents")
    own = within("anew", ", attention: documents, positions: documents")
    assert len({r[2]["weights_digest"] for r in (plain, attention, own)}) == 3, (plain[2], attention[2], own[2])
    assert_same(within("anew-2", ", attention: documents, positions: documents", "{dp: 1, pp: 2, tp: 1, micro: 3}"), own)
    weft("export", work / "ck-anew", work / "anew.gguf", "-q").ok()
    said = weft("run", work / "anew.gguf", "-p", "The", "-n", 12, "--temp", 0.8, "--seed", 3, "--kv", "f32", "--json", "-q").ok().json()["text"]
    assert texts["anew"] == texts["anew-2"] == [said], (texts, said)
    learnt = [within(f"anew-learnt-{micro}", ", attention: documents, positions: documents", f"{{dp: 1, pp: 1, tp: 1, micro: {micro}}}", "gpt2") for micro in (1, 6)]
    assert_same(*learnt)
    weft("train", documents_spec("bad-anew", keys + ", positions: documents", "{dp: 1, pp: 1, tp: 1}"), "-q").fails(2, "add data.attention")


def case_sampled():
    """texts that are sampled on the way are the same on each layout, and the last one is what the exported model says under that seed"""
    texts = {}
    for layout in ("{dp: 1, pp: 1, tp: 1}", "{dp: 1, pp: 2, tp: 1, micro: 3}", "{dp: 1, pp: 1, tp: 2}", "{dp: 2, pp: 1, tp: 1}"):
        path = spec("sampled", "llama", steps=40, layout=layout, every=40, sample="{every: 20, prompt: The, tokens: 12, temperature: 0.8}")
        path.write_text(path.read_text().replace("data: {", "data: {tokenizer: {train: 300}, ").replace("ck-sampled", f"ck-sampled-{len(texts)}"))
        steps = [json.loads(line) for line in weft("train", path, "--json", "-q").ok().out.splitlines()]
        texts[layout] = [(s["step"], s["sample"]) for s in steps if "sample" in s]
    assert len(set(map(str, texts.values()))) == 1 and [step for step, text in texts[layout]] == [20, 40], texts
    shown = weft("train", spec("said", "llama", steps=6, every=6, sample="{every: 6, prompt: The, tokens: 4}")).ok().out
    assert "\n  sample: The" in shown and shown.count("sample") == 1, shown
    weft("run", work / "ck-sampled-0/step-0000000040", "-p", "The", "-q").fails(2, "is not a regular file", "weft export makes one of a checkpoint")
    weft("export", work / "ck-sampled-0/step-0000000040", work / "sampled.gguf", "-q").ok()
    said = weft("run", work / "sampled.gguf", "-p", "The", "-n", 12, "--temp", 0.8, "--seed", 3, "--kv", "f32", "--json", "-q").ok().json()
    assert said["text"] == texts[layout][1][1], (said["text"], texts[layout])


def case_planned():
    """weft plan of a job file: memory of each worker, the schedule's bubble, the layout that auto then gets; what cannot be, with legal neighbours"""
    plan = lambda *more, **keys: weft("plan", spec("planned", *more, **keys), "--json").ok().json()
    for family in MODELS:
        alone, two, cut, staged = (plan(family, layout=layout) for layout in (
            "{dp: 1, pp: 1, tp: 1}", "{dp: 2, pp: 1, tp: 1, zero: 1}", "{dp: 1, pp: 1, tp: 2}", "{dp: 1, pp: 2, tp: 1, micro: 6}"))
        ranks = lambda p: [rank for stage in p["stages"] for rank in stage["ranks"]]
        whole = ranks(alone)[0]
        assert 4 * alone["parameters"] <= whole["weight_bytes"] <= 4.2 * alone["parameters"], alone
        assert 8 * alone["parameters"] <= whole["optimizer_bytes"] and whole["gradient_bytes"] >= whole["weight_bytes"], whole
        for p, n in ((two, 2), (cut, 2), (staged, 2)):
            assert len(ranks(p)) == n and {r["worker"] for r in ranks(p)} == {"worker-1", "worker-2"}, p
            for r in ranks(p):
                assert r["peak_bytes"] == sum(r[k] for k in ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "buffer_bytes", "process_bytes")) <= r["memory_bytes"], r
        assert sum(r["optimizer_bytes"] for r in ranks(two)) < 1.1 * whole["optimizer_bytes"], two  # ZeRO-1
        assert all(r["weight_bytes"] < whole["weight_bytes"] for r in ranks(cut) + ranks(staged)), (cut, staged)
        m = staged["micro_batches"]
        assert staged["schedule"] == "1f1b" and m == 6 and 1 / (m + 1) - 1e-6 < staged["predicted"]["bubble"] < 0.9, staged  # (p - 1) / (m + p - 1) and the transfers
        assert alone["predicted"]["bubble"] == 0 and alone["predicted"]["exchange_s"] == 0 < two["predicted"]["exchange_s"], (alone, two)
        assert all(p["predicted"]["step_s"] > 0 and len(p["reasons"]) == 5 for p in (alone, two, cut, staged))
    chosen = plan(layout="auto")["layout"]
    run = weft("train", spec("chosen", layout="auto")).ok()
    assert f"epoch 1: dp {chosen['dp']}, pp {chosen['pp']}, tp {chosen['tp']}\n" in run.err, (chosen, run)
    assert "a step took " in run.out and "predicted were " in run.out, run
    assert "predicted:" in weft("plan", spec("planned")).ok().out
    assert any("as the last job had it" in reason for reason in plan()["reasons"])
    weft("plan", spec("planned", layout="{dp: 3, pp: 1, tp: 1}")).fails(2, "needs 3 workers and there are 2", "layout: {dp: 2, pp: 1, tp: 1}")
    weft("plan", spec("planned", layout="{dp: 1, pp: 3, tp: 1}")).fails(2)
    weft("plan", spec("planned", lern="1")).fails(2, "lern")


def case_progress():
    """lines of weft train, for people and as JSON: loss, speed, share of the workers' rate, waits, what is left"""
    shown = weft("train", spec("progress", layout="{dp: 2, pp: 1, tp: 1}")).ok().out.splitlines()
    line = re.compile(r"step (\d+)/12: loss [\d.]+(, validation [\d.]+)?, lr \S+, grad norm \S+, \d+ tokens/s, MFU \d+ %(, waited \d+ %)?, \S+ left")
    assert [int(line.fullmatch(one)[1]) for one in shown if one.startswith("step ")] == list(range(1, 13)), shown
    steps = [json.loads(text) for text in weft("train", spec("counted"), "--json", "-q").ok().out.splitlines()][:-1]
    assert all(0 < s["mfu"] < 2 and s["eta_s"] >= 0 for s in steps) and steps[-1]["eta_s"] == 0, steps


def case_seen():
    """a job at work in status, top and why: step, loss, speed, MFU, what is left, waits of each worker, and the very memory that the plan named"""
    path = spec("seen", steps=1000000, layout="{dp: 1, pp: 2, tp: 1, micro: 3}")
    planned = {rank["worker"]: rank["peak_bytes"] - rank["process_bytes"] for stage in weft("plan", path, "--json").ok().json()["stages"] for rank in stage["ranks"]}
    run = Run(path)
    run.until_step(8)
    now = lambda verb: next(t for t in weft(verb, "--json").ok().json()["training"] if t["name"] == "seen")
    job = wait_for("word of both ranks", lambda: (lambda t: t if len(t["ranks"]) == 2 and all(r["memory_bytes"] for r in t["ranks"]) else None)(now("status")))
    assert {r["worker"]: r["memory_bytes"] for r in job["ranks"]} == planned, (job, planned)
    assert (job["state"], job["layout"], job["steps"]) == ("running", "dp1 pp2 tp1", 1000000) and job["step"] >= 8, job
    assert job["loss"] > 0 and job["tokens_per_s"] > 0 and 0 < job["mfu"] < 2 and job["eta_s"] > 0, job
    assert all(0 <= r["wait_share"] <= 1 and r["state"] == "running" for r in job["ranks"]), job
    assert now("top")["step"] >= job["step"]
    assert all(word in weft("top").ok().out for word in ("TRAINING", "seen", "dp1 pp2 tp1")) and "seen" in weft("status").ok().out
    why = next(r for r in weft("why", "--json").ok().json()["reasons"] if r["id"] == "seen")
    assert (why["kind"], why["state"]) == ("job", "running") and "of 1000000 is done" in why["text"], why
    assert "tokens/s" in weft("why", "seen").ok().out
    weft("why", "sean").fails(3, "seen")
    weft("cancel", "seen", "-q").ok()
    run.process.stdout.read()
    run.process.wait(GUARD_S)
    assert all(t["name"] != "seen" for t in weft("status", "--json").ok().json()["training"])


def case_traced():
    """the trace of a run on two stages: every pass of every traced step on both, each after what it needs, by one clock, as many as planned; losses and
    weights as without"""
    path = spec("traced", layout="{dp: 1, pp: 2, tp: 1, micro: 2}",  # of two leaves each
                trace="{file: seen/traced.json, first: 4, steps: 3}")
    done = weft("train", path, "--json").ok()
    assert_same(result(done.out), reference("gpt2", 12))
    assert f"\ntrace {work}/seen/traced.json\n" in done.err, done.err
    trace = json.loads((work / "seen/traced.json").read_text())
    assert trace["version"] == 1 and trace["otherData"] == {"job": "traced", "layout": "dp 1, pp 2, tp 1", "schedule": "1f1b", "chunks": 1}, trace["otherData"]
    named = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert named == {0: "stage 0 rank 0: worker-1", 1: "stage 1 rank 0: worker-2"}, named
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    steps = {(e["tid"], e["args"]["step"]): e for e in spans if e["name"].startswith("step ")}
    assert sorted(steps) == [(stage, step) for stage in (0, 1) for step in (4, 5, 6)] and min(e["ts"] for e in spans) == 0, steps
    ends = lambda e: e["ts"] + e["dur"]
    assert all(steps[e["tid"], e["args"]["step"]]["ts"] <= e["ts"] and ends(e) <= ends(steps[e["tid"], e["args"]["step"]]) for e in spans)
    by = {(e["name"], e["tid"], e["args"]["step"], e["args"]["micro"]): e for e in spans if "micro" in e["args"]}
    n_micro = 1 + max(micro for name, stage, step, micro in by)
    plan = weft("plan", path, "--json").ok().json()
    assert plan["micro_batches"] == n_micro == 2 and "2 micro-batches: as the file says" in plan["reasons"], (n_micro, plan)
    assert len(by) == 3 * 8 * n_micro == sum("micro" in e["args"] for e in spans), (len(by), n_micro)
    for step in (4, 5, 6):
        for micro in range(n_micro):
            at = lambda name, stage: by[name, stage, step, micro]
            order = [at("forward", 0), at("send forward", 0), at("forward", 1), at("backward", 1), at("send backward", 1), at("backward", 0)]
            assert all(a["ts"] <= b["ts"] for a, b in zip(order, order[1:])) and ends(at("backward", 1)) <= at("backward", 0)["ts"], order
            assert at("send forward", 0)["ts"] <= ends(at("receive forward", 1)) <= at("forward", 1)["ts"], order


def case_traced_without_samples():
    """a replica that has no sample has steps in the trace, and nothing in them"""
    path = spec("idle", layout="{dp: 2, pp: 1, tp: 1}", trace="{file: idle.json, first: 2, steps: 2}")
    path.write_text(path.read_text().replace("sequences: 6, length: 32, leaves: 4", "sequences: 2, length: 32, leaves: 3"))
    done = weft("train", path, "--json").ok()
    assert f"trace {work}/idle.json\n" in done.err, done
    spans = [e for e in json.loads((work / "idle.json").read_text())["traceEvents"] if e["ph"] == "X"]
    steps = sorted((e["pid"], e["args"]["step"]) for e in spans if e["name"].startswith("step "))
    assert steps == [(replica, step) for replica in (0, 1) for step in (2, 3)], steps
    assert len({e["pid"] for e in spans if "micro" in e["args"]}) == 1, spans


def case_trace_not_written():
    """a trace that the disk cannot take is said once; the job goes on to the same weights, and what was there before stays"""
    path = spec("heavy", steps=LONG, every=LONG, layout="{dp: 1, pp: 2, tp: 1, micro: 3}", trace=f"{{file: heavy.json, first: 1, steps: {LONG - 100}}}")
    (work / "heavy.json").write_text("before")
    mine = Cluster(workers=2)
    resource.prlimit(mine.pid("coordinator"), resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = mine.weft("train", path, "--json").ok()
    mine.down()
    assert done.err.count("\nno trace: ") == 1 and f"{work}/heavy.json cannot be written: " in done.err and "File too large" in done.err, done.err[-3000:]
    assert "ended: " not in done.err, done.err[-3000:]
    assert_same(result(done.out), reference("gpt2", LONG))
    assert (work / "heavy.json").read_text() == "before" and not list(work.glob("heavy.json.*")), list(work.iterdir())


def case_memory():
    """where memory is short `layout: auto` takes a stage more, with the same losses and weights; what does not fit, or wants more workers than there are, is one line that says what would do"""
    broad = "{family: gpt2, layers: 4, width: 256, heads: 4, context: 32}"
    job = lambda name, layout: spec(name, steps=4, every=4, model=broad, layout=layout)
    peak = lambda layout: max(rank["peak_bytes"] for stage in weft("plan", job("broad", layout), "--json").ok().json()["stages"] for rank in stage["ranks"])
    one, two = peak("{dp: 1, pp: 1, tp: 1}"), peak("{dp: 1, pp: 2, tp: 1}")
    assert two < 0.8 * one, (one, two)
    want = result(weft("train", job("broad", "{dp: 1, pp: 1, tp: 1}"), "--json", "-q").ok().out)
    small = Cluster(start=False)
    try:
        small.weft("up", "-q", "--workers", 2, "--memory", (one + two) // 2).ok()
        assert small.weft("plan", job("short", "auto"), "--json").ok().json()["layout"] == {"dp": 1, "pp": 2, "tp": 1}
        got = small.weft("train", job("short", "auto"), "--json").ok()
        assert "epoch 1: dp 1, pp 2, tp 1\n" in got.err, got.err
        assert_same(result(got.out), want)
        for layout in ("{dp: 1, pp: 1, tp: 1}", "{dp: 2, pp: 1, tp: 1}"):
            refused = small.weft("train", job("tight", layout), "-q").fails(2, "worker-1 would hold ", " of its ", "start more workers, or choose layout: {").err
            named = refused.split("choose layout: ")[1].strip().split(" or ")
            assert 1 <= len(named) <= 3 and "{dp: 1, pp: 2, tp: 1}" in named, refused
            for other in named:
                shutil.rmtree(work / "ck-fits", ignore_errors=True)
                assert_same(result(small.weft("train", job("fits", other), "--json", "-q").ok().out), want)
            assert named == re.findall(r"layout: ({[^}]*})", small.weft("plan", job("tight", layout)).fails(2, "would hold").err), refused
        small.weft("train", job("many", "{dp: 2, pp: 2, tp: 1}"), "-q").fails(2, "needs 4 workers and there are 2: start more, or choose layout: {dp: 2, pp: 1, tp: 1} or {dp: 1, pp: 2, tp: 1} or ")
        small.weft("drain", "worker-2", "-q").ok()
        small.weft("train", job("lonely", "auto"), "-q").fails(2, "layout dp 1, pp 1, tp 1 over 1 workers: worker-1 would hold ", "no layout of these fits, nor with recompute: full")
    finally:
        small.down()


def case_bad_input():
    """what is wrong with a job is one line: keys, files, data that are too short, layouts that cannot be, another model's checkpoint"""
    weft("train", spec("bad", lern="1")).fails(2, "lern")
    weft("train", work / "none.yaml").fails(3, "none.yaml")
    weft("train").fails(2, "one job file")
    weft("train", spec("wide", layout="{dp: 3, pp: 1, tp: 1}"), "-q").fails(2, "3 workers", "there are 2")
    weft("train", spec("wide", layout="{dp: 1, pp: 3, tp: 1}"), "-q").fails(2, "layout.pp 3 is impossible", "use 1 to 2")
    weft("train", spec("unseen", trace="{steps: 3}"), "-q").fails(2, "trace.steps needs trace.file")
    weft("train", spec("unseen", trace="{file: t.json, first: 13}"), "-q").fails(2, "step 13 of a run of 12")
    weft("train", spec("unseen", trace=f"{{file: {TEXT}/t.json}}"), "-q").fails(2, f"trace.file {TEXT}/t.json cannot be written: Not a directory; name another file")
    weft("train", spec("unseen", trace=f"{{file: {work}}}"), "-q").fails(2, f"trace.file {work} cannot be written: Is a directory")
    weft("train", spec("single", loss_scale="{policy: fixed}"), "-q").fails(2, "f32 needs no loss scale")
    missing = spec("missing")
    missing.write_text(missing.read_text().replace(str(TEXT), "/no/such/text"))
    weft("train", missing, "-q").fails(3, "/no/such/text")
    short = work / "short.txt"
    short.write_text("too short")
    little = spec("little")
    little.write_text(little.read_text().replace(str(TEXT), str(short)))
    weft("train", little, "-q").fails(2, "data.train: ", "tokens, fewer than one sequence of 32")
    short.write_text("a text of some words, enough for two sequences or three, but not for a batch of six of them")
    weft("train", little, "-q").fails(2, "data.train: ", " sequences of 32, fewer than a batch of 6; give more text, shorter sequences or a smaller batch")
    short.write_text("too short")
    unheld = spec("unheld")
    unheld.write_text(unheld.read_text().replace(f"validation: {TEXT}", f"validation: {short}"))
    weft("train", unheld, "-q").fails(2, "data.validation: ")
    low, high = work / "low.tokens", work / "high.tokens"
    low.write_bytes(bytes([1, 0, 63, 0] * 200))
    high.write_bytes(bytes([1, 0, 64, 0] * 200))
    few = f"{MODELS['gpt2'][:-1]}, vocabulary: 64}}"
    for i, (train, held, prompt, said) in enumerate(((high, low, "0", "data.train: token 1 has id 64,"), (low, high, "0", "data.validation: token 1 has id 64,"), (low, low, "0a", "sample.prompt: token 1 has id 97,"))):
        path = spec(f"few-{i}", model=few, sample=f"{{every: 6, prompt: \"{prompt}\", tokens: 4}}")
        path.write_text(path.read_text().replace(f"train: {TEXT}, validation: {TEXT}", f"train: {train}, validation: {held}, format: tokens"))
        weft("train", path, "-q").fails(2, said, "and the model a vocabulary of 64 ids; use the model's tokenizer")
    odd = spec("odd")
    odd.write_text(odd.read_text().replace("name: odd", "name: ../odd"))
    weft("train", odd, "-q").fails(2, "odd.yaml:2: name cannot be a file's")
    other = spec("other", "llama")
    other.write_text(other.read_text().replace("ck-other", "ck-words"))
    weft("train", other, "-q").fails(2, "another model")
    states = {j["name"]: j["state"] for j in weft("jobs", "--json").ok().json()["jobs"]}
    assert states["wide"] == states["little"] == states["other"] == "failed" and "bad" not in states, states


def case_interleaved():
    """stages of several chunks of layers, run by an interleaved schedule, with activations made again, give the same"""
    want = result(weft("train", spec("deep", model=DEEP), "--json", "-q").ok().out)
    got = weft("train", spec("chunks", model=DEEP, layout="{dp: 1, pp: 2, tp: 1, micro: 4, schedule: interleaved, chunks: 2, recompute: selective}"), "--json", "-q").ok().out
    assert_same(result(got), want)


def case_f16():
    """f16 with a dynamic loss scale: steps that overflow are skipped on every rank and told; equal on layouts and when it goes on from a checkpoint; without a dynamic scale the job ends with the step and what to do, or skips by choice"""
    half = dict(precision="f16", loss_scale="{start: 67108864, growth_steps: 5}")
    run = weft("train", spec("half", **half), "--json", "-q").ok().out
    want = result(run)
    steps = [json.loads(line) for line in run.splitlines()[:-1]]
    skipped = [s["step"] for s in steps if s.get("skipped")]
    assert 0 < len(skipped) < 8 and steps[0]["scale"] == 2 ** 26, steps
    assert steps[-1]["scale"] < 2 ** 26 and want[0][-1][0] < want[0][0][0], steps
    for layout in ("{dp: 2, pp: 1, tp: 1}", "{dp: 1, pp: 2, tp: 1, micro: 3}"):
        assert_same(result(weft("train", spec("half-" + layout[5], layout=layout, **half), "--json", "-q").ok().out), want)
    shutil.rmtree(work / "ck-half/step-0000000012")
    lines = [json.loads(line) for line in weft("train", spec("half", layout="{dp: 1, pp: 1, tp: 2}", **half), "--json", "-q").ok().out.splitlines()]
    assert [(s["step"], s["loss"], s["grad_norm"], s["scale"]) for s in lines[:-1]] == [(s["step"], s["loss"], s["grad_norm"], s["scale"]) for s in steps[10:]], lines
    assert lines[-1]["weights_digest"] == want[2]["weights_digest"], lines
    fixed = dict(precision="f16", loss_scale="{policy: fixed, start: 1152921504606846976}")
    weft("train", spec("fixed", **fixed), "-q").fails(1, "step 1: the gradient is not finite", "loss_scale.policy: dynamic")
    out = weft("train", spec("skips", nonfinite="skip", **fixed), "--json", "-q").ok().out
    assert all(json.loads(line)["skipped"] for line in out.splitlines()[:-1]), out


def case_not_written():
    """a checkpoint that cannot be written is said, the one before stays, and training goes on to the same weights"""
    path = spec("full")
    folder = work / "ck-full"
    folder.mkdir()
    (folder / ".step-0000000010").write_text("in the way")
    done = weft("train", path, "--json").ok()
    assert "checkpoint of step 10 was not written" in done.err and "the last one stays" in done.err, done
    assert_same(result(done.out), reference("gpt2", 12))
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-0000000005", "step-0000000012"], list(folder.iterdir())


def case_slow_disk():
    """a checkpoint whose writing takes longer than the next ones' is not taken for what a death left: all are written, in order"""
    if os.environ.get("WEFT_FAILPOINTS") != "true":
        raise Skip("this build has no fail points")
    slow = Cluster(workers=1, env={"WEFT_FAILPOINT": "checkpoint-slow=5"})
    done = slow.weft("train", spec("slow"), "--json").ok()
    assert_same(result(done.out), reference("gpt2", 12))
    said = [int(line.split("step-")[1]) for line in done.err.splitlines() if line.startswith("checkpoint /")]
    assert said == [5, 10, 12] and "not written" not in done.err and "ended: " not in done.err, done
    assert sorted(p.name for p in (work / "ck-slow").glob("step-*")) == ["step-0000000010", "step-0000000012"]
    slow.down()


def case_worker_killed():
    """a worker that is killed is named, the job goes on by itself, and ends with the losses and weights of the undisturbed run"""
    mortal = Cluster(workers=2)
    run = Run(spec("killed", steps=LONG, layout="{dp: 2, pp: 1, tp: 1}"), mortal)
    run.until_step(25)
    os.kill(mortal.pid("worker-2"), signal.SIGKILL)
    assert_same(run.end(), reference("gpt2", LONG))
    told = run.errors.read_text()
    assert "ended: " in told and "worker-2" in told and "goes on from step" in told, told
    mortal.down()


def case_worker_frozen():
    """so does one that is frozen"""
    run = Run(spec("frozen", steps=LONG, layout="{dp: 1, pp: 2, tp: 1, micro: 3}"))
    run.until_step(25)
    pid = cluster.pid("worker-1")
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for("the end of the epoch", lambda: "ended: " in run.errors.read_text())
    finally:
        os.kill(pid, signal.SIGCONT)
    assert_same(run.end(), reference("gpt2", LONG))
    assert "worker-1" in run.errors.read_text(), run.errors.read_text()
    cluster.wait_members(2)


def case_cancelled():
    """weft cancel ends a run, for its follower too; its checkpoints stay"""
    run = Run(spec("stopped", steps=1000000))
    run.until_step(6)
    weft("cancel", "stopped", "-q").ok()
    run.process.stdout.read()
    assert run.process.wait(GUARD_S) == 130, run.errors.read_text()
    assert run.errors.read_text().endswith("weft: job stopped was cancelled\n"), run.errors.read_text()
    assert all(j["name"] != "stopped" for j in weft("jobs", "--json").ok().json()["jobs"])
    assert any((work / "ck-stopped").iterdir())


def case_coordinator_stopped():
    """who follows a job hears that its coordinator stops, and does not take that for the job's end"""
    mine = Cluster(workers=1)
    run = Run(spec("left", steps=1000000), mine)
    run.until_step(6)
    mine.down()
    run.process.stdout.read()
    assert run.process.wait(GUARD_S) == 5, run.errors.read_text()
    assert "weft: the coordinator is stopping" in run.errors.read_text(), run.errors.read_text()


def case_coordinator_killed():
    """the job outlives its coordinator: the next one has its steps and goes on to the same end"""
    run = Run(spec("orphan", steps=LONG, layout="{dp: 1, pp: 1, tp: 2}"))
    run.until_step(25)
    pid = cluster.pid("coordinator")
    os.kill(pid, signal.SIGKILL)
    run.process.stdout.read()
    assert run.process.wait(GUARD_S) == 5, run.errors.read_text()
    wait_for("another coordinator", lambda: cluster.pid("coordinator") != pid and weft("status").code == 0)
    done = wait_for("the job's end", lambda: next((j for j in weft("jobs", "--json").ok().json()["jobs"] if j["name"] == "orphan" and j["state"] in ("done", "failed")), None))
    assert done["state"] == "done" and done["reason"] == "", (done, weft("logs", "orphan").ok().out[-3000:])
    lines = [line.split(" ", 1)[1] for line in weft("logs", "orphan").ok().out.splitlines()]
    assert_same(result("\n".join(line for line in lines if line.startswith("{"))), reference("gpt2", LONG))


run_cases([case_layouts, case_definition, case_device, case_devices_of_one_worker, case_shown, case_sampled, case_planned, case_progress, case_seen, case_traced, case_traced_without_samples, case_trace_not_written, case_memory, case_served, case_bad_input, case_interleaved, case_f16, case_not_written, case_slow_disk, case_worker_killed, case_worker_frozen, case_coordinator_killed, case_coordinator_stopped,
           case_documents, case_cancelled])
