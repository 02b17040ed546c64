"""Every recognised schema gives the same columns, with the prompt worded as documented."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import datasets
import pytest

from fedlora_hf.data.formats import load_examples
from fedlora_hf.errors import ConfigError, DataError


def examples(*records: dict[str, object], **options: Any) -> datasets.Dataset:
    return load_examples(datasets.Dataset.from_list(list(records)), **options)


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        (
            {"instruction": "Do it.", "context": "", "response": "Done."},
            "Instruction:\nDo it.\n\nAnswer:\n",
            "Done.",
        ),
        (
            {"instruction": "Do it. ", "context": "A thing.\n", "response": "Done."},
            "Instruction:\nDo it.\n\nContext:\nA thing.\n\nAnswer:\n",
            "Done.",
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Instruction:\nAdd.\n\nInput:\n1 2\n\nAnswer:\n",
            "3",
        ),
        ({"prompt": "one, two,", "completion": " three"}, "one, two,", " three"),
        ({"question": "Why?", "answer": "So."}, "Instruction:\nWhy?\n\nAnswer:\n", "So."),
        (
            {"definition": "Add.", "inputs": "1 2", "targets": "3"},
            "Instruction:\nAdd.\n\nInput:\n1 2\n\nAnswer:\n",
            "3",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hi."},
                    {"role": "user", "content": "Bye"},
                    {"role": "assistant", "content": "Farewell."},
                    {"role": "user", "content": "dropped"},
                ]
            },
            "System:\nBe brief.\n\nUser:\nHello\n\nAssistant:\nHi.\n\nUser:\nBye\n\nAssistant:\n",
            "Farewell.",
        ),
    ],
    ids=["dolly", "dolly with context", "alpaca", "prompt", "question", "natural instructions", "chat"],
)
def test_schema(record: dict[str, object], prompt: str, completion: str) -> None:
    made = examples(record).to_list()
    chat = made[0].pop("chat", None)
    assert made == [{"prompt": prompt, "completion": completion, "references": [completion], "group": ""}]
    assert (chat is not None) == ("messages" in record)


def test_dolly_file(dolly: Path) -> None:
    made = load_examples(dolly)
    assert made.column_names == ["prompt", "completion", "references", "group"]
    assert len(made) == 83
    assert set(made["group"]) == {
        *("open_qa", "closed_qa", "classification", "information_extraction"),
        *("summarization", "brainstorming", "creative_writing", "general_qa"),
    }
    assert made.cache_files == []


def test_task_folder_keeps_all_accepted_answers(tmp_path: Path) -> None:
    (tmp_path / "task9.json").write_text(
        '{"Definition": ["Say yes.", "other"], "Instances": [{"input": "now", "output": ["yes", "yeah"]}]}'
    )
    assert load_examples(tmp_path).to_list() == [
        {
            "prompt": "Instruction:\nSay yes.\n\nInput:\nnow\n\nAnswer:\n",
            "completion": "yes",
            "references": ["yes", "yeah"],
            "group": "task9",
        }
    ]


def test_named_columns_make_a_schema() -> None:
    made = examples({"article": "A", "headline": "B"}, text_column="article", label_column="headline")
    assert made[0]["prompt"] == "A"
    assert made[0]["completion"] == "B"


def test_examples_made_before_stay_as_they_are() -> None:
    record = {"prompt": "a", "completion": "yes", "references": ["yes", "yeah"], "group": "g", "client": "c"}
    assert examples(record).to_list() == [record]
    assert load_examples(examples(record)).to_list() == [record]


def test_named_labels_number_the_classes_and_admit_no_other() -> None:
    options = {"task": "sequence_classification", "labels": ["so so", "bad", "good"]}
    made = examples({"text": "a", "label": "good"}, {"text": "b", "label": "good"}, **options)
    assert made["label"][:] == [2, 2]
    assert made.features["label"].names == options["labels"]
    with pytest.raises(DataError, match=r"'label': holds 'fine', which is none of labels=so so,bad,good; name it"):
        examples({"text": "a", "label": "fine"}, **options)


def test_a_record_may_have_no_group() -> None:
    pair = {"prompt": "a", "completion": "b"}
    assert examples({**pair, "category": "x"}, {**pair, "category": None})["group"][:] == ["x", ""]


def test_client_column_by_name_and_by_default() -> None:
    record = {"prompt": "a", "completion": "b", "client": "x", "hospital": 3}
    assert examples(record)["client"][:] == ["x"]
    assert examples(record, client_column="hospital")["client"][:] == ["3"]
    with pytest.raises(DataError, match=r"must have ward; name the column to use with client_column"):
        examples(record, client_column="ward")


def test_unrecognised_columns_are_listed_with_the_recognised_sets() -> None:
    with pytest.raises(DataError) as caught:
        examples({"title": "a", "body": "b"})
    message = str(caught.value)
    assert message.startswith("columns body, title: not a recognised set")
    assert "instruction + response (Dolly)" in message
    assert "text_column" in message
    assert "\n" not in message


def test_record_without_a_value_is_named() -> None:
    with pytest.raises(DataError, match=r"record 2 has no 'completion'"):
        examples({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None})
    with pytest.raises(DataError, match="must be a list of turns"):
        examples({"messages": [{"role": "user", "content": "Hello"}]})


def test_unknown_task() -> None:
    with pytest.raises(ConfigError, match="task 'translation'"):
        examples({"prompt": "a", "completion": "b"}, task="translation")


def test_classes_of_strings_numbers_and_class_labels() -> None:
    def labels(values: list[object], feature: object = None) -> tuple[list[int], list[str]]:
        made = datasets.Dataset.from_dict({"text": ["t"] * len(values), "label": values})
        if feature is not None:
            made = made.cast_column("label", feature)
        loaded = load_examples(made, task="sequence_classification")
        return loaded["label"][:], loaded.features["label"].names

    assert labels(["no", "yes", "no"]) == ([0, 1, 0], ["no", "yes"])
    assert labels([10, 9, -1]) == ([2, 1, 0], ["-1", "9", "10"])
    assert labels([1, 0], datasets.ClassLabel(names=["yes", "no", "never seen"])) == (
        [1, 0],
        ["yes", "no", "never seen"],
    )


def test_classification_of_dolly_by_category(dolly: Path) -> None:
    made = load_examples(dolly, task="sequence_classification")
    assert made.column_names == ["text", "label", "group"]
    assert made.features["label"].num_classes == 8
    names = made.features["label"].names
    assert [names[label] for label in made["label"]] == made["group"][:]


def test_classification_needs_two_classes_and_a_text() -> None:
    with pytest.raises(DataError, match=r"label column 'label': holds the one class 'a'"):
        examples({"text": "t", "label": "a"}, {"text": "u", "label": "a"}, task="sequence_classification")
    with pytest.raises(DataError, match=r"columns label, sentence: must have text or instruction; .* text_column"):
        examples({"sentence": "t", "label": "a"}, task="sequence_classification")


@pytest.mark.real_data
def test_published_dolly(real_data: Path) -> None:
    made = load_examples(real_data / "dolly" / "databricks-dolly-15k.jsonl")
    assert len(made) == 15_011
    assert len(set(made["group"][:])) == 8
    assert sum("\n\nContext:\n" in prompt for prompt in made["prompt"][:]) >= 4_467


@pytest.mark.real_data
def test_published_natural_instructions(real_data: Path) -> None:
    made = load_examples(real_data / "natural_instructions")
    assert len(made) == 12_000
    assert len(set(made["group"][:])) == 40
    assert max(map(len, made["references"][:])) > 1
    assert all(answers[0] == text for answers, text in zip(made["references"][:], made["completion"][:], strict=True))
