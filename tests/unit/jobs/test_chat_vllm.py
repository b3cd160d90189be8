"""vLLM's own rendering as the judge: a short version of benchmarks/chat_templates.py."""

import pytest
from chat_tokenizers import CHATML, CHATML_GENERATION

pytest.importorskip("vllm")


def test_no_cell_is_wrong_by_vllms_own_rendering():
    from chat_templates import measure

    parts = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    figures = measure({"plain": CHATML, "marked": CHATML_GENERATION, "parts": parts})
    assert figures["wrong_cells"] == []
    assert figures["refusable_cells"] == []
    assert figures["cells"]["right"] > 50
