"""grpc.health.v1 and reflection, asked by another implementation (python3-grpcio) with mutual TLS, on both daemons; the plaintext health port; an engine that
sleeps or spins, idle and busy."""
import os
import socket
import subprocess

import harness
from harness import COORDINATOR, WEFT, WORKER, Skip, clean_environment, command, folder, spawn, tiny_model, wait_for

try:
    import grpc
except ImportError:
    grpc = None

work = folder("health")
model = tiny_model(work, context=65536)
state, logs = work / "coordinator", work / "logs"
hold, spin = work / "hold", work / "spin"  # while one exists, alpha's engine sleeps, or spins
logs.mkdir()
NAMES = {"coordinator": "weft-coordinator", "worker": "weft-worker"}
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = 0, 1, 2, 3


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


plain = {"coordinator": free_address(), "worker": free_address()}
spawn([COORDINATOR, "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0", "--health-listen", plain["coordinator"], "--models", work, "--state", state],
      logs / "coordinator.log")
wait_for("the coordinator's endpoint file", lambda: (state / "endpoint").exists())


def weft(*arguments, home=state):
    return command([WEFT, *arguments], env={"WEFT_STATE": str(home)})


token = weft("token", "create", "--json").ok().json()
spawn([WORKER, "--join", token["join_address"], "--token", token["token"], "--ca-hash", token["ca_hash"], "--name", "alpha", "--state", work / "alpha", "--cache",
       work / "cache", "--threads", 1, "--memory", "1G", "--listen", "127.0.0.1:0", "--health-listen", plain["worker"]], logs / "alpha.log",
      env={"WEFT_FAILPOINT": f"engine-hold=file:{hold},engine-spin=file:{spin}"})


def member():
    found = weft("status", "--json").ok().json()["members"]
    return found[0] if found else {"state": "absent"}


wait_for("the worker to be ready", lambda: member()["state"] == "ready")
ADDRESS = {"coordinator": weft("status", "--json").ok().json()["control_address"], "worker": member()["address"]}


# ---- a client that knows protobuf's wire format and nothing of ours ----

def varint(value):
    out = b""
    while True:
        value, low = value >> 7, value & 0x7F
        out += bytes([low | (0x80 if value else 0)])
        if not value:
            return out


def text_field(number, text):
    return varint(number << 3 | 2) + varint(len(text)) + text.encode()


def fields(data):
    """[(number, value)]: int or bytes."""
    found, at = [], 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = number()
        value = number()
        if key & 7 == 2:
            value, at = data[at:at + value], at + value
        found.append((key >> 3, value))
    return found


def channel(daemon, home=state, certificate=True):
    if grpc is None:
        raise Skip("python3-grpcio is not installed")
    read = lambda name: (home / name).read_bytes()
    credentials = grpc.ssl_channel_credentials((state / "ca.crt").read_bytes(), *((read("admin.key"), read("admin.crt")) if certificate else (None, None)))
    return grpc.secure_channel(ADDRESS[daemon], credentials, [("grpc.ssl_target_name_override", NAMES[daemon])])


def check(to, service=""):
    answer = to.unary_unary("/grpc.health.v1.Health/Check")(text_field(1, service) if service else b"", timeout=harness.GUARD_S)
    return dict(fields(answer)).get(1, UNKNOWN)


def plain_channel(daemon):
    if grpc is None:
        raise Skip("python3-grpcio is not installed")
    return grpc.insecure_channel(plain[daemon])


def fails_with(code, call):
    try:
        answer = call()
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}: {error.details()}"
        return
    raise AssertionError(f"no error: {answer!r}")


# ---- cases ----

def case_coordinator():
    """the coordinator is SERVING, a service that it does not have is NOT_FOUND"""
    with channel("coordinator") as c:
        assert check(c) == SERVING and check(c, "weft.v1.Admin") == SERVING
        fails_with(grpc.StatusCode.NOT_FOUND, lambda: check(c, "no.such.Service"))


def case_worker_earns_it():
    """a worker without a shard is NOT_SERVING, with one it is SERVING"""
    with channel("worker") as c:
        assert check(c) == NOT_SERVING
        assert weft("probe", ADDRESS["worker"]).code == 4
        weft("run", model, "-p", "x", "-n", 2, "-q").ok()
        wait_for("SERVING", lambda: check(c) == SERVING)
        weft("probe", ADDRESS["worker"]).ok()


def case_plain():
    """the health port: plaintext, health and nothing else"""
    for daemon in ("coordinator", "worker"):
        with plain_channel(daemon) as c:
            assert check(c) == SERVING
            for method in ("/weft.v1.Admin/Status", "/weft.v1.Serve/Run", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
                fails_with(grpc.StatusCode.UNIMPLEMENTED, lambda: c.unary_unary(method)(b"", timeout=harness.GUARD_S))
        weft("probe", plain[daemon], "--plain", home=work / "nobody").ok()


def case_no_certificate():
    """without a certificate nothing is answered on the control ports"""
    for daemon in ("coordinator", "worker"):
        with channel(daemon, certificate=False) as c:
            fails_with(grpc.StatusCode.UNAVAILABLE, lambda: check(c))


def reflect(daemon, version, request, home=state):
    with channel(daemon, home) as c:
        call = c.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
        return dict(fields(next(call(iter([request]), timeout=harness.GUARD_S))))


def case_reflection():
    """reflection v1 and v1alpha list the services and describe them, for administrators"""
    wanted = {"coordinator": {"weft.v1.Admin", "weft.v1.Serve", "grpc.health.v1.Health"}, "worker": {"weft.v1.Leader", "grpc.health.v1.Health"}}
    for daemon in ("coordinator", "worker"):
        for version in ("v1", "v1alpha"):
            listed = reflect(daemon, version, text_field(7, ""))[6]
            names = {dict(fields(service))[1].decode() for _, service in fields(listed)}
            assert wanted[daemon] | {f"grpc.reflection.{version}.ServerReflection"} <= names, names
            described = reflect(daemon, version, text_field(4, "grpc.health.v1.Health"))[4]
            assert any(b"HealthCheckRequest" in file for _, file in fields(described))
            assert 7 in reflect(daemon, version, text_field(4, "no.such.Thing")), "no error for an unknown symbol"


def case_roles():
    """a probe certificate sees health and nothing else"""
    home = work / "prober"
    parts = weft("token", "create", "--role", "probe", "--json").ok().json()
    weft("login", parts["join_address"], "--token", parts["token"], "--ca-hash", parts["ca_hash"], "-q", home=home).ok()
    for daemon in ("coordinator", "worker"):
        with channel(daemon, home / "client") as c:
            assert check(c) in (SERVING, NOT_SERVING)
        fails_with(grpc.StatusCode.PERMISSION_DENIED, lambda: reflect(daemon, "v1", text_field(7, ""), home / "client"))
    weft("status", home=home).fails(6, "role")


def need_fail_points():
    if os.environ.get("WEFT_FAILPOINTS") == "false":
        raise Skip("built without fail points")


def status_says(*words):
    reason = member()["reason"]
    return all(word in reason for word in words) and reason


def serves_again():
    """The engine was let go: alpha serves when it has a shard again."""
    with channel("worker") as c:
        wait_for("alpha to be well", lambda: member()["reason"] == "")
        wait_for("a run to succeed", lambda: weft("run", model, "-p", "x", "-n", 2, "-q").code == 0)
        wait_for("SERVING", lambda: check(c) == SERVING)


def idle_engine_stands_still(point):
    """Nobody asks anything of it: seen by Watch, probe, status and the coordinator's log, with worker and operation; then it serves again."""
    need_fail_points()
    serves_again()
    seen = (logs / "coordinator.log").stat().st_size
    with channel("worker") as c:
        watch = c.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=harness.GUARD_S)
        assert dict(fields(next(watch)))[1] == SERVING
        point.touch()
        assert dict(fields(next(watch)))[1] == NOT_SERVING
        assert check(c) == NOT_SERVING and weft("probe", ADDRESS["worker"]).code == 4
    said = wait_for("status to say why", lambda: status_says("its engine "))
    assert "stands still in its turn between steps" in said or "has run no step" in said, said
    over = wait_for("the epoch's end", lambda: [line for line in (logs / "coordinator.log").read_bytes()[seen:].decode().splitlines() if " over: " in line])
    assert "alpha" in over[0] and ("stands still in its turn between steps" in over[0] or "has run no step" in over[0]), over
    point.unlink()
    serves_again()


def busy_engine_stands_still(point):
    """With a request open: seen by Check, Watch and probe, its stream is told of worker and operation; let go, it serves again and the request goes on."""
    need_fail_points()
    serves_again()
    said, told = work / "held.out", work / "held.err"
    with open(said, "wb") as out, open(told, "wb") as err:
        process = subprocess.Popen([str(WEFT), "run", str(model), "-p", "go", "-n", "60000"], env=clean_environment({"WEFT_STATE": str(state)}),
                                   stdout=out, stderr=err)
    harness._processes.append(process)
    wait_for("the answer to begin", lambda: said.stat().st_size > 0)
    with channel("worker") as c:
        watch = c.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=harness.GUARD_S)
        assert dict(fields(next(watch)))[1] == SERVING
        point.touch()
        assert dict(fields(next(watch)))[1] == NOT_SERVING
        assert check(c) == NOT_SERVING
        assert weft("probe", ADDRESS["worker"]).code == 4 and weft("probe", plain["worker"], "--plain").code == 4
        named = lambda line: "alpha" in line and ("stands still in" in line or "has run no step" in line)
        wait_for("worker and operation to be named", lambda: any(named(line) for line in told.read_text().splitlines()))
        wait_for("status to say why", lambda: status_says("its engine "))
        point.unlink()
        wait_for("the request to go on", lambda: b"goes on in epoch" in told.read_bytes())
        process.terminate()
        process.wait()
        serves_again()


def case_sleeping_idle():
    """an engine that sleeps without a request turns NOT_SERVING"""
    idle_engine_stands_still(hold)


def case_sleeping_busy():
    """an engine that sleeps with a request open turns NOT_SERVING"""
    busy_engine_stands_still(hold)


def case_spinning_idle():
    """an engine that spins without a request turns NOT_SERVING"""
    idle_engine_stands_still(spin)


def case_spinning_busy():
    """an engine that spins with a request open turns NOT_SERVING"""
    busy_engine_stands_still(spin)


harness.run_cases([case for name, case in list(globals().items()) if name.startswith("case_")])
