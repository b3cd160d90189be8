"""How far each library has been fed."""

from __future__ import annotations

from pathlib import Path

from apollo_ipc.database import Database


def marks_path(state_dir: Path) -> Path:
    return state_dir / "curves.sqlite"


class Marks(Database):
    """Of one library, `keeper`."""

    schema = """
CREATE TABLE IF NOT EXISTS keepers (keeper TEXT PRIMARY KEY, next_seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS steps (
    keeper TEXT, run_id TEXT, step INTEGER NOT NULL, PRIMARY KEY (keeper, run_id)
) WITHOUT ROWID;
"""
    advice = "move it away; the curves of jobs from now on are kept"

    def __init__(self, path: Path, keeper: str):
        self._keeper = keeper
        super().__init__(path)

    def next_seq(self) -> int | None:
        """Of the first job that is not told whole; None: this library was never told anything."""
        rows = self.query("SELECT next_seq FROM keepers WHERE keeper = ?", self._keeper)
        return rows[0][0] if rows else None

    def set_next_seq(self, seq: int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO keepers VALUES (?, ?)", (self._keeper, seq))

    def step(self, run_id: str) -> int:
        rows = self.query("SELECT step FROM steps WHERE keeper = ? AND run_id = ?", self._keeper, run_id)
        return rows[0][0] if rows else 0

    def set_step(self, run_id: str, step: int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO steps VALUES (?, ?, ?)", (self._keeper, run_id, step))
