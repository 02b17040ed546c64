"""Instruction schemas: which columns make a prompt and its accepted answers, and how our own wording puts them.

Prompts end with a line break, so that in the usual tokenizers no token holds the end of a prompt and the start of an
answer:

    Instruction:                    Instruction:                    User:
    <instruction or question>       <task definition>               <what was said>

    Context:                        Input:                          Assistant:
    <context, if any>               <input>                         <the answer that completes it>

    Answer:                         Answer:
    <answer>                        <answer>

Of a chat, the last assistant turn is the completion and all before it the prompt, under System, User, Assistant and
Tool. A `prompt` of text is used as it is. With a chat template, an instruction schema is one user turn: the
instruction and what it speaks of, with a blank line between.
"""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedlora_hf.data.turns import Turn, is_turns, last_answer, plain_chat, read_turns
from fedlora_hf.data.values import Row
from fedlora_hf.errors import DataError, one_line


class Said(NamedTuple):
    """What a record says. chat: the same as turns ({"messages", "tools"}), where it is a chat or can be put as one."""

    prompt: str
    answers: list[str]
    chat: dict[str, Any] | None = None


@dataclass(frozen=True)
class Schema:
    """A recognised set of columns: those it needs, those it also reads, and how a record becomes what it says.

    is_chat: its records are chats already, and are worded by a chat template wherever there is one.
    """

    name: str
    needs: tuple[str, ...]
    convert: Callable[[Row], Said]
    reads: tuple[str, ...] = ()
    is_chat: bool = False


def render_prompt(instruction: str, extra: str = "", heading: str = "Context") -> str:
    """The prompt of an instruction and, where `extra` is not blank, what it speaks of, under `heading`."""
    return _render(instruction, [(heading, extra)])


def choose_schema(columns: Sequence[str], text_column: str | None = None, label_column: str | None = None) -> Schema:
    """The schema of these columns: the two named ones where some are named, else the first recognised one."""
    if text_column is not None or label_column is not None:
        prompt = choose_column(text_column, ("prompt",), columns, "text_column")
        completion = choose_column(label_column, ("completion",), columns, "label_column")
        return _named(prompt, completion)
    for schema in SCHEMAS:
        if set(schema.needs) <= set(columns):
            return schema
    known = "; ".join(f"{' + '.join(schema.needs)} ({schema.name})" for schema in SCHEMAS)
    raise DataError(
        f"columns {', '.join(columns)}: not a recognised set, which are {known}; rename the columns, or name the "
        "prompt with text_column and the completion with label_column"
    )


def choose_column(wanted: str | None, defaults: tuple[str, ...], columns: Sequence[str], option: str) -> str:
    """The column to use: the one asked for, or the first default that is there."""
    found = next((name for name in ([wanted] if wanted is not None else defaults) if name in columns), None)
    if found is None:
        raise DataError(
            f"columns {', '.join(columns)}: must have {' or '.join([wanted] if wanted is not None else defaults)}; "
            f"name the column to use with {option}"
        )
    return found


def _render(instruction: str, extras: Sequence[tuple[str, str]]) -> str:
    sections = [f"{heading}:\n{extra.strip()}" for heading, extra in extras if extra.strip()]
    return "\n\n".join([f"Instruction:\n{instruction.strip()}", *sections, "Answer:\n"])


def _instruction(name: str, instruction: str, answer: str, *extras: str) -> Schema:
    """extras: columns of what the instruction speaks of, in the order of the prompt."""

    def convert(row: Row) -> Said:
        asked = row.text(instruction)
        further = [(_heading(column), row.get(column) or "") for column in extras]
        answers = _with_references(row.answers(answer), row, {answer})
        user = "\n\n".join(text.strip() for text in (asked, *(extra for _, extra in further)) if text.strip())
        return Said(_render(asked, further), answers, _one_question(user, answers[0]))

    return Schema(name, (instruction, answer), convert, (*extras, "references"))


def _heading(column: str) -> str:
    return "Input" if column in ("input", "inputs") else "Context"


def _one_question(user: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def _with_references(answers: list[str], row: Row, used: set[str]) -> list[str]:
    """The answers and, after them, what else a column `references` accepts."""
    further = [] if "references" in used else row.answers("references", optional=True)
    return answers + [text for text in further if text not in answers]


def _task_instance(row: Row) -> Said:
    asked, extra, answers = row.text("definition"), row.text("inputs"), row.answers("targets")
    user = "\n\n".join(text.strip() for text in (asked, extra) if text.strip())
    return Said(_render(asked, [("Input", extra)]), answers, _one_question(user, answers[0]))


def _prompt_and_completion(row: Row) -> Said:
    """Text as it is; of lists of turns, the chat that they make together."""
    given = row.record.get("chat")
    kept = json.loads(given) if isinstance(given, str) and given.startswith("{") else None
    if not is_turns(row.record.get("prompt")) and not is_turns(row.record.get("completion")):
        return Said(row.text("prompt"), _with_references(row.answers("completion"), row, set()), kept)
    where = f"record {row.number}, prompt and completion"
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.record.get(column)
        turns += read_turns(value if is_turns(value) else [{"role": role, "content": row.text(column)}], where)
    return _chat_of(turns, row, where)


def _chat(column: str) -> Callable[[Row], Said]:
    def convert(row: Row) -> Said:
        where = f"record {row.number}, column {column!r}"
        return _chat_of(read_turns(row.record.get(column), where), row, where)

    return convert


def _chat_of(turns: list[Turn], row: Row, where: str) -> Said:
    turns = last_answer(turns, where)
    prompt, completion = plain_chat(turns)
    tools = _tools(row, where)
    answers = _with_references([completion], row, set())
    return Said(prompt, answers, {"messages": turns, **({"tools": tools} if tools else {})})


def _tools(row: Row, where: str) -> list[Any]:
    """The tools of a chat, as objects or as JSON text (in which Arrow keeps their shapes apart)."""
    tools = row.record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError:
        tools = "?"
    if tools and not isinstance(tools, list):
        raise DataError(f"{where}: tools {one_line(row.record['tools'], 40)!r} must be a list; correct the record")
    return list(tools or [])


def _named(prompt: str, completion: str) -> Schema:
    def convert(row: Row) -> Said:
        return Said(row.text(prompt), _with_references(row.answers(completion), row, {prompt, completion}))

    return Schema(f"{prompt} and {completion}", (prompt, completion), convert, ("references",))


SCHEMAS = (
    Schema("Natural Instructions", ("definition", "inputs", "targets"), _task_instance),
    _instruction("Dolly", "instruction", "response", "context", "input"),
    _instruction("Alpaca", "instruction", "output", "context", "input"),
    Schema(
        "prompt and completion",
        ("prompt", "completion"),
        _prompt_and_completion,
        ("references", "tools", "chat"),
        is_chat=True,
    ),
    _instruction("question and answer", "question", "answer", "context"),
    Schema("chat", ("messages",), _chat("messages"), ("tools", "references"), is_chat=True),
    Schema("chat", ("conversations",), _chat("conversations"), ("tools", "references"), is_chat=True),
)
