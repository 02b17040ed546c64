"""Clients in lockstep: each comes to what it comes to alone, fails alone, and a resumed round to the same bytes."""
# SPDX-License-Identifier: Apache-2.0

import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from launched import launch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainerCallback

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.adapter.slot import with_adapter
from fedlora_hf.errors import ConfigError
from fedlora_hf.rounds.federation import Federation, Start
from fedlora_hf.training.lockstep import Lockstep
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

pytestmark = pytest.mark.usefixtures("bare_output")
SIZES = {"ada": 4, "bob": 7, "dan": 9, "eve": 2}
EPOCHS: dict[str, Any] = {"local_steps": None, "local_epochs": 2.0}  # so that steps differ, and last batches


def trainer_of(folder: Path, clients: Any = None, **changes: Any) -> FederatedTrainer:
    clients = clients or models.token_clients(SIZES)
    return models.federation(folder, clients, **{"clients_at_once": 4, **EPOCHS, **changes})


def in_lockstep(trainer: FederatedTrainer, number: int = 1) -> dict[str, Any]:
    """{client: its update, or what ended it}, in the order in which they were told."""
    found: dict[str, Any] = {}
    trainer.train_clients(list(trainer.clients), number, lambda client, update, _: found.update({client: update}))
    return found


def assert_close(mine: ClientUpdate, theirs: ClientUpdate) -> None:
    assert mine.metrics == pytest.approx(theirs.metrics, abs=1e-5)
    for module, factors in theirs.state.items():
        for name in "AB":
            torch.testing.assert_close(getattr(mine.state[module], name), getattr(factors, name), rtol=0, atol=1e-5)
    for name, tensor in theirs.state.extras.items():
        torch.testing.assert_close(mine.state.extras[name], tensor, rtol=0, atol=1e-5)
    for name, tensor in theirs.control.items():
        torch.testing.assert_close(mine.control[name], tensor, rtol=0, atol=1e-5)


def changed(update: ClientUpdate, start: AdapterState) -> float:
    """The largest change of any number."""
    before = ClientUpdate("start", start)
    return max(float((a - b).abs().max()) for a, b in zip(tensors(update), tensors(before), strict=True))


def tensors(update: ClientUpdate) -> list[torch.Tensor]:
    return [getattr(factors, name) for factors in update.state.values() for name in "AB"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": "dirmag"},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "warmup_steps": 1, "max_grad_norm": 0.05},
        {"optim": "sgd", "learning_rate": 0.5, "scaffold": True, "weight_decay": 0.1},
        {"fedprox_mu": 0.5, "label_smoothing_factor": 0.1, "max_grad_norm": 0.0},
        {"aggregation": "ffa", "activation_checkpointing": True},
    ],
    ids=["lora", "dirmag", "accumulation, schedule, clipping", "scaffold", "fedprox, smoothing", "one factor"],
)
def test_every_client_comes_to_what_it_comes_to_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, **changes)
    before = trainer.slot.checksum()
    found = in_lockstep(trainer)
    assert trainer.slot.checksum() == before  # the model's own adapter is not touched
    steps = [update.metrics["steps"] for update in found.values()]
    assert steps == sorted(steps)  # who has the fewest steps is done first
    assert len(set(steps)) > 2
    for client in SIZES:
        alone = trainer.train_client(client, 1)
        assert_close(found[client], alone)
        assert changed(alone, trainer.initial) > 1e-3  # so that there is something to be equal in
    again = in_lockstep(trainer)
    for client in SIZES:
        assert all(torch.equal(a, b) for a, b in zip(tensors(found[client]), tensors(again[client]), strict=True))


def test_a_head_is_each_clients_own(tmp_path: Path) -> None:
    clients = models.token_clients(SIZES, make=models.class_examples)
    trainer = trainer_of(tmp_path, clients, model=models.tiny_classifier(), task="sequence_classification")
    found = in_lockstep(trainer)
    assert found["ada"].state.extras
    for client in SIZES:
        assert_close(found[client], trainer.train_client(client, 1))


def test_packed_rows_stay_blind_to_each_other(tmp_path: Path) -> None:
    clients = models.token_clients(dict.fromkeys(SIZES, 9))
    model = models.tiny_llama(attn_implementation="eager")
    trainer = trainer_of(tmp_path, clients, model=model, packing=True, max_length=24)
    found = in_lockstep(trainer)
    for client in SIZES:
        assert_close(found[client], trainer.train_client(client, 1))


def test_a_loss_of_the_runs_own_is_taken_client_by_client(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        flat = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
        return torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="mean")

    trainer = trainer_of(tmp_path, more={"compute_loss_func": loss}, gradient_accumulation_steps=2)
    found = in_lockstep(trainer)
    for client in SIZES:
        assert_close(found[client], trainer.train_client(client, 1))


def test_a_trainer_that_does_not_read_loss_is_scaled_for_ga(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of transformers 5.17: losses are divided as where nothing is said, even if a subclass has the attribute."""
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2)
    found = in_lockstep(trainer)
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    for said in ({}, {"loss_is_scaled_for_ga": False}):
        vars(trainer).update(said)
        again = in_lockstep(trainer)
        for client in SIZES:
            assert all(torch.equal(a, b) for a, b in zip(tensors(found[client]), tensors(again[client]), strict=True))


def test_clipping_and_noise_are_each_clients_own(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    trainer = trainer_of(tmp_path, dp_clip=0.05, dp_noise_multiplier=0.1, dp_seed=3)
    found = in_lockstep(trainer)
    for client in SIZES:
        assert_close(found[client], trainer.train_client(client, 1))


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on a CPU
def test_a_base_in_4_bits_is_followed_and_one_in_8_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    models.tiny_llama(hidden_size=64).save_pretrained(tmp_path / "base")  # a multiple of the 4-bit block

    def quantised(bits: int) -> Any:
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")

    trainer = trainer_of(tmp_path, model=quantised(4))
    found = in_lockstep(trainer)
    for client in SIZES:
        assert_close(found[client], trainer.train_client(client, 1))
    with pytest.raises(ConfigError, match="is in 8 bits, whose outlier columns"):
        trainer_of(tmp_path, model=quantised(8))


class Listener(TrainerCallback):
    """What a callback finds in the model after a step, by client: the sum of its B factors, how far its schedule is."""

    def __init__(self) -> None:
        self.heard: dict[str, list[tuple[float, float]]] = {}
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = sum(float(f.B.sum()) for f in self.trainer.slot.read().values())
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        assert kwargs["optimizer"].param_groups[0]["lr"] == rate
        self.heard.setdefault(self.trainer.client_in_training, []).append((total, rate))


def test_callbacks_hear_of_each_clients_own_adapter_and_optimizer(tmp_path: Path) -> None:
    heard = []
    for count in (1, 4):
        listener = Listener()
        more = {"callbacks": [listener]}
        options = {"num_rounds": 1, "lr_scheduler_type": "linear", "clients_at_once": count, "more": more}
        listener.trainer = trainer_of(tmp_path / str(count), **options)
        listener.trainer.train()
        heard.append(listener)
    alone, together = heard
    assert together.trainer.state.global_step == alone.trainer.state.global_step
    assert {client: len(told) for client, told in alone.heard.items()} == {
        client: len(told) for client, told in together.heard.items()
    }
    for client, told in alone.heard.items():
        assert len(told) > 1
        for mine, theirs in zip(together.heard[client], told, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_an_optimizer_goes_on_with_its_moments(tmp_path: Path) -> None:
    def adapters(name: str, count: int) -> dict[str, torch.Tensor]:
        trainer = trainer_of(tmp_path / name, keep_optimizer=True, clients_at_once=count)
        trainer.train()
        return {f"{m}.{n}": getattr(f, n) for m, f in trainer.run.state.items() for n in "AB"}

    together, alone = adapters("together", 4), adapters("alone", 1)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-5)


class Broken:
    """A collator that cannot read one client's batches after a few of them; or gives them no finite number."""

    def __init__(self, collate: Any, after: int) -> None:
        self.collate, self.left = collate, after

    def __call__(self, rows: Any) -> Any:
        if len(rows[0]["input_ids"]) > 20:
            self.left -= 1
            if self.left < 0:
                raise OSError("row cannot be read")
        return self.collate(rows)


def test_a_client_that_fails_fails_alone(tmp_path: Path) -> None:
    clients = models.token_clients(SIZES)
    clients["bob"]["train"] = clients["bob"]["train"].map(
        lambda row: {"input_ids": row["input_ids"] * 5, "labels": row["labels"] * 5}
    )
    trainer = trainer_of(tmp_path, clients)
    collate = trainer.data_collator
    trainer.data_collator = Broken(collate, after=1)
    found = in_lockstep(trainer)
    assert isinstance(found["bob"], OSError)
    trainer.data_collator = collate
    for client in ("ada", "dan", "eve"):
        assert_close(found[client], trainer.train_client(client, 1))


def test_a_client_without_a_finite_number_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    expected = {client: trainer.train_client(client, 1) for client in SIZES}
    start = Federation.start

    def spoilt(federation: Federation, run: Any, client: str) -> Start:
        found = start(federation, run, client)
        if client != "bob":
            return found
        factors = {m: LoraFactors(f.A, torch.full_like(f.B, torch.nan), f.scale) for m, f in found.state.items()}
        return Start(AdapterState(factors), found.frozen)

    monkeypatch.setattr(Federation, "start", spoilt)
    found = in_lockstep(trainer)
    assert not any(torch.isfinite(factors.B).any() for factors in found["bob"].state.values())
    for client in ("ada", "dan", "eve"):
        assert_close(found[client], expected[client])


def test_a_pass_that_fails_is_taken_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path / "lockstep", num_rounds=1)

    def out_of_memory(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedlora_hf.training.lockstep.joint_losses", out_of_memory)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "a pass over 4 clients failed (RuntimeError: out of memory); one by one now" in caplog.text
    assert not trainer.run.record.quarantined
    alone = trainer_of(tmp_path / "alone", num_rounds=1, clients_at_once=1)
    alone.train()
    mine, theirs = (models.weight_files(tmp_path / name) for name in ("lockstep", "alone"))
    assert mine == theirs


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["optimizer"] is not None
        if state.global_step >= self.step:
            control.should_training_stop = True


def test_a_round_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """After 9 steps eve and nobody else is done; on going on all are trained, in the same company."""
    trainer_of(tmp_path / "whole").train()
    stopped = trainer_of(tmp_path / "stopped", more={"callbacks": [StopAt(9)]})
    stopped.train()
    assert stopped.store.committed() == []
    assert [c for c in SIZES if stopped.store.finished(1, c) is not None] == ["eve"]
    trainer_of(tmp_path / "stopped", resume_from="last").train()
    assert models.weight_files(tmp_path / "stopped") == models.weight_files(tmp_path / "whole")


def test_groups_are_the_longest_first_and_of_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, clients_at_once=3, num_rounds=1)
    groups: list[list[str]] = []
    run = Lockstep.run
    monkeypatch.setattr(Lockstep, "run", lambda self: groups.append([t.name for t in self.tasks]) or run(self))
    trainer.train()
    assert groups == [["dan", "bob", "ada"]]
    assert sorted(trainer.run.record.clients) == sorted(SIZES)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_dropout": 0.1}, "beside lora_dropout=0.1: what is dropped is drawn anew"),
        ({"client_timeout": 5.0}, "beside client_timeout: the time of a pass is no one client's"),
        ({"torch_compile": True}, "beside torch_compile"),
        ({"optim": "lomo"}, "beside optim=lomo: it steps inside the shared pass"),
        ({"client_parallel": "data"}, "client_parallel clients"),
        ({"clients_at_once": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match="clients_at_once=") as caught:
        trainer_of(tmp_path, **changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def gpt2(**changes: float) -> Any:
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, **shape, **changes))
    return with_adapter(
        model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"), seed=0
    )


def experts() -> Any:
    return models.tiny_llama(num_local_experts=2)  # as the configurations of mixtures say it


@pytest.mark.parametrize(
    ("model", "told"),
    [(gpt2, "drops out 0.1 of its input"), (experts, "num_local_experts=2: experts are given tokens")],
)
def test_models_whose_rows_are_not_each_clients_own_are_refused(tmp_path: Path, model: Any, told: str) -> None:
    with pytest.raises(ConfigError, match="clients_at_once=4: ") as caught:
        trainer_of(tmp_path, model=model())
    assert told in str(caught.value)
    assert trainer_of(tmp_path, model=gpt2(), clients_at_once=1)


def test_another_kind_of_model_without_dropout_is_followed(tmp_path: Path) -> None:
    """GPT-2: Conv1D layers, learnt positions, its loss function called with other words."""
    trainer = trainer_of(tmp_path, model=gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    found = in_lockstep(trainer)
    for client in SIZES:
        assert_close(found[client], trainer.train_client(client, 1))


def test_a_loss_of_more_than_the_loss_function_is_refused(tmp_path: Path) -> None:
    model = models.tiny_llama()
    forward = model.forward

    def more(**inputs: Any) -> Any:
        outputs = forward(**inputs)
        outputs["loss"] = outputs["loss"] + 1
        return outputs

    trainer = trainer_of(tmp_path, model=model)
    model.forward = more
    with pytest.raises(ConfigError, match="LlamaForCausalLM makes its loss of more than its loss_function"):
        in_lockstep(trainer)
    assert "_loss_function" not in vars(model)


def test_a_subclass_that_trains_a_client_itself_is_refused(tmp_path: Path) -> None:
    class Own(FederatedTrainer):
        def train_client(self, client_id: str, number: int) -> ClientUpdate:
            return super().train_client(client_id, number)

    args = FederatedConfig(**models.options(tmp_path, clients_at_once=2))
    with pytest.raises(ConfigError, match=r"Own.train_client is a subclass's own"):
        Own(models.tiny_llama(), args, models.token_clients(SIZES))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_subclass_makes_an_optimizer_of_its_own_for_the_model_itself(tmp_path: Path, at_once: int) -> None:
    seen = []

    class Own(FederatedTrainer):
        def create_optimizer(self) -> torch.optim.Optimizer:  # as most are written, without the model
            seen.append(self.model)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.SGD(trained, lr=0.1)
            return self.optimizer

    args = FederatedConfig(**models.options(tmp_path, clients_at_once=at_once))
    trainer = Own(models.tiny_llama(), args, models.token_clients(SIZES))
    trainer.train()
    assert len(seen) >= len(SIZES)
    assert all(model is trainer.model for model in seen)


@pytest.mark.parametrize("changes", [{"pipeline": "fedlora_optimizer"}, {"personal_proximal_mu": 0.5}])
def test_personal_steps_are_taken_side_by_side(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    run = Lockstep.run
    monkeypatch.setattr(Lockstep, "run", lambda self: groups.append([t.name for t in self.tasks]) or run(self))
    clients = models.token_clients(SIZES, held_out=3)
    trainer = trainer_of(tmp_path, clients, personal_steps=3, num_rounds=1, **changes)
    trainer.train()
    assert groups[-1] == ["dan", "bob", "ada", "eve"]
    for client, state in trainer.run.personalised.items():
        facts = trainer.run.record.clients[client]["personal"]
        alone = trainer.personal_adapter(
            client, trainer.run.state, trainer.federation.own(trainer.run.record, client), None
        )
        assert facts["choice"] == str(alone.choice)
        assert facts["validation_loss"] == pytest.approx(alone.losses_by_name(), abs=1e-5)
        assert_close(ClientUpdate(client, state), ClientUpdate(client, alone.state))
    assert {facts["personal"]["choice"][-5:] for facts in trainer.run.record.clients.values()} >= {"tuned"}


def test_a_client_whose_personal_steps_fail_has_no_personal_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, personal_steps=2, num_rounds=1)
    batches_of = trainer.batches_of

    def broken(data: Any, order: int) -> Any:
        own = order == trainer.order_seed("personal", "bob")
        return (1 / 0 for _ in range(9)) if own else batches_of(data, order)

    monkeypatch.setattr(trainer, "batches_of", broken)
    trainer.train()
    assert "ZeroDivisionError" in trainer.run.record.clients["bob"]["personal"]["failed"]
    assert sorted(trainer.run.personalised) == ["ada", "dan", "eve"]


SCRIPT = f"""
import os, sys
import models
import fedlora_hf.rounds.output

fedlora_hf.rounds.output.write_report = lambda record, folder: []
os.fsync = lambda handle: None
clients = models.token_clients({SIZES})
models.federation(sys.argv[1], clients, clients_at_once=2, personal_steps=2, **{EPOCHS}).train()
"""


@pytest.mark.slow
def test_processes_take_the_same_groups_and_come_to_the_same_bytes(tmp_path: Path) -> None:
    """Two groups of two: which process takes which, and when, changes nothing."""
    trainer_of(tmp_path / "one", clients_at_once=2, personal_steps=2).train()
    launch(SCRIPT, tmp_path, 2, tmp_path / "two")
    assert models.weight_files(tmp_path / "two") == models.weight_files(tmp_path / "one")
