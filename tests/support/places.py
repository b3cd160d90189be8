"""Where the tests find the repository's files: a test that moves to another folder finds them still."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SUPPORT = ROOT / "tests" / "support"  # the modules that several tests import; on pytest's pythonpath
