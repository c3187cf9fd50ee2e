#!/usr/bin/python3
"""test_budget.py COUNT_OPS BUDGET [--update]: instructions of each op, counted by callgrind, against the budget kept in the repository.

Instruction counts repeat exactly, so a slower inner loop shows on any machine and under any load. An op may take 2 % more than its line says. After
a change that is meant: --update writes the file anew. The counts hold for the compiler that the file names; with another one the test is skipped.
"""
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

SLACK = 1.02


def skip(why):
    print(f"skipped: {why}")
    sys.exit(77)


def count(program):
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out", program],
                              capture_output=True, text=True)
        if done.returncode == 77:
            skip(done.stderr.strip().splitlines()[-1] if "lacks" in done.stderr else "this CPU (or valgrind) lacks AVX2")
        if done.returncode != 0:
            raise SystemExit(f"{program} under valgrind ended with {done.returncode}:\n{done.stderr[-2000:]}")
        counts = {}
        for path in glob.glob(folder + "/out.*"):
            with open(path) as f:
                text = f.read()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            if name and total:
                counts[name[1]] = int(total[1])
        return counts


def read_budget(path):
    compiler, budget = None, {}
    with open(path) as f:
        for line in f:
            if line.startswith("# compiler: "):
                compiler = line[len("# compiler: "):].strip()
            elif line.strip() and not line.startswith("#"):
                number, name = line.split(None, 1)
                budget[name.strip()] = int(number)
    return compiler, budget


def main():
    program, path = sys.argv[1], sys.argv[2]
    update = "--update" in sys.argv[3:]
    if shutil.which("valgrind") is None:
        skip("valgrind is not installed")
    if not os.path.exists("/usr/include/valgrind/callgrind.h"):
        skip("valgrind's headers were not there when this was built")
    compiler = subprocess.run([program, "--compiler"], check=True, capture_output=True, text=True).stdout.strip()
    if not update:
        expected, budget = read_budget(path)
        if expected.split(".")[0] != compiler.split(".")[0]:
            skip(f"the budget is for gcc {expected}, this is {compiler}")
    counts = count(program)
    if not counts:
        raise SystemExit("callgrind counted nothing")
    if update:
        with open(path, "w") as f:
            f.write("# Instructions of one call of each op of the AVX2 table (shapes: count-ops.c), written by test_budget.py --update.\n")
            f.write(f"# compiler: {compiler}\n")
            for name, n in sorted(counts.items()):
                f.write(f"{n:10} {name}\n")
        return
    bad = 0
    for name in sorted(set(counts) | set(budget)):
        now, allowed = counts.get(name), budget.get(name)
        if now is None or allowed is None:
            print(f"{name}: {'no longer counted' if now is None else 'has no budget'}: run test_budget.py with --update")
            bad += 1
        elif now > allowed * SLACK:
            print(f"{name}: {now} instructions, the budget is {allowed} (+{100 * (now / allowed - 1):.1f} %)")
            bad += 1
        elif now * SLACK < allowed:
            print(f"# {name}: {now} instructions, the budget could be lowered from {allowed}")
    print(f"{len(counts)} ops counted, {bad} over their budget")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
