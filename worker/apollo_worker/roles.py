"""The worker's two processes log to one stream: each line says whose it is."""

from __future__ import annotations

import logging
import sys
from typing import Literal


def log_as(role: Literal["front", "trainer"]) -> None:
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s {role} %(name)s: %(message)s",
        stream=sys.stderr,
    )
