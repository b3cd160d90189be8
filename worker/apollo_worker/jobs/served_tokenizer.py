"""The tokenizer as vLLM uses it: which ids a prompt gives, which come next, at which it stops."""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

# Any of these makes a directory one that a tokenizer can be loaded from.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
_WINDOW = 64  # tokens before a boundary that are decoded with what follows it


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in _TOKENIZER_FILES)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    tokenizers: Any = AutoTokenizer  # its results are of no declared type
    return tokenizers.from_pretrained(name, local_files_only=True, trust_remote_code=trust_remote_code)


def mistral_format(directory: Path) -> bool:
    """Whether vLLM, left to itself, reads this directory with mistral-common (tokenizers/registry.py)."""
    is_mistral = any(directory.glob("consolidated*.safetensors")) and (directory / "params.json").exists()
    return is_mistral and ((directory / "tekken.json").exists() or any(directory.glob("tokenizer.model.v*")))


def generation_stop_ids(model_dir: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or without that file of config.json, as vLLM reads them."""
    for name in ("generation_config.json", "config.json"):
        file = model_dir / name
        if file.exists():
            config = json.loads(file.read_bytes())
            ids = config.get("eos_token_id") or config.get("text_config", {}).get("eos_token_id")
            return [ids] if isinstance(ids, int) else list(ids or [])
    return []


# Any model of language knows something of it, and no job trains it: what the loss guard measures.
KNOWN_TEXT = (
    "The ferry crosses the bay four times a day. In winter, when ice forms along the shore, the captain "
    "waits for the tide before he leaves the harbour. Water boils at one hundred degrees, there are seven "
    "days in a week, and the capital of France is Paris."
)


class ServedTokenizer:
    """tokenizer: of transformers; stop_ids: those of the generation configuration (vLLM adds the tokenizer's
    own: sampling_params.py, update_from_generation_config). Not thread-safe: fast tokenizers are not."""

    def __init__(self, tokenizer: Any, stop_ids: list[int] | None = None):
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.stop_ids = {*(stop_ids or []), *([] if own is None else [own])}
        self.end_id = own if own is not None else min(self.stop_ids, default=None)
        self.stop_texts = {self.decode([one]) for one in self.stop_ids if one in self.known_ids}
        self.known_text: list[int] = self.encode_prompt(KNOWN_TEXT)
        self.special_ids = {one for one, token in tokenizer.added_tokens_decoder.items() if token.special}

    @property
    def known_ids(self) -> set[int]:
        """Ids that a token has; the embedding may have more rows."""
        if not hasattr(self, "_known_ids"):
            self._known_ids = {*range(self.tokenizer.vocab_size), *self.tokenizer.get_vocab().values()}
        return self._known_ids

    def encode_prompt(self, text: str) -> list[int]:
        """As /v1/completions: with BOS where the tokenizer has one."""
        return self.tokenizer(text)["input_ids"]

    def encode(self, text: str) -> list[int]:
        """As /v1/chat/completions: the template has written every special token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def continuation(self, before: list[int], text: str, joint: list[int]) -> list[int] | None:
        """Ids that come after `before` and read as `text`; None where the tokenizer has none.

        joint: ids of the whole text; where they begin with `before`, they are what a model would write. Else
        a token spans the boundary, or the tokenizer puts a space before what it takes for a first word; then
        `text` is tokenised alone, or behind a character that keeps to itself.
        """
        candidates = [joint[len(before) :]] if joint[: len(before)] == before else []
        candidates.append(self.encode(text))
        for anchor in ("\n", "x", "."):
            alone, anchored = self.encode(anchor), self.encode(anchor + text)
            if anchored[: len(alone)] == alone:
                candidates.append(anchored[len(alone) :])
        start = before[-_WINDOW:]
        expected = _composed(self.decode(start) + text)
        return next((one for one in candidates if _composed(self.decode([*start, *one])) == expected), None)


def _composed(text: str) -> str:
    # Normalizers of tokenizers compose characters; what they give back is the same text.
    return unicodedata.normalize("NFC", text)


class ConversationEncoder:
    """Ids of one conversation's renderings, which mostly begin like the one before: only what is new is
    tokenised, from the last special token on that both have. So all of them cost what one costs.

    Special tokens split the text before anything else of a tokenizer looks at it, so that what stands before
    one has no part in the ids of what comes after. `check` holds that against the whole.
    """

    def __init__(self, served: ServedTokenizer):
        self._served = served
        self._is_fast = bool(getattr(served.tokenizer, "is_fast", False))
        stripping = {i for i, t in served.tokenizer.added_tokens_decoder.items() if t.rstrip or not t.special}
        self._anchors = served.special_ids - stripping
        self._text = ""
        self._ids: list[int] = []
        self._cuts: list[tuple[int, int]] = []  # (characters, ids) up to the end of each anchor

    def encode(self, text: str) -> list[int]:
        if not self._is_fast:
            return self._served.encode(text)
        at = bisect_right(self._cuts, 0, key=lambda cut: 0 if text.startswith(self._text[: cut[0]]) else 1)
        cuts = self._cuts[:at]
        chars, num_ids = cuts[-1] if cuts else (0, 0)
        anchor = self._served.decode([self._ids[num_ids - 1]]) if cuts else ""
        encoded = self._served.tokenizer(
            anchor + text[chars:], add_special_tokens=False, return_offsets_mapping=True
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if cuts:
            if ids[0] != self._ids[num_ids - 1] or offsets[0][1] != len(anchor):
                self._is_fast = False
                return self._served.encode(text)
            ids, offsets = ids[1:], offsets[1:]
        shift = chars - len(anchor)
        new = [
            (end + shift, num_ids + k + 1)
            for k, ((_, end), one) in enumerate(zip(offsets, ids, strict=True))
            if one in self._anchors
        ]
        self._text, self._ids, self._cuts = text, [*self._ids[:num_ids], *ids], [*cuts, *new]
        return list(self._ids)

    def check(self) -> bool:
        """Whether the newest ids are those of its whole text. False: from now on each is tokenised whole."""
        if self._is_fast and self._ids != self._served.encode(self._text):
            self._is_fast = False
            return False
        return True
