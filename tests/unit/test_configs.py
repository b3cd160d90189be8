"""The files that a person edits: configs/*.toml and the systemd units."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import pytest
from places import ROOT

from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.config import DEFAULT_RANK, SECTION_GROUP, Config, load_config
from apollo_ipc.errors import ConfigError

CONFIGS = ROOT / "configs"
UNITS = sorted((CONFIGS / "systemd").glob("*.service"))
TIMERS = sorted((CONFIGS / "systemd").glob("*.timer"))
OWN = Config.__struct_fields__
SECTIONS = {field.name: field.type for field in msgspec.structs.fields(CurationConfig)}


def load(file: Path, **more) -> CurationConfig:
    """With all sections; that worker and server read the same file without ours is tested beside it."""
    return load_curation_config(file, **{"environ": {}, **more})


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.name)
def test_every_configuration_file_is_valid(file):
    assert load_config(file, environ={}) == Config(*(getattr(load(file), name) for name in OWN))


def test_the_sections_of_a_client_are_left_to_it(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nrank = 8\n[judge]\nanything = 1\n")
    environ = {"APOLLO_CURATION__URL": "http://127.0.0.1:1", "APOLLO_QUALITY__NONE": "1"}
    assert load_config(file, environ=environ).train.rank == 8
    with pytest.raises(ConfigError, match=r"judge\.anything: unknown field"):
        load_curation_config(file, environ={})
    with pytest.raises(ConfigError, match=r"jugde: unknown field 'jugde'"):
        load_config(environ={"APOLLO_JUGDE__URL": "x"})


def test_every_section_of_ours_is_named_to_those_who_leave_it_to_us():
    mine = entry_points(group=SECTION_GROUP)
    assert {point.name: point.load() for point in mine} == {
        name: kind for name, kind in SECTIONS.items() if name not in OWN
    }


def test_the_default_file_says_every_key_with_its_default():
    file = CONFIGS / "default.toml"
    assert load(file) == CurationConfig()
    said = {(section, key) for section, keys in tomllib.loads(file.read_text()).items() for key in keys}
    known = {
        (section, field.name) for section, kind in SECTIONS.items() for field in msgspec.structs.fields(kind)
    }
    assert said == known


def test_every_key_is_read_by_the_program():
    """By its name, in any file but the two that declare it."""
    declared = {"src/apollo_ipc/config.py", "src/apollo_curation/settings.py"}
    files = [file for folder in ("src", "router", "worker") for file in (ROOT / folder).rglob("*.py")]
    program = "\n".join(file.read_text() for file in files if str(file.relative_to(ROOT)) not in declared)
    program += "\n".join((ROOT / file).read_text().partition("class Config")[2] for file in declared)
    read = set(re.findall(r"\.([a-z_0-9]+)\b", program))
    keys = {field.name for kind in SECTIONS.values() for field in msgspec.structs.fields(kind)}
    assert keys - read == set()


def test_the_model_files_say_only_what_they_are_for():
    for name in ("cpu.toml", "qwen3.5-27b.toml"):
        config = load(CONFIGS / name)
        assert config != CurationConfig()
        assert config.train.rank == DEFAULT_RANK
    assert load(CONFIGS / "qwen3.5-27b.toml").train.activation_checkpointing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nrnak = 64", "train.rnak: unknown field 'rnak'; did you mean 'rank'?"),
        ("[trian]\nrank = 64", "trian: unknown field 'trian'; did you mean 'train'?"),
        ("port = 1", "unknown field 'port'; known here: checkpoint, curation, dream, follow, http,"),
        ('[train]\nrank = "64"', "train.rank: Expected `int`, got `str`"),
        ("[train]\nlr = 0.0", "train.lr: Expected `float` > 0.0"),
        (
            '[train]\nrounding = "up"',
            "train.rounding: 'up' is no choice here; known here: kahan, nearest",
        ),
        ("[train", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key_and_what_would_be_right(tmp_path, text, words):
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert str(file) in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{}", "curation.strip[0]: a rule has exactly one of role, begin + end, pattern, json_path"),
        ('{role = "system", pattern = "x"}', "exactly one of"),
        ('{begin = "<memory>"}', "begin and end go together"),
        ('{role = "user"}', "curation.strip[0].role: the user's messages are what is learned from"),
        ('{pattern = "("}', "curation.strip[0].pattern: not a regular expression"),
        ('{pattern = "a*"}', "matches the empty text"),
    ],
)
def test_a_strip_rule_that_cannot_be_meant_is_refused(tmp_path, rule, words):
    file = tmp_path / "my.toml"
    file.write_text(f"[curation]\nstrip = [{rule}]\n")
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert words in str(raised.value)


def test_a_tier_keeps_its_own_defaults_beside_a_key_that_is_given():
    config = load_curation_config(environ={"APOLLO_TIER_DIRECT__WHEN": "nightly"})
    assert (config.tier_direct.when, config.tier_direct.lr) == ("nightly", 1e-4)
    assert config.tier_bootstrap.lr == 1e-5


def test_the_environment_wins_over_the_file_and_a_flag_over_both(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('[train]\nlr = 2e-5\nrank = 8\nepochs = 2\n[paths]\nstate_dir = "/file"\n')
    environ = {
        "APOLLO_TRAIN__RANK": "16",
        "APOLLO_TRAIN__EPOCHS": "3",
        "APOLLO_PATHS__STATE_DIR": "/environment",
        "APOLLO_CONFIG": "/not/this/one.toml",
    }
    config = load(file, environ=environ, overrides={"train.epochs": 4, "train.lr": None})
    assert (config.train.lr, config.train.rank, config.train.epochs) == (2e-5, 16, 4)
    assert str(config.state_dir) == "/environment"


def test_a_wrong_variable_or_flag_is_named_as_such():
    with pytest.raises(ConfigError, match=r"APOLLO_TRAIN__RNAK.*did you mean 'rank'"):
        load_config(environ={"APOLLO_TRAIN__RNAK": "1"})
    with pytest.raises(ConfigError, match=r"flag for train\.rank.*Expected `int` >= 1"):
        load_config(environ={}, overrides={"train.rank": 0})


def test_the_file_may_come_from_the_environment(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nrank = 8\n")
    assert load_config(environ={"APOLLO_CONFIG": str(file)}).train.rank == 8
    with pytest.raises(ConfigError, match="No such file"):
        load_config(environ={"APOLLO_CONFIG": str(tmp_path / "none.toml")})


# --- systemd ---


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    # It checks that the programs exist, so the place that the units name becomes the one where they are.
    for unit in (*UNITS, *TIMERS):
        text = unit.read_text().replace("/opt/apollo-ipc/.venv/bin", str(Path(sys.executable).parent))
        (tmp_path / unit.name).write_text(text)
    units = [tmp_path / unit.name for unit in (*UNITS, *TIMERS)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_stop_is_told_to_the_main_process_alone(unit):
    """The others (the trainer, a compiler at work for it) are ended by it, in order."""
    assert "\nKillMode=mixed\n" in unit.read_text() or "\nType=oneshot\n" in unit.read_text()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_let_the_worker_reach_vllms_memory(unit):
    settings = [
        line.partition("=")[::2] for line in unit.read_text().splitlines() if "=" in line and line[0] != "#"
    ]
    for hides in (
        "ProtectProc",
        "PrivatePIDs",
        "PrivateUsers",
        "PrivateDevices",
        "DeviceAllow",
        "PrivateIPC",
    ):
        assert hides not in dict(settings)
    wanted = {"RuntimeDirectory": "apollo-ipc", "RuntimeDirectoryPreserve": "yes", "NoNewPrivileges": "yes"}
    assert wanted.items() <= dict(settings).items()
    # What the units give is what the configuration beside them uses.
    config = load(CONFIGS / "qwen3.5-27b.toml")
    assert (str(config.runtime_dir), str(config.state_dir)) == ("/run/apollo-ipc", "/var/lib/apollo-ipc")


def test_when_memory_runs_out_the_worker_dies_first():
    score = {
        unit.stem: int(line.partition("=")[2])
        for unit in UNITS
        for line in unit.read_text().splitlines()
        if line.startswith("OOMScoreAdjust=")
    }
    assert score["apollo-worker"] > 0 > score["apollo-vllm"]
