"""The train key: who may train; an inference key (vLLM's --api-key) never does. The secret of webhooks."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from apollo_ipc.config import Config, make_private_dir
from apollo_ipc.errors import ConfigError


def key_path(config: Config) -> Path:
    return config.state_dir / "train.key"


def train_key(config: Config) -> str:
    """The configured key, else the one in the state directory, made (mode 0600) where there is none yet."""
    return config.http.train_key or _kept(key_path(config), lambda: f"apollo-{secrets.token_urlsafe(32)}")


def webhook_secret(config: Config) -> str:
    """Likewise, of what signs webhooks."""
    return config.webhooks.secret or _kept(
        config.state_dir / "webhook.secret",
        lambda: "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
    )


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What the file says; made (mode 0600) where there is none yet."""
    make_private_dir(path.parent)
    if path.exists():
        return _read(path)
    key = make()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(key)
    try:
        os.link(temporary, path)  # the whole key or none, and the first of two creators wins
    except FileExistsError:
        return _read(path)
    finally:
        temporary.unlink()
    return key


def _read(path: Path) -> str:
    info = path.lstat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"{path}: must be ours with mode 0600, is uid {info.st_uid} {info.st_mode & 0o777:04o}"
        )
    key = path.read_text().strip()
    if not key:
        raise ConfigError(f"{path}: empty; remove it and a new key is made")
    return key


def keys_equal(given: str, expected: str) -> bool:
    """Constant-time comparison."""
    return hmac.compare_digest(given.encode(), expected.encode())
