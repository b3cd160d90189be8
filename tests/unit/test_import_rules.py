"""Who may import whom: style.md's "The house". Read from the source, so that a lazy import counts too."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import BENCHMARKS, ROOT

PACKAGES = {
    "apollo_ipc": ROOT / "src/apollo_ipc",
    "apollo_curation": ROOT / "src/apollo_curation",
    "apollo_router": ROOT / "router/apollo_router",
    "apollo_worker": ROOT / "worker/apollo_worker",
}
NEVER = {
    "apollo_ipc": {"apollo_curation", "apollo_router", "apollo_worker", "vllm"},
    "apollo_curation": {"apollo_router", "apollo_worker", "vllm"},
    "apollo_router": {"apollo_curation", "apollo_worker"},
    "apollo_worker": {"apollo_curation", "apollo_router", "vllm"},
}


# Rooms that a room may not import, on any way and at any depth of a function: who is asked knows no asker.
BELOW = {
    "apollo_worker": (
        {"step", "optimizer", "model", "jobs", "link", "sync"},
        {"front", "trainer", "commands"},
    ),
    "apollo_ipc": (
        {"wire", "checkpoint", "process", "config", "manifest", "keys", "errors"},
        {"cli", "demo"},
    ),
}
MAX_LINES = 350


def modules() -> dict[str, Path]:
    """Every module of the product and of the benchmarks, by its name."""
    found = {file.stem: file for file in BENCHMARKS.glob("*.py")}
    for package, root in PACKAGES.items():
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imported(file: Path) -> Iterator[str]:
    """What `file` imports, at any depth of its functions; of `from a import b` both "a.b" and "a"."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports() -> dict[str, set[str]]:
    """module -> the modules of ours that it imports."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        names = (name if name in MODULES else name.rpartition(".")[0] for name in imported(file))
        graph[module] = {name for name in names if name in MODULES} - {module}
    return graph


def room(module: str) -> str:
    """The folder just under the package, or the module itself where it stands in none."""
    parts = module.split(".")
    return ".".join(parts[:2])


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of nodes each of which reaches every other one."""
    reached = {node: reach(graph, node) for node in graph}
    with_self = (node for node in graph if node in reached[node])
    return {
        frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in with_self
    }


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in graph.get(waiting.pop(), set()) - seen:
            seen.add(node)
            waiting.append(node)
    return seen


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    tops = {
        str(file.relative_to(ROOT)): {name.partition(".")[0] for name in imported(file)} for file in files
    }
    assert {file: bad for file, names in tops.items() if (bad := names & NEVER[package])} == {}


def test_what_is_imported_of_ours_is_there():
    """A module that moves takes its benchmarks with it, too: most of them no other test imports."""
    ours = (*PACKAGES, *(module for module in MODULES if "." not in module))
    missing = [
        f"{module}: {name}"
        for module, file in MODULES.items()
        for name in imported(file)
        if name.partition(".")[0] in ours and name not in MODULES and name.rpartition(".")[0] not in MODULES
    ]
    assert missing == []


def test_no_import_goes_in_a_circle_neither_of_modules_nor_of_rooms():
    graph = imports()
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others)
    for name, others in rooms.items():
        others.discard(name)
    assert circles(graph) | circles(rooms) == set()


def test_no_import_runs_up_a_floor():
    upward = set()
    for module, others in imports().items():
        package, _, rest = module.partition(".")
        lower, upper = BELOW.get(package, (set(), set()))
        if rest.partition(".")[0] in lower:
            up = {f"{package}.{name}" for name in upper}
            upward |= {(module, other) for other in others if room(other) in up}
    assert upward == set()


def test_a_file_of_the_product_fits_into_a_head():
    product = [file for file in MODULES.values() if BENCHMARKS not in file.parents]
    long = {str(file.relative_to(ROOT)) for file in product if len(file.read_text().splitlines()) > MAX_LINES}
    assert long == set()


def test_the_worker_is_rooms_and_its_start():
    files = {file.name for file in PACKAGES["apollo_worker"].glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "process.py"}


def loaded_modules(*modules: str) -> set[str]:
    """Everything that a fresh interpreter has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_configuration_imports_no_torch():
    assert not loaded_modules("apollo_ipc.config", "apollo_ipc.wire.client") & {
        "torch",
        "transformers",
        "vllm",
    }


def test_the_command_line_imports_no_torch():
    if importlib.util.find_spec("apollo_ipc.cli") is None:
        pytest.skip("apollo_ipc.cli does not exist yet")
    assert not loaded_modules("apollo_ipc.cli.main") & {"torch", "transformers", "vllm"}


def test_the_routes_import_no_torch_and_nothing_of_vllm():
    loaded = loaded_modules("apollo_router.plugin", "apollo_router.routes")
    assert not loaded & {"torch", "transformers", "vllm", "apollo_router.export"}


def test_an_engine_process_that_loads_the_plugin_makes_no_metrics():
    # In PROMETHEUS_MULTIPROC_DIR each process's metrics are files, also those of one that serves no HTTP.
    assert not loaded_modules("apollo_router.plugin") & {"prometheus_client", "fastapi", "zmq", "torch"}
