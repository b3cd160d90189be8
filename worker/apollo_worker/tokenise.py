"""An example as the tokens to train on, with a mark on each token that the loss is taken of.

Everything that can be wrong with an example is refused here, before it is queued, with its field's path.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from apollo_ipc.errors import UserError
from apollo_ipc.requests import Example, check_form

# Any of these makes a directory one that a tokenizer can be loaded from.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


class TokenisedExample(msgspec.Struct, frozen=True):
    """input_ids: the whole sequence; is_target: per token, whether the loss is taken of predicting it."""

    input_ids: list[int]
    is_target: list[bool]


def content_hash(example: Example) -> bytes:
    """32 bytes that are equal for equal examples, whatever the order of keys in what the client sent."""
    return blake2b(msgspec.json.encode(example, order="sorted"), digest_size=32).digest()


def load_tokeniser(model_dir: str | Path, *, vocab_size: int, max_tokens: int) -> Tokeniser:
    """The tokeniser of a model directory; one without tokenizer files takes token ids only."""
    tokenizer = None
    if any((Path(model_dir) / name).exists() for name in _TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return Tokeniser(tokenizer, vocab_size=vocab_size, max_tokens=max_tokens)


class Tokeniser:
    """vocab_size: rows of the model's embedding; max_tokens: longest example that is trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, max_tokens: int):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        # The service checks examples while the main loop trains; a fast tokenizer used by two threads
        # raises "Already borrowed".
        self._lock = threading.Lock()

    def encode(self, example: Example, path: str) -> TokenisedExample:
        """`example` as tokens. Raises UserError (`invalid_example`) with a field below `path`.

        messages: loss on every assistant turn, up to and with its end-of-turn token.
        prompt + completion: the prompt is tokenised as vLLM's /v1/completions does it (BOS where the
        tokenizer has one), the completion on its own, so that the boundary is where generation starts;
        EOS is appended as a target, so that the served model stops there.
        context_ids + continuation_ids: as they are.
        The first token of a sequence is never a target: nothing predicts it.
        """
        check_form(example, path)
        if example.context_ids is not None and example.continuation_ids is not None:
            self._check_ids(example.context_ids, f"{path}.context_ids")
            self._check_ids(example.continuation_ids, f"{path}.continuation_ids")
            ids = [*example.context_ids, *example.continuation_ids]
            first_target, field = len(example.context_ids), f"{path}.continuation_ids"
            is_target = [i >= first_target for i in range(len(ids))]
        else:
            if self.tokenizer is None:
                raise _invalid(
                    "the model directory has no tokenizer: send context_ids and continuation_ids", path
                )
            with self._lock:
                if example.messages is not None:
                    field = f"{path}.messages"
                    ids, is_target = _encode_messages(self.tokenizer, example, field)
                else:
                    field = f"{path}.completion"
                    ids, is_target = _encode_completion(self.tokenizer, example)
            self._check_ids(ids, field, from_tokenizer=True)
        return self._checked(ids, is_target, field)

    def _check_ids(self, ids: list[int], field: str, *, from_tokenizer: bool = False) -> None:
        at = next((i for i, token in enumerate(ids) if token >= self.vocab_size), None)
        if at is None:
            return
        if from_tokenizer:
            message = (
                f"the tokenizer gives token id {ids[at]}, but the model's vocabulary has {self.vocab_size}"
            )
            raise _invalid(message, field)
        message = f"token id {ids[at]} is not in the vocabulary: 0 to {self.vocab_size - 1}"
        raise _invalid(message, f"{field}[{at}]")

    def _checked(self, ids: list[int], is_target: list[bool], field: str) -> TokenisedExample:
        if len(ids) > self.max_tokens:
            raise _invalid(
                f"{len(ids)} tokens; at most {self.max_tokens} fit: shorten it or raise train.max_tokens",
                field,
            )
        is_target = [target and i > 0 for i, target in enumerate(is_target)]
        if not any(is_target):
            raise _invalid(
                "no token to learn: nothing predicts the first token, and no later one is a target", field
            )
        return TokenisedExample(ids, is_target)


def _invalid(message: str, field: str) -> UserError:
    return UserError(message, field=field, code="invalid_example")


def _encode_completion(tokenizer: Any, example: Example) -> tuple[list[int], list[bool]]:
    prompt = tokenizer(example.prompt)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)


def _encode_messages(tokenizer: Any, example: Example, field: str) -> tuple[list[int], list[bool]]:
    messages = msgspec.to_builtins(example.messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise _invalid('no message has the role "assistant": nothing to learn', field)
    try:
        template = tokenizer.get_chat_template(tools=example.tools)
    except ValueError as error:
        raise _invalid(
            f"the model's tokenizer has no usable chat template ({str(error).split('!')[0]}): send prompt "
            "and completion, or token ids",
            field,
        ) from None
    if _GENERATION_BLOCK.search(template) and tokenizer.is_fast:
        encoded = _apply_template(
            tokenizer, messages, example.tools, field, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], [bool(mask) for mask in encoded["assistant_masks"]]
    return _mask_by_prefix(tokenizer, messages, example.tools, field)


def _apply_template(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None, field: str, **options
) -> Any:
    """{"input_ids", ...} of the rendered conversation. Raises UserError where the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, **options
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        # Templates refuse by raise_exception, or stumble over what they did not expect.
        raise _invalid(f"the model's chat template refuses these messages: {error}", field) from error


def _mask_by_prefix(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None, field: str
) -> tuple[list[int], list[bool]]:
    """Token ids of the conversation, and which of them an assistant turn consists of.

    A turn starts where the conversation before it, with the generation prompt, ends: what the served model
    is given when it answers. It ends where the conversation with it ends, whitespace after the end-of-turn
    token left out (the model stops before it). Both must agree with the whole conversation token by token.
    """

    def tokens(part: list[Any], **options: Any) -> list[int]:
        return _apply_template(tokenizer, part, tools, field, **options)["input_ids"]

    ids = tokens(messages)
    is_target = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            message = "the conversation begins with an assistant turn: put a system or user message before it"
            raise _invalid(message, f"{field}[0]")
        end = None
        if (start := _turn_start(tokenizer, ids, messages, i, tokens)) is not None:
            end = _turn_end(tokenizer, ids, start, tokens(messages[: i + 1]))
        if start is None or end is None:
            raise _invalid(
                f"the conversation before message {i}, rendered with the generation prompt, is not how the "
                "tokens of the whole conversation begin, so this assistant turn cannot be told apart: send "
                "each assistant turn as an example of its own (as the last message), or use a chat template "
                "with {% generation %} blocks",
                f"{field}[{i}]",
            )
        is_target[start:end] = [True] * (end - start)
    return ids, is_target


def _turn_start(
    tokenizer: Any, ids: list[int], messages: list[Any], i: int, tokens: Callable[..., list[int]]
) -> int | None:
    """Where assistant message `i` starts in `ids`, or None if that cannot be verified."""
    # A reasoning model's generation prompt opens a thought (Qwen3.5: "<think>\n"), while a turn without
    # reasoning is rendered after the prompt for thinking switched off. Other templates ignore the option.
    prompt = tokens(messages[:i], add_generation_prompt=True)
    for candidate in (prompt, tokens(messages[:i], add_generation_prompt=True, enable_thinking=False)):
        if ids[: len(candidate)] == candidate:
            return len(candidate)
    # An earlier turn may have lost its thought altogether: then the prompt up to the thought agrees, and
    # what follows is the message's text.
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
    has_header = common > len(tokens(messages[:i]))
    text = tokenizer.decode(ids[common:]) if has_header else ""
    return common if has_header and text.startswith(messages[i]["content"].strip()) else None


def _turn_end(tokenizer: Any, ids: list[int], start: int, with_turn: list[int]) -> int | None:
    """Where the assistant turn that starts at `start` ends in `ids`, or None if that cannot be verified.

    with_turn: the conversation rendered up to and with this turn. Some templates (Qwen3) render the last
    turn in another way than an earlier one; then the turn ends with its first special token, if that is EOS.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if ids[: len(with_turn)] != with_turn:
        first = next((at for at in range(start, len(ids)) if ids[at] in special), None)
        return first + 1 if first is not None and ids[first] == tokenizer.eos_token_id else None
    after = list(takewhile(lambda token: token not in special, reversed(with_turn[start:])))
    if len(after) < len(with_turn) - start and not tokenizer.decode(after[::-1]).strip():
        return len(with_turn) - len(after)
    return len(with_turn)
