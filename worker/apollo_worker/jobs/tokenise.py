"""An example as the tokens to train on, with a mark on each token that the loss is taken of.

What is trained is what is served: each run of targets stands behind the very tokens that vLLM would have
given the model there. Everything that can be wrong with an example is refused here, before it is queued, with
its field's path.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from apollo_ipc.errors import UserError
from apollo_ipc.manifest import Serving
from apollo_ipc.wire.examples import PER_TARGET, Example, TopLogprobs, check_form
from apollo_worker.jobs.alternatives import Alternative, alternatives, at_its_answer
from apollo_worker.jobs.assistant_turn import Chat
from apollo_worker.jobs.chat_template import chat_template, template_variables
from apollo_worker.jobs.conversation import invalid, template_messages, template_tools
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.sequences import Served, labelled, sequences_of, with_answer, with_terms
from apollo_worker.jobs.served_tokenizer import (
    ConversationEncoder,
    ServedTokenizer,
    generation_stop_ids,
    has_tokenizer,
    load_tokenizer,
    mistral_format,
)

# Over 1, of the sum of a teacher's probabilities: they may come rounded, in fp16 or as text.
MAX_EXCESS = 0.01


def load_tokeniser(
    model_dir: str | Path, *, vocab_size: int, max_tokens: int, serving: Serving | None = None
) -> Tokeniser:
    """The tokeniser of a model as vLLM serves it; one without tokenizer files takes token ids only."""
    model_dir, serving = Path(model_dir), serving or Serving()
    mode = serving.tokenizer_mode
    if mode == "auto":
        mode = "mistral" if mistral_format(model_dir) else "hf"
    tokenizer = None
    if mode == "hf" and (serving.tokenizer or has_tokenizer(model_dir)):
        loaded = load_tokenizer(
            serving.tokenizer or str(model_dir), trust_remote_code=serving.trust_remote_code
        )
        stop_ids = generation_stop_ids(model_dir) if serving.stop_ids is None else serving.stop_ids
        tokenizer = ServedTokenizer(loaded, stop_ids)
    return Tokeniser(
        tokenizer,
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        serving=serving,
        model_dir=model_dir,
        missing=None
        if mode == "hf"
        else f"vLLM serves this model with tokenizer mode {mode!r}, which renders by itself",
    )


class Tokeniser:
    """vocab_size: rows of the model's embedding; max_tokens: longest sequence that is trained on; missing:
    why there is no tokenizer."""

    def __init__(
        self,
        tokenizer: ServedTokenizer | None,
        *,
        vocab_size: int,
        max_tokens: int,
        serving: Serving | None = None,
        model_dir: Path | None = None,
        missing: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self._serving = serving or Serving()
        self._model_dir = model_dir or Path()
        self._missing = missing or "the model directory has no tokenizer"
        # A fast tokenizer used by two threads raises "Already borrowed".
        self._lock = threading.Lock()

    def encode_all(
        self, numbered: Iterable[tuple[int, Example]], on_progress: Callable[[], None] = lambda: None
    ) -> list[TokenisedExample]:
        """The sequences of (index in the request, example) in order: one or several of each example, each
        with its `example`. on_progress: called after each message and each example, as a sign of life.
        Raises like `encode`, below `examples[index]`."""
        sequences: list[TokenisedExample] = []
        for i, example in numbered:
            sequences += self.encode(example, f"examples[{i}]", i, on_progress)
            on_progress()
        return sequences

    def encode(
        self,
        example: Example,
        path: str,
        index: int = 0,
        on_progress: Callable[[], None] = lambda: None,
    ) -> list[TokenisedExample]:
        """The sequences of `example`. Raises UserError (`invalid_example`) with a field below `path`.

        messages: loss on every assistant turn whose weight is not 0, up to and with the token at which vLLM
        stops; turns share a sequence where the later one's prompt begins with the earlier turn as it was
        said. prompt + completion: the prompt as /v1/completions tokenises it, then the tokens that read as
        the completion, then the end of sequence. context_ids + continuation_ids: as they are.
        The first token of a sequence is never a target: nothing predicts it.
        """
        check_form(example, path)
        if answers := alternatives(example, path):
            return self._encode_answers(example, answers, path, index, on_progress)
        with self._lock:
            if example.messages is not None:
                field = f"{path}.messages"
                turns = self._chat_turns(self._required(path), example, path, on_progress)
            elif example.prompt is not None:
                field = f"{path}.completion"
                turns = [self._completion(self._required(path), example, field)]
            else:
                field = f"{path}.continuation_ids"
                turns = [self._given_ids(example, path)]
        sequences = sequences_of(turns, index)
        if any(getattr(example, name) is not None for name in PER_TARGET):
            sequences = [with_terms(sequence, example, path) for sequence in sequences]
        if example.label is not None:
            sequences = [labelled(sequences, example.label, field)]
        for sequence in sequences:
            if example.context_ids is None:
                self._check_rows(sequence.input_ids, field, given=False)
            self._check_length(len(sequence.input_ids), field)
            if not any(sequence.is_target):
                raise invalid(
                    "no token to learn: nothing predicts the first token, and no later one is a target", field
                )
        return sequences

    def _encode_answers(
        self,
        example: Example,
        answers: list[Alternative],
        path: str,
        index: int,
        on_progress: Callable[[], None],
    ) -> list[TokenisedExample]:
        """A sequence each, in order."""
        sequences: list[TokenisedExample] = []
        for one in answers:
            plain = one.example
            if one.ids is not None:
                plain = Example(context_ids=self._context(plain, path), continuation_ids=one.ids)
            try:
                (sequence,) = self.encode(plain, path, index, on_progress)
            except UserError as error:
                raise at_its_answer(error, path, one) from None
            sequences.append(with_answer(sequence, one))
            on_progress()
        if example.chosen is not None and sequences[0].input_ids == sequences[1].input_ids:
            raise invalid("chosen and rejected are the same tokens: nothing to prefer", f"{path}.rejected")
        return sequences

    def _context(self, example: Example, path: str) -> list[int]:
        """What vLLM gives the model for a prompt, or for messages that wait for an answer."""
        tokenizer = self._required(path)
        with self._lock:
            if example.messages is None:
                return tokenizer.encode_prompt(example.prompt or "")
            chat = self._chat(tokenizer, example, path)
            return ConversationEncoder(tokenizer).encode(chat.prompt())

    def _required(self, path: str) -> ServedTokenizer:
        if self.tokenizer is None:
            raise invalid(f"{self._missing}: send context_ids and continuation_ids", path)
        return self.tokenizer

    def _chat_turns(
        self, tokenizer: ServedTokenizer, example: Example, path: str, on_progress: Callable[[], None]
    ) -> list[Served]:
        field = f"{path}.messages"
        assert example.messages is not None
        answers = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
        learned = [i for i in answers if example.messages[i].weight != 0]
        if not learned:
            every = (
                "every assistant message has weight 0" if answers else 'no message has the role "assistant"'
            )
            raise invalid(f"{every}: nothing to learn", field)
        chat = self._chat(tokenizer, example, path)
        encoder = ConversationEncoder(tokenizer)
        turns: list[Served] = []
        for i in learned:
            turns.append(_chat_turn(chat, i, tokenizer, encoder))
            self._check_length(len(turns[-1].before) + len(turns[-1].said), field)
            on_progress()
        if not encoder.check():
            turns = [_chat_turn(chat, i, tokenizer, encoder) for i in learned]
        return turns

    def _chat(self, tokenizer: ServedTokenizer, example: Example, path: str) -> Chat:
        field = f"{path}.messages"
        assert example.messages is not None
        tools = template_tools(example.tools, f"{path}.tools")
        template = chat_template(
            tokenizer.tokenizer, self._serving, self._model_dir, has_tools=tools is not None, field=field
        )
        return Chat(
            template,
            template_messages(example.messages, template.content_format, field),
            tools,
            template_variables(
                self._serving.default_chat_template_kwargs,
                example.chat_template_kwargs,
                f"{path}.chat_template_kwargs",
            ),
            field,
        )

    def _completion(self, tokenizer: ServedTokenizer, example: Example, field: str) -> Served:
        assert example.prompt is not None
        assert example.completion is not None
        before = tokenizer.encode_prompt(example.prompt)
        joint = tokenizer.encode_prompt(example.prompt + example.completion)
        said = tokenizer.continuation(before, example.completion, joint)
        if said is None:
            raise invalid(
                "the tokenizer cannot write this completion behind this prompt: no tokens that follow the "
                "prompt's read as it (its characters, or a space at the boundary, are lost)",
                field,
            )
        note = None if tokenizer.end_id is not None else _NO_END
        return Served(before, [*said, *([] if tokenizer.end_id is None else [tokenizer.end_id])], None, note)

    def _given_ids(self, example: Example, path: str) -> Served:
        assert example.context_ids is not None
        assert example.continuation_ids is not None
        for name, ids in (
            ("context_ids", example.context_ids),
            ("continuation_ids", example.continuation_ids),
        ):
            self._check_rows(ids, f"{path}.{name}", given=True)
        if self.tokenizer is not None:
            for at, token in enumerate(example.continuation_ids):
                if token not in self.tokenizer.known_ids:
                    raise invalid(
                        f"no token of the tokenizer has the id {token}: vLLM could not show what was learned",
                        f"{path}.continuation_ids[{at}]",
                    )
        for at, row in enumerate(example.top_logprobs or []):
            if row is not None:
                self._check_teacher(row, f"{path}.top_logprobs[{at}]")
        return Served(example.context_ids, example.continuation_ids)

    def _check_teacher(self, row: TopLogprobs, field: str) -> None:
        """One row of top_logprobs: known tokens, each once, that share a probability of at most 1."""
        self._check_rows([token for token, _ in row], field, given=True)
        if not row or len({token for token, _ in row}) != len(row):
            raise invalid("each row needs one token or more, each of them once", field)
        if (total := sum(math.exp(value) for _, value in row)) > 1 + MAX_EXCESS:
            raise invalid(f"the probabilities add up to {total:.3f}: 1 is the most", field)

    def _check_rows(self, ids: list[int], field: str, *, given: bool) -> None:
        """Each id must have a row of the embedding."""
        at = next((i for i, token in enumerate(ids) if token >= self.vocab_size), None)
        if at is None:
            return
        if given:
            message = f"token id {ids[at]} is not in the vocabulary: 0 to {self.vocab_size - 1}"
            raise invalid(message, f"{field}[{at}]")
        raise invalid(
            f"the tokenizer gives token id {ids[at]}, but the model's vocabulary has {self.vocab_size}", field
        )

    def _check_length(self, num_tokens: int, field: str) -> None:
        if num_tokens > self.max_tokens:
            raise invalid(
                f"{num_tokens} tokens; at most {self.max_tokens} fit: shorten it or raise train.max_tokens",
                field,
            )


_NO_END = "the tokenizer has no end of sequence: no end is learned, and the served model goes on"


def _chat_turn(chat: Chat, i: int, tokenizer: ServedTokenizer, encoder: ConversationEncoder) -> Served:
    """Turn `i` in tokens. Raises UserError where it has no end at which vLLM stops, or one in its midst."""
    field = f"{chat.path}[{i}]"
    turn = chat.turn(i)
    before = encoder.encode(turn.context)
    said = _tokens_behind(turn.context, before, turn.said, tokenizer, encoder, field)
    if (end := _first_stop(said, tokenizer)) is not None:
        stop = tokenizer.decode([said[end]])
        if not chat.says_all(i, turn.said.partition(stop)[0]):
            raise invalid(f"vLLM stops at {stop!r}, which stands in the midst of this turn", field)
        return Served(before, said[: end + 1], i)
    if turn.is_followed:
        raise invalid("the template does not render this turn without a message after it", field)
    then, tail = chat.end_of_turn(i)
    spaces = then[: len(then) - len(then.lstrip())]
    if ended := next((stop for stop in tokenizer.stop_texts if then[len(spaces) :].startswith(stop)), None):
        # The next role's token ends the turn.
        said = _tokens_behind(turn.context, before, turn.said + spaces + ended, tokenizer, encoder, field)
        if (end := _first_stop(said, tokenizer)) is not None:
            return Served(before, said[: end + 1], i)
    stops = ", ".join(map(repr, sorted(tokenizer.stop_texts))) or "nothing"
    if tail.strip():
        raise invalid(
            f"the template ends this turn with {tail.strip()!r}, and vLLM stops at {stops}: the served "
            "answer would run on. Add it to eos_token_id in generation_config.json and start vLLM anew",
            field,
        )
    if tokenizer.end_id is None:
        return Served(before, said, i, _NO_END)
    text = turn.said.removesuffix(tail) if tail else turn.said
    said = _tokens_behind(turn.context, before, text, tokenizer, encoder, field)
    end_text = tokenizer.decode([tokenizer.end_id])
    note = f"the template ends no turn: {end_text!r}, at which vLLM stops, is learned as its end"
    return Served(before, [*said, tokenizer.end_id], i, note)


def _tokens_behind(
    context: str,
    before: list[int],
    text: str,
    tokenizer: ServedTokenizer,
    encoder: ConversationEncoder,
    field: str,
) -> list[int]:
    joint = encoder.encode(context + text)
    if joint[: len(before)] == before:
        return joint[len(before) :]
    said = tokenizer.continuation(before, text, joint)
    if said is None:
        raise invalid(
            "the tokenizer cannot write this turn behind the prompt that vLLM gives: no tokens that follow "
            "the prompt's read as it",
            field,
        )
    return said


def _first_stop(ids: list[int], tokenizer: ServedTokenizer) -> int | None:
    return next((at for at, token in enumerate(ids) if token in tokenizer.stop_ids), None)
