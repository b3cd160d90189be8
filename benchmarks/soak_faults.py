"""Exceptions in the live trainer, poison and restores, for soak.py."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
from soak_system import SoakFailed, System, wait_for

HERE = Path(__file__).parent
SUPPORT = HERE.parent / "tests" / "support"
POISON = 250
# Layer -> the largest number of a call that raises; as tests/support/faults.py names them.
LAYERS = {
    "disk": 60, "sqlite": 60, "sqlite COMMIT": 6, "queue": 6, "mark": 4, "state file": 6, "file": 4,
    "device put": 200, "device read": 300, "device close": 2,
}  # fmt: skip
WITHIN_S = 45.0
LOOK_S = 0.2


def hook_into(system: System) -> None:
    """The trainers that its worker starts import soak_hooks/sitecustomize.py."""
    hooks = system.base / "hooks"
    hooks.mkdir()
    system.poison = POISON
    system.env |= {
        "PYTHONPATH": f"{HERE / 'soak_hooks'}:{SUPPORT}",
        "APOLLO_SOAK_HOOKS": str(hooks),
        "APOLLO_SOAK_POISON": str(POISON),
    }


def raised(system: System) -> list[str]:
    path = system.base / "hooks" / "raised"
    return path.read_text().splitlines() if path.exists() else []


def raise_once(system: System, draw: random.Random) -> str:
    """The call that raised, in the trainer that runs. Raises SoakFailed."""
    before, deadline = len(raised(system)), time.monotonic() + 10 * WITHIN_S
    while time.monotonic() < deadline:
        layer = draw.choice([*LAYERS])
        (system.base / "hooks" / "next").write_text(f"{layer} {draw.randint(1, LAYERS[layer])}")
        (system.base / "hooks" / "next").rename(system.base / "hooks" / "raise")
        until = time.monotonic() + WITHIN_S
        while time.monotonic() < until:
            if len(seen := raised(system)) > before:
                return seen[before]
            system.ask_for_sync(draw.choice(("full", "delta")))
            time.sleep(LOOK_S * 10)
    raise SoakFailed("no call raised")


def restore_live(system: System, draw: random.Random) -> int:
    """The version that was restored; the trainer must be idle."""
    version = -1

    def is_done() -> bool:
        nonlocal version
        listed = httpx.get(f"{system.server.url}/checkpoint/history", headers=system.headers, timeout=30)
        listed.raise_for_status()
        versions = [one["weight_version"] for one in listed.json()["versions"] if not one["is_present"]]
        if not versions:
            raise SoakFailed("there is no older version to be restored")
        version = draw.choice(versions)
        answer = httpx.post(
            f"{system.server.url}/checkpoint/restore",
            json={"version": version}, headers=system.headers, timeout=300,
        )  # fmt: skip
        # A sync that ran already may have taken its place since it was listed.
        is_gone = answer.status_code == 400 and "is not kept" in answer.text
        if answer.status_code not in (200, 409, 503) and not is_gone:
            raise SoakFailed(f"restore of version {version}: {answer.status_code} {answer.text[:300]}")
        return answer.status_code == 200

    wait_for(is_done, "a live restore", 600, 1.0)
    return version


def restore_on_disk(system: System, draw: random.Random) -> int:
    """`apollo-ipc checkpoint restore`; nobody may serve or train the directory."""
    from apollo_ipc.checkpoint import read_commit

    commit = read_commit(system.model_dir)
    versions = [one.weight_version for one in commit.history] if commit else []
    if not versions:
        raise SoakFailed("there is no older version to be restored")
    version = draw.choice(versions)
    command = [sys.executable, "-m", "apollo_ipc", "checkpoint", "restore", str(version), "--yes"]
    command += ["--model-dir", str(system.model_dir)]
    done = subprocess.run(command, env=system.env, capture_output=True, text=True)
    if done.returncode:
        raise SoakFailed(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return version
