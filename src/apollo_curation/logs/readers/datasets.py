"""Data sets of single answers: prompt and completion, Alpaca, KTO's labels, DPO's pairs.

An answer that is labelled bad is seen, not learned (weight 0); of a pair the chosen one is read.
"""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers import openai
from apollo_curation.logs.readers.text import RawChat, Unreadable, as_string, embedded

BAD = "answer labelled bad"
REJECTED = "rejected answer"
ANSWERS = ("completion", "response", "answer", "output")


def is_pair(record: dict[str, Any]) -> bool:
    return "chosen" in record and "rejected" in record


def is_completion(record: dict[str, Any]) -> bool:
    return "prompt" in record and any(name in record for name in ANSWERS)


def is_alpaca(record: dict[str, Any]) -> bool:
    return "instruction" in record and any(name in record for name in ANSWERS)


def is_text(record: dict[str, Any]) -> bool:
    return isinstance(record.get("text"), str)


def read_pair(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    chat = _chat(record, record["chosen"])
    chat.lost[REJECTED] += 1
    return chat


def read_completion(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    is_bad = record.get("label") is False or record.get("label") == 0
    chat = _chat(record, next(record[name] for name in ANSWERS if name in record), is_bad=is_bad)
    if is_bad:
        chat.lost[BAD] += 1
    return chat


def read_alpaca(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    messages: list[Any] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for turn in record.get("history") or []:
        if isinstance(turn, list) and len(turn) == 2:
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = as_string(record["instruction"], "instruction")
    if record.get("input"):
        asked += "\n\n" + as_string(record["input"], "input")
    answer = next(record[name] for name in ANSWERS if name in record)
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return openai.read_messages(messages, "instruction")


def read_text(record: dict[str, Any]) -> RawChat:
    raise Unreadable("plain_text", "it is text without turns: nobody asks and nobody answers")


def _chat(record: dict[str, Any], answer: Any, *, is_bad: bool = False) -> RawChat:
    prompt, answer = embedded(record.get("prompt") or []), embedded(answer)
    messages: list[Any] = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    if isinstance(answer, list):
        whole = answer[: len(messages)] == messages  # some repeat the prompt
        answers = answer[len(messages) :] if whole else answer
    else:
        answers = [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]
    if is_bad:
        answers = [{**one, "weight": 0} if isinstance(one, dict) else one for one in answers]
    return openai.read_messages([*messages, *answers], "prompt")
