"""One client's data and steps: the splits, the order of batches, the number of steps."""
# SPDX-License-Identifier: Apache-2.0

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora_hf import FederatedConfig
from fedlora_hf.data.prepare import prepare_client
from fedlora_hf.errors import DataError
from fedlora_hf.training.local import local_batches, num_local_steps


def settings(**changes: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "local_steps": None,
        "local_epochs": 1.0,
    }
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("examples", "batch", "accumulation", "epochs", "steps"),
    [(8, 2, 1, 1.0, 4), (7, 2, 1, 1.0, 4), (7, 2, 3, 1.0, 2), (7, 2, 3, 2.0, 4), (7, 2, 3, 1.5, 3), (1, 8, 4, 0.1, 1)],
)
def test_epochs_become_steps(examples: int, batch: int, accumulation: int, epochs: float, steps: int) -> None:
    args = settings(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, local_epochs=epochs)
    assert num_local_steps(args, examples) == steps
    assert num_local_steps(settings(local_steps=17, local_epochs=epochs), examples) == 17


def rows(args: Any, count: int, seed: int, steps: int) -> list[list[list[int]]]:
    """The examples of each micro-batch of each of the first steps."""
    batches = local_batches(list(range(count)), lambda examples: {"rows": examples}, args, seed)
    return [[batch["rows"] for batch in group] for group in islice(batches, steps)]


@given(count=st.integers(1, 12), batch=st.integers(1, 5), accumulation=st.integers(1, 4), seed=st.integers(0, 3))
def test_an_epoch_is_every_example_once(count: int, batch: int, accumulation: int, seed: int) -> None:
    args = settings(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    steps = num_local_steps(args, count)
    for epoch in (0, 1):
        groups = rows(args, count, seed, 2 * steps)[epoch * steps :][:steps]
        assert sorted(row for group in groups for part in group for row in part) == list(range(count))
        assert all(len(group) == accumulation for group in groups[:-1])


def test_order_differs_by_epoch_and_seed_and_by_nothing_else() -> None:
    args = settings(per_device_train_batch_size=12, gradient_accumulation_steps=1)
    first, second = rows(args, 12, 5, 2)
    torch.rand(3)
    assert rows(args, 12, 5, 2) == [first, second]
    assert first != second
    assert rows(args, 12, 6, 1) != [first]
    assert first[0] != list(range(12))


def config(tmp_path: Path, **changes: Any) -> FederatedConfig:
    return FederatedConfig(**models.options(tmp_path, **changes))


def raw(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"prompt": f"How many coins are {n}?\n", "completion": f"{n} coins.", "references": [f"{n} coins.", "some"]}
            for n in range(count)
        ]
    )


def test_splits_are_tokenised_and_some_questions_kept(tmp_path: Path) -> None:
    splits = {"train": raw(5), "validation": raw(2), "test": raw(4)}
    args = config(tmp_path, max_eval_examples=3, generation_examples=2)
    data = prepare_client("a", splits, models.tiny_tokenizer(), args)
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 2, 3)
    assert set(data.train[0]) == {"input_ids", "labels"}
    assert data.questions["references"][:] == [["0 coins.", "some"], ["1 coins.", "some"]]
    none = prepare_client("a", splits, models.tiny_tokenizer(), config(tmp_path, generation_examples=0))
    assert none.questions is None


def test_tokenised_data_is_taken_as_it_is(tmp_path: Path) -> None:
    examples = models.token_examples(3, seed=0)
    data = prepare_client("a", examples, None, config(tmp_path))
    assert list(data.train) == examples.to_list()
    assert data.validation is data.test is data.questions is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": raw(0)}, "client 'a': 0 training examples; at least 1 is needed"),
        ({"test": raw(3)}, "client 'a': 0 training examples"),
        (
            datasets.Dataset.from_dict({"question": ["x"]}),
            "client 'a': columns question: not a recognised set",
        ),
        (raw(2), "client 'a': text without a tokenizer; pass processing_class"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare_client("a", data, None, config(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
