"""What the system tests share: cases printed as TAP, clusters of real daemons on loopback in a folder that goes away, `weft` run with a guard, and waiting on
state. Standard library only. The environment says where things are: WEFT_BUILD (the build folder), WEFT_TEST_MODEL (a real model, optional)."""
import atexit
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

BUILD = pathlib.Path(os.environ["WEFT_BUILD"])
WEFT = BUILD / "tools/weft/weft"
COORDINATOR = BUILD / "coordinator/weft-coordinator"
WORKER = BUILD / "worker/weft-worker"
SYSTEM = BUILD / "tests/system"
GUARD_S = 180  # of one command and of one wait; no test asserts a time, this only ends what hangs


class Skip(Exception):
    """Raised with the reason by a case that cannot run here."""


class Result:
    def __init__(self, args, code, out, err):
        self.args, self.code, self.out, self.err = args, code, out, err

    def json(self):
        """The one object that --json prints."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"--json printed {len(lines)} lines: {self}"
        value = json.loads(lines[0])
        assert next(iter(value)) == "version" and value["version"] == 1, f"no version first: {self}"
        return value

    def ok(self):
        assert self.code == 0, f"exit code not 0: {self}"
        return self

    def fails(self, code, *words):
        """One line `weft: ...` on stderr (beside a daemon's log) that holds all the words, nothing on stdout, and this exit code."""
        lines = [line for line in self.err.splitlines() if line and not re.match(r"\d{4}-\d\d-\d\dT\S+ info: ", line)]
        assert self.code == code, f"exit code not {code}: {self}"
        assert self.out == "", f"output beside an error: {self}"
        assert len(lines) == 1 and lines[0].startswith("weft"), f"not one line: {self}"
        for word in words:
            assert word in lines[0], f"'{word}' is missing: {self}"
        return self

    def __str__(self):
        words = " ".join(str(a) if len(str(a)) < 80 else str(a)[:80] + "..." for a in self.args)
        return f"{words}: exit code {self.code}\n  stdout: {self.out[-1500:]}\n  stderr: {self.err[-1500:]}"


def wait_for(what, condition, guard_s=GUARD_S):
    """Returns the first true value of condition()."""
    limit = time.monotonic() + guard_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > limit:
            raise AssertionError(f"waited {guard_s} s for {what}")
        time.sleep(0.02)


# ---- processes and folders that must not outlive the test ----

_processes = []
_folders = []
_clusters = []


def _clean():
    for cluster in list(_clusters):
        with contextlib.suppress(Exception):
            cluster.down()
    for process in _processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)


atexit.register(_clean)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def folder(name):
    path = pathlib.Path(tempfile.mkdtemp(prefix=f"weft-{name}-"))
    _folders.append(path)
    return path


def clean_environment(extra=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WEFT_", "XDG_"))}
    env.update(extra or {})
    return env


def spawn(arguments, log, env=None):
    """A daemon of our own, logging to a file."""
    with open(log, "ab") as out:
        process = subprocess.Popen([str(a) for a in arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=clean_environment(env))
    _processes.append(process)
    return process


def command(arguments, env=None, stdin=None, guard_s=GUARD_S):
    words = [str(a) for a in arguments]
    done = subprocess.run(words, env=clean_environment(env), input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL, capture_output=True,
                          timeout=guard_s)
    return Result(words[1:], done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


class Cluster:
    """`weft up` in a folder of its own."""

    def __init__(self, workers=3, env=None, start=True):
        self.state = folder("system")
        self.env = {"WEFT_STATE": str(self.state), **(env or {})}
        _clusters.append(self)
        if start:
            self.weft("up", "--workers", workers, "-q").ok()

    def weft(self, *arguments, **more):
        return command([WEFT, *arguments], env={**self.env, **more.pop("env", {})}, **more)

    def status(self):
        return self.weft("status", "--json").ok().json()

    def member(self, name):
        return next(m for m in self.status()["members"] if m["name"] == name)

    def wait_states(self, states, what):
        """Until the members' states are these: {"worker-1": ("ready", "serving"), ...}."""
        return wait_for(what, lambda: all(self.member(n)["state"] in s for n, s in states.items()))

    def wait_members(self, n):
        """Until n members are ready or serving."""
        return wait_for(f"{n} members", lambda: sum(m["state"] in ("ready", "serving") for m in self.status()["members"]) >= n)

    def pid(self, name):
        for line in (self.state / "up").read_text().splitlines():
            words = line.split()
            if words[0] == name:
                return int(words[1])
        raise AssertionError(f"no process {name} in {self.state}/up")

    def endpoint(self, key):
        for line in (self.state / "coordinator/endpoint").read_text().splitlines():
            if line.startswith(key + " "):
                return line.split()[1]
        raise AssertionError(f"no {key} in the endpoint file")

    def logs(self):
        return {p.name: p.read_text(errors="replace") for p in self.state.glob("*.log")}

    def down(self):
        if self in _clusters:
            _clusters.remove(self)
        return self.weft("down")


def tiny_model(directory, name="tiny.gguf", **settings):
    """A model of random weights that three workers can share in every way: 6 heads over 3 KV heads, 4 layers."""
    path = pathlib.Path(directory) / name
    words = [f"{k}={v}" for k, v in settings.items()]
    done = subprocess.run([SYSTEM / "make-model", path, *words], capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    return path


def recomputed_digest(path, vocabulary):
    done = subprocess.run([SYSTEM / "row-digest", path, str(vocabulary)], capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def real_model():
    path = os.environ.get("WEFT_TEST_MODEL", "")
    if not path or not os.path.exists(path):
        raise Skip("WEFT_TEST_MODEL names no file")
    return path


# ---- memory ----

HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident_is_what_was_asked():
    """Skips where a process's resident size tells something else."""
    if os.environ.get("WEFT_SANITIZE", "none") != "none":
        raise Skip("a sanitizer's own memory is beside the process's")
    if HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text():
        raise Skip("transparent_hugepage is 'always': the kernel gives 2 MiB where a page was asked")


def forget_peak(pid):
    """What the kernel noted so far: a worker that starts measures the machine, with 256 MiB."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident(pid, what="VmRSS"):
    """Bytes."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(what + ":"))


def peak(pid):
    """The highest resident size since forget_peak()."""
    return resident(pid, "VmHWM")


# ---- cases ----

def run_cases(cases):
    """Runs functions in order and prints TAP; a name is the function's docstring."""
    failed = 0
    print(f"1..{len(cases)}", flush=True)
    for number, case in enumerate(cases, 1):
        name = " ".join(case.__doc__.split()).rstrip(".")
        try:
            case()
            print(f"ok {number} - {name}", flush=True)
        except Skip as reason:
            print(f"ok {number} - {name} # SKIP {reason}", flush=True)
        except Exception:
            failed += 1
            print(f"not ok {number} - {name}", flush=True)
            for line in traceback.format_exc().splitlines():
                print(f"# {line}", flush=True)
    sys.exit(1 if failed else 0)
