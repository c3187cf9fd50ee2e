"""The arrows of the design (DESIGN 2) hold: what a room includes, where the adapters' headers are, what each library needs (nm), what the programs hold.

    proto <- kernels, transport <- worker, coordinator <- tools, tests

Each check is a function from files to a list of violations; the seeded cases give it broken ones, so that a check which sees nothing fails.
Arguments: ROOM=LIBRARY.a, program:NAME=FILE or module=FILE, as tests/layering/meson.build has them; CC in the environment compiles the seeds."""
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

ROOMS = {  # room -> the rooms whose headers it may include, beside its own
    "proto": set(),
    "kernels": {"proto"},
    "transport": {"proto"},
    "worker": {"proto", "kernels", "transport"},
    "coordinator": {"proto", "transport"},
    "tools": {"proto", "kernels", "transport", "worker", "coordinator", "tests"},
    "tests": {"proto", "kernels", "transport", "worker", "coordinator", "tools"},
}
SHIPPED = {  # folder of tools that is a program of users: it knows the rest of the house only by RPC
    "tools/weft": {"proto", "transport"},
}
INSIDE = {  # folder -> what of its own room it may include, where the room is several libraries; the rest of the room may not be seen
    "transport/crypto": {"transport/crypto"},
    "transport/daemon": {"transport/daemon"},
    "transport/rpc": {"transport/rpc", "transport/crypto"},
    "transport/link": {"transport/link", "transport/crypto"},
    "transport/group": {"transport/group", "transport/link"},
}
ADAPTERS = {  # a foreign header's beginning -> where alone it may be included
    "grpc/": "transport/rpc/grpc/",
    "ucp/": "transport/link/ucx",
    "ucs/": "transport/link/ucx",
    "uct/": "transport/link/ucx",
    "nccl.h": "kernels/cuda/nccl",
    "cuda": "kernels/cuda/",
    "cublas": "kernels/cuda/",
    "microhttpd.h": "coordinator/gateway/http/",
    "sqlite3.h": "coordinator/store/",
    "curl/": "tools/weft/load",
}
LIBRARIES = {  # library -> the libraries of ours whose symbols it may need
    "proto": set(),
    "kernels": {"proto"},
    "crypto": {"proto"},
    "daemon": {"proto"},
    "rpc": {"proto", "crypto"},
    "link": {"proto", "crypto"},
    "group": {"proto", "link"},
    "worker": {"proto", "kernels", "crypto", "daemon", "rpc", "link", "group"},
    "coordinator": {"proto", "crypto", "daemon", "rpc"},
}
FOREIGN = {  # beginning of a foreign library's symbols -> the library of ours that alone may need them
    "grpc_": "rpc", "gpr_": "rpc", "ucp_": "link", "ucs_": "link", "uct_": "link", "nccl": "kernels", "cuda": "kernels", "cublas": "kernels",
    "MHD_": "coordinator", "sqlite3_": "coordinator",
}
PROGRAMS = {  # program -> the libraries of ours that it must hold nothing of
    "weft-coordinator": {"kernels", "worker", "link", "group"},
    "weft-worker": {"coordinator"},
    "weft": {"kernels", "worker", "coordinator", "link", "group"},
}


# ---- includes ----

def sources(root):
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.[ch]")):
            yield path.relative_to(root)


def included_file(root, source, name):
    """Of ours: the path below root, of a generated header that of its .proto. Foreign: None."""
    made_from = re.sub(r"\.pb-c\.h$", ".proto", name)
    for base in (source.parent, pathlib.Path("."), pathlib.Path("proto")):
        path = pathlib.Path(os.path.normpath(base / made_from))
        if (root / path).is_file():
            return path
    return None


def include_violation(root, source, name, quoted):
    target = included_file(root, source, name)
    if target is None:
        if quoted:
            return "is no file of ours: foreign headers are in angle brackets"
        for begin, home in ADAPTERS.items():
            if name.startswith(begin) and not str(source).startswith(home):
                return f"belongs to {home} alone"
        return None
    room, other = source.parts[0], target.parts[0]
    mine, theirs = "/".join(source.parts[:2]), "/".join(target.parts[:2])
    if mine in SHIPPED and theirs != mine and other not in SHIPPED[mine]:
        return f"{mine} must not know {theirs if room == other else other}"
    if room != other:
        return None if other in ROOMS[room] else f"{room} must not know {other}"
    if mine in INSIDE and theirs not in INSIDE[mine]:
        return f"{mine} must not know {theirs}"
    return None


def include_violations(root):
    found = []
    for source in sources(root):
        text = (root / source).read_text(errors="replace")
        for line, quote, name in re.findall(r'^([ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">])', text, re.MULTILINE):
            why = include_violation(root, source, name, quote == '"')
            if why:
                found.append(f"{source}: {line.strip()}: {why}")
    return found


# ---- symbols ----

def symbols(path):
    """Global symbols that a library or program has, and those that it needs. The compiler's own (they begin with __) are nobody's."""
    done = subprocess.run(["nm", "-g", "-P", str(path)], capture_output=True, text=True, check=True)
    has, needs = set(), set()
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].endswith(":") or words[0].startswith("__"):
            continue
        (needs if words[1] in "Uw" else has).add(words[0].split("@")[0])
    return has, needs - has


class Libraries:
    def __init__(self, paths):
        """paths: library -> list of archives"""
        self.has, self.needs, self.owners = {}, {}, {}
        for name, archives in paths.items():
            pairs = [symbols(a) for a in archives]
            self.has[name] = set().union(*(p[0] for p in pairs))
            self.needs[name] = set().union(*(p[1] for p in pairs)) - self.has[name]
            for s in self.has[name]:
                self.owners.setdefault(s, set()).add(name)

    def violations(self):
        found = []
        for name in sorted(self.needs):
            for s in sorted(self.needs[name]):
                owners = self.owners.get(s, set())
                if owners and not owners & LIBRARIES[name]:
                    found.append(f"library {name} needs {s} of {', '.join(sorted(owners))}")
                home = next((h for begin, h in FOREIGN.items() if s.startswith(begin)), None)
                if not owners and home is not None and home != name:
                    found.append(f"library {name} needs {s}: the adapter is in {home}")
        found += [f"libraries {' and '.join(sorted(o))} both have {s}: no program could hold them" for s, o in sorted(self.owners.items()) if len(o) > 1]
        return found

    def program_violations(self, program, path):
        has, _ = symbols(path)
        assert "main" in has, f"{path} has no symbol main: is it stripped? then nothing can be said of it"
        return [f"program {program} holds {s} of {library}" for library in sorted(PROGRAMS[program]) for s in sorted(has & self.has[library])]


# ---- cases ----

def case_includes(_):
    """every include points the way of DESIGN 2, and adapters' headers are in their rooms"""
    assert len(list(sources(ROOT))) > 200, "the sources were not found"
    return include_violations(ROOT)


def case_libraries(given):
    """each library needs only what stands below it, and no two have a function of one name"""
    libraries = Libraries(given["libraries"])
    assert set(given["libraries"]) == set(LIBRARIES), "meson.build names other libraries"
    assert all(len(libraries.has[name]) >= 5 for name in LIBRARIES), "a library without symbols"
    return libraries.violations()


def case_programs(given):
    """the coordinator holds no kernel, the worker no coordinator, the command line neither"""
    libraries = Libraries(given["libraries"])
    assert set(given["programs"]) == set(PROGRAMS), "meson.build names other programs"
    return [v for name, path in given["programs"].items() for v in libraries.program_violations(name, path)]


def gpu_libraries(path):
    """What a program or library says that the loader must find of NVIDIA's."""
    done = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True)
    return [n for n in re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout) if re.match(r"lib(cuda|cublas|nccl|nv)", n)]


def case_no_gpu_library(given):
    """no program needs a library of CUDA or NCCL: they come with the module, which is loaded where a driver is"""
    return [f"program {name} needs {library}" for name, path in given["programs"].items() for library in gpu_libraries(path)]


def case_no_driver(given):
    """the module needs no driver library, so that it loads and says no device; the runtime's name in it shows that this would be seen"""
    if "module" not in given:
        return []  # no nvcc here, or -Dcuda=disabled
    found = gpu_libraries(given["module"])
    return [f"the module needs {n}" for n in found if n.startswith("libcuda.so")] + ([] if any(n.startswith("libcudart") for n in found) else ["no libcudart seen"])


def expect(found, wanted):
    return [] if sorted(found) == sorted(wanted) else [f"found {found}, not {wanted}"]


def case_seeded_includes(_):
    """a seeded violation of each include rule is found, and only those"""
    seeds = {
        "proto/base/a.h": "",
        "worker/serve/engine.h": '#include "proto/base/a.h"\n',
        "coordinator/members.h": "",
        "coordinator/good.c": '#include "coordinator/members.h"\n#include "members.h"\n#include "weft/v1/plan.pb-c.h"\n#include <string.h>\n',
        "coordinator/bad.c": '#include "worker/serve/engine.h"\n',
        "worker/bad.c": '  #  include "../coordinator/members.h"\n',
        "proto/plan/bad.c": '#include "kernels/kernels.h"\n#include <sqlite3.h>\n',
        "kernels/kernels.h": "",
        "kernels/bad.c": "#include <tests/sim/loop.h>\n",
        "tests/sim/loop.h": '#include "worker/serve/engine.h"\n',
        "transport/crypto/bad.c": '#include "transport/rpc/rpc.h"\n',
        "transport/rpc/rpc.h": "",
        "proto/grpc/health.proto": "",
        "proto/weft/v1/plan.proto": "",
        "transport/rpc/grpc/good.c": '#include <grpc/grpc.h>\n#include "grpc/health.pb-c.h"\n',
        "transport/rpc/bad.c": "#include <grpc/grpc.h>\n",
        "tools/weft/worse.c": '#include "tests/sim/loop.h"\n#include "worker/serve/engine.h"\n#include "tools/bench/peaks.h"\n',
        "tools/bench/peaks.h": '#include "tests/sim/loop.h"\n#include "worker/serve/engine.h"\n',
        "tools/weft/bad.c": "#include <ucp/api/ucp.h>\n#include <nccl.h>\n#include <cuda_runtime.h>\n#include <microhttpd.h>\n",
    }
    with tempfile.TemporaryDirectory(prefix="weft-layering-") as folder:
        root = pathlib.Path(folder)
        for name, text in seeds.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        found = include_violations(root)
    return expect([f.split(": ")[0] + ": " + f.split(": ")[2] for f in found], [
        "coordinator/bad.c: coordinator must not know worker", "worker/bad.c: worker must not know coordinator",
        "proto/plan/bad.c: proto must not know kernels", "proto/plan/bad.c: belongs to coordinator/store/ alone", "kernels/bad.c: kernels must not know tests",
        "transport/crypto/bad.c: transport/crypto must not know transport/rpc", "transport/rpc/bad.c: belongs to transport/rpc/grpc/ alone",
        "tools/weft/worse.c: tools/weft must not know tests", "tools/weft/worse.c: tools/weft must not know worker",
        "tools/weft/worse.c: tools/weft must not know tools/bench", "tools/weft/bad.c: belongs to transport/link/ucx alone", "tools/weft/bad.c: belongs to kernels/cuda/nccl alone",
        "tools/weft/bad.c: belongs to kernels/cuda/ alone", "tools/weft/bad.c: belongs to coordinator/gateway/http/ alone"])


def compiled(folder, name, text):
    source = folder / (name + ".c")
    source.write_text(text)
    subprocess.run([*shlex.split(os.environ["CC"]), "-c", "-o", str(source.with_suffix(".o")), str(source)], check=True)
    return source.with_suffix(".o")


def case_seeded_symbols(given):
    """a coordinator that calls a kernel, one that links it, and a function of the same name in two libraries are found"""
    real = Libraries(given["libraries"])
    kernel = min(real.has["kernels"])
    with tempfile.TemporaryDirectory(prefix="weft-layering-") as folder:
        folder = pathlib.Path(folder)
        caller = compiled(folder, "caller", f"void {kernel}(void); void ucp_worker_progress(void); void seeded(void);\n"
                                            f"void seeded(void) {{ {kernel}(); ucp_worker_progress(); }}\n")
        twin = min(real.has["worker"])
        double = compiled(folder, "double", f"void {twin}(void);\nvoid {twin}(void) {{}}\n")
        program = compiled(folder, "program", f"void {kernel}(void);\nvoid {kernel}(void) {{}}\nint main(void) {{ return 0; }}\n")
        broken = Libraries({**given["libraries"], "coordinator": [*given["libraries"]["coordinator"], caller, double]})
        return (expect(broken.violations(), [f"library coordinator needs {kernel} of kernels",
                                             f"libraries coordinator and worker both have {twin}: no program could hold them",
                                             "library coordinator needs ucp_worker_progress: the adapter is in link"])
                + expect(real.program_violations("weft-coordinator", program), [f"program weft-coordinator holds {kernel} of kernels"]))


def main(arguments):
    given = {"libraries": {}, "programs": {}}
    for a in arguments:
        name, path = a.split("=", 1)
        if name == "module":
            given["module"] = path
        elif name.startswith("program:"):
            given["programs"][name.removeprefix("program:")] = path
        else:
            given["libraries"].setdefault(name, []).append(path)
    cases = [case_includes, case_libraries, case_programs, case_no_gpu_library, case_no_driver, case_seeded_includes, case_seeded_symbols]
    failed = 0
    print(f"1..{len(cases)}")
    for number, case in enumerate(cases, 1):
        try:
            found = case(given)
        except Exception as error:  # a check that cannot be made has not passed
            found = [repr(error)]
        failed += bool(found)
        print(f"{'not ok' if found else 'ok'} {number} - {case.__doc__}")
        for line in found:
            print(f"# {line}")
    sys.exit(1 if failed else 0)


main(sys.argv[1:])
