"""What the scripts of tools/bench start ends with them."""
import json
import os
import pathlib
import signal
import subprocess
import sys

import harness
from harness import BUILD, GUARD_S, clean_environment, folder, wait_for

BENCH = pathlib.Path(__file__).resolve().parents[2] / "tools/bench"
# Starts a cluster and two processes, of which one takes no notice of SIGTERM, says who they are and waits for its end.
SCRIPT = r"""
import signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import started
started.STOP_S = 1
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(10000)"
def start(code):
    process = started.Process([sys.executable, "-c", code], stdout=subprocess.PIPE).process
    process.stdout.readline()
    print(process.pid)
start("print(flush=True)\nimport time; time.sleep(10000)")
cluster = started.Cluster(1)
start(deaf)
for line in open(cluster.state + "/up"):
    words = line.split()
    if len(words) > 1 and words[1].isdigit():
        print(words[1])
print(cluster.state, flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("an end")
time.sleep(10000)
"""


def is_alive(pid):
    """Runs still, or waits for being noticed: a zombie is neither."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def run(how):
    """The script's process, the pids of what it started, its state folder."""
    script = subprocess.Popen([sys.executable, "-c", SCRIPT, str(BENCH), how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=clean_environment({"BUILD": str(BUILD)}))
    harness._processes.append(script)
    pids = []
    for line in script.stdout:
        if not line.strip().isdigit():
            return script, pids, line.strip()
        pids.append(int(line))
    raise AssertionError(f"the script said no more than {pids}")


def case_end():
    """by signal or exception: daemons and processes end, also one that is deaf to SIGTERM, and the folder is gone"""
    for how, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), ("raise", 1)):
        script, pids, state = run("raise" if how == "raise" else "wait")
        assert len(pids) >= 4, pids  # two processes, a coordinator, a worker
        if how != "raise":
            assert all(is_alive(pid) for pid in pids)
            script.send_signal(how)
        assert script.wait(GUARD_S) == status, (how, script.returncode)
        wait_for("the end of all", lambda: not any(is_alive(pid) for pid in pids))
        assert not os.path.exists(state), state


def case_killed():
    """killed outright: its processes end with it; what is left of the cluster is in its folder, for `weft down`"""
    script, pids, state = run("wait")
    script.kill()
    script.wait(GUARD_S)
    wait_for("the end of the processes", lambda: not any(is_alive(pid) for pid in pids[:2]))
    harness.command([harness.WEFT, "down", "-q"], env={"WEFT_STATE": state}).ok()
    wait_for("the end of the daemons", lambda: not any(is_alive(pid) for pid in pids))
    harness.shutil.rmtree(state)


def case_load_stopped():
    """tools/bench/load that is stopped while its clients are at work: what it has measured is said and written, and nothing else"""
    path = folder("bench") / "load.json"
    script = subprocess.Popen([sys.executable, BENCH / "load", *["others"] * 100, "--clients", "slow senders", "--scale", "0", "--json", path], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=clean_environment({"BUILD": str(BUILD)}))
    harness._processes.append(script)
    assert any(line.startswith("  others beside slow senders") for line in script.stdout)
    script.send_signal(signal.SIGTERM)
    _, said = script.communicate(timeout=GUARD_S)
    assert script.returncode == 143 and said == "", (script.returncode, said)
    assert json.loads(path.read_text())["scenes"]["others"]["slow senders"]["pairs"]


harness.run_cases([case_end, case_killed, case_load_stopped])
