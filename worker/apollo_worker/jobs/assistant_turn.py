"""What vLLM would have given the model before an assistant's turn, and what the model would then have to say.

The rule: the context of turn i is what vLLM renders for the messages before it, with the generation prompt;
the target is how the rendering with the turn goes on, up to and with the token at which vLLM stops. What
cannot be had so is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from apollo_ipc.wire.decoded import is_list, is_object
from apollo_worker.jobs.chat_template import ChatTemplate, TemplateRefusal
from apollo_worker.jobs.conversation import Rendered, invalid

_PROBE, _THOUGHT = "\ue000", "\ue001"  # characters that no template writes
_NOT_SHOWN = "the model's chat template does not show this, so it cannot be learned"
_CLOSED = re.compile(r"(?:</[\w:-]+>|\[/THINK\]|<\|END_\w+\|>|<\|/\w+\|>|<\w+\|>)\s*$")
_OPENED = re.compile(r"<([\w:-]+)>\s*$")
# vLLM takes a message of any role. These templates are made for; of another one they may show nothing.
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
_EMPTY_THOUGHT = re.compile(
    r"\s*(?:(?:<[\w:-]*(?:think|thought|reason)\w*>\s*)?</[\w:-]*(?:think|thought|reason)\w*>"
    r"|(?:\[THINK\]\s*)?\[/THINK\]|(?:<\|START_THINKING\|>\s*)?<\|END_THINKING\|>)"
)


class TurnText(NamedTuple):
    """context: the prompt; said: the turn as it is rendered behind it, maybe more than what vLLM lets the
    model say; is_followed: `said` goes on with a message after it."""

    context: str
    said: str
    is_followed: bool = False


class Chat:
    """One conversation and what it is rendered with. path: of its list of messages."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[Rendered],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        path: str,
    ):
        self.messages, self.path = messages, path
        self._template, self._tools, self._variables = template, tools, variables
        self._shown_roles: set[str] = set()

    def says_all(self, i: int, text: str) -> bool:
        """Whether `text` has all that message `i` says."""
        return _shows(text, self.messages[i])

    def prompt(self) -> str:
        """What vLLM gives the model for all the messages. Raises UserError with their field."""
        try:
            return self._render(self.messages, is_prompt=True)
        except TemplateRefusal as refusal:
            raise self._refused(refusal, self.path) from refusal

    def turn(self, i: int) -> TurnText:
        """Of the assistant's message `i`. Raises UserError with its field."""
        field = f"{self.path}[{i}]"
        if i == 0:
            raise invalid(
                "nothing comes before this assistant's turn: put a system or user message before it, or give "
                "it the weight 0",
                field,
            )
        try:
            context = self._render(self.messages[:i], is_prompt=True)
        except TemplateRefusal as refusal:
            raise self._refused(refusal, self.path) from refusal
        self._check_roles(i)
        turn = self._rendered_turn(i, context)
        self._check_shown(i, turn.said)
        return turn

    def end_of_turn(self, i: int) -> tuple[str, str]:
        """(what stands behind turn `i` where a message follows it, what the template writes after a turn's
        text): where to look for its end if `said` has none."""
        before, message = self.messages[:i], self.messages[i]
        whole, longer = self._try([*before, message]), self._try([*before, message, self._follower(i)])
        tail = self._frame(before)[1]
        return _after(longer, whole, message, tail) if longer is not None and whole is not None else "", tail

    def _rendered_turn(self, i: int, context: str) -> TurnText:
        field, before, message = f"{self.path}[{i}]", self.messages[:i], self.messages[i]
        is_followed = False
        try:
            whole = self._render([*before, message])
        except TemplateRefusal as refusal:  # some refuse a conversation that ends so
            longer = self._try([*before, message, self._follower(i)])
            if longer is None:
                raise self._refused(refusal, field) from refusal
            whole, is_followed = longer, True
        said = whole[len(context) :] if whole.startswith(context) else None
        if said is not None and _shows(said, message):
            self._refuse_empty_thought(i, context, said)
        elif (with_thought := _with_thought(context, whole, message)) is not None:
            said = with_thought
        elif said is None:
            said = self._said_after_closed_prompt(context, whole, self._frame(before)[0], field)
        return TurnText(context, said, is_followed)

    def _said_after_closed_prompt(self, context: str, whole: str, header: str | None, field: str) -> str:
        """Of a turn that is rendered without what the generation prompt adds to its header: a closed thought
        (thinking is off), or whitespace."""
        if header is not None and whole.startswith(header):
            added = context[len(header) :] if context.startswith(header) else None
            if added is None and context.rstrip() == header.rstrip():
                added = ""
            if added is not None and (not added.strip() or _CLOSED.search(added)):
                return whole[len(header) :]
            if added is not None:
                raise invalid(
                    f"vLLM's prompt for this turn goes on with {added.strip()!r}, and this turn has no such "
                    "thought: send it as `reasoning`, or switch thinking off by chat_template_kwargs (many "
                    'templates know {"enable_thinking": false})',
                    field,
                )
        common = next(
            (k for k, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b),
            min(len(context), len(whole)),
        )
        raise invalid(
            "the template does not render this turn behind the prompt that vLLM gives: the prompt goes on "
            f"with {context[common : common + 40]!r}, the turn with {whole[common : common + 40]!r}",
            field,
        )

    def _refuse_empty_thought(self, i: int, context: str, said: str) -> None:
        message, content = self.messages[i], _text(self.messages[i])
        if message.get("reasoning") or _EMPTY_THOUGHT.match(content):
            return
        is_empty = _EMPTY_THOUGHT.match(said) is not None
        at = said.find(content.strip()) if content.strip() else -1
        if not is_empty and at > 0 and (shown := said[:at].strip()):
            thinking = {**self._answer(_PROBE), "reasoning": _THOUGHT, "reasoning_content": _THOUGHT}
            probe = self._try([*self.messages[:i], thinking]) or ""
            start, end = probe.find(_THOUGHT), probe.rfind(_PROBE)
            if probe.startswith(context) and len(context) <= start < end:
                around = probe[len(context) : start] + probe[start + 1 : end]
                is_empty = _squashed(shown) == _squashed(around)
        if is_empty:
            raise invalid(
                "this turn has no thought, and the template would have the model write an empty one, which "
                "teaches it not to think: send the thought as `reasoning`, or switch thinking off by "
                'chat_template_kwargs (many templates know {"enable_thinking": false})',
                f"{self.path}[{i}]",
            )

    def _follower(self, i: int) -> Rendered:
        """A message that may come after turn `i`: the one that does, or one like it."""
        if i + 1 < len(self.messages) and self.messages[i + 1]["role"] != "assistant":
            return self.messages[i + 1]
        if calls := self.messages[i].get("tool_calls"):
            name = calls[-1]["function"]["name"]
            return {"role": "tool", "content": "x", "name": name, "tool_call_id": calls[-1].get("id", "x")}
        return self._message("user", "x")

    def _frame(self, before: list[Rendered]) -> tuple[str | None, str]:
        """What a turn of plain text is rendered between: (all before it, all behind it)."""
        probe = self._try([*before, self._answer(_PROBE)])
        if probe is None or _PROBE not in probe:
            return None, ""
        at = probe.rindex(_PROBE)
        return probe[:at], probe[at + 1 :]

    def _check_roles(self, i: int) -> None:
        """Raises UserError at the first message before turn `i` whose role the template passes over. Where it
        shows one message of a role, it shows the others."""
        for k, message in enumerate(self.messages[:i]):
            role = message["role"]
            if role in _ROLES or role in self._shown_roles:
                continue
            probe = self._try([*self.messages[:k], self._message(role, _PROBE)])
            if probe is not None and _PROBE not in probe:
                raise invalid(
                    f"the model's chat template shows nothing of a message of the role {role!r}: use system, "
                    "user, assistant or tool",
                    f"{self.path}[{k}].role",
                )
            self._shown_roles.add(role)

    def _check_shown(self, i: int, said: str) -> None:
        """Raises UserError at the part of turn `i` that `said` leaves out."""
        message, calls, field = self.messages[i], self.messages[i].get("tool_calls", []), f"{self.path}[{i}]"
        for name, _ in _parts(message):
            if not _shows(said, message, up_to=name):
                raise invalid(_NOT_SHOWN, f"{field}.{name}")
        # Of a turn with calls, each part must matter: its words may stand in another one's.
        less: list[tuple[str, Rendered]] = []
        without = {name: value for name, value in message.items() if name != "tool_calls"}
        if calls and _text(message).strip():
            less.append(("content", {**message, **self._answer("")}))
        for k in range(len(calls)):
            rest = [*calls[:k], *calls[k + 1 :]]
            less.append((f"tool_calls[{k}]", {**without, "tool_calls": rest} if rest else without))
        whole = self._try([*self.messages[:i], message]) if less else None
        for name, one in less:
            if whole is not None and self._try([*self.messages[:i], one]) == whole:
                raise invalid(_NOT_SHOWN, f"{field}.{name}")

    def _answer(self, text: str) -> Rendered:
        return self._message("assistant", text)

    def _message(self, role: str, text: str) -> Rendered:
        is_text = self._template.content_format == "string"
        return {"role": role, "content": text if is_text else [{"type": "text", "text": text}]}

    def _render(self, messages: list[Rendered], *, is_prompt: bool = False) -> str:
        return self._template.render(messages, self._tools, self._variables, is_prompt=is_prompt)

    def _try(self, messages: list[Rendered]) -> str | None:
        try:
            return self._render(messages)
        except TemplateRefusal:
            return None

    def _refused(self, refusal: TemplateRefusal, field: str):
        return invalid(f"the model's chat template refuses these messages: {refusal}", field)


def _after(longer: str, whole: str, message: Rendered, tail: str) -> str:
    """What the rendering with one more message has behind the turn."""
    if longer.startswith(whole):
        return longer[len(whole) :]
    # A turn that is not the last may have lost its thought; its text is still there.
    content = _text(message).strip()
    ends = content + tail.rstrip()
    at = longer.rfind(ends) if content and not message.get("tool_calls") else -1
    return longer[at + len(ends) :] if at >= 0 else ""


def _with_thought(context: str, whole: str, message: Rendered) -> str | None:
    """The turn of a template that leaves thoughts out: what the model says is its thought, the closing tag
    and the text, and the template shows the text only."""
    content, thought = _text(message), message.get("reasoning") or ""
    if message.get("tool_calls"):
        return None
    opened = _OPENED.search(context)
    closing = f"</{opened[1]}>" if opened else "</think>"
    if thought.strip() and opened:
        said, shown = f"{thought.strip()}\n{closing}\n\n{content.strip()}", content
    elif not thought and closing in content:
        said, shown = content.strip(), content.rpartition(closing)[2]
        if opened:
            said = said.removeprefix(f"<{opened[1]}>").lstrip()
    else:
        return None
    at = whole.rfind(shown.strip())
    if at < 0 or not shown.strip():
        return None
    return ("" if context[-1:].isspace() or not opened else "\n") + said + whole[at + len(shown.strip()) :]


def _parts(message: Rendered) -> list[tuple[str, str]]:
    """(field, text) of all that a turn says, in the order in which templates show it."""
    parts = [("reasoning", message.get("reasoning") or "")]
    content = message["content"]
    parts += [("content", part["text"]) for part in content] if is_list(content) else [("content", content)]
    calls = enumerate(message.get("tool_calls", []))
    parts += [(f"tool_calls[{k}]", call["function"]["name"]) for k, call in calls]
    return [(name, text) for name, text in parts if text.strip()]


def _shows(said: str, message: Rendered, up_to: str | None = None) -> bool:
    """Whether `said` has all parts (`up_to` one of them): the thought first, text and calls in any order
    behind it, calls one after the other. Whitespace does not count."""
    text, thought_end, ends = _squashed(said), 0, {"content": 0, "calls": 0}
    calls = message.get("tool_calls", [])
    for name, part in _parts(message):
        kind = "calls" if name.startswith("tool_calls") else name
        found = text.find(_squashed(part), max(thought_end, ends.get(kind, 0)))
        if found < 0:
            return False
        end = found + len(_squashed(part))
        if name == "reasoning":
            thought_end = end
        else:
            ends[kind] = end
        if kind == "calls":
            arguments = calls[int(name[len("tool_calls[") : -1])]["function"]["arguments"]
            if not all(any(one in text for one in forms) for forms in _leaves(arguments)):
                return False
        if name == up_to:
            return True
    return True


def _leaves(value: Any) -> Iterator[list[str]]:
    """For each key and value inside the arguments of a call: the ways in which a template may write it."""
    if is_object(value):
        for name, inner in value.items():
            yield from _leaves(name)
            yield from _leaves(inner)
    elif is_list(value):
        for inner in value:
            yield from _leaves(inner)
    else:
        forms = [str(value), json.dumps(value), json.dumps(value, ensure_ascii=False)]
        yield [_squashed(one.strip('"') if isinstance(value, str) else one) for one in forms]


def _text(message: Rendered) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _squashed(text: str) -> str:
    return "".join(text.split())
