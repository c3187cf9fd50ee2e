"""Counts single test cases in meson's log (TAP lines of each program; a program without TAP counts as one) and prints the closing line."""
import json
import re
import sys

passed = failed = 0
skipped = []
for line in open(sys.argv[1]):
    test = json.loads(line)
    cases = re.findall(r"^(ok|not ok)\b([^\n]*)$", test.get("stdout") or "", re.M)
    bad = 0
    for verdict, rest in cases:
        skip = re.search(r"# ?skip\S*\s*(.*)", rest, re.I)
        if skip:
            skipped.append(f"{test['name']}: {rest.strip(' -')}")
        elif verdict == "ok":
            passed += 1
        else:
            bad += 1
    if not cases:
        if test["result"] == "OK":
            passed += 1
        elif test["result"] == "SKIP":
            reason = (test.get("stdout") or test.get("stderr") or "").strip().splitlines()
            skipped.append(f"{test['name']}: {reason[-1] if reason else 'no reason given'}")
        else:
            bad = 1
    elif test["result"] not in ("OK", "SKIP") and bad == 0 and test.get("returncode") != 0:
        bad = 1  # crashed, timed out or lost its plan after its last line; cmocka's skips ("not ok # SKIP") exit with 0
    failed += bad
for reason in skipped:
    print("skipped", reason)
print(f"{passed} passed, {failed} failed" + (f", {len(skipped)} skipped" if skipped else ""))
sys.exit(1 if failed else 0)
