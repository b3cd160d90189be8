"""An answer that was given after a complaint, as it could have stood in the first place."""

from __future__ import annotations

import re

from apollo_curation.moments.signals.evidence import likeness

MIN_LIKENESS = 0.5  # to the first answer: from here on the rest replaces it as a whole
MAX_LAST_CHARS = 300  # of a last sentence of excuses

_FIRST = re.compile(r"\s*(.*?(?:[.!?…:](?=\s|$)|\n|$))", re.DOTALL)
_LAST = re.compile(r"(?<=[.!?…])\s+([^.!?…\n]+[.!?…]*)$")
_CLAUSES = re.compile(r"\s*(?:[,;:.!?…]+|\s[-–—]\s)\s*")  # noqa: RUF001
# A clause that speaks only to the complaint. Whole clauses, in lower case.
_LEAD = re.compile(
    r"(?:(?:ah|oh|oops|whoops|of course|yes|indeed|right|sure|certainly|absolutely|understood|got it|"
    r"i see|okay|"
    r"ok|in that case|no problem|happy to help)"
    r"|(?:i'm |i am )?(?:so |very |really |terribly )?sorry(?: (?:about|for) .*)?"
    r"|(?:my|all my) (?:mistake|apologies|bad|error|fault|oversight)"
    r"|(?:my |please accept my )?apologies(?: for .*)?|i (?:do )?apologi[sz]e(?: for .*)?"
    r"|you(?:'re| are) (?:\w+ )?(?:right|correct)(?: about .*| that .*)?"
    r"|(?:good|nice|great) (?:catch|point|spot)|well spotted|fair (?:enough|point)"
    r"|thank(?:s| you)(?: (?:so much|for .*))?"
    r"|that was (?:my|a|an) (?:mistake|error|slip|oversight)"
    r"|i (?:misread|misunderstood|miscounted|miscalculated|mixed|confused|overlooked|forgot|missed|"
    r"was wrong|got "
    r"that wrong|made a mistake|swapped)\b.*"
    r"|(?:here(?:'s| is)|this is) (?:the|a|my) (?:corrected|fixed|revised|updated|right|proper) .*"
    r"|entschuldigung|entschuldige|verzeihung|stimmt|(?:es )?tut mir leid|oh nein|ach ja|natürlich|gern|klar"
    r"|(?:du hast|sie haben|da hast du|da haben sie) (?:\w+ )?recht"
    r"|(?:da|das) habe ich (?:mich )?(?:vertan|verwechselt|übersehen|falsch .*)|mein fehler"
    r"|danke(?: für .*)?)"
)
# What only makes sense to someone who has heard the complaint.
_LOOKS_BACK = re.compile(
    r"\b(?:as you (?:said|say|noted|mentioned|pointed)|you (?:said|mentioned|wanted|asked)|earlier|"
    r"previous(?:ly)?|"
    r"corrected|again|this time|my (?:first|last|previous) (?:answer|version|reply)|instead of my|"
    r"apologi[sz]e|apologies|i was wrong|my mistake|"
    r"wie (?:du|sie) (?:sagst|sagen|gesagt)|vorhin|diesmal|korrigiert\w*|entschuldigung)\b"
)


def standing_alone(text: str, original: str | None = None) -> str | None:
    """`text` without the sentences that only speak to a complaint; None where what would be left may not be a
    whole answer to what was asked before it.

    A first sentence of both ("You're right, it is X. Y.") is left away only where the rest is much like
    `original`, so that it takes its place as a whole; else nobody can say by rule where the answer is.
    """
    rest = _without_last(text.strip())
    while rest:
        first = _FIRST.match(rest)
        assert first is not None
        clauses = [clause for clause in _CLAUSES.split(_lower(first[1])) if clause]
        leads = [_LEAD.fullmatch(clause) is not None for clause in clauses]
        if not any(leads) or not _is_lead(clauses[0]):
            break
        if all(leads):
            rest = rest[first.end() :].lstrip()
            continue
        after = rest[first.end() :].lstrip()
        if original is None or likeness(after, original) < MIN_LIKENESS:
            return None
        rest = after
    if not rest or _LOOKS_BACK.search(_lower(rest)):
        return None
    return rest


def _is_lead(clause: str) -> bool:
    return _LEAD.fullmatch(clause) is not None


def _lower(text: str) -> str:
    return text.replace("’", "'").lower()  # noqa: RUF001


def _without_last(text: str) -> str:
    """Without a last sentence of excuses or thanks."""
    start = max(0, len(text) - MAX_LAST_CHARS)
    found = _LAST.search(text, start)
    if found and all(_is_lead(clause) for clause in _CLAUSES.split(_lower(found[1])) if clause):
        return text[: found.start()]
    return text
