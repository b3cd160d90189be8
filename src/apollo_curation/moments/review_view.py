"""How a moment looks to a person: the way to the decision, what was said, what would be learned, and why."""

from __future__ import annotations

import difflib
import json
import re
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from apollo_curation.moments.moments import Moment
from apollo_curation.printable import printable
from apollo_ipc.wire.requests import Message

SHORT_CHARS = 600  # of a message of the context, until `more` is asked for
SHORT_MESSAGES = 4

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")
_ROLES = {"user": "cyan", "assistant": "green", "tool": "magenta", "system": "yellow", "developer": "yellow"}


def view(moment: Moment, *, whole: bool = False, has_colour: bool = True) -> RenderableType:
    """whole: all of the context; else its last messages, shortened."""
    parts: list[RenderableType] = [_title(moment), _why(moment)]
    if moment.forgotten:
        return Group(
            *parts, Text("its texts were dropped after their time (worker.keep_examples_s)", style="dim")
        )
    context = moment.context if whole else moment.context[-SHORT_MESSAGES:]
    if len(context) < len(moment.context):
        parts.append(Text(f"... {len(moment.context) - len(context)} messages before", style="dim"))
    parts += [_message(message, whole) for message in context]
    parts.append(Panel(_decision(moment, has_colour), title=_decision_title(moment), title_align="left"))
    if moment.aftermath:
        parts.append(Text("what followed, not learned:", style="dim"))
        aftermath = moment.aftermath if whole else moment.aftermath[:2]
        parts += [_message(message, whole) for message in aftermath]
    return Group(*parts)


def print_view(console: Console, moment: Moment, *, whole: bool = False) -> None:
    console.print(view(moment, whole=whole, has_colour=console.color_system is not None))


def diff(before: str, after: str, *, has_colour: bool) -> Text:
    """Word by word, as one text: what goes in red, what comes in green. Without colours as git's word diff:
    [-goes-]{+comes+}."""
    old, new = _PIECES.findall(printable(before)), _PIECES.findall(printable(after))
    text = Text()
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            text.append("".join(old[i:j]))
            continue
        if gone := "".join(old[i:j]):
            text.append(gone if has_colour else f"[-{gone}-]", style="red strike")
        if come := "".join(new[k:m]):
            text.append(come if has_colour else f"{{+{come}+}}", style="green bold")
    return text


def as_text(message: Message | None) -> str:
    """A message as one text: its content, and each call as name(arguments)."""
    if message is None:
        return ""
    calls = [_call(call["function"]) for call in message.tool_calls or []]
    return "\n".join(part for part in (message.content, *calls) if part)


def _title(moment: Moment) -> Text:
    surprise = "-" if moment.surprise is None else f"{moment.surprise:.2f} nats/token"
    title = Text(moment.moment_id, style="bold")
    title.append(f"  {moment.kind}  confidence {moment.confidence:.2f}  surprise {surprise}  {moment.state}")
    title.append(printable(f"  {moment.source}  topic {moment.topic}"), style="dim")
    return title


def _why(moment: Moment) -> Text:
    why = Text("noticed: ", style="dim")
    why.append(printable(moment.reason), style="not dim")
    if moment.hindsight is not None:
        why.append("\nhindsight: ")
        why.append(printable(moment.hindsight.sentence), style="not dim")
    elif moment.is_candidate:
        why.append("\na candidate: the served model has not scored the next message yet")
    if moment.decided_reason:
        why.append(f"\n{moment.decided_by}: ")
        why.append(printable(moment.decided_reason), style="not dim")
    return why


def _message(message: Message, whole: bool) -> Text:
    text = Text(f"{message.role}: ", style=f"bold {_ROLES.get(message.role, 'white')}")
    said = printable(as_text(message))
    if not whole and len(said) > SHORT_CHARS:
        said = f"{said[:SHORT_CHARS]} [... {len(said) - SHORT_CHARS:,} more characters]"
    text.append(said, style="not bold default")
    return text


def _decision_title(moment: Moment) -> str:
    if moment.original is None:
        return "to be learned as it was said"
    if moment.answer is None and moment.moves_away:
        return "said then; there is no better answer yet: approved as it is, it becomes less likely"
    return "said then, and to be learned" if moment.answer else "said then; there is no better answer yet"


def _decision(moment: Moment, has_colour: bool) -> Text:
    if moment.original is None or moment.answer is None:
        return Text(printable(as_text(moment.original or moment.answer)))
    before, after = as_text(moment.original), as_text(moment.answer)
    if difflib.SequenceMatcher(None, before[:4000].split(), after[:4000].split()).ratio() < 0.3:
        # Of two texts that share a few words only, a diff of words is a riddle.
        text = Text(printable(before) if has_colour else f"[-{printable(before)}-]", style="red")
        text.append("\n\n")
        return text.append(printable(after) if has_colour else f"{{+{printable(after)}+}}", style="green")
    return diff(before, after, has_colour=has_colour)


def _call(function: dict) -> str:
    arguments = function["arguments"]
    with suppress(ValueError):
        arguments = json.dumps(json.loads(arguments), ensure_ascii=False)
    return f"{function['name']}({arguments})"
