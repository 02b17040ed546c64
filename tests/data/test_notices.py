"""What a run would do to the training data without a word is said: empty answers, examples cut at max_length."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import datasets
import models
import pytest

from fedlora_hf import FederatedConfig
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.notices import empty_answers, notice
from fedlora_hf.data.prepare import ClientData, prepare_client
from fedlora_hf.util import say

LONG = " ".join(["word"] * 50)


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(say, "_SAID", set())


def client(answers: list[str], folder: Path, **changes: object) -> tuple[FederatedConfig, ClientData]:
    args = FederatedConfig(**models.options(folder, max_length=24, **changes))
    rows = [{"prompt": f"say {number}", "completion": answer} for number, answer in enumerate(answers)]
    return args, prepare_client("ada", datasets.Dataset.from_list(rows), models.tiny_tokenizer(), args)


def test_answers_of_white_space_are_counted() -> None:
    rows = [{"prompt": "p", "completion": text} for text in ("", " \n\t", "yes", "0")]
    assert empty_answers(load_examples(datasets.Dataset.from_list(rows))) == 2
    assert empty_answers(datasets.Dataset.from_list([{"input_ids": [1], "labels": [1]}])) == 0


def test_what_is_empty_and_what_is_cut_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args, data = client(["yes", "", LONG, LONG], tmp_path)
    assert max(data.train.lengths) == 24
    for _ in range(2):
        notice(args, [data, data])
    assert caplog.messages == [
        "2 of 8 training answers are empty: there the model learns to say nothing",
        "4 of 8 training examples fill max_length=24 tokens: a longer one loses the start of its prompt, then the end "
        "of its answer",
    ]


def test_nothing_is_said_of_whole_examples_and_of_packed_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notice(*_listed(client(["yes", "no"], tmp_path)))
    notice(*_listed(client(["yes", LONG], tmp_path, packing=True)))
    assert caplog.messages == []


def _listed(found: tuple[FederatedConfig, ClientData]) -> tuple[FederatedConfig, list[ClientData]]:
    return found[0], [found[1]]
