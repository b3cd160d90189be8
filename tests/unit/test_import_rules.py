"""Who may import whom: style.md's "The house". Read from the source, so that a lazy import counts too."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

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


def imports(file: Path) -> set[str]:
    """Top-level names of everything that `file` imports, at any depth of its functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): bad for file in files if (bad := imports(file) & NEVER[package])}
    assert not wrong


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
