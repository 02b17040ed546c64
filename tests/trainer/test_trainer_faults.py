"""What goes wrong: failing and poisoned clients, too few of them, wrong arguments. The round goes on, or says why."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import models
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from fedlora_hf import FederatedTrainer
from fedlora_hf.errors import ConfigError, DataError, RoundError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

pytestmark = pytest.mark.usefixtures("bare_output")


def broken(trainer: FederatedTrainer, monkeypatch: pytest.MonkeyPatch, ids: set[str], rounds: set[int]) -> None:
    """Let these clients raise in these rounds."""
    train_client = trainer.train_client

    def failing(client_id: str, number: int) -> ClientUpdate:
        if client_id in ids and number in rounds:
            raise RuntimeError("out of memory\nand a long story")
        return train_client(client_id, number)

    monkeypatch.setattr(trainer, "train_client", failing)


def poisoned(trainer: FederatedTrainer, monkeypatch: pytest.MonkeyPatch, client: str, value: float) -> None:
    """Let a client's A hold `value` in one entry."""
    train_client = trainer.train_client

    def poison(client_id: str, number: int) -> ClientUpdate:
        update = train_client(client_id, number)
        if client_id != client:
            return update
        state = dict(update.state)
        module = next(iter(state))
        A = state[module].A.clone()
        A[0, 0] = value
        state[module] = LoraFactors(A, state[module].B, state[module].scale)
        return replace(update, state=AdapterState(state))

    monkeypatch.setattr(trainer, "train_client", poison)


def test_a_client_that_raises_is_quarantined_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = models.federation(tmp_path, models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2))
    broken(trainer, monkeypatch, {"bob"}, {1, 2})
    trainer.train()
    record = trainer.run.record
    assert record.quarantined == {"bob": "training failed: RuntimeError: out of memory"}
    assert record.flagged == []
    assert not record.clients["bob"]["collaborative"]
    assert record.clients["bob"]["weight"] == 0.0
    assert [sorted(entry["weights"]) for entry in record.rounds] == [["ada", "eve"]] * 2
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == ["ada", "eve"]


def test_the_others_are_as_if_the_failed_client_had_never_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5})
    trainer = models.federation(tmp_path / "with", clients)
    broken(trainer, monkeypatch, {"bob"}, {1, 2})
    trainer.train()
    models.federation(tmp_path / "without", {client: clients[client] for client in ("ada", "eve")}).train()
    files = models.weight_files(tmp_path / "with")
    assert files == models.weight_files(tmp_path / "without")


def test_a_client_that_recovers_is_welcome_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = models.federation(tmp_path)
    broken(trainer, monkeypatch, {"bob"}, {1})
    trainer.train()
    assert trainer.run.record.rounds[0]["quarantined"] == {"bob": "training failed: RuntimeError: out of memory"}
    assert trainer.run.record.rounds[1]["quarantined"] == trainer.run.record.quarantined == {}
    assert "bob" in trainer.run.personalised


@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, "NaN or Inf"), (torch.inf, "NaN or Inf"), (1e9, "above 1e+06")]
)
def test_a_client_with_impossible_numbers_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, reason: str
) -> None:
    trainer = models.federation(tmp_path, num_rounds=1)
    poisoned(trainer, monkeypatch, "eve", value)
    trainer.train()
    assert list(trainer.run.record.quarantined) == ["eve"]
    assert reason in trainer.run.record.quarantined["eve"]
    assert all(f.A.isfinite().all() and f.B.isfinite().all() for f in trainer.run.state.values())
    assert "eve" not in trainer.run.personalised


def test_too_few_usable_updates_leave_the_rounds_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = models.federation(tmp_path, server_min_clients=3)
    broken(trainer, monkeypatch, {"bob"}, {2})
    with pytest.raises(RoundError, match="round 2: 2 usable updates, server_min_clients=3") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.store.committed() == [1]
    assert trainer.run.round == 1
    assert len(trainer.run.record.rounds) == 1
    assert len(trainer.store.record(1).rounds) == 1
    assert not (tmp_path / "run.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("fedlora_hf.rounds.output.write_report", lambda record, folder: [])
    models.federation(tmp_path, server_min_clients=3, resume_from="last").train()
    models.federation(tmp_path / "whole", server_min_clients=3).train()
    unbroken = models.weight_files(tmp_path / "whole")
    found = models.weight_files(tmp_path)
    assert {path: found[path] for path in unbroken} == unbroken


def test_a_round_in_which_all_fail_says_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = models.federation(tmp_path)
    broken(trainer, monkeypatch, {"ada", "bob", "eve"}, {1})
    with pytest.raises(RoundError, match="round 1: all 3 clients failed; 'ada' with: training failed: RuntimeError"):
        trainer.train()
    assert trainer.store.committed() == []


def refusal(tmp_path: Path, kind: type[Exception], **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        models.federation(tmp_path, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_arguments_are_refused_at_the_door(tmp_path: Path) -> None:
    data = models.token_examples(3, seed=0)
    with pytest.raises(DataError, match="0 clients"):
        FederatedTrainer(models.tiny_llama(), models.federation(tmp_path).args, {})
    with pytest.raises(ConfigError, match="args is a TrainingArguments: must be a FederatedConfig"):
        FederatedTrainer(models.tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True), {"a": data})
    assert "client id '7'" in refusal(tmp_path, ConfigError, clients={7: data})
    empty = datasets.Dataset.from_dict({"input_ids": [], "labels": []})
    assert "client 'b': 0 training examples" in refusal(tmp_path, DataError, clients={"a": data, "b": empty})
    message = refusal(tmp_path, ConfigError, target_modules=["nothing_of_the_kind"])
    assert message.startswith("target_modules=nothing_of_the_kind:")
    assert "q_proj" in message
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert "optimizers=" in refusal(tmp_path, ConfigError, more={"optimizers": (optimizer, None)})


class Listener(TrainerCallback):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("train_begin")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("train_end")

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("round_end")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_callbacks_hear_of_steps_rounds_and_numbers(tmp_path: Path) -> None:
    listener = Listener()
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
    trainer = models.federation(tmp_path, clients, evaluate_rounds=True, more={"callbacks": [listener]})
    result = trainer.train()
    assert listener.events == ["train_begin", *(["step"] * 6 + ["round_end"]) * 2, "train_end"]
    assert result.global_step == trainer.state.global_step == 12
    rounds = [log for log in listener.logs if "round" in log]
    assert [log["round"] for log in rounds] == [1, 2]
    assert all({"loss", "flagged", "quarantined", "seconds", "eval_global_loss"} <= set(log) for log in rounds)
    assert {"eval_global_loss", "eval_personalised_loss"} <= set(listener.logs[-1])
    assert rounds[-1]["eval_global_loss"] == pytest.approx(listener.logs[-1]["eval_global_loss"])


def test_a_callback_may_stop_the_run_after_a_round(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = True
            return control

    trainer = models.federation(tmp_path, num_rounds=4, more={"callbacks": [Stop()]})
    trainer.train()
    assert trainer.store.committed() == [1]
    assert len(trainer.run.record.rounds) == 1
    assert (tmp_path / "run.json").is_file()
