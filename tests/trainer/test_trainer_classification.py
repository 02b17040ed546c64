"""Sequence classification: the head is trained whole, meaned like the factors, saved, and loaded by stock PEFT."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import datasets
import models
import pytest
import torch
from peft import PeftModel

from fedlora_hf.methods import METHODS

# Four clients of a few steps each are too few for clair's weights to settle, which it says.
pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]
HEAD = "score.weight"
SIZES = {"ada": 4, "bob": 6, "eve": 5, "kim": 7}


def classifier_run(folder: Path, **changes: Any) -> Any:
    clients = models.token_clients(SIZES, models.class_examples, held_out=3)
    trainer = models.federation(
        folder, clients, model=models.tiny_classifier(), task="sequence_classification", **changes
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_the_head_travels_with_the_adapter(tmp_path: Path, method: str) -> None:
    trainer = classifier_run(tmp_path, aggregation=method)
    head = trainer.run.state.extras[HEAD]
    assert head.shape == (models.CLASSES, 16)
    assert not torch.equal(head, trainer.initial.extras[HEAD])
    for folder, state in (
        (tmp_path, trainer.run.state),
        (tmp_path / "clients" / "ada", trainer.run.personalised.get("ada")),
    ):
        if state is None:  # judged contaminated
            continue
        trainer.scorer.install(state)
        stock = PeftModel.from_pretrained(models.tiny_classifier(), str(folder))
        torch.testing.assert_close(models.logits(stock), models.logits(trainer.model), atol=2e-6, rtol=1e-5)


def test_heads_are_averaged_by_examples(tmp_path: Path) -> None:
    trainer = classifier_run(tmp_path, num_rounds=1)
    heads = {client: trainer.store.update(1, client).state.extras[HEAD].double() for client in SIZES}
    mean = sum(SIZES[client] * heads[client] for client in SIZES) / sum(SIZES.values())
    torch.testing.assert_close(trainer.run.state.extras[HEAD], mean.float(), atol=1e-7, rtol=1e-6)


def test_a_head_goes_on_learning_where_rounds_restart(tmp_path: Path) -> None:
    """stacking gives every round fresh factors; the head starts from the mean of the round before."""
    trainer = classifier_run(tmp_path, aggregation="stacking", num_rounds=1)
    start = trainer.federation.start(trainer.run, "ada")
    trainer.install(start.state, start.frozen)
    assert torch.equal(trainer.slot.read().extras[HEAD], trainer.run.state.extras[HEAD])
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 9
    assert all(".default." in name for name in trainable)


def test_metrics_of_classes_are_in_the_record(tmp_path: Path) -> None:
    trainer = classifier_run(tmp_path, num_rounds=1)
    for when, kind in (("before", "global"), ("after", "global"), ("after", "personalised")):
        metrics = trainer.run.record.metrics[when][kind]
        assert set(metrics) == {"loss", "accuracy"}
        assert 0 <= metrics["accuracy"] <= 1


def test_texts_and_labels_are_learned(tmp_path: Path) -> None:
    """A rule that one word tells: the federation learns it."""
    rows = [
        {"text": f"{word} {number}", "label": label}
        for label, word in enumerate(("red", "green", "blue"))
        for number in range(6)
    ]
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[::2])}
    tokenizer = models.tiny_tokenizer()
    trainer = models.federation(
        tmp_path,
        {"one": splits, "two": splits},
        model=models.tiny_classifier(vocab_size=len(tokenizer)),
        task="sequence_classification",
        local_steps=15,
        per_device_train_batch_size=9,
        more={"processing_class": tokenizer},
    )
    trainer.train()
    assert trainer.run.record.metrics["before"]["global"]["accuracy"] < 0.7
    assert trainer.run.record.metrics["after"]["global"]["accuracy"] == 1.0
