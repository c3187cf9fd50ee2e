"""What a benchmark starts, and its end: processes and clusters are stopped, and their folders removed, however the script ends: at its end, by an
exception, SIGINT, SIGTERM or SIGHUP. Processes also end when it is killed outright; of a cluster then its state folder tells what to stop."""
import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile

BUILD = os.environ.get("BUILD", os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "build"))
WEFT = os.path.join(BUILD, "tools", "weft", "weft")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_S = 20
_open = []


def _end(number, _frame):
    for one in SIGNALS:  # stopping is not interrupted
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _stop_all():
    for one in SIGNALS:
        with contextlib.suppress(ValueError):
            signal.signal(one, signal.SIG_IGN)
    for thing in reversed(list(_open)):
        with contextlib.suppress(Exception):
            thing.stop()


def _remember(thing):
    if not _open:
        for one in SIGNALS:
            signal.signal(one, _end)
    _open.append(thing)


def _forget(thing):
    if thing in _open:
        _open.remove(thing)


atexit.register(_stop_all)
_prctl = ctypes.CDLL(None).prctl
PR_SET_PDEATHSIG = 1


def _die_with_parent():
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """A process in a group of its own: Ctrl-C reaches the script alone, which stops the group."""

    def __init__(self, command, **more):
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent, **more)
        _remember(self)

    def stop(self, first=signal.SIGTERM):
        """Asks it to end, kills what is left of its group after a while; returns its status."""
        for number in (first, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
                break
        _forget(self)
        return self.process.returncode


class Cluster:
    """`weft up` in a folder of its own, on the CPUs of a taskset list (None: all)."""

    def __init__(self, workers, cpus=None, environment=None):
        self.state = tempfile.mkdtemp(prefix="weft-bench.")
        self.environment = dict(os.environ, **(environment or {}), WEFT_STATE=self.state)
        _remember(self)
        up = subprocess.Popen([*(["taskset", "-c", cpus] if cpus else []), WEFT, "up", "--workers", str(workers), "-q"], env=self.environment,
                              stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            said = up.communicate()[1]
        except SystemExit:
            up.communicate()  # it notes what it started at its end
            raise
        if up.returncode != 0:
            self.stop()
            raise RuntimeError(said.strip())

    def weft(self, *arguments, **more):
        return subprocess.run([WEFT, *map(str, arguments)], env=self.environment, capture_output=True, text=True, **more)

    def stop(self):
        self.weft("down", "-q")
        shutil.rmtree(self.state, ignore_errors=True)
        _forget(self)
