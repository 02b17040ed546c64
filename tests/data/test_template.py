"""Chats in a template's words: what is learnt is the assistant's, by its marks or by prefixes, to the character."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import chat_templates as chats
import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.template import Template
from fedlora_hf.data.tokenize import IGNORED, question_ids, tokenize_examples
from fedlora_hf.data.wording import Wording, choose_wording, is_tuned, own_form, save_tokenizer
from fedlora_hf.errors import ConfigError, DataError


def row(tokenizer: Any, turns: list[dict[str, Any]], all_turns: bool = False, **more: Any) -> dict[str, list[int]]:
    examples = load_examples(datasets.Dataset.from_list([{"messages": turns, **more.pop("columns", {})}]))
    wording = choose_wording(tokenizer, "auto", all_turns=all_turns)
    return dict(tokenize_examples(examples, tokenizer, max_length=more.get("max_length", 500), wording=wording)[0])


def learned(tokenizer: Any, found: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in found["labels"] if label != IGNORED]))


@pytest.mark.parametrize("template", [chats.PLAIN, chats.MARKED, chats.THINKING], ids=["plain", "marked", "thinking"])
@pytest.mark.parametrize("turns", chats.ODD_CHATS)
def test_ids_are_the_templates_and_the_last_answer_is_learnt(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], template: str
) -> None:
    chat = chats.with_template(tokenizer, template)
    found = row(chat, turns)
    assert found["input_ids"] == chat.apply_chat_template(turns, return_dict=False)
    thought = "<think></think>" if template is chats.THINKING else ""
    after = "" if template is chats.MARKED else "\n"
    assert learned(chat, found) == f"{thought}{turns[-1]['content']}<eos>{after}"


@pytest.mark.parametrize("template", [chats.PLAIN, chats.MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("turns", chats.ODD_CHATS)
def test_every_answer_is_learnt_when_asked(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], template: str
) -> None:
    chat = chats.with_template(tokenizer, template)
    found = row(chat, turns, all_turns=True)
    after = "" if template is chats.MARKED else "\n"
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert learned(chat, found) == "".join(f"{text}<eos>{after}" for text in answers)
    assert found["input_ids"] == chat.apply_chat_template(turns, return_dict=False)


def test_marks_are_those_that_transformers_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.MARKED)
    for turns in chats.ODD_CHATS:
        made = chat.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        found = row(chat, turns, all_turns=True)
        assert [label != IGNORED for label in found["labels"]] == [bool(mark) for mark in made["assistant_masks"]]


def test_earlier_answers_are_found_where_a_template_words_them_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.THINKING)
    assert (
        learned(chat, row(chat, chats.turns("a", "b", "c", "d"), all_turns=True)) == "b<eos>\n<think></think>d<eos>\n"
    )


def test_a_template_that_leaves_turns_open_gets_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.OPEN)
    assert learned(chat, row(chat, chats.turns("Hello", "Hi."))) == "Hi.<eos>"
    assert not Template(chat, Wording(chats.OPEN)).closes
    assert Template(chat, Wording(chats.PLAIN)).closes


def test_tools_and_their_calls_are_worded_by_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.TOOLS)
    call = {"type": "function", "function": {"name": "find", "arguments": '{"q": "bus"}'}}
    turns = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = json.dumps([{"type": "function", "function": {"name": "find"}}])
    found = row(chat, turns, columns={"tools": tools})
    assert learned(chat, found) == '<call>{"name": "find", "arguments": {"q": "bus"}}</call><eos>\n'
    assert chat.decode(found["input_ids"]).startswith('<|tools|>[{"type": "function"')


def test_a_chat_that_is_too_long_loses_its_start(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    turns = chats.turns("one two three four five six", "seven", "eight nine", "ten eleven")
    whole = row(chat, turns)
    for length in range(8, len(whole["input_ids"]) + 1, 5):
        found = row(chat, turns, max_length=length)
        assert len(found["input_ids"]) == len(found["labels"]) == length
        kept = [label for label in found["labels"] if label != IGNORED]
        assert kept
        assert kept == [label for label in whole["labels"] if label != IGNORED][: len(kept)]
        assert found["labels"][0] == IGNORED


def test_what_is_asked_is_what_stands_before_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    wording = choose_wording(chat, "auto")
    examples = load_examples(datasets.Dataset.from_list([{"messages": turns} for turns in chats.ODD_CHATS]))
    rows = tokenize_examples(examples, chat, max_length=500, wording=wording)
    for ids, found in zip(question_ids(examples, chat, max_length=500, wording=wording), rows, strict=True):
        assert found["input_ids"][: len(ids)] == ids
        assert set(found["labels"][: len(ids)]) == {IGNORED}
        assert found["labels"][len(ids)] != IGNORED


def test_tokenizers_without_offsets_cut_at_the_answers(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    turns = chats.turns("a b", "c d", "e", "f")
    together = row(chat, turns, all_turns=True)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    apart = row(chat, turns, all_turns=True)
    assert chat.decode(apart["input_ids"]) == chat.decode(together["input_ids"])
    assert learned(chat, apart) == learned(chat, together)


def test_a_chat_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chats.with_template(tokenizer, chats.STRICT)
    with pytest.raises(DataError, match=r"example 1: the chat template refuses a chat of system, user.*user first"):
        row(chat, chats.turns("S:Be brief.", "a", "b"))


def test_which_wording_is_chosen(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    file = tmp_path / "mine.jinja"
    file.write_text(chats.MARKED)
    assert choose_wording(tokenizer, "auto") == Wording()
    assert choose_wording(chat, "none") == Wording()
    assert choose_wording(chat, "auto", base="org/Base-7B") == Wording(chats.PLAIN, "tokenizer")
    assert choose_wording(chat, "auto", base="org/Base-7B-Instruct").instructions
    assert choose_wording(tokenizer, str(file)) == Wording(chats.MARKED, "mine.jinja", True)
    file.write_text("{% for m in %}")
    for bad in (str(file), str(tmp_path / "absent")):
        with pytest.raises(ConfigError, match="must be auto, none, or a file with a Jinja chat template"):
            choose_wording(tokenizer, bad)
    with pytest.raises(ConfigError, match="assistant_only_loss: the loss on every assistant turn needs"):
        choose_wording(tokenizer, "auto", all_turns=True)


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("org/SmolLM2-135M-Instruct", True),
        ("org/gemma-2b-it", True),
        ("org/Llama-2-7b-chat-hf", True),
        ("org/exploit-2b", False),
        ("org/base-7m", False),
        (None, False),
    ],
)
def test_a_name_says_instruct(name: str | None, tuned: bool) -> None:
    assert is_tuned(name) is tuned


def test_a_card_says_instruct(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert not is_tuned(str(base))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Small model, Instruct version\n")
    assert is_tuned(str(base))


def test_the_template_is_kept_with_the_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, Wording(chats.PLAIN, "mine.jinja", True), tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == chats.PLAIN
    assert tokenizer.chat_template is None
    facts = Wording(chats.PLAIN, "mine.jinja", True).facts()
    assert facts["chat_template"] == "mine.jinja"
    assert len(facts["chat_template_sha256"]) == 64


def test_our_own_form_tells_nobodys_data() -> None:
    made = load_examples(datasets.Dataset.from_list([{"question": "Secret?", "answer": "x"}]))
    assert own_form(made[0]["prompt"]) == "Instruction:\n...\n\nAnswer:\n"
    assert own_form("Secret: ") == "..."
