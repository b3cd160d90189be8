"""Curation's commands, which apollo_ipc mounts (the entry points in pyproject.toml)."""

from importlib.util import find_spec

for _name in ("click", "jsonpath"):  # of the extra `curation`
    if find_spec(_name) is None:
        raise ImportError(f"{_name} is not installed; `pip install 'apollo-ipc[curation]'`")
