"""Flagged moments before a person, one at a time: approve, edit or reject. Every decision is kept at once.

What is approved is what was shown: state and answer are written together, and only while the moment is still
in the state in which it was shown. So two reviewers never overwrite each other; the second is told.
"""

from __future__ import annotations

import time
from collections import Counter

import msgspec

from apollo_curation.moments.moments import Moment, Moments, State
from apollo_curation.store import Store
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

KEYS: dict[str, str] = {
    "a": "approve",
    "e": "edit the answer and approve it",
    "r": "reject",
    "s": "skip",
    "b": "back",
    "m": "more of the context",
    "q": "quit",
}
CHANGEABLE: tuple[State, ...] = ("flagged", "approved", "rejected")  # by a person who comes back to it

SCHEMA = """
CREATE TABLE IF NOT EXISTS review_places (
    reviewer TEXT PRIMARY KEY,
    moment_id TEXT NOT NULL,
    created_at REAL NOT NULL,
    left_at REAL NOT NULL
);
"""


class Review:
    """One reviewer's way through what is flagged: the oldest first, from where he left it; what he skipped
    comes again, behind the rest, the next time.

    decided: how many moments this run approved, edited, rejected and skipped, and how many somebody else
    decided meanwhile.
    """

    def __init__(self, store: Store, moments: Moments, reviewer: str):
        store.declare(SCHEMA)
        self._store = store
        self._moments = moments
        self._reviewer = reviewer
        self._queue = self._from_last_place([moment.moment_id for moment in self._flagged()])
        self._at = 0
        self._seen: set[str] = set()
        self.decided: Counter[str] = Counter()
        self._go_on()

    @property
    def current(self) -> Moment | None:
        """As it is now; None at the end."""
        if self._at >= len(self._queue):
            return None
        return self._moments.get(self._queue[self._at])

    @property
    def num_left(self) -> int:
        """The current one and those behind it."""
        return len(self._queue) - self._at

    def approve(self, shown: Moment, answer: Message | None = None) -> Moment:
        """answer: in place of the one that was shown. Raises UserError where nothing could be learned, or
        somebody else has decided meanwhile."""
        approved = approve(self._moments, shown, answer=answer)
        self.decided["edited" if answer is not None else "approved"] += 1
        self._next()
        return approved

    def reject(self, shown: Moment, reason: str = "") -> Moment:
        rejected = reject(self._moments, shown, reason)
        self.decided["rejected"] += 1
        self._next()
        return rejected

    def skip(self) -> None:
        self.decided["skipped"] += 1
        self._next()

    def back(self) -> bool:
        """To the one that was shown before, decided or not; whether there is one."""
        earlier = [i for i in range(self._at) if self._queue[i] in self._seen]
        if not earlier:
            return False
        self._at = earlier[-1]
        self._keep_place()
        return True

    def pass_over(self) -> None:
        """What somebody else has decided."""
        self.decided["decided meanwhile"] += 1
        self._next()

    def _next(self) -> None:
        self._at += 1
        self._go_on()

    def _go_on(self) -> None:
        """To the next one that is still flagged; new ones that came meanwhile are taken up at the end."""
        while True:
            if self._at >= len(self._queue):
                known = set(self._queue)
                self._queue += [one.moment_id for one in self._flagged() if one.moment_id not in known]
            moment = self.current
            if moment is None or moment.state == "flagged":
                break
            self._at += 1
        if moment is not None:
            self._seen.add(moment.moment_id)
            self._keep_place()

    def _flagged(self) -> list[Moment]:
        return self._moments.list("flagged")

    def _from_last_place(self, ids: list[str]) -> list[str]:
        """The one where this reviewer left first, then those behind it, then those before it."""
        rows = self._store.query("SELECT * FROM review_places WHERE reviewer = ?", self._reviewer)
        if not rows or not ids:
            return ids
        place = (rows[0]["created_at"], rows[0]["moment_id"])
        moments = {moment.moment_id: moment for moment in self._flagged()}
        later = [one for one in ids if one in moments and (moments[one].created_at, one) >= place]
        return later + [one for one in ids if one not in later]

    def _keep_place(self) -> None:
        moment = self.current
        assert moment is not None
        values = (self._reviewer, moment.moment_id, moment.created_at, time.time())
        with self._store.transaction() as db:
            db.execute("INSERT OR REPLACE INTO review_places VALUES (?, ?, ?, ?)", values)


def approve(moments: Moments, shown: Moment, *, answer: Message | None = None, reason: str = "") -> Moment:
    """By a person. Raises UserError; see Review.approve."""
    if shown.forgotten:
        raise UserError(f"moment {shown.moment_id} has no text any more: its time is over")
    chosen = answer if answer is not None else shown.answer
    if chosen is None and not shown.moves_away:
        raise UserError(
            f"moment {shown.moment_id} has no answer to learn; edit it, or let `curate judge` propose one"
        )
    changes: dict[str, object] = {"answer": chosen}
    if chosen != shown.answer:
        changes["surprise"] = None  # it was measured of another answer
    return _decide(moments, shown, "approved", reason, changes)


def reject(moments: Moments, shown: Moment, reason: str = "") -> Moment:
    return _decide(moments, shown, "rejected", reason, {})


def _decide(moments: Moments, shown: Moment, state: State, reason: str, changes: dict[str, object]) -> Moment:
    expected: tuple[State, ...] = (shown.state,)
    if shown.state not in CHANGEABLE and not (shown.state in ("failed", "undone") and state == "approved"):
        raise UserError(f"moment {shown.moment_id} is {shown.state}; that cannot be changed any more")
    return moments.change(
        shown.moment_id,
        expected=expected,
        state=state,
        decided_by="person",
        decided_reason=reason or shown.decided_reason,
        **changes,
    )


def edited(text: str, before: Message | None) -> Message:
    """The answer that a person wrote: plain text, or JSON of a whole message (which a call of a tool needs).

    Raises UserError for text that would teach nothing or is no assistant's message.
    """
    text = text.strip()
    if not text:
        raise UserError("the answer is empty; nothing was changed")
    has_calls = before is not None and bool(before.tool_calls)
    if not has_calls and not text.startswith('{"role"'):
        return Message("assistant", text)
    try:
        message = msgspec.json.decode(text, type=Message)
    except msgspec.DecodeError as error:
        raise UserError(f"this is no message in JSON: {error}; nothing was changed") from None
    if message.role != "assistant" or not (message.content or message.tool_calls):
        raise UserError("an answer is an assistant's message that says or calls something")
    for call in message.tool_calls or []:
        function = call.get("function")
        if not isinstance(function, dict) or not {"name", "arguments"} <= set(function):
            raise UserError('each of tool_calls needs "function": {"name": ..., "arguments": ...}')
    return message


def editable(moment: Moment) -> str:
    """What a person finds in the editor: the proposed answer, else what was said, to be mended."""
    start = moment.answer or moment.original
    if start is None:
        return ""
    if start.tool_calls:
        return msgspec.json.format(msgspec.json.encode(start), indent=2).decode() + "\n"
    return start.content + "\n"
