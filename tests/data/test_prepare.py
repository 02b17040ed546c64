"""What a Python caller may give as one client's data: every schema, paths, streams, splits by any usual name."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import chat_templates as chats
import datasets
import models
import pytest
from transformers import PreTrainedTokenizerFast

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.prepare import ClientData, prepare_client, wording_facts
from fedlora_hf.errors import DataError

QUESTIONS = [{"question": f"Why {n}?", "answer": f"So {n}."} for n in range(6)]


def prepared(data: Any, tokenizer: Any, folder: Path, **changes: Any) -> ClientData:
    return prepare_client("ada", data, tokenizer, FederatedConfig(**models.options(folder, **changes)))


def texts(data: ClientData, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(data.train[place]["input_ids"]) for place in range(len(data.train))]


def test_the_same_examples_from_every_kind_of_source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(QUESTIONS)
    file = tmp_path / "ada.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    dataset.save_to_disk(tmp_path / "saved")
    want = texts(prepared(dataset, tokenizer, tmp_path), tokenizer)
    assert want[0] == "Instruction:\nWhy 0?\n\nAnswer:\nSo 0.<eos>"
    for source in (
        str(file),
        file,
        {"train": file},
        dataset.to_iterable_dataset(),
        datasets.DatasetDict({"train": dataset}),
        datasets.load_from_disk(str(tmp_path / "saved")),
        str(tmp_path / "saved"),
    ):
        assert texts(prepared(source, tokenizer, tmp_path), tokenizer) == want


def test_a_dataset_on_the_disk_is_tokenised_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    datasets.Dataset.from_list(QUESTIONS).save_to_disk(tmp_path / "saved")
    files = []
    for _ in range(2):
        prepared({"train": datasets.load_from_disk(str(tmp_path / "saved"))}, tokenizer, tmp_path)
        files.append(sorted(path.name for path in (tmp_path / "saved").glob("cache-*.arrow")))
    assert len(files[0]) == 2  # worded, and tokenised
    assert files[0] == files[1]


def test_splits_by_their_usual_names_and_a_stream_that_is_bounded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = datasets.Dataset.from_list(QUESTIONS)
    data = prepared({"train": dataset, "dev": dataset.select([0]), "test": dataset}, tokenizer, tmp_path)
    assert data.validation is not None
    assert len(data.validation) == 1
    assert data.questions is not None
    assert len(data.questions) == 4
    assert data.questions[0]["prompt_ids"] == data.train[0]["input_ids"][: len(data.questions[0]["prompt_ids"])]
    stream = dataset.to_iterable_dataset()
    assert len(prepared(stream, tokenizer, tmp_path, max_examples_per_client=3).train) == 3
    assert "a stream; its first 3 records are taken" in caplog.text


def test_chats_are_worded_by_the_tokenizers_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    rows = datasets.Dataset.from_list([{"messages": turns} for turns in chats.ODD_CHATS])
    args = FederatedConfig(**models.options(tmp_path))
    data = prepare_client("ada", rows, chat, args)
    assert texts(data, chat)[0] == "<|user|>\nHello<eos>\n<|assistant|>\nHi.<eos>\n"
    assert wording_facts(args, chat, [data])["chat_template"] == "tokenizer"
    own = prepared(rows, chat, tmp_path, chat_template="none")
    assert texts(own, chat)[0] == "User:\nHello\n\nAssistant:\nHi.<eos>"
    facts = wording_facts(FederatedConfig(**models.options(tmp_path, chat_template="none")), chat, [own])
    assert facts["example"] == "User:\n...\n\nAssistant:\n"


def test_instructions_are_worded_by_the_template_of_a_tuned_base(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    rows = datasets.Dataset.from_list(QUESTIONS)
    tuned = prepared(rows, chat, tmp_path, model_name_or_path="org/Small-Instruct")
    assert texts(tuned, chat)[0] == "<|user|>\nWhy 0?<eos>\n<|assistant|>\nSo 0.<eos>\n"
    base = prepared(rows, chat, tmp_path, model_name_or_path="org/Small")
    assert texts(base, chat)[0] == "Instruction:\nWhy 0?\n\nAnswer:\nSo 0.<eos>"


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}], "record 1 has no 'completion'"),
        ([{"prompt": "a", "completion": {"x": 1}}], "record 1, column 'completion': holds a dict"),
        ([{"title": "a"}], "columns title: not a recognised set"),
    ],
)
def test_what_cannot_be_read_names_client_and_record(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, data: Any, part: str
) -> None:
    with pytest.raises(DataError) as caught:
        prepared(datasets.Dataset.from_list(data), tokenizer, tmp_path)
    assert str(caught.value).startswith("client 'ada': ")
    assert part in str(caught.value)


def test_names_of_classes_need_their_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}])
    args = FederatedConfig(**models.options(tmp_path, task="sequence_classification"))
    data = prepare_client("ada", rows, tokenizer, args, head=["pos", "neg"])
    assert [data.train[place]["labels"] for place in range(2)] == [0, 1]
