"""Random bodies for fuzz.py: of the grammar of /train, and the same with one thing or more wrong.

A body comes with what must become of it: "taken" (it follows the grammar), "refused" (what was done to it is
never right), or "either".
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VOCAB = 256  # ids that every tokeniser has
TEXTS = ("The harbour", "2+2=", "é漢字🙂", " ", "a\nb\tc", "<|no_token|>", "{{ messages }}", "x" * 100)
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    -(2**31),
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "\0",
    "\ud800",
    "é" * 70,
    "NaN",
    "true",
    "12",
    [],
    [[]],
    {},
    [None],
    {"": None},
    "../../etc/passwd",
    "<|im_end|>",
    "x" * 5000,
    {"type": "Submit"},
)
KINDS = ("plain", "plain", "ids", "chat", "chat", "pair", "group", "foreign", "weighed", "bare")
NAMES = ("", "lr", "seq", "job_id", "__class__", "$ref", "Examples", "prompt ", "\0", "\ud800", "type", "é")


class Grammar:
    def __init__(self, draw: random.Random):
        self.draw = draw

    # --- what is right ---

    def train_body(self) -> dict[str, Any]:
        draw = self.draw
        kind = draw.choice(
            ("plain", "plain", "ids", "chat", "chat", "pair", "group", "foreign", "weighed", "bare")
        )
        if kind == "bare":
            return self.plain()
        examples = [getattr(self, kind)() for _ in range(draw.choice((1, 1, 2, 3, 5)))]
        if kind == "foreign" and draw.random() < 0.3:
            return {"training_data": {"samples": examples, "config": self.options(kind)}}
        body: dict[str, Any] = {"examples": examples}
        if draw.random() < 0.7:
            body["options"] = self.options(kind)
        return body

    def options(self, kind: str) -> dict[str, Any]:
        draw = self.draw
        of = {
            "lr": lambda: draw.choice((1e-6, 1e-5, 1e-3, 0.1)),
            "epochs": lambda: draw.randint(1, 3),
            "schedule": lambda: draw.choice(("auto", "constant", "cosine")),
            "weight_decay": lambda: draw.choice((0, 0.01, 1)),
            "rank": lambda: draw.choice((1, 8, 64, 65536)),
            "max_steps": lambda: draw.choice((1, 2, 1000000)),
            "on_duplicate": lambda: draw.choice(("skip", "train")),
            "accumulate_steps": lambda: draw.choice((1, 2, 65536)),
            "reduction": lambda: draw.choice(("mean", "sum")),
        }
        names = draw.sample(sorted(of), draw.randint(0, 4))
        return {name: of[name]() for name in names}

    def text(self) -> str:
        draw = self.draw
        if draw.random() < 0.5:
            return draw.choice(TEXTS)
        return "".join(
            chr(draw.choice((draw.randint(32, 126), draw.randint(0xA0, 0xD7FF)))) for _ in range(8)
        )

    def some_ids(self, least: int = 0) -> list[int]:
        return [self.draw.randrange(VOCAB) for _ in range(self.draw.randint(least, 12))]

    def plain(self) -> dict[str, Any]:
        return {"prompt": self.text(), "completion": self.text() + "."}

    def ids(self) -> dict[str, Any]:
        return {"context_ids": self.some_ids(1), "continuation_ids": self.some_ids(1)}

    def weighed(self) -> dict[str, Any]:
        example = self.ids()
        num = len(example["continuation_ids"])
        example["weights"] = [self.draw.choice((-1, 0.5, 1, 2)) for _ in range(num)]
        return example

    def chat(self) -> dict[str, Any]:
        draw = self.draw
        messages: list[dict[str, Any]] = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": self.text()})
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": self.text()})
            messages.append({"role": "assistant", "content": self.text() + "!"})
        if draw.random() < 0.2:
            messages[-1]["weight"] = 1
        return {"messages": messages}

    def pair(self) -> dict[str, Any]:
        return {"prompt": self.text(), "chosen": "yes " + self.text(), "rejected": "no " + self.text()}

    def group(self) -> dict[str, Any]:
        num = self.draw.randint(2, 4)
        return {
            "prompt": self.text(),
            "completions": [f"{i} {self.text()}" for i in range(num)],
            "rewards": [self.draw.choice((-1.0, 0.0, 1.0, 0.5)) for _ in range(num)],
        }

    def foreign(self) -> dict[str, Any]:
        if self.draw.random() < 0.5:
            turns = [{"from": "human", "value": self.text()}, {"from": "gpt", "value": self.text() + "."}]
            return {"conversations": turns}
        return {"instruction": self.text() + "?", "output": self.text() + "."}

    # --- what is wrong ---

    def broken(self, body: Any) -> tuple[bytes, str]:
        """(bytes, what must become of it) of a copy of `body` with something done to it."""
        draw, body = self.draw, copy.deepcopy(body)
        if draw.random() < 0.25:
            return self.broken_bytes(encode(body))
        if draw.random() < 0.2:
            return encode(self.surely_wrong(body)), "refused"
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            body = self.changed(body)
        return encode(body), "either"

    def surely_wrong(self, body: Any) -> Any:
        """A field that nobody knows, at one of the places where none is let pass."""
        inner = body.get("training_data", body)
        examples = inner.get("examples", inner.get("samples", [inner]))
        place = self.draw.choice((inner, self.draw.choice(examples)))
        place[self.draw.choice(("no_such_field", "Prompt", "learning-rate"))] = self.draw.choice(
            (1, "a", None)
        )
        return body

    def changed(self, body: Any) -> Any:
        draw, places = self.draw, list(_places(body))
        if not places:
            return draw.choice(ODD)
        holder, key = draw.choice(places)
        match draw.randrange(7):
            case 0 | 1:
                holder[key] = draw.choice(ODD)
            case 2:
                del holder[key]
            case 3 if isinstance(holder, dict):
                holder[draw.choice(NAMES)] = holder.pop(key)
            case 4:
                other, at = draw.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 5:
                holder[key] = [holder[key]] if draw.random() < 0.5 else {str(draw.choice(NAMES)): holder[key]}
            case _:
                holder[key] = self.near(holder[key])
        return body

    def near(self, value: Any) -> Any:
        draw = self.draw
        if isinstance(value, bool) or value is None:
            return draw.choice(ODD)
        if isinstance(value, int | float):
            return draw.choice(
                (-value, value + 1, value * 10**6, -value - 1, str(value)[:100], value + 2**31)
            )
        if isinstance(value, str):
            return draw.choice((value * 50, value[1:], value.upper(), value + "\0", repr(value)))
        if isinstance(value, list):
            return draw.choice((value * 20, value[1:], value[::-1], [*value, None]))
        return {**value, draw.choice(NAMES): draw.choice(ODD)}

    def broken_bytes(self, data: bytes) -> tuple[bytes, str]:
        draw = self.draw
        match draw.randrange(9):
            case 0:
                return data[: draw.randrange(len(data))], "refused"  # no object is a beginning of another
            case 1:
                return changed_bytes(draw, data), "either"
            case 2:
                return draw.randbytes(draw.randint(0, 200)), "refused"
            case 3:
                return data.decode().encode(draw.choice(("utf-16", "utf-32", "utf-16-le"))), "refused"
            case 4:
                return b"\xef\xbb\xbf" + data, "either"
            case 5:
                depth = draw.choice((60, 600, 6000, 60000))
                inside = draw.choice((b"[", b'{"a":', b'{"examples":[', b'{"messages":[')) * depth
                return draw.choice((inside, data[:-1] + b',"b":' + inside)), "refused"
            case 6:
                return data + draw.choice((b"}", b",", data, b"\0", b"//")), "refused"
            case 7:
                return b"{" + data[1:-1] + b"," + data[1:], "either"  # each name twice
            case _:
                at = draw.randrange(len(data))
                number = b"1" * draw.choice((30, 400, 5000))
                return data[:at] + draw.choice((number, b"NaN", b"1e99999", b"\\u0000", b"\xff")) + data[
                    at:
                ], "either"


def encode(body: Any) -> bytes:
    """NaN and lone surrogates as JSON of careless programs has them."""
    return json.dumps(body, allow_nan=True).encode()


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """A few bytes, a stretch or the length are others."""
    changed = bytearray(data)
    if not changed:
        return draw.randbytes(16)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed))
        match draw.randrange(6):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.randrange(256)
            case 2:
                num = min(draw.choice((1, 4, 64, 512)), len(changed) - at)
                changed[at : at + num] = draw.randbytes(num)
            case 3:
                num = min(draw.choice((4, 64, 512, 4096)), len(changed) - at)
                changed[at : at + num] = bytes(num)
            case 4:
                if at:
                    del changed[at:]
            case _:
                changed[at:at] = draw.randbytes(draw.choice((1, 3, 32)))
    return bytes(changed)


def _places(value: Any):
    """(container, key) of everything inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
