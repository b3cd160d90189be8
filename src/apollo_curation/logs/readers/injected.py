"""What programs put into the user's mouth, where the format does not mark it: agents' own notes, and results.

Reminders and the like within a message are taken out by rules of `curation.strip`; here stands what changes
who has spoken.
"""

from __future__ import annotations

import re

# Whole messages, by how they begin.
_NOTES = re.compile(
    r"\s*(?:<(?P<tag>command-name|command-message|local-command-stdout|local-command-stderr|local-command-caveat|"
    r"bash-input|bash-stdout|bash-stderr|task-notification|user-prompt-submit-hook|environment_context|"
    r"user_instructions|turn_aborted|user_shell_command|permissions instructions|collaboration_mode|skill|"
    r"teammate-message)\b|"
    r"(?P<hook>(?:Stop|Pre|Post|User|Sub)\w* ?hook (?:feedback|blocking error|additional context)|"
    r"\w+:\w* hook |\w+ hook feedback:)|"
    r"(?P<interruption>\[Request interrupted by user)|"
    r"(?P<summary>This session is being continued from a previous conversation|"
    r"Another language model started to solve this problem)|"
    r"(?P<caveat>Caveat: The messages below were generated)|"
    r"(?P<instructions># AGENTS\.md instructions for ))"
)
# What follows an agent's command in its programs' own words.
_OBSERVATION = re.compile(
    r"\s*(?:OBSERVATION:|Observation:|<returncode>|<output>|<observation>|EXECUTION RESULT of \[|"
    r"Your command ran successfully and did not produce any output)"
)
_FENCED = re.compile(r"```(?:bash|sh|shell|mswea_bash_command)?[^\S\n]*\n(.*?)\n?```", re.DOTALL)


def note_of(text: str) -> str | None:
    """The name of what a program said in the user's place, None where the user speaks himself."""
    found = _NOTES.match(text)
    if found is None:
        return None
    return found["tag"] or next(name for name, value in found.groupdict().items() if value)


def is_observation(text: str) -> bool:
    return _OBSERVATION.match(text) is not None


def without_head(text: str) -> str:
    """An observation without the word that it begins with."""
    return re.sub(r"\A\s*(?:OBSERVATION|Observation):\s?", "", text)


def command_in(text: str) -> tuple[str, str] | None:
    """What an agent says, and the command that it gives in a fenced block at its end; None without one."""
    found = list(_FENCED.finditer(text))
    if not found:
        return None
    last = found[-1]
    return (text[: last.start()] + text[last.end() :]).strip(), last[1]
