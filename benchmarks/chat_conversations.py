"""Conversations of every kind that a client sends, as bodies of one example."""

from __future__ import annotations

from typing import Any


def _user(text: Any = "How far is it to the moon?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: Any = "About 384,400 km.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _system(text: str = "You are brief.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def _call(
    name: str = "distance", arguments: Any = '{"to": "the moon", "unit": "km"}', number: int = 1
) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def _result(text: str = "384400", number: int = 1, name: str = "distance") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05d}", "name": name}


TOOLS = [
    {
        "function": {
            "parameters": {
                "type": "object",
                "properties": {"to": {"type": "string"}, "unit": {"type": "string"}},
                "required": ["to"],
            },
            "name": "distance",
            "description": "Distance from Earth",
        },
        "type": "function",
    },
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
_THOUGHT = "The mean distance is asked for."
_AS_SERVED = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
_NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "question": {"messages": [_user(), _answer()]},
    "system": {"messages": [_system(), _user(), _answer()]},
    "two turns": {"messages": [_user(), _answer(), _user("And the sun?"), _answer("149.6 million km.")]},
    "three turns, system": {
        "messages": [
            _system(),
            _user(),
            _answer(),
            _user("Sun?"),
            _answer("Far."),
            _user("Mars?"),
            _answer("Farther."),
        ]
    },
    "last turn only": {
        "messages": [_user(), _answer(weight=0), _user("And the sun?"), _answer("149.6 million km.")]
    },
    "first turn only": {"messages": [_user(), _answer(), _user("And?"), _answer("No.", weight=0)]},
    "spaces around": {"messages": [_user("  hm \n"), _answer("\n  yes, here  \n")]},
    "newline first": {"messages": [_user(), _answer("\n\nyes")]},
    "empty answer": {"messages": [_user(), _answer("")]},
    "unicode": {"messages": [_user("Grüße, 世界 🌍"), _answer("e\u0301 ist nicht é; 好的 🙂")]},
    "markup": {"messages": [_user("<b>bold</b> & {{ x }}"), _answer("<tag>{% raw %} & </tag>")]},
    "digits": {"messages": [_user("2+2?"), _answer("4"), _user("2+3?"), _answer("5")]},
    "parts": {
        "messages": [
            _user([{"type": "text", "text": "How far"}, {"type": "text", "text": "is it?"}]),
            _answer([{"type": "text", "text": "About"}, {"type": "text", "text": "384,400 km."}]),
        ]
    },
    "as served": {"messages": [_user(), _answer(**_AS_SERVED)]},
    "thought": {"messages": [_user(), _answer(reasoning=_THOUGHT)]},
    "thought, earlier name": {"messages": [_user(), _answer(reasoning_content=_THOUGHT)]},
    "thoughts of two turns": {
        "messages": [
            _user(),
            _answer(reasoning=_THOUGHT),
            _user("And the sun?"),
            _answer("149.6 million km.", reasoning="One astronomical unit."),
        ]
    },
    "thought in the text": {
        "messages": [_user(), _answer(f"<think>\n{_THOUGHT}\n</think>\n\nAbout 384,400 km.")]
    },
    "thinking off": {"messages": [_user(), _answer()], **_NO_THINKING},
    "thinking off, two turns": {
        "messages": [_user(), _answer(), _user("And the sun?"), _answer("149.6 million km.")],
        **_NO_THINKING,
    },
    "a role of its own": {
        "messages": [_user(), {"role": "robot", "content": "Range finder ready."}, _answer()]
    },
    "developer": {"messages": [{"role": "developer", "content": "You are brief."}, _user(), _answer()]},
    "developer later": {
        "messages": [
            _system(),
            _user(),
            _answer(),
            {"role": "developer", "content": "Longer."},
            _user("Sun?"),
            _answer("Far."),
        ]
    },
    "call": {"messages": [_user(), _answer(None, tool_calls=[_call()])], "tools": TOOLS},
    "call as served": {
        "messages": [_user(), _answer(None, tool_calls=[_call()], **_AS_SERVED)],
        "tools": TOOLS,
    },
    "call and result": {
        "messages": [_user(), _answer(None, tool_calls=[_call()]), _result(), _answer()],
        "tools": TOOLS,
    },
    "text beside a call": {
        "messages": [_user(), _answer("Let me look.", tool_calls=[_call()])],
        "tools": TOOLS,
    },
    "two calls": {
        "messages": [_user(), _answer(None, tool_calls=[_call(), _call("time", "{}", 2)])],
        "tools": TOOLS,
    },
    "two equal calls": {
        "messages": [_user(), _answer(None, tool_calls=[_call(), _call(number=2)])],
        "tools": TOOLS,
    },
    "thought and call": {
        "messages": [
            _user(),
            _answer(None, reasoning=_THOUGHT, tool_calls=[_call()]),
            _result(),
            _answer(reasoning="So."),
        ],
        "tools": TOOLS,
    },
    "tools unused": {"messages": [_user(), _answer()], "tools": TOOLS},
    "no tools": {"messages": [_user(), _answer()], "tools": []},
    "empty calls": {"messages": [_user(), _answer(tool_calls=[])]},
}
