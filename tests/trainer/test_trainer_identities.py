"""Runs that must give the same adapters: one client and a plain Trainer, equal clients and one, any order, any time."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from fedlora_hf import FederatedTrainer
from fedlora_hf.adapter.slot import AdapterSlot, with_adapter
from fedlora_hf.training.local import local_batches
from fedlora_hf.update import AdapterState
from fedlora_hf.util.seeding import derive_seed

pytestmark = pytest.mark.usefixtures("bare_output")


class InOrder(Trainer):
    """Trainer over batches that are made already, one after the other."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def first(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return batches[0]


def plain_training(
    federated: FederatedTrainer, client: str, folder: Path, model: Any, order: int | None = None, **settings: Any
) -> AdapterState:
    """What transformers.Trainer makes of the same start, batches and settings."""
    args = federated.args
    peft_model = with_adapter(model, federated.model.peft_config["default"], args.seed)
    AdapterSlot(peft_model).write(federated.initial)
    seed = derive_seed(args.seed, "client", 1, client) if order is None else order
    groups = islice(local_batches(federated.clients[client].train, federated.data_collator, args, seed), 40)
    batches = [batch for group in islice(groups, args.local_steps) for batch in group]
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_steps=args.local_steps,
        learning_rate=args.learning_rate,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        **settings,
    )
    trainer = InOrder(peft_model, training, data_collator=first, train_dataset=batches)
    trainer.train()
    assert trainer.state.global_step == args.local_steps
    return AdapterSlot(peft_model).read()


# Four whole steps of one batch; two epochs of two steps of two; one epoch whose last step has one batch of three.
@pytest.mark.parametrize(("examples", "accumulation", "steps"), [(7, 1, 4), (8, 2, 4), (7, 3, 2)])
def test_one_client_is_a_plain_trainer(tmp_path: Path, examples: int, accumulation: int, steps: int) -> None:
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0.5}
    federated = models.federation(
        tmp_path / "federated",
        models.token_clients({"solo": examples}),
        num_rounds=1,
        local_steps=steps,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    federated.train()
    plain = plain_training(federated, "solo", tmp_path / "plain", models.tiny_llama(), **settings)
    assert sample_updates.same_bits(federated.run.state, plain)
    assert not sample_updates.same_bits(federated.initial, plain)


@pytest.mark.parametrize(
    "asked",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"data_seed": 11},
        {"dataloader_drop_last": True},
        {"logging_steps": 1, "include_num_input_tokens_seen": "all"},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_one_client_is_a_plain_trainer_whatever_its_batches(tmp_path: Path, asked: dict[str, Any]) -> None:
    federated = models.federation(
        tmp_path / "federated", models.token_clients({"solo": 7}), num_rounds=1, local_steps=5, **asked
    )
    federated.train()
    seed = derive_seed(federated.args.seed, "client", 1, "solo")
    order = derive_seed(11, "client", 1, "solo") if "data_seed" in asked else seed
    settings = {"lr_scheduler_type": "constant"}
    plain = plain_training(federated, "solo", tmp_path / "plain", models.tiny_llama(), order=order, **settings)
    assert sample_updates.same_bits(federated.run.state, plain)
    batches = list(islice(local_batches(federated.clients["solo"].train, len_of, federated.args, order), 4))
    sizes = [size for group in batches for size, _ in group]
    assert sizes == ([2] * 4 if asked.get("dataloader_drop_last") else [2, 2, 2, 1])
    if asked.get("train_sampling_strategy") == "group_by_length":
        assert max(longest for _, longest in batches[0]) == max(federated.clients["solo"].train.lengths)


def len_of(rows: list[Any]) -> Any:
    """A collator that tells how many rows a batch has, and the tokens of the longest."""
    return len(rows), max(len(row["input_ids"]) for row in rows)


def test_data_seed_alone_sets_the_order(tmp_path: Path) -> None:
    one, two = (models.federation(tmp_path / str(seed), seed=seed, data_seed=5) for seed in (0, 1))
    assert one.order_seed("client", 1, "ada") == two.order_seed("client", 1, "ada")
    three = models.federation(tmp_path / "three", seed=0)
    assert three.order_seed("client", 1, "ada") == derive_seed(0, "client", 1, "ada")


def test_a_compiled_model_trains_as_the_other(tmp_path: Path) -> None:
    plain = models.federation(tmp_path / "plain", num_rounds=1)
    compiled = models.federation(tmp_path / "compiled", num_rounds=1, torch_compile=True, torch_compile_backend="eager")
    for trainer in (plain, compiled):
        trainer.train()
    difference = sample_updates.relative(
        sample_updates.dense(compiled.run.state), sample_updates.dense(plain.run.state)
    )
    assert difference < 1e-5


def test_one_client_is_a_plain_trainer_for_a_classifier(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "linear"}
    federated = models.federation(
        tmp_path / "federated",
        models.token_clients({"solo": 7}, models.class_examples),
        model=models.tiny_classifier(),
        task="sequence_classification",
        num_rounds=1,
        local_steps=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    federated.train()
    plain = plain_training(federated, "solo", tmp_path / "plain", models.tiny_classifier(), **settings)
    assert list(plain.extras) == ["score.weight"]
    assert not torch.equal(plain.extras["score.weight"], federated.initial.extras["score.weight"])
    assert sample_updates.same_bits(federated.run.state, plain)


@pytest.mark.parametrize("method", ["fedavg", "product_mean", "median"])
def test_equal_clients_are_one_client(tmp_path: Path, method: str) -> None:
    def run(folder: str, *clients: str) -> torch.Tensor:
        data = {client: {"train": models.token_examples(6, seed=1)} for client in clients}
        trainer = models.federation(
            tmp_path / folder, data, aggregation=method, per_device_train_batch_size=6, optim="sgd", learning_rate=0.5
        )
        trainer.train()
        return sample_updates.dense(trainer.run.state)

    one = run("one", "a")
    assert one.norm() > 0.01
    assert sample_updates.relative(run("four", "a", "b", "c", "d"), one) < 1e-6


def test_order_of_clients_changes_no_bit_and_neither_does_a_second_run(tmp_path: Path) -> None:
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
    for folder, ids in (("one", "ada bob eve"), ("two", "ada bob eve"), ("permuted", "eve ada bob")):
        models.federation(tmp_path / folder, {client: clients[client] for client in ids.split()}).train()
    files = models.weight_files(tmp_path / "one")
    assert {"adapter_model.safetensors", "clients/eve/adapter_model.safetensors"} < set(files)
    assert {"rounds/1/adapter_model.safetensors", "rounds/2/clients/ada/adapter_model.safetensors"} < set(files)
    assert models.weight_files(tmp_path / "two") == files
    assert models.weight_files(tmp_path / "permuted") == files
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one") == numbers(tmp_path / "permuted")


def numbers(folder: Path) -> dict[str, Any]:
    """run.json without what the clock says."""
    record = json.loads((folder / "run.json").read_text())
    del record["created"]
    for entry in record["rounds"]:
        del entry["seconds"]
    return record


def test_another_seed_gives_other_adapters(tmp_path: Path) -> None:
    for seed in (0, 1):
        models.federation(tmp_path / str(seed), seed=seed, num_rounds=1).train()
    zero, one = (models.weight_files(tmp_path / str(seed)) for seed in (0, 1))
    assert list(zero) == list(one)
    assert all(zero[path] != one[path] for path in zero)


def test_dropout_is_drawn_from_the_seed(tmp_path: Path) -> None:
    for folder, dropout in (("one", 0.5), ("two", 0.5), ("without", 0.0)):
        models.federation(tmp_path / folder, num_rounds=1, lora_dropout=dropout).train()
        torch.rand(7)  # the global generator moves on between runs
    files = models.weight_files(tmp_path / "one")
    assert files == models.weight_files(tmp_path / "two")
    assert files != models.weight_files(tmp_path / "without")


def test_training_and_evaluation_leave_the_global_generator_alone(tmp_path: Path) -> None:
    clients = models.token_clients({"ada": 4, "bob": 6}, held_out=2)
    trainer = models.federation(tmp_path, clients, lora_dropout=0.1, evaluate_rounds=True, personal_steps=1)
    before = torch.random.get_rng_state()
    trainer.train()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_checkpointing_of_activations_is_on_and_changes_nothing(tmp_path: Path) -> None:
    models.federation(tmp_path / "without").train()
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointed = models.federation(tmp_path / "with", **{name: True})
    calls = []
    for module in checkpointed.model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            inner = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, _inner=inner, **k: calls.append(1) or _inner(*a, **k)
    checkpointed.train()
    assert calls
    without, found = (models.weight_files(tmp_path / folder) for folder in ("without", "with"))
    assert found == without


def test_adapters_of_a_model_that_has_one_already_are_the_start(tmp_path: Path) -> None:
    first_run = models.federation(tmp_path / "first")
    first_run.train()
    model = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "first"), is_trainable=True)
    second = models.federation(tmp_path / "second", model=model)
    assert sample_updates.same_bits(second.initial, first_run.run.state)
