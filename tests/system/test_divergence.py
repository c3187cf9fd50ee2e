"""weft perplexity --save-logits and --against: the divergence of two quantisations beside one worked out here from the files, exact zeros, refusals of what does not
belong together, and that nothing is left of what was not finished."""
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess

import harness
from harness import Cluster, Skip, WEFT, clean_environment, command, folder, tiny_model, wait_for

work = folder("divergence")
VOCABULARY = 3000
fine = tiny_model(work, "fine.gguf", type="F32", vocab=VOCABULARY)
coarse = work / "coarse.gguf"
command([WEFT, "quantize", fine, coarse, "Q4_0"]).ok()
text = work / "text.txt"
text.write_text("The quick brown fox jumps over the lazy dog. The sky is blue and the sea is deep; 1,234 ships went out. " * 6)
CTX = 32
# Windows in pieces of five rows, which only a large vocabulary gives else.
pieces = {"WEFT_FAILPOINT": "score-rows=5"} if os.environ.get("WEFT_FAILPOINTS") == "true" else {}
three = Cluster(workers=3, env=pieces)
one = Cluster(workers=1)
KEYS = ("kl_mean", "kl_standard_error", "kl_median", "kl_p99", "kl_max", "same_top", "perplexity_ratio")


def score(cluster, model, *more, file=text, ctx=CTX):
    return cluster.weft("perplexity", model, "-f", file, "--ctx", ctx, "--json", "-q", *more)


def save(cluster, model, path, *more):
    return score(cluster, model, "--save-logits", path, *more).ok().json()


def against(cluster, model, path, *more):
    return score(cluster, model, "--against", path, *more).ok().json()


def read(path):
    """(window, rows of floats) by the format's description in tools/weft/logits_file.h."""
    data = path.read_bytes()
    magic, version, vocabulary, window, n_windows = struct.unpack_from("<8s4I", data)
    assert (magic, version, vocabulary) == (b"weftlogi", 1, VOCABULARY)
    n = n_windows * (window - window // 2)
    assert len(data) == 256 + n * vocabulary * 4 + (n + 1) * 16
    return window, [struct.unpack_from(f"<{vocabulary}f", data, 256 + i * vocabulary * 4) for i in range(n)]


def log_softmax(row):
    most = max(row)
    log_sum = most + math.log(math.fsum(math.exp(z - most) for z in row))
    return [z - log_sum for z in row]


def quantile(values, share):
    at = share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def near(got, want, what):
    assert abs(got - want) <= 2e-8 * max(1e-3, abs(want)), (what, got, want)


def case_two_quantisations():
    """every figure of a coarse model against a fine one is what is worked out from the two files"""
    save(three, fine, work / "fine")
    saved = save(three, coarse, work / "coarse")
    got = against(three, coarse, work / "fine")
    window, p_rows = read(work / "fine")
    assert window == CTX and got["tokens_scored"] == len(p_rows) > 60
    kl, same = [], 0
    for p_row, q_row in zip(p_rows, read(work / "coarse")[1]):
        p, q = log_softmax(p_row), log_softmax(q_row)
        kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)))
        same += p_row.index(max(p_row)) == q_row.index(max(q_row))
    mean = math.fsum(kl) / len(kl)
    deviation = math.sqrt(math.fsum((k - mean) ** 2 for k in kl) / (len(kl) - 1))
    kl.sort()
    want = {"kl_mean": mean, "kl_standard_error": deviation / math.sqrt(len(kl)), "kl_median": quantile(kl, 0.5), "kl_p99": quantile(kl, 0.99),
            "kl_max": kl[-1], "same_top": same / len(p_rows)}
    for key, value in want.items():
        near(got[key], value, key)
    assert got["kl_mean"] > 1e-6, "the two models are one"
    assert got["reference"]["model"] == "fine.gguf" and got["reference"]["numerics"] == "exact" and len(got["reference"]["definition"]) == 32, got
    plain = score(three, fine).ok().json()
    # Sums of log-probabilities that were rounded to float.
    assert abs(got["reference"]["perplexity"] / plain["perplexity"] - 1) < 1e-5, (got, plain)
    assert abs(got["perplexity_ratio"] / (got["perplexity"] / plain["perplexity"]) - 1) < 1e-5, (got, plain)
    assert (saved["perplexity"], saved["tokens_scored"]) == (got["perplexity"], got["tokens_scored"])
    assert not any(key in saved for key in KEYS), saved


def case_itself():
    """a model against itself: exact zeros, every token the same, ratio 1; in words too"""
    got = against(three, fine, work / "fine")
    assert [got[key] for key in KEYS] == [0, 0, 0, 0, 0, 1, 1], got
    out = three.weft("perplexity", fine, "-f", text, "--ctx", CTX, "-q", "--against", work / "fine").ok().out
    assert "ratio 1.000000" in out and "mean 0 " in out and "100.000 %" in out, out


def case_layouts():
    """class exact: every layout and number of workers gives the very same file, and the perplexity that it has without one"""
    want = (work / "fine").read_bytes()
    plain = score(one, fine).ok().json()
    for cluster, more in ((one, []), (three, ["--pp", 2]), (three, ["--tp", 3]), (three, ["--dp", 3])):
        path = work / "layout"
        got = save(cluster, fine, path, *more)
        assert path.read_bytes() == want, (more, "the rows differ")
        assert (got["nll_mean"], got["tokens_scored"]) == (plain["nll_mean"], plain["tokens_scored"]), (more, got, plain)
        both = score(cluster, fine, "--against", work / "fine", "--save-logits", path, *more).ok().json()
        assert both["kl_max"] == 0 and path.read_bytes() == want, (more, both)


def case_wide():
    """a vocabulary of 100,000: a window comes in pieces of two rows"""
    wide = tiny_model(work, "wide.gguf", type="Q8_0", vocab=100000, layers=1, width=96, heads=3, kv=1)
    path = work / "wide"
    got = save(one, wide, path)
    assert path.stat().st_size == 256 + got["tokens_scored"] * 400000 + (got["tokens_scored"] + 1) * 16
    for cluster, more in ((one, []), (three, ["--pp", 1, "--tp", 3])):
        assert against(cluster, wide, path, *more)["kl_max"] == 0
    path.unlink()


def case_damaged():
    """files that are cut, changed or something else: one line, exit code 2; none: 3"""
    good = (work / "fine").read_bytes()
    bad = work / "bad"
    hashes = 256 + (len(good) - 256 - 16) // (VOCABULARY * 4 + 16) * VOCABULARY * 4
    for name, data, word in (("cut", good[:-1], "bytes"), ("cut in the rows", good[:len(good) // 2], "bytes"), ("header alone", good[:256], "bytes"),
                             ("cut header", good[:100], "no file of logits"), ("empty", b"", "no file of logits"), ("longer", good + b"x", "bytes"),
                             ("a model", fine.read_bytes(), "no file of logits"), ("header", good[:20] + b"\x07" + good[21:], "header"),
                             ("a row", good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], "row 0"),
                             ("a hash", good[:hashes] + bytes([good[hashes] ^ 1]) + good[hashes + 1:], "hashes"),
                             ("version", good[:8] + b"\x02" + good[9:], "version 2")):
        bad.write_bytes(data)
        result = score(three, fine, "--against", bad)
        try:
            result.fails(2, str(bad), word)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    score(three, fine, "--against", work / "none").fails(3, "none", "--save-logits")
    score(three, fine, "--against", work).fails(2, str(work))


def case_not_of_this():
    """another text, window, vocabulary or tokenizer: one line that says which, exit code 2"""
    other = work / "other.txt"
    other.write_text(text.read_text()[1:])
    score(three, fine, "--against", work / "fine", file=other).fails(2, "another text")
    score(three, fine, "--against", work / "fine", ctx=16).fails(2, "--ctx 32")
    small = tiny_model(work, "small.gguf", type="F32", vocab=2000)
    score(three, small, "--against", work / "fine").fails(2, "another vocabulary", "3000", "2000")


def case_unwritable():
    """logits that cannot be written: one line, and nothing is there afterwards"""
    score(three, fine, "--save-logits", "/none/logits").fails(1, "/none/logits")
    score(three, fine, "--save-logits", work).fails(2, str(work))
    assert not list(work.parent.glob(work.name + ".*"))


def case_disk_full():
    """a disk that is too small is said before anything is written; what was there stays"""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(work)], capture_output=True).returncode != 0:
        raise Skip("no mount namespace of one's own here")
    disk = work / "disk"
    disk.mkdir()
    words = [WEFT, "perplexity", fine, "-f", text, "--ctx", CTX, "-q", "--save-logits", disk / "logits"]
    script = 'mount -t tmpfs -o size=64k none disk && echo old >disk/logits && "$@"; code=$?; { ls -A disk; cat disk/logits; } >listing; exit $code'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *map(str, words)], env=clean_environment(three.env), capture_output=True, cwd=work,
                          timeout=harness.GUARD_S)
    harness.Result(words, done.returncode, done.stdout.decode(), done.stderr.decode()).fails(1, str(disk / "logits"), "are free there")
    assert (work / "listing").read_text() == "logits\nold\n", (work / "listing").read_text()


def holds_file_in(process, place):
    """A file that it writes there has no name where the file system offers that."""
    for number in pathlib.Path(f"/proc/{process.pid}/fd").glob("*"):
        try:
            if os.readlink(number).startswith(str(place)):
                return True
        except OSError:
            pass  # closed meanwhile
    return False


def case_interrupted():
    """Ctrl-C while logits are written: exit code 130; killed: neither leaves anything"""
    place = work / "interrupted"
    place.mkdir()
    many = work / "many.txt"
    many.write_text(text.read_text() * 60)
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen([str(w) for w in (WEFT, "perplexity", fine, "-f", many, "--ctx", CTX, "-q", "--save-logits", place / "logits")],
                                   env=clean_environment(three.env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        harness._processes.append(process)
        wait_for("the file to be begun", lambda: process.poll() is not None or holds_file_in(process, place))
        is_named = list(place.iterdir()) != []
        process.send_signal(number)
        out, err = process.communicate(timeout=harness.GUARD_S)
        assert (process.returncode, out) == (code, b""), (process.returncode, out, err)
        assert list(place.iterdir()) == [] or (is_named and number == signal.SIGKILL), list(place.iterdir())


def case_announced():
    """how large the file will be is said before it is written"""
    path = work / "told"
    err = three.weft("perplexity", fine, "-f", text, "--ctx", CTX, "--save-logits", path).ok().err
    rows = (path.stat().st_size - 256 - 16) // (VOCABULARY * 4 + 16)
    assert f"{path}: {rows} rows of {VOCABULARY} logits" in err, err
    assert json.loads(score(three, fine).ok().out)["tokens_scored"] == rows


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
