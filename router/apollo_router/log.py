"""The router's logger.

A child of "vllm": vLLM configures that one logger only (vllm/logger.py), so that a record of any other name
below WARNING would be lost. Outside vLLM the name means nothing and Python's defaults hold.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.apollo_router")
