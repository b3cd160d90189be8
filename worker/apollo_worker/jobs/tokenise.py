"""An example as the tokens to train on, with a mark on each token that the loss is taken of.

Everything that can be wrong with an example is refused here, before it is queued, with its field's path.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Example, check_form
from apollo_worker.jobs.example import TokenisedExample

# Any of these makes a directory one that a tokenizer can be loaded from.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


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

    def encode_all(
        self, numbered: Iterable[tuple[int, Example]], on_progress: Callable[[], None] = lambda: None
    ) -> list[TokenisedExample]:
        """The sequences of (index in the request, example) in order: one or several of each example, each
        with its `example`. on_progress: called after each message and each example, as a sign of life.
        Raises like `encode`, below `examples[index]`."""
        sequences = []
        for i, example in numbered:
            sequences.append(msgspec.structs.replace(self.encode(example, f"examples[{i}]"), example=i))
            on_progress()
        return sequences

    def encode(self, example: Example, path: str) -> TokenisedExample:
        """`example` as tokens. Raises UserError (`invalid_example`) with a field below `path`.

        messages: loss on every assistant turn whose weight is not 0, up to and with its end-of-turn token.
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
    messages: list[dict[str, Any]] = msgspec.to_builtins(example.messages)
    weights = [message.pop("weight", 1) for message in messages]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [i for i in turns if weights[i]]
    for i, message in enumerate(messages):
        _parse_arguments(message, f"{field}[{i}].tool_calls" if i in learned else None)
    if not learned:
        every = "every assistant message has weight 0" if turns else 'no message has the role "assistant"'
        raise _invalid(f"{every}: nothing to learn", field)
    try:
        template = tokenizer.get_chat_template(tools=example.tools)
    except ValueError as error:
        raise _invalid(
            f"the model's tokenizer has no usable chat template ({str(error).split('!')[0]}): send prompt "
            "and completion, or token ids",
            field,
        ) from None
    _check_tool_calls_are_rendered(tokenizer, messages, learned, example.tools, field)
    if _GENERATION_BLOCK.search(template) and tokenizer.is_fast:
        encoded = _apply_template(
            tokenizer, messages, example.tools, field, return_assistant_tokens_mask=True
        )
        mask = [bool(token) for token in encoded["assistant_masks"]]
        if learned == turns:
            return encoded["input_ids"], mask
        runs = [list(run) for kind, run in groupby(range(len(mask)), mask.__getitem__) if kind]
        if len(runs) == len(turns):  # else the marks do not tell one turn from the next
            for i, run in zip(turns, runs, strict=True):
                for at in run:
                    mask[at] = i in learned
            return encoded["input_ids"], mask
    return _mask_by_prefix(tokenizer, messages, learned, example.tools, field)


def _parse_arguments(message: dict[str, Any], learned_at: str | None) -> None:
    """Arguments of tool calls as objects, as templates expect them; OpenAI's API has JSON in a string.

    The same as vLLM does before it renders (vllm/renderers/chat_utils.py, _postprocess_messages): the model
    is trained on what it will be shown. Where they are no object, vLLM shows an empty one; that is not
    learned: raises UserError with the field `learned_at`, None for a message that is context only.
    """
    for call in message.get("tool_calls") or []:
        function = call.get("function")
        if not isinstance(function, dict):
            continue
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments)
            except msgspec.DecodeError:
                arguments = None
        if not isinstance(arguments, dict):
            if learned_at is not None:
                raise _invalid("the arguments of a tool call are not a JSON object", learned_at)
            arguments = {}
        function["arguments"] = arguments


def _check_tool_calls_are_rendered(
    tokenizer: Any, messages: list[dict[str, Any]], learned: list[int], tools: list[Any] | None, field: str
) -> None:
    """A template that leaves tool calls out would teach the model to end its turn instead of calling."""
    for i in learned:
        if not messages[i].get("tool_calls"):
            continue
        part = messages[: i + 1]
        without = [*part[:-1], {name: part[-1][name] for name in part[-1] if name != "tool_calls"}]
        shown, plain = (_apply_template(tokenizer, one, tools, field)["input_ids"] for one in (part, without))
        if shown == plain:
            raise _invalid(
                "the model's chat template does not show tool calls, so this one cannot be learned",
                f"{field}[{i}].tool_calls",
            )


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
    tokenizer: Any, messages: list[Any], learned: list[int], tools: list[Any] | None, field: str
) -> tuple[list[int], list[bool]]:
    """Token ids of the conversation, and which of them the assistant turns at `learned` consist of.

    A turn starts where the conversation before it, with the generation prompt, ends: what the served model
    is given when it answers. It ends where the conversation with it ends, whitespace after the end-of-turn
    token left out (the model stops before it). Both must agree with the whole conversation token by token.
    """

    def tokens(part: list[Any], **options: Any) -> list[int]:
        return _apply_template(tokenizer, part, tools, field, **options)["input_ids"]

    ids = tokens(messages)
    is_target = [False] * len(ids)
    for i in learned:
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
