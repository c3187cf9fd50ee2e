"""llama.cpp's own programs, built from the PyPI source package llama-cpp-python into WEFT_PEERS when they are missing."""
import glob
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile

PEERS = os.environ.get("WEFT_PEERS", os.path.expanduser("~/.cache/weft/peers"))
CMAKE = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
         "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"]


def programs(folder, targets, options=()):
    """Paths of the targets in PEERS/folder, built if need be; SystemExit with the reason."""
    build = os.path.join(PEERS, folder)
    paths = [os.path.join(build, "bin", target) for target in targets]
    if all(os.path.exists(path) for path in paths):
        return paths
    me = os.path.relpath(sys.argv[0])
    if shutil.which("cmake") is None:
        sys.exit(f"{me}: cmake is not installed: {targets[0]} cannot be built")
    print(f"building {', '.join(targets)} from the PyPI package llama-cpp-python (many minutes)", file=sys.stderr)
    os.makedirs(build, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PEERS) as source, open(build + ".log", "w") as log:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", source, "llama-cpp-python"]
        subprocess.run(fetch, check=True, stdout=log, stderr=log)
        with tarfile.open(glob.glob(source + "/*.tar.gz")[0]) as archive:
            archive.extractall(source, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python of Debian 12 may lack it
        tree = glob.glob(source + "/*/vendor/llama.cpp")[0]
        for command in (["cmake", "-S", tree, "-B", build, *CMAKE, *options], ["cmake", "--build", build, "--target", *targets, "-j2"]):
            if subprocess.run(command, stdout=log, stderr=log).returncode != 0:
                sys.exit(f"{me}: {targets[0]} does not build, see {log.name}")
    return paths
