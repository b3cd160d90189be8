"""Configuration: one TOML file, overridden by environment (`APOLLO_TRAIN__LR=1e-4`) and then by flags.

Each section below is a section of the file; configs/default.toml lists them all with their defaults. A client
that keeps sections of its own in the same file names them in the entry point group `apollo_ipc.sections`, and
reads them with a subclass of Config.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from apollo_ipc.errors import ConfigError, UserError
from apollo_ipc.wire.requests import convert

DEFAULT_RANK = 64  # APOLLO's projection rank: the one place where it is written
ENV_PREFIX = "APOLLO_"
SECTION_GROUP = "apollo_ipc.sections"  # of entry points; only their names are read here

Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
CurveKeeper = Literal["tensorboard", "wandb", "mlflow"]  # each an extra of its name


class Paths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """runtime_dir: socket, lock and manifest (lost at reboot); state_dir: queue and keys (kept).

    Empty means the user's own: $XDG_RUNTIME_DIR/apollo-ipc (or a directory under the temporary one) and
    $XDG_STATE_HOME/apollo-ipc (or ~/.local/state/apollo-ipc).
    """

    runtime_dir: str = ""
    state_dir: str = ""


class Train(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Defaults of a job, and what the optimizer is."""

    lr: Annotated[float, Meta(gt=0, le=0.1)] = 1e-5
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    accumulate_steps: Annotated[int, Meta(ge=1, le=65536)] = 1  # examples an update: their mean loss
    schedule: Literal["auto", "constant", "cosine"] = "auto"
    warmup_fraction: Fraction = 0.1
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    eps: Positive = 1e-8
    weight_decay: Fraction = 0.0
    rank: Annotated[int, Meta(ge=1)] = DEFAULT_RANK
    refresh_steps: Annotated[int, Meta(ge=1)] = 200
    projection: Literal["gaussian", "block_sign"] = "gaussian"
    limiter_ratio: Annotated[float, Meta(ge=0)] = 1.01  # 0 switches the norm-growth limiter off
    limiter_floor: Annotated[float, Meta(ge=0)] = 1.0  # RMS of an update, in units of lr, that it lets pass
    rounding: Literal["stochastic", "nearest", "kahan"] = "stochastic"
    seed: Annotated[int, Meta(ge=0, le=2**62)] = 0
    router: Literal["train", "freeze"] = "train"  # of a mixture of experts: what chooses among them
    max_tokens: Annotated[int, Meta(ge=2)] = 2048  # longest example
    logit_chunk_tokens: Annotated[int, Meta(ge=1)] = 64
    activation_checkpointing: bool = False
    on_duplicate: Literal["skip", "train"] = "train"
    publish_interval_s: Positive = 30.0  # longest time inside a job without a new weight version
    # Between two drops of vLLM's prefix cache, which preempt its requests: a job's end waits for it.
    publish_distance_s: Annotated[float, Meta(ge=0, le=60)] = 1.0
    max_bad_steps: Annotated[int, Meta(ge=1)] = 3  # bad steps in a row (not finite, spikes) that fail a job
    spike_ratio: Annotated[float, Meta(ge=0)] = 5.0  # a loss so many times the usual one is bad; 0: no guard
    on_spike: Literal["fail", "restore"] = "restore"  # the weights of a job that harms: fail leaves them
    on_torn_step: Literal["restore", "accept"] = "restore"  # accept: go on with a step that was cut off
    log_to: list[CurveKeeper] = []  # where losses are kept besides


class Worker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the training process behaves beside serving."""

    num_threads: Annotated[int, Meta(ge=0)] = 0  # 0: as many as cores
    idle_priority: bool = True  # CPU: training threads run only when serving leaves time (SCHED_IDLE)
    max_queued_jobs: Annotated[int, Meta(ge=1)] = 10_000
    keep_examples_s: Annotated[float, Meta(ge=0)] = 30 * 86400.0  # those of ended jobs; results stay
    verify_checkpoint: bool = True  # compare views with the checkpoint at the first attach to a vLLM
    step_timeout_s: Positive = (
        600.0  # a trainer whose step or sync takes longer hangs: it is killed and restarted
    )


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the live weights are written to the model directory, and what stays there."""

    sync_interval_s: Annotated[float, Meta(ge=0)] = 600.0  # while something changed; 0: only on request
    full_interval_s: Annotated[float, Meta(ge=0)] = 3600.0  # syncs between two full ones are deltas; 0: none
    history: Annotated[int, Meta(ge=0, le=1000)] = 4  # older versions that can be restored
    max_write_bytes_per_s: Annotated[float, Meta(ge=0)] = 0.0  # 0: as fast as the disk takes it
    max_abs_weight: Annotated[float, Meta(ge=0)] = 0.0  # a live weight beyond it refuses a sync; 0: off
    verify_at_load: bool = True  # vLLM loads only what the last sync wrote, by digest
    post_sync_command: list[str] = []  # runs after a commit on a directory that stands still
    post_sync_timeout_s: Positive = 3600.0
    sync_after_bulk_job: bool = True  # a job of at least bulk_job_steps steps is synced at its end
    bulk_job_steps: Annotated[int, Meta(ge=1)] = 100
    sync_at_stop: bool = True


class Http(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The router inside vLLM's API server."""

    train_key: str = ""  # empty: generated into state_dir/train.key
    max_body_bytes: Annotated[int, Meta(ge=1024, le=60 * 1024 * 1024)] = 32 * 1024 * 1024
    wait_timeout_s: Positive = 3600.0


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chat completions that the server has answered, recorded to be learned from. Off without a directory."""

    directory: str = ""  # `serve --learn-from-traffic`
    max_bytes: Annotated[int, Meta(ge=64 * 1024 * 1024)] = 1024 * 1024 * 1024  # of its files; the oldest go
    unrecorded_key: str = ""  # requests with this API key are never recorded


class Follow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another machine's checkpoint instead of training. Off without a source."""

    source: str = ""  # `apollo-ipc follow`: a model directory, or any URL of one that fsspec reads
    version: Annotated[int, Meta(ge=-1)] = -1  # stay at this weight version of it; -1: take the newest
    interval_s: Positive = 5.0  # between two looks at the source


class Webhooks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is told what happens: each event is a signed POST to each URL (Standard Webhooks)."""

    urls: list[str] = []
    secret: str = ""  # whsec_...; empty: generated into state_dir/webhook.secret


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    paths: Paths = Paths()
    train: Train = Train()
    worker: Worker = Worker()
    checkpoint: Checkpoint = Checkpoint()
    http: Http = Http()
    traffic: Traffic = Traffic()
    webhooks: Webhooks = Webhooks()
    follow: Follow = Follow()

    def check(self) -> None:
        """What the types of the fields cannot say. Raises UserError."""
        if 0 < self.train.limiter_ratio < 1:
            raise UserError("0 (off) or at least 1 is needed", field="train.limiter_ratio")
        for at, name in enumerate(self.train.log_to):
            if name in self.train.log_to[:at]:
                raise UserError(f"{name!r} is given twice", field=f"train.log_to[{at}]")
        for at, url in enumerate(self.webhooks.urls):
            if problem := _problem_of(url, self.webhooks.urls[:at]):
                raise UserError(f"{url!r}: {problem}", field=f"webhooks.urls[{at}]")

    @property
    def runtime_dir(self) -> Path:
        return Path(self.paths.runtime_dir) if self.paths.runtime_dir else _default_runtime_dir()

    @property
    def state_dir(self) -> Path:
        return Path(self.paths.state_dir) if self.paths.state_dir else _default_state_dir()

    @property
    def socket_path(self) -> Path:
        return self.runtime_dir / "worker.sock"


def _problem_of(url: str, others: list[str]) -> str | None:
    """What keeps it from being a webhook's URL."""
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not url.isascii() or not url.isprintable() or " " in url:
        return "not a URL of the form https://host/path"
    if parts.username is not None or parts.fragment:
        return "a webhook's URL has no user name and no fragment"
    return "it is given twice" if url in others else None


def _default_runtime_dir() -> Path:
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "apollo-ipc"
    import tempfile

    return Path(tempfile.gettempdir()) / f"apollo-ipc-{os.geteuid()}"


def _default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "apollo-ipc"


T = TypeVar("T", bound=Config)


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    kind: type[T] = Config,
) -> T:
    """File, then `APOLLO_SECTION__KEY` from the environment, then `overrides` ({"train.lr": 1e-4}).

    `file` defaults to $APOLLO_CONFIG; without either, the defaults hold. kind: Config, or a client's own with
    more sections; those of other clients are left to them.
    Raises ConfigError naming the key, where it came from, and the nearest known one.
    """
    environ = os.environ if environ is None else environ
    data: dict[str, Any] = {}
    if file is None and environ.get("APOLLO_CONFIG"):
        file = Path(environ["APOLLO_CONFIG"])
    if file is not None:
        try:
            data = tomllib.loads(file.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from None
        _check(data, str(file), kind)
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
            _set(data, section, key, _parse_scalar(value), f"environment variable {name}", kind)
    for path, value in (overrides or {}).items():
        if value is not None:
            section, _, key = path.partition(".")
            _set(data, section, key, value, f"flag for {path}", kind)
    return _check(data, "configuration", kind)


def _set(data: dict[str, Any], section: str, key: str, value: Any, source: str, kind: type[Config]) -> None:
    if isinstance(value, int | float) and _is_text(kind, section, key):
        value = str(value)  # `APOLLO_HTTP__TRAIN_KEY=12345` is a key, not a number
    data.setdefault(section, {})[key] = value
    _check({section: {key: value}}, source, kind)


def _is_text(kind: type[Config], section: str, key: str) -> bool:
    of_section = get_type_hints(kind).get(section)
    return of_section is not None and get_type_hints(of_section).get(key) is str


def _check(data: Any, source: str, kind: type[T]) -> T:
    foreign = data.keys() - kind.__struct_fields__
    if foreign:  # the packages that are installed are looked through only where it may matter
        from importlib.metadata import entry_points

        foreign &= entry_points(group=SECTION_GROUP).names
    try:
        config = convert({name: value for name, value in data.items() if name not in foreign}, kind)
        config.check()
        return config
    except UserError as error:
        at = f"{error.field}: " if error.field else ""
        message = error.message.replace("Expected `array`, got `str`", 'a list is needed, as ["this"]')
        raise ConfigError(f"{source}: {at}{message}", field=error.field) from None


def _parse_scalar(text: str) -> Any:
    """TOML's reading of `text`, else the text itself: `0.1`, `true`, `"x"` and `x` do what they seem to."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def make_private_dir(path: Path) -> Path:
    """`path` as a directory of mode 0700 that is ours. Raises ConfigError where it is someone else's."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    info = path.lstat()
    if path.is_symlink() or info.st_uid != os.geteuid():
        raise ConfigError(f"{path}: not a directory of our own (uid {info.st_uid}); choose another")
    if info.st_mode & 0o077:
        path.chmod(0o700)
    return path
