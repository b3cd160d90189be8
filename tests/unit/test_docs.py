"""The documents say what the code does: links, commands, flags, keys, routes, codes, files, messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer
from apollo_router import teaching
from apollo_router.fine_tuning.store import FineTuningStore
from apollo_router.fine_tuning.store import store_path as fine_tuning_path
from apollo_router.routes import router
from apollo_router.tinker.store import TinkerStore
from apollo_router.tinker.store import store_path as tinker_path
from apollo_router.worker_metrics import WorkerMetrics
from apollo_worker.curves.marks import Marks, marks_path
from apollo_worker.follow.version import Frames
from apollo_worker.front.endpoint import Endpoint
from apollo_worker.front.front import Front
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import StatusBoard
from apollo_worker.trainer.front_end import trainer_lock
from apollo_worker.trainer.step_marks import LiveState, StepMarks, write_state
from places import ROOT

from apollo_curation.lock import alone
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store, store_path
from apollo_curation.teach.run import the_teacher
from apollo_ipc.checkpoint import STATE_DIR
from apollo_ipc.checkpoint.record import pending_dir
from apollo_ipc.cli.main import PASS_ON, app
from apollo_ipc.config import Config, Paths, load_config
from apollo_ipc.keys import key_path, train_key, webhook_secret
from apollo_ipc.manifest import manifest_path
from apollo_ipc.teaching.store import TeachStore
from apollo_ipc.teaching.store import store_path as teach_path
from apollo_ipc.webhooks.outbox import Outbox, outbox_path
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo, Status, SyncResult
from apollo_ipc.wire.requests import Example, Message, TrainOptions

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# docs/log.md tells of trials and quotes what is no more.
OURS = [page for page in PAGES if page.name != "log.md"]
SECTIONS = {
    field.name: {f.name for f in msgspec.structs.fields(field.type)}
    for field in msgspec.structs.fields(CurationConfig)
}
# Of vLLM, git, systemctl and the like. A flag that is in neither this list nor our programs is a mistake.
FOREIGN_FLAGS = {
    "--api-key",
    "--backend-store-uri",
    "--chat-template",
    "--cpu-offload-gb",
    "--default-chat-template-kwargs",
    "--data-parallel-size",
    "--enable-cumem-allocator",
    "--enable-eplb",
    "--enable-expert-parallel",
    "--enable-sleep-mode",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--hf-config-path",
    "--hf-overrides",
    "--load-format",
    "--logdir",
    "--logprobs-mode",
    "--max-model-len",
    "--moe-backend",
    "--no-enable-prefix-caching",
    "--nnodes",
    "--now",
    "--pipeline-parallel-size",
    "--served-model-name",
    "--tensor-parallel-size",
}
# Of the programs behind our commands, which argparse reads.
ARGPARSE_FILES = [
    "src/apollo_ipc/demo/__main__.py",
    "tools/setup.py",
    *(f"worker/apollo_worker/{name}.py" for name in ("__main__", "commands/check", "commands/offline")),
]


def page(name: str) -> str:
    return (ROOT / name).read_text()


def code_of(text: str) -> Iterator[str]:
    """Lines of fenced blocks, and spans in backticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.S | re.M))


def section(name: str, title: str) -> str:
    """The text of a page below the heading that begins with `title`, up to the next heading of its rank."""
    text = page(name)
    start = re.search(rf"^(#+) {re.escape(title)}.*$", text, re.M)
    assert start, f"{name} has no heading {title!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --- links ---


def anchors(path: Path) -> set[str]:
    """GitHub's ids of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_every_relative_link_leads_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (file.parent / name).resolve() if name else file
        assert path.exists(), f"{file.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{file.name}: {target}"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_every_file_of_ours_that_is_named_exists(file):
    for name in re.findall(
        r"\b(?:src|router|worker|configs|docs|tests|tools)/[\w./-]*\w\.\w+", file.read_text()
    ):
        assert (ROOT / name).exists(), f"{file.name}: {name}"


def test_the_tree_in_the_readme_names_every_folder():
    tree = section("README.md", "How it works")
    packages = ("src/apollo_ipc", "src/apollo_curation", "router/apollo_router", "worker/apollo_worker")
    rooms = [file.parent for package in packages for file in (ROOT / package).glob("*/__init__.py")]
    assert len(rooms) > 15
    assert not [room for room in rooms if not re.search(rf"(?<!\w){room.name}/", tree)]


# --- commands and flags ---


def commands() -> dict[str, object]:
    """`serve`, `checkpoint sync`, ... -> the click command."""
    top = typer.main.get_command(app)
    found = {}
    for name in top.list_commands(None):
        found[name] = command = top.get_command(None, name)
        for sub, inner in getattr(command, "commands", {}).items():
            found[f"{name} {sub}"] = inner
    return found


def flags_of(command) -> set[str]:
    return {"--help"} | {
        flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")
    }


def argparse_flags() -> set[str]:
    return {
        flag
        for file in ARGPARSE_FILES
        for flag in re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", (ROOT / file).read_text())
    }


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_every_command_and_flag_that_is_named_exists(file):
    known = commands()
    everywhere = (
        set().union(*map(flags_of, known.values())) | argparse_flags() | FOREIGN_FLAGS | {"--version"}
    )
    for line in code_of(file.read_text()):
        line = line.split("  #")[0].split(" -- ")[0]  # after `--` comes somebody else's command
        if match := re.search(r"(?:^|[ /(])apollo-ipc +([a-z]+)(?: +([a-z]+))?", line):
            name = next((n for n in (f"{match[1]} {match[2]}", match[1]) if n in known), None)
            assert name, f"{file.name}: {line}"
            if match[1] == "checkpoint" and match[2]:
                assert f"checkpoint {match[2]}" in known, f"{file.name}: {line}"
            allowed = flags_of(known[name])
            if known[name].context_settings == PASS_ON:
                allowed = allowed | FOREIGN_FLAGS | argparse_flags()
            wrong = set(re.findall(r"(?<!\S)--[\w-]+", line[match.start() :])) - allowed
        else:
            wrong = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", line)) - everywhere
        assert not wrong, f"{file.name}: {line}"


def test_every_command_is_in_the_readme():
    named = {
        match for line in code_of(page("README.md")) for match in re.findall(r"apollo-ipc ([a-z]+)", line)
    }
    listed = re.search(r"^  cli/.*$", page("README.md"), re.M)
    assert listed
    assert {name.split()[0] for name in commands()} <= named | set(re.findall(r"[a-z]+", listed[0]))


@pytest.mark.parametrize("target", ["setup", "demo", "demo-night", "test"])
def test_the_make_targets_that_are_named_exist(target):
    assert re.search(rf"^{target}:", page("Makefile"), re.M)
    assert any(f"make {target}" in line for line in code_of(page("README.md")))


# --- configuration ---


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_every_configuration_key_that_is_named_exists(file):
    for span in code_of(file.read_text()):
        for name, key in re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z][a-z0-9_]*)", span):
            files = ("train.key", "worker.sock", "worker.lock", "curation.train", "curation.dream")
            is_file = f"{name}.{key}" in (*files, "curation.night", "quality.breach") or key in (
                "py",
                "md",
                "sqlite",
            )
            assert is_file or key in SECTIONS[name], f"{file.name}: {name}.{key}"
    for name, key in re.findall(r"APOLLO_([A-Z]+)__([A-Z0-9_]+)", file.read_text()):
        assert key.lower() in SECTIONS[name.lower()], f"{file.name}: APOLLO_{name}__{key}"


def test_a_key_of_digits_is_text_as_the_page_says():
    assert "`APOLLO_HTTP__TRAIN_KEY=12345`" in page("docs/operations.md")
    assert load_config(environ={"APOLLO_HTTP__TRAIN_KEY": "12345"}).http.train_key == "12345"


# --- HTTP ---


def test_the_routes_of_the_page_are_those_of_the_router():
    documented = set(re.findall(r"^## `([A-Z]+) (\S+)`$", page("docs/http.md"), re.M))
    routes = [*router.routes, *teaching.router.routes]
    assert documented == {(method, route.path) for route in routes for method in route.methods}


def test_the_error_codes_of_the_page_are_in_the_code():
    codes = {code for _, cell, _ in rows(section("docs/http.md", "Errors")) for code in spans(cell)}
    literals = set(strings()) | {f"job_{state}" for state in ENDED_STATES}
    assert codes
    assert codes <= literals, codes - literals


def test_the_tables_of_fields_are_the_types():
    status = {name for row in rows(section("docs/http.md", "`GET /train/status`")) for name in spans(row[0])}
    assert status == {"worker", "router_vllm_boot_id", *Status.__struct_fields__}
    options = {
        spans(row[0])[0]
        for row in rows(section("docs/http.md", "`POST /train`"))
        if not row[0].startswith("`{")
    }
    assert options == set(TrainOptions.__struct_fields__)
    forms = section("docs/http.md", "`POST /train`")
    for name in (*Example.__struct_fields__, *Message.__struct_fields__):
        assert re.search(rf"\b{name}\b", forms), name
    jobs = section("docs/http.md", "`GET /train/jobs`")
    assert set(re.findall(r'"(\w+)":', jobs)) - {"object", "data"} == set(JobInfo.__struct_fields__)
    synced = set(re.findall(r'"(\w+)":', section("docs/http.md", "`POST /checkpoint`")))
    assert synced == set(SyncResult.__struct_fields__)


# --- files ---


def test_every_file_of_the_state_page_is_one_that_the_code_makes(tmp_path):
    # Short, since a socket's path is limited; nothing is bound here.
    config = Config(paths=Paths(runtime_dir=str(tmp_path / "run"), state_dir=str(tmp_path / "state")))
    endpoint = Endpoint(config.runtime_dir, config.runtime_dir / "s")
    endpoint.lock()
    endpoint.unlock()
    train_key(config)
    with trainer_lock(StatusBoard(), config) as is_ours:
        assert is_ours
    front = Front(config)
    front.stop()
    queue = JobQueue(config.state_dir / "queue.sqlite", 1)
    Frames(config.state_dir / "follow")
    StepMarks(config.state_dir / "step.marks").close()
    write_state(config.state_dir, LiveState("m", "b", 1))
    for name in ("reports", "tensorboard", "wandb", "mlflow.db"):  # the last three by libraries
        (config.state_dir / name).mkdir()
    curves = Marks(marks_path(config.state_dir), "wandb")
    store = Store(store_path(config))
    uploads = FineTuningStore(fine_tuning_path(config))
    futures = TinkerStore(tinker_path(config))
    outbox = Outbox(outbox_path(config), [])
    lessons = TeachStore(teach_path(config))
    with the_teacher(config) as is_ours:
        assert is_ours
    webhook_secret(config)
    metrics = WorkerMetrics(config.runtime_dir)
    metrics.may_count()
    for module, lock in (("training/batches", "train"), ("dreams/dream", "dream"), ("night", "night")):
        assert f"curation.{lock}.lock" in strings(f"src/apollo_curation/{module}.py")
        with alone(config.state_dir / f"curation.{lock}.lock"):
            pass
    made = {file.name for file in [*config.runtime_dir.iterdir(), *config.state_dir.iterdir()]}
    store.close()
    uploads.close()
    futures.close()
    outbox.close()
    curves.close()
    lessons.close()
    metrics.close()
    queue.close()
    tables = rows(section("docs/state.md", "Runtime directory") + section("docs/state.md", "State directory"))
    named = {name for row in tables for name in spans(row[0])}
    assert named == made | {config.socket_path.name, manifest_path(tmp_path).name, key_path(config).name}
    assert {"queue.sqlite", "step.marks", "queue.sqlite-wal", "queue.sqlite-shm"} <= made
    assert {'"queue.sqlite"', '"step.marks"'} <= {
        f'"{text}"' for text in strings("worker/apollo_worker/trainer/loop.py")
    }


def test_the_files_of_the_model_directory_are_those_of_the_commit_protocol():
    named = {spans(row[0])[0] for row in rows(section("docs/state.md", "Model directory"))}
    of_ours = {name for name in named if name.startswith(STATE_DIR)}
    assert f"{pending_dir(Path(), 8)}/".replace("8", "N") in of_ours
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "src/apollo_ipc/checkpoint").glob("*.py")]
    files = [
        *sources,
        "worker/apollo_worker/sync/sync_task.py",
        "worker/apollo_worker/sync/optimizer_file.py",
    ]
    literals = "\n".join(strings(*files))
    for name in of_ours:
        stem = name.removeprefix(f"{STATE_DIR}/").partition("N")[0]
        assert stem in literals, name


def test_every_test_that_a_page_names_exists():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", code, re.M))
    table = page("docs/recovery.md")
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 40
    assert named <= defined, named - defined
    for row in rows(table):
        assert "`test_" in row[-1], row


# --- sentences ---


def strings(*files: str) -> Iterator[str]:
    """Every piece of text in the source; an f-string gives what stands between its braces' values."""
    paths = [ROOT / file for file in files] or [
        file for package in ("src", "router", "worker") for file in (ROOT / package).rglob("*.py")
    ]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize(
    ("name", "title"),
    [("docs/operations.md", "Troubleshooting"), ("docs/manifest.md", "What a refusal means")],
)
def test_the_messages_that_are_explained_are_the_programs_own(name, title):
    everything = "\0".join(strings())
    explained = rows(section(name, title))
    assert len(explained) > 10
    for row in explained:
        for fragment in spans(row[0]):
            assert fragment.strip() in everything, fragment


def test_the_way_of_one_example_leads_from_file_to_file():
    """Each file is imported by one before it in its process; the first of a process gets a message."""
    seen: list[str] = []
    for process, file, _ in rows(section("docs/protocol.md", "The way of one example")):
        path = spans(file)[0]
        if process:
            seen = []
        package, _, name = path.removesuffix(".py").replace("/", ".").partition(".apollo_")
        module = f"apollo_{name}"
        of, _, last = module.rpartition(".")
        imports = (f"import {module}", f"from {module} import", f"from {of} import {last}")
        sources = [page(one) for one in seen]
        assert process or any(line in source for line in imports for source in sources), path
        seen.append(path)
    assert package
