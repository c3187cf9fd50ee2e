"""The page /metrics, read by a parser of its own: the text format to the letter, names that dashboards ask for, counters that never fall, a loss that shows."""
import http.client
import json
import os
import re
import signal
import threading

from harness import GUARD_S, WEFT, Cluster, folder, run_cases, spawn, tiny_model, wait_for

work = folder("metrics")
LAYERS = 12
model = tiny_model(work, context=16384, layers=LAYERS)
cluster = Cluster(workers=3)

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
# What boards made for vLLM draw (its page of metrics, and the board that it ships).
VLLM = {"num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge", "prefix_cache_queries_total": "counter",
        "prefix_cache_hits_total": "counter", "num_preemptions_total": "counter", "prompt_tokens_total": "counter", "generation_tokens_total": "counter",
        "request_success_total": "counter", "time_to_first_token_seconds": "histogram", "inter_token_latency_seconds": "histogram",
        "time_per_output_token_seconds": "histogram", "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
        "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram", "request_inference_time_seconds": "histogram",
        "request_prompt_tokens": "histogram", "request_generation_tokens": "histogram", "request_max_num_generation_tokens": "histogram",
        "request_params_max_tokens": "histogram", "request_params_n": "histogram", "request_time_per_output_token_seconds": "histogram",
        "iteration_tokens_total": "histogram", "gpu_cache_usage_perc": "gauge"}


def serve():
    log = work / "serve.log"
    spawn([WEFT, "serve", model, "--name", "tiny", "--listen", "127.0.0.1:0", "--context", "16384", "--pp", "2", "--dp", "1", "--tp", "1", "--json"], log,
          env=cluster.env)
    said = wait_for("weft serve", lambda: next((json.loads(l) for l in log.read_text().splitlines() if l.startswith("{")), None))
    return said["address"].split("//")[1]


def call(method, path, body=None):
    host, port = ADDRESS.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=GUARD_S)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"} if body else {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == 200, (answer.status, text)
    return answer.headers, text


def labels_of(text, line):
    """The labels between the braces, as a sorted tuple; the whole text must be labels."""
    found, at = [], 0
    while at < len(text):
        match = LABEL.match(text, at)
        assert match and (match[3] or match.end() == len(text)), line
        found.append((match[1], match[2]))
        at = match.end()
    assert len({name for name, _ in found}) == len(found), f"a label twice: {line}"
    return tuple(sorted(found))


class Page:
    """One scrape: families {name: (type, {(sample name, labels): value})}, checked as it is read."""

    def __init__(self):
        headers, text = call("GET", "/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4"), headers
        assert text.endswith("\n") and "\r" not in text
        self.families, self.helped = {}, None
        family = None
        for line in text[:-1].split("\n"):
            if line.startswith("# HELP "):
                name, words = line[7:].split(" ", 1)
                assert NAME.fullmatch(name) and words and self.helped is None and name not in self.families, f"HELP again or out of place: {line}"
                self.helped = name
            elif line.startswith("# TYPE "):
                name, kind = line[7:].split(" ")
                assert name == self.helped and kind in SUFFIXES, f"TYPE without its HELP: {line}"
                assert (kind == "counter") == name.endswith("_total") or name == "vllm:iteration_tokens_total", f"only counters end in _total: {line}"
                self.helped, family = None, name
                self.families[name] = (kind, {})
            else:
                self.sample(line, family)
        for name, (kind, samples) in self.families.items():
            if kind == "histogram":
                self.check_histogram(name, samples)

    def sample(self, line, family):
        match = re.fullmatch(r"([^ {]+)(?:\{(.*)\})? (\S+)", line)
        assert match and self.helped is None and family, f"no sample: {line}"
        kind, samples = self.families[family]
        assert match[1] in {family + suffix for suffix in SUFFIXES[kind]}, f"not of the family {family} before it: {line}"
        key = (match[1], labels_of(match[2] or "", line))
        assert key not in samples, f"a series twice: {line}"
        value = float(match[3])
        assert value == value and (kind == "gauge" or value >= 0), line
        samples[key] = value

    @staticmethod
    def check_histogram(name, samples):
        """Bounds rise, counts rise with them, the last is +Inf and equals _count."""
        series = {}
        for (sample, labels), value in samples.items():
            rest = tuple(l for l in labels if l[0] != "le")
            if sample == name + "_bucket":
                series.setdefault(rest, []).append((float(dict(labels)["le"]), value))
        for rest, buckets in series.items():
            assert buckets == sorted(buckets) and [c for _, c in buckets] == sorted(c for _, c in buckets), (name, buckets)
            assert buckets[-1][0] == float("inf") and buckets[-1][1] == samples[(name + "_count", rest)], (name, rest)
            assert (name + "_sum", rest) in samples
        assert {k[1] for k in samples if k[0] == name + "_count"} == set(series), name

    def values(self, sample, **labels):
        """{labels as a dict: value} of all series of a sample's name that have these labels."""
        family = next(f for f in (sample, re.sub(r"_(bucket|sum|count)$", "", sample)) if f in self.families)
        return [(dict(found), value) for (name, found), value in self.families[family][1].items()
                if name == sample and all(dict(found).get(k) == v for k, v in labels.items())]

    def total(self, sample, **labels):
        return sum(value for _, value in self.values(sample, **labels))

    def counts(self):
        """Every series that may never fall."""
        return {key: value for kind, samples in self.families.values() for key, value in samples.items() if kind != "gauge"}


ADDRESS = serve()


def complete(**body):
    return json.loads(call("POST", "/v1/completions", {"model": "tiny", "prompt": "count me", "temperature": 0, "ignore_eos": True, **body})[1])


def reported():
    """A page on which the replica's leader has said what it does, by a heartbeat since it serves."""
    def told():
        page = Page()
        return page if page.values("vllm:kv_cache_usage_perc", model_name="tiny") and page.total("weft_worker_steps_total") > 0 else None
    return wait_for("the leader's report", told)


def case_before_any_request():
    """the page is well formed before anybody asked, and has zeros where a board looks"""
    page = Page()
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert page.values(gauge, model_name="tiny") == [({"model_name": "tiny"}, 0.0)], page.families[gauge]
    assert page.total("weft_worker_up") == 3 and page.total("weft_build_info") == 1


def case_vllm_names():
    """every name that boards for vLLM ask for is there with its type and model_name, and counts"""
    before = Page()
    complete(max_tokens=7, n=2, temperature=1)
    wait_for("the count", lambda: Page().total("vllm:request_params_n_count") > before.total("vllm:request_params_n_count"))
    page = reported()
    for name, kind in VLLM.items():
        assert page.families["vllm:" + name][0] == kind, (name, page.families["vllm:" + name][0])
        sample = "vllm:" + name + ("_count" if kind == "histogram" else "")
        assert page.values(sample, model_name="tiny"), f"{sample} has no model_name=tiny: {page.values(sample)}"
    grown = lambda sample, **labels: page.total(sample, model_name="tiny", **labels) - (before.total(sample, model_name="tiny", **labels))
    assert grown("vllm:generation_tokens_total") == 14 and grown("vllm:request_success_total", finished_reason="length") == 2
    assert grown("vllm:request_generation_tokens_sum") == 14 and grown("vllm:request_generation_tokens_count") == 2
    assert grown("vllm:request_max_num_generation_tokens_sum") == 7 and grown("vllm:request_params_max_tokens_sum") == 7
    assert grown("vllm:request_params_n_sum") == 2 and grown("vllm:request_prompt_tokens_count") == 1
    assert grown("vllm:request_prompt_tokens_sum") == grown("vllm:prompt_tokens_total") > 0
    assert 0 < grown("vllm:request_inference_time_seconds_sum")


def case_stages_workers_links():
    """series of each replica, stage, worker and link"""
    page = reported()
    job = page.values("weft_job_epoch")[0][0]["job"]
    layers = page.values("weft_stage_layers", job=job, replica="0", rank="0")
    assert sorted(labels["stage"] for labels, _ in layers) == ["0", "1"] and sum(n for _, n in layers) == LAYERS, layers
    assert len({labels["worker"] for labels, _ in layers}) == 2
    assert all(v > 0 for _, v in page.values("weft_stage_weight_bytes", job=job)) and page.total("weft_stage_peak_bytes", job=job) > 0
    assert page.total("weft_replica_epoch", job=job) == page.total("weft_job_epoch", job=job) >= 1
    workers = {labels["worker"] for labels, _ in layers}
    for counter in ("weft_worker_steps_total", "weft_worker_sent_bytes_total", "weft_worker_compute_seconds_total", "weft_worker_wait_seconds_total"):
        assert len([1 for labels, _ in page.values(counter) if labels["worker"] in workers]) == 2, counter
        while Page().total(counter) == 0:  # the heartbeat after more work tells
            complete(max_tokens=50)


def case_links_add_up():
    """what a worker sent is what it sent to its peers, and what these received from it; waits are told by link"""
    def settled():
        page = reported()
        pairs = {(l["worker"], l["peer"]): v for l, v in page.values("weft_link_sent_bytes_total") if v > 0}
        arrived = {(l["peer"], l["worker"]): v for l, v in page.values("weft_link_received_bytes_total") if v > 0}
        sent = {l["worker"]: v for l, v in page.values("weft_worker_sent_bytes_total") if v > 0}
        own = {w: sum(v for (a, _), v in pairs.items() if a == w) for w in sent}
        return (page, pairs) if pairs and pairs == arrived and sent == own else None
    page, pairs = wait_for("heartbeats after the last message", settled)
    assert len(pairs) == 2 and {a for a, _ in pairs} == {b for _, b in pairs}, pairs
    assert all(page.total("weft_link_sent_messages_total", worker=a, peer=b) > 0 for a, b in pairs)
    assert page.total("weft_link_wait_seconds_total") > 0 and page.values("weft_link_stalls_total"), pairs


def case_loop_lag():
    """a worker whose main loop stood still says for how long: on the page, in status, top and doctor, and in its log"""
    page = reported()
    busy = {labels["worker"] for labels, _ in page.values("weft_stage_layers")}
    idle = next(labels["worker"] for labels, _ in page.values("weft_worker_up") if labels["worker"] not in busy)
    assert page.total("weft_coordinator_loop_lag_seconds") < 60 and page.values("weft_worker_loop_lag_seconds", worker=idle)
    os.kill(cluster.pid(idle), signal.SIGSTOP)
    try:
        wait_for("its silence", lambda: cluster.member(idle)["last_heartbeat_ms"] > 2000)
    finally:
        os.kill(cluster.pid(idle), signal.SIGCONT)
    wait_for("the lag on the page", lambda: Page().total("weft_worker_loop_lag_seconds", worker=idle) >= 1)
    assert cluster.member(idle)["loop_lag_ms"] >= 1000
    assert next(w for w in cluster.weft("top", "--json").ok().json()["workers"] if w["name"] == idle)["loop_lag_ms"] >= 1000
    assert "loop lag" in next(c for c in cluster.weft("doctor", "--json").json()["checks"] if c["check"] == f"member {idle}")["text"]
    wait_for("its log", lambda: "the main loop stood still for" in (cluster.state / f"{idle}.log").read_text())
    cluster.wait_members(3)


def case_counters_never_fall():
    """under load the page stays well formed, and no counter falls from one scrape to the next"""
    failed, over = [], threading.Event()

    def client(seed):
        try:
            for i in range(6):
                complete(prompt=f"request {seed} {i}", max_tokens=40, seed=seed)
        except Exception as error:
            failed.append(error)

    def scrape():
        try:
            before = {}
            while not over.is_set():
                now = Page().counts()
                fell = {key: (before[key], now.get(key)) for key in before if key not in now or now[key] < before[key]}
                assert not fell, fell
                before = now
        except Exception as error:
            failed.append(error)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    scraper = threading.Thread(target=scrape)
    before = Page().total("vllm:generation_tokens_total", model_name="tiny")
    for thread in [scraper, *clients]:
        thread.start()
    for thread in clients:
        thread.join()
    over.set()
    scraper.join()
    assert not failed, failed
    assert Page().total("vllm:generation_tokens_total", model_name="tiny") == before + 4 * 6 * 40


def case_a_loss_shows():
    """a worker is killed under a request: the epoch rises, and the recovery is counted and timed"""
    before = Page()
    job = before.values("weft_job_epoch")[0][0]["job"]
    answers = []
    asking = threading.Thread(target=lambda: answers.append(complete(max_tokens=4000)))
    asking.start()
    started = before.total("vllm:generation_tokens_total")
    wait_for("the answer to begin", lambda: Page().total("vllm:generation_tokens_total") > started)
    victim = before.values("weft_stage_layers", job=job, stage="1")[0][0]["worker"]
    os.kill(cluster.pid(victim), signal.SIGKILL)
    asking.join()
    assert answers and answers[0]["usage"]["completion_tokens"] == 4000, answers
    page = Page()
    assert page.total("weft_job_epoch", job=job) > before.total("weft_job_epoch", job=job)
    assert page.total("weft_job_recovery_seconds_count", job=job) >= before.total("weft_job_recovery_seconds_count", job=job) + 1
    assert page.total("weft_job_recovery_seconds_sum", job=job) > 0
    assert page.total("weft_request_recovery_seconds_count", model_name="tiny") >= before.total("weft_request_recovery_seconds_count", model_name="tiny") + 1


run_cases([case_before_any_request, case_vllm_names, case_stages_workers_links, case_links_add_up, case_loop_lag, case_counters_never_fall, case_a_loss_shows])
