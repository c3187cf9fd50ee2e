"""tools/train-demo, with fewer steps: what it shows is true, and nothing of it is left."""
import pathlib
import signal
import subprocess

import harness
from harness import BUILD, GUARD_S, clean_environment, folder, run_cases, wait_for

DEMO = pathlib.Path(__file__).resolve().parents[2] / "tools/train-demo"


def start(place, steps):
    environment = clean_environment({"BUILD": str(BUILD), "TMPDIR": str(place), "WEFT_TRAIN_STEPS": str(steps)})
    process = subprocess.Popen([DEMO, "--no-build"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    harness._processes.append(process)
    return process


def processes_in(place):
    """Daemons whose command line names the folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(place) in words:
            found.append(words.replace("\0", " "))
    return found


def case_shown():
    """a worker is killed, losses and weights are those of one worker alone, the model is sampled, exported and served"""
    place = folder("train-demo")
    demo = start(place, 40)
    shown = demo.communicate(timeout=3 * GUARD_S)[0]
    assert demo.returncode == 0, shown[-4000:]
    for words in ("epoch 1: dp 2, pp 2, tp 1", "epoch 1: dp 1, pp 1, tp 1", "step 1/40: loss", "  sample: The licensee may", "equal: 40 losses, the sampled texts and the weights", "train-demo.svg: 40 steps of four", "small.gguf: gguf",
                  "60 tokens at", '"object":"text_completion"', "done; stopping"):
        assert words in shown, (words, shown[-4000:])
    wait_for("the end of the daemons", lambda: not processes_in(place))
    assert not list(place.iterdir()), list(place.iterdir())


def case_interrupted():
    """interrupted while it trains: everything ends with it"""
    place = folder("train-demo")
    demo = start(place, 100000)
    for line in demo.stdout:
        if line.startswith("step 1/"):
            break
    demo.send_signal(signal.SIGTERM)
    rest = demo.stdout.read()
    assert demo.wait(GUARD_S) == 130, rest[-4000:]
    wait_for("the end of the daemons", lambda: not processes_in(place))
    assert not list(place.iterdir()), list(place.iterdir())


run_cases([case_shown, case_interrupted])
