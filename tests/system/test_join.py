"""Who gets in and who does not: tokens, the CA's hash, foreign certificates, revocation; daemons started by hand as an operator would."""
import os
import shutil
import signal
import socket

import harness
from harness import COORDINATOR, WEFT, WORKER, Cluster, command, folder, spawn, tiny_model, wait_for

work = folder("join")
model = tiny_model(work)
state = work / "coordinator"
logs = work / "logs"
logs.mkdir()


def start_coordinator(*more, home=state, log="coordinator.log", env=None):
    return spawn([COORDINATOR, "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0", "--models", work, "--state", home,
                  *more], logs / log, env)


coordinator = start_coordinator()
wait_for("the coordinator's endpoint file", lambda: (state / "endpoint").exists())
TOKENS = []


def weft(*arguments, home=state, **more):
    return command([WEFT, *arguments], env={"WEFT_STATE": str(home)}, **more)


def token(*more, home=state):
    parts = weft("token", "create", "--json", *more, home=home).ok().json()
    TOKENS.append(parts["token"])
    return parts


def worker_words(parts, name, **changed):
    parts = {**parts, **changed}
    return [WORKER, "--join", parts["join_address"], "--token", parts["token"], "--ca-hash", parts["ca_hash"], "--name", name, "--state", work / name,
            "--cache", work / "cache", "--threads", 1, "--memory", "1G", "--listen", "127.0.0.1:0"]


def members(home=state):
    return {m["name"]: m for m in weft("status", "--json", home=home).ok().json()["members"]}


def wait_member(name, *states, home=state):
    return wait_for(f"{name} to be {states}", lambda: members(home).get(name, {}).get("state") in states)


def wait_end(process):
    return process.wait(harness.GUARD_S)


def case_join():
    """a worker joins with the printed line; its key is its own, readable by nobody else"""
    line = weft("token", "create").ok().out.split()
    TOKENS.append(line[4])
    parts = {"join_address": line[2], "token": line[4], "ca_hash": line[6]}
    spawn(worker_words(parts, "alpha"), logs / "alpha.log")
    wait_member("alpha", "ready")
    keys = [p for p in (work / "alpha").iterdir() if b"PRIVATE KEY" in p.read_bytes()]
    assert keys and all(p.stat().st_mode & 0o077 == 0 for p in keys), keys
    for path in state.iterdir():
        assert keys[0].read_bytes().split(b"-----END")[0] not in path.read_bytes(), f"the worker's key is in {path}"


def case_used_token():
    """a token authenticates once: a second worker with it is denied (6) while another token keeps the door open"""
    used, other = token(), token()
    spawn(worker_words(used, "beta"), logs / "beta.log")
    wait_member("beta", "ready")
    command(worker_words(used, "gamma")).fails(6, "token")
    assert "gamma" not in members()
    spawn(worker_words(other, "gamma"), logs / "gamma.log")
    wait_member("gamma", "ready")


def case_wrong_token():
    """a wrong token, an expired one, one for another role: denied (6)"""
    good = token()
    command(worker_words(good, "delta", token="0" * len(good["token"]))).fails(6, "token")
    command(worker_words(good, "delta", token="")).fails(6, "token")
    expired = token("--ttl", "1ms")
    command(worker_words(expired, "delta")).fails(6, "token")
    admin = token("--role", "admin")
    command(worker_words(admin, "delta")).fails(6, "role")
    weft("login", good["join_address"], "--token", good["token"], "--ca-hash", good["ca_hash"], home=work / "nobody").fails(6, "role")
    assert "delta" not in members()


def case_wrong_hash():
    """a wrong CA hash: nothing is sent, denied (6), the hash is named; a malformed one is bad input (2)"""
    good = token()
    wrong = "sha256:" + "ab" * 32
    command(worker_words(good, "delta", ca_hash=wrong)).fails(6, wrong, good["join_address"])
    command(worker_words(good, "delta", ca_hash="sha256:12")).fails(2, "sha256:12")
    weft("login", good["join_address"], "--token", good["token"], "--ca-hash", wrong, home=work / "nobody").fails(6, wrong)
    command(worker_words(good, "delta", join_address="127.0.0.1:1")).fails(5, "127.0.0.1:1")
    command([WORKER, "--state", work / "delta"]).fails(2, "--join")


def case_taken_name():
    """a name that is taken gets a number"""
    twin = spawn(worker_words(token(), "beta") + ["--state", work / "beta-twin"], logs / "twin.log")
    wait_member("beta-2", "ready")
    weft("revoke", "beta-2", "-q").ok()
    assert wait_end(twin) == 6, twin.returncode


def case_door_closed():
    """the join listener is closed when no token is valid"""
    fresh = Cluster(workers=1)
    host, port = fresh.status()["join_address"].split(":")

    def refused():
        with socket.socket() as s:
            return s.connect_ex((host, int(port))) != 0

    wait_for("the join listener to close", refused)
    fresh.weft("token", "create", "--ttl", "1h").ok()
    wait_for("the join listener to open", lambda: not refused())
    fresh.down()


def case_foreign():
    """another cluster's certificates open nothing: the client refuses the server, the server refuses the client"""
    foreign = Cluster(workers=1)
    control = weft("status", "--json").ok().json()["control_address"]
    foreign.weft("status", "--cluster", control).fails(5, control, "certificate")
    mixed = work / "mixed"
    mixed.mkdir()
    for name in ("admin.crt", "admin.key"):
        shutil.copy(foreign.state / "coordinator" / name, mixed / name)
    for name in ("ca.crt", "endpoint"):
        shutil.copy(state / name, mixed / name)
    got = weft("status", home=mixed)
    assert got.code in (5, 6), got
    got.fails(got.code, control)
    foreign.down()


def case_name_and_role():
    """a worker's certificate is no administrator's"""
    home = work / "worker-as-admin"
    home.mkdir()
    pem = (work / "alpha" / "node.pem").read_text()
    key = pem[pem.index("-----BEGIN PRIVATE"):pem.index("-----END PRIVATE")] + "-----END PRIVATE KEY-----\n"
    (home / "admin.key").write_text(key)
    (home / "admin.crt").write_text(pem.replace(key, ""))
    shutil.copy(state / "ca.crt", home / "ca.crt")
    shutil.copy(state / "endpoint", home / "endpoint")
    for words in (["token", "create"], ["drain", "beta"], ["revoke", "beta"], ["run", model, "-p", "x", "-q"]):
        weft(*words, home=home).fails(6, "role")


def case_revoke():
    """revoke acts at once: the worker is out, ends with 6 and does not come back; an admin's open client is refused too"""
    weft("run", model, "-p", "x", "-n", 2, "--tp", 3, "-q").ok()
    elsewhere = work / "elsewhere"
    admin = token("--role", "admin")
    weft("login", admin["join_address"], "--token", admin["token"], "--ca-hash", admin["ca_hash"], home=elsewhere).ok()
    who = weft("status", "--json", home=elsewhere).ok()
    assert who.json()["members"]
    gamma = harness._processes[[p.args[p.args.index("--name") + 1] if "--name" in p.args else "" for p in harness._processes].index("gamma")]
    weft("revoke", "gamma", "-q").ok()
    assert wait_end(gamma) == 6, gamma.returncode
    assert members()["gamma"]["state"] == "revoked"
    again = spawn([WORKER, "--state", work / "gamma", "--cache", work / "cache", "--listen", "127.0.0.1:0", "--threads", 1], logs / "gamma.log")
    assert wait_end(again) in (5, 6), again.returncode
    weft("run", model, "-p", "x", "-n", 2, "--tp", 3, "-q").fails(2, "3 workers")
    weft("run", model, "-p", "x", "-n", 2, "--tp", 2, "-q").ok()


def case_plain_probe():
    """probe of the plaintext health port says what to do; --plain asks it, and says where that belongs when the port has TLS"""
    ports = dict(line.split()[:2] for line in (state / "endpoint").read_text().splitlines())
    weft("probe", ports["health"]).fails(2, ports["health"], "without TLS", "--plain")
    assert weft("probe", ports["health"], "--plain").ok().out == "status: SERVING\n"
    weft("probe", ports["control"], "--plain").fails(2, ports["control"], "--health-listen")
    # It may still be giving back what it held with the revoked one.
    wait_for("beta to serve", lambda: weft("probe", members()["beta"]["address"]).out == "status: SERVING\n")
    assert "No match found" not in (logs / "beta.log").read_text()


def case_port_in_use():
    """a port in use, an address that is not ours: one line, exit 1"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command([COORDINATOR, "--listen", address, "--join-listen", "127.0.0.1:0", "--state", work / "second"]).fails(1, address, "in use")
        command(worker_words(token(), "epsilon")[:-2] + ["--listen", address]).fails(1, address, "in use")
    command([COORDINATOR, "--listen", "203.0.113.7:0", "--join-listen", "127.0.0.1:0", "--state", work / "second"]).fails(1, "203.0.113.7")
    command([COORDINATOR, "--listen", "nonsense", "--state", work / "second"]).fails(2, "nonsense")


def case_state_in_use():
    """a state directory serves one daemon at a time"""
    command([COORDINATOR, "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0", "--state", state]).fails(1, str(state))
    command([WORKER, "--state", work / "alpha", "--listen", "127.0.0.1:0"]).fails(1, "alpha")
    command([COORDINATOR, "--state", "/proc/weft"]).fails(1, "/proc/weft")


def case_models():
    """files outside --models are refused, also by way of links and dots"""
    outside = tiny_model(folder("outside"))
    (work / "link.gguf").symlink_to(outside)
    for path in (outside, work / "link.gguf", f"{work}/../{outside.parent.name}/{outside.name}"):
        got = weft("run", path, "-p", "x", "-q")
        assert got.code in (3, 6), got
        got.fails(got.code, str(work))
    weft("run", model, "-p", "x", "-n", 2, "-q").ok()
    weft("run", "tiny.gguf", "-p", "x", "-n", 2, "-q").ok()


def case_coordinator_renewal():
    """the coordinator's own certificate is renewed while it runs: after the first has expired workers serve, join and are administered"""
    if os.environ.get("WEFT_FAILPOINTS") != "true":
        raise harness.Skip("this build has no fail points")
    home = work / "renewal"
    daemons = [start_coordinator(home=home, log="renewal.log", env={"WEFT_FAILPOINT": "coordinator-certificate-life=9"})]
    wait_for("the endpoint file", lambda: (home / "endpoint").exists())
    daemons.append(spawn(worker_words(token(home=home), "one"), logs / "one.log"))
    wait_member("one", "ready", home=home)
    # renewed after 6 s and after 12 s: by then the first is no good any more
    wait_for("two renewals", lambda: (logs / "renewal.log").read_text().count("certificate renewed") >= 2)
    weft("run", model, "-p", "x", "-n", 2, "--tp", 1, "-q", home=home).ok()
    assert members(home)["one"]["state"] == "serving"
    daemons.append(spawn(worker_words(token(home=home), "two"), logs / "two.log"))
    wait_member("two", "ready", home=home)
    weft("run", model, "-p", "x", "-n", 2, "--tp", 2, "-q", home=home).ok()
    assert "lost" not in (logs / "renewal.log").read_text()
    for process in reversed(daemons):
        process.send_signal(signal.SIGTERM)
        assert wait_end(process) == 0, process.args


def case_quiet_logs():
    """no token and no key is in a log; all that still run stop in order with exit 0"""
    for path in logs.iterdir():
        text = path.read_text()
        assert "PRIVATE KEY" not in text, path
        for secret in TOKENS:
            assert secret not in text, f"a token is in {path}"
    running = [p for p in harness._processes if p.poll() is None]
    assert len(running) == 3, [p.args for p in running]
    for process in reversed(running):
        process.send_signal(signal.SIGTERM)
        assert wait_end(process) == 0, process.args


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
