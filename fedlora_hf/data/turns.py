"""Chats: lists of turns in the spellings that people publish, read into one; and our own wording of them.

Read are turns of role and content (OpenAI's form) and of from and value (ShareGPT's; human, gpt), a content that is a
list of text parts, and assistant turns that call tools and say nothing. Other keys of a turn are kept for the chat
template that may know them.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import json
from typing import Any

from fedlora_hf.data.values import as_text, is_missing
from fedlora_hf.errors import DataError, one_line

Turn = dict[str, Any]
_ROLES = {
    **dict.fromkeys(("human", "prompter", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call", "assistant"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "tool"), "tool"),
}
_NAMES = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def is_turns(value: object) -> bool:
    """Whether a value is a list of turns."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def read_turns(value: object, where: str) -> list[Turn]:
    """The turns of `value`, each with "role" and "content" (a text), nothing in them missing.

    where: names record and column. Raises DataError for what is not a list of turns, and for parts that are no text.
    """
    if not is_turns(value):
        raise DataError(
            f"{where}: {one_line(value, 60)!r} must be a list of turns with role and content (or from and value); "
            "correct or remove the record"
        )
    return [_turn(turn, where) for turn in value]  # type: ignore[attr-defined]


def last_answer(turns: list[Turn], where: str) -> list[Turn]:
    """The turns up to the last of the assistant's, which must answer something; what follows it is dropped."""
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise DataError(
            f"{where}: must be a list of turns with role and content, one of them the assistant's after another's; "
            "correct or remove the record"
        )
    return turns[: last + 1]


def plain_chat(turns: list[Turn]) -> tuple[str, str]:
    """(prompt, completion) in our own wording: every turn but the last under who speaks, and the last, bare."""
    before = [f"{_NAMES.get(turn['role'], turn['role'])}:\n{said(turn).strip()}" for turn in turns[:-1]]
    return "\n\n".join([*before, "Assistant:\n"]), said(turns[-1])


def said(turn: Turn) -> str:
    """What a turn says: its content, and the tools it calls as one line of JSON each."""
    calls = [call.get("function", call) for call in turn.get("tool_calls", [])]
    lines = [json.dumps({k: c[k] for k in ("name", "arguments") if k in c}, ensure_ascii=False) for c in calls]
    return "\n".join([turn["content"], *lines] if turn["content"] else lines) if lines else str(turn["content"])


def _turn(turn: Turn, where: str) -> Turn:
    given = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = given if isinstance(given, str) else None
    if not role:
        raise DataError(f"{where}: a turn has no role; every turn needs one, complete or remove the record")
    key = next((name for name in ("content", "value", "text") if not is_missing(turn.get(name))), None)
    kept = {k: _without_none(v) for k, v in turn.items() if k not in ("role", "from", key) and v is not None}
    calls = kept.pop("tool_calls", None)
    content = _content(turn[key], where) if key else ""
    if calls:
        kept["tool_calls"] = [_call(call, where) for call in calls]
    elif key is None:
        raise DataError(f"{where}: a turn of {role} has no content; complete or remove the record")
    return {"role": _ROLES.get(role, role), "content": content, **kept}


def _content(value: object, where: str) -> str:
    """A text, or the texts of its parts one after the other."""
    parts = value if isinstance(value, list | tuple) else [value]
    try:
        texts = [as_text(part.get("text") if isinstance(part, dict) else part) for part in parts]
    except TypeError:
        texts = [None]
    if None in texts:
        kinds = sorted({str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in parts})
        raise DataError(f"{where}: content of kind {', '.join(kinds)}; only text can be learnt, remove the other parts")
    return "".join(text for text in texts if text)


def _call(call: object, where: str) -> dict[str, Any]:
    """A tool call as chat templates expect it: the arguments an object, where OpenAI's form has them as JSON text."""
    if not isinstance(call, dict):
        raise DataError(f"{where}: tool_calls must be a list of objects; correct or remove the record")
    kept = dict(_without_none(call))
    inner = kept.get("function", kept)
    if not isinstance(inner, dict) or "name" not in inner:
        raise DataError(f"{where}: a tool call has no name; it needs function.name, correct or remove the record")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
        inner = {**inner, "arguments": arguments}
    return {**kept, "function": inner} if "function" in kept else inner


def _without_none(value: Any) -> Any:
    """Columns in Arrow give every object the keys of all: what is None was not there."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
