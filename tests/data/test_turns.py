"""Chats in every published spelling become one list of turns; odd ones are refused in one line."""
# SPDX-License-Identifier: Apache-2.0

import json
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.turns import last_answer, plain_chat, read_turns
from fedlora_hf.errors import DataError

CALL = {"type": "function", "function": {"name": "find", "arguments": '{"q": "bus"}'}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def example(record: dict[str, Any], **options: Any) -> dict[str, Any]:
    return dict(load_examples(datasets.Dataset.from_list([record]), **options)[0])


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    "turns",
    [
        [turn("user", "Name a tree."), turn("assistant", "An oak.")],
        [{"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": "An oak."}],
        [{"from": "user", "value": "Name a tree."}, {"from": "assistant", "value": "An oak."}],
        [
            turn("user", [{"type": "text", "text": "Name "}, {"type": "text", "text": "a tree."}]),
            turn("assistant", [{"type": "text", "text": "An oak."}]),
        ],
    ],
    ids=["openai", "sharegpt", "from user", "parts"],
)
def test_every_spelling_is_the_same_chat(column: str, turns: list[dict[str, Any]]) -> None:
    made = example({column: turns})
    assert made["prompt"] == "User:\nName a tree.\n\nAssistant:\n"
    assert made["completion"] == "An oak."
    assert json.loads(made["chat"]) == {"messages": [turn("user", "Name a tree."), turn("assistant", "An oak.")]}


def test_conversational_prompt_and_completion_are_one_chat() -> None:
    said = {"prompt": [turn("system", "S"), turn("user", "u")], "completion": [turn("assistant", "a")]}
    made = example(said)
    assert (made["prompt"], made["completion"]) == ("System:\nS\n\nUser:\nu\n\nAssistant:\n", "a")
    assert len(json.loads(made["chat"])["messages"]) == 3


def test_a_call_of_a_tool_is_an_answer() -> None:
    asked = [turn("user", "When is the bus?"), turn("assistant", None, tool_calls=[CALL])]
    answered = [*asked, turn("tool", "12:10"), turn("assistant", "At 12:10.")]
    line = '{"name": "find", "arguments": {"q": "bus"}}'
    assert plain_chat(read_turns(asked, "x"))[1] == line
    prompt, completion = plain_chat(read_turns(answered, "x"))
    assert prompt == f"User:\nWhen is the bus?\n\nAssistant:\n{line}\n\nTool:\n12:10\n\nAssistant:\n"
    assert completion == "At 12:10."
    # A template is given the arguments as an object, and no content that is not there.
    assert read_turns(asked, "x")[1]["tool_calls"][0]["function"]["arguments"] == {"q": "bus"}


def test_keys_that_arrow_fills_in_are_not_there() -> None:
    rows = [
        {"messages": [turn("user", "a", name="Ann"), turn("assistant", "b")]},
        {"messages": [turn("user", "c"), turn("assistant", "d", tool_calls=None)]},
    ]
    made = load_examples(datasets.Dataset.from_list(rows))
    assert json.loads(made[0]["chat"])["messages"][0] == turn("user", "a", name="Ann")
    assert json.loads(made[1]["chat"])["messages"] == [turn("user", "c"), turn("assistant", "d")]


def test_instructions_are_turns_where_a_template_may_word_them() -> None:
    record = {"instruction": "Do it. ", "context": "A thing.", "response": "Done."}
    assert "chat" not in example(record)
    asked = json.loads(example(record, turns=True)["chat"])["messages"]
    assert asked == [turn("user", "Do it.\n\nA thing."), turn("assistant", "Done.")]


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        ([turn("user", "a")], "must be a list of turns"),
        ([turn("assistant", "a")], "must be a list of turns"),
        ("a chat", "must be a list of turns"),
        ([turn("user", None), turn("assistant", "a")], "a turn of user has no content"),
        ([turn("user", [{"type": "image", "url": "x"}]), turn("assistant", ["a"])], "content of kind image; only text"),
        ([turn("user", "a"), turn("assistant", None, tool_calls=[{"function": {}}])], "a tool call has no name"),
    ],
)
def test_odd_chats_are_refused_in_one_line(turns: Any, part: str) -> None:
    with pytest.raises(DataError) as caught:
        plain_chat(last_answer(read_turns(turns, "record 1"), "record 1"))
    assert part in str(caught.value)
    assert "record 1" in str(caught.value)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "from", "content", "value", "text", "tool_calls"]), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(deadline=None, database=None, max_examples=300)
@given(value=json_values)
def test_anything_is_a_chat_or_refused(value: Any) -> None:
    try:
        turns = read_turns(value, "here")
    except DataError:
        return
    assert all(isinstance(one["content"], str) and isinstance(one["role"], str) for one in turns)
    assert plain_chat(turns)[0].endswith("Assistant:\n")
