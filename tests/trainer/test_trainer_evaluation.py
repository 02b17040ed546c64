"""What a Trainer's user expects of evaluation, saving, stopping and logging, round by round."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import datasets
import models
import numpy as np
import pytest
import sample_updates
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from fedlora_hf import FederatedTrainer
from fedlora_hf.adapter.slot import AdapterSlot
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.training.stages import round_learning_rate

pytestmark = pytest.mark.usefixtures("bare_output")
SIZES = {"ada": 4, "bob": 6, "eve": 5}


class Listener(TrainerCallback):
    """Writes down what it hears; `stop_at`: the step at which it asks for the end."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.stop_at, self.optimizers = stop_at, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizers += kwargs["optimizer"] is not None and kwargs["lr_scheduler"] is not None
        if self.stop_at is not None and state.global_step >= self.stop_at:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("round")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append("evaluate")
        self.metrics.append(dict(metrics))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("save")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def run(folder: Path, *callbacks: Any, more: Any = None, **changes: Any) -> FederatedTrainer:
    trainer = models.federation(
        folder,
        models.token_clients(SIZES, held_out=2),
        more={"callbacks": list(callbacks), **(more or {})},
        **{"num_rounds": 3, "local_steps": 1, **changes},
    )
    trainer.train()
    return trainer


def test_rounds_are_evaluated_and_saved_as_the_strategies_say(tmp_path: Path) -> None:
    every, second = Listener(), Listener()
    run(tmp_path / "every", every, eval_strategy="epoch", save_strategy="epoch")
    assert every.events == ["round", "evaluate", "save"] * 3 + ["evaluate"]
    assert all("eval_global_loss" in metrics for metrics in every.metrics)
    assert "eval_personalised_loss" in every.metrics[-1]
    run(tmp_path / "second", second, eval_strategy="steps", eval_steps=2, save_strategy="no")
    assert second.events == ["round", "round", "evaluate", "round", "evaluate"]


def test_user_s_metrics_are_taken_on_every_client_s_split(tmp_path: Path) -> None:
    shapes = []

    def shrink(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def count(found: Any) -> dict[str, float]:
        shapes.append((found.predictions.shape, found.label_ids.shape))
        return {"right": float((found.predictions == found.label_ids).mean()), "rows": len(found.label_ids)}

    listener = Listener()
    more = {"compute_metrics": count, "preprocess_logits_for_metrics": shrink}
    trainer = run(tmp_path, listener, more=more, eval_strategy="epoch", num_rounds=1)
    assert all(predictions == labels and len(labels) == 2 for predictions, labels in shapes)
    assert listener.metrics[0]["eval_global_rows"] == 2.0
    clients = trainer.run.record.clients
    assert all(0 <= clients[client]["metrics"]["global"]["right"] <= 1 for client in SIZES)


def test_early_stopping_ends_the_run_and_the_best_round_is_the_result(tmp_path: Path) -> None:
    """A learning rate that ruins the adapter: the first round is the best, and one round of patience is over."""
    listener = Listener()
    trainer = run(
        tmp_path,
        EarlyStoppingCallback(1),
        listener,
        num_rounds=5,
        learning_rate=5.0,
        optim="sgd",
        max_grad_norm=0.0,
        local_steps=3,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        keep_rounds=2,
        personalise="method",
    )
    losses = [metrics["eval_global_loss"] for metrics in listener.metrics[:-1]]
    best = int(np.argmin(losses))
    assert trainer.run.round == len(losses) < 5 or best == len(losses) - 1
    assert trainer.state.best_metric == pytest.approx(losses[best])
    assert sample_updates.same_bits(trainer.run.state.in_memory(), trainer.store.state(best + 1).in_memory())
    assert listener.metrics[-1]["eval_global_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_a_run_that_gets_better_is_not_stopped_early(tmp_path: Path) -> None:
    listener = Listener()
    trainer = run(tmp_path, EarlyStoppingCallback(1), listener, load_best_model_at_end=True, eval_strategy="epoch")
    losses = [metrics["eval_global_loss"] for metrics in listener.metrics[:-1]]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == trainer.run.round == 3


def test_a_metric_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric_for_best_model='eval_charm': is not among eval_global_loss"):
        run(tmp_path, eval_strategy="epoch", metric_for_best_model="charm")
    with pytest.raises(ConfigError, match="pass --eval_strategy epoch"):
        models.federation(tmp_path / "none", load_best_model_at_end=True)


def test_an_eval_dataset_of_the_server_is_scored_with_the_rounds(tmp_path: Path) -> None:
    listener = Listener()
    run(tmp_path, listener, more={"eval_dataset": models.token_examples(4, 9)}, eval_strategy="epoch", num_rounds=2)
    assert all({"eval_loss", "eval_global_loss"} <= set(metrics) for metrics in listener.metrics)


def test_a_stop_is_obeyed_at_the_next_step_and_the_round_is_left_open(tmp_path: Path) -> None:
    listener = Listener(stop_at=4)
    trainer = run(tmp_path / "one", listener, local_steps=2)
    assert trainer.run.round == 0
    assert trainer.state.global_step == 4
    again = models.federation(tmp_path / "one", models.token_clients(SIZES, held_out=2), num_rounds=3)
    again.train(resume_from_checkpoint=True)
    whole = run(tmp_path / "two", local_steps=2)
    assert sample_updates.same_bits(again.run.state.in_memory(), whole.run.state.in_memory())


def test_losses_are_logged_per_step_and_per_client(tmp_path: Path) -> None:
    listener = Listener()
    trainer = run(tmp_path, listener, logging_steps=1, num_rounds=2)
    steps = [log for log in listener.logs if "grad_norm" in log]
    assert len(steps) == 6
    assert all({"loss", "learning_rate", "epoch"} <= set(log) for log in steps)
    curves = {name for log in steps for name in log if name.startswith("client/")}
    assert curves == {f"client/{client}/loss" for client in SIZES}
    recorded = trainer.run.record.rounds[0]["train_loss"]
    assert {c: log[f"client/{c}/loss"] for log in steps[:3] for c in SIZES if f"client/{c}/loss" in log} == (
        pytest.approx(recorded)
    )
    rounds = [log for log in listener.logs if "round" in log]
    assert all("round_loss" in log for log in rounds)
    assert listener.optimizers == 6


def test_state_counts_steps_epochs_and_tokens_under_sampling(tmp_path: Path) -> None:
    trainer = models.federation(
        tmp_path, models.token_clients(SIZES), clients_per_round=2, include_num_input_tokens_seen="all", num_rounds=3
    )
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == 12
    assert trainer.state.epoch == 3
    tokens = [entry["input_tokens"] for entry in trainer.run.record.rounds]
    assert trainer.state.num_input_tokens_seen == sum(tokens)
    assert all(tokens)
    again = models.federation(
        tmp_path, models.token_clients(SIZES), clients_per_round=2, include_num_input_tokens_seen="all", num_rounds=3
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.num_input_tokens_seen == sum(tokens)
    assert again.state.global_step == 12


def test_the_model_holds_the_global_adapter_and_a_context_a_personal_one(tmp_path: Path) -> None:
    trainer = run(tmp_path, personalise="method", aggregation="fedavg")

    def held() -> Any:
        return AdapterSlot(trainer.model).read()

    assert sample_updates.same_bits(held(), trainer.run.state.in_memory())
    whole = models.logits(trainer.model)
    with trainer.personal("ada") as model:
        assert model is trainer.model
        assert sample_updates.same_bits(held(), trainer.run.personalised["ada"].in_memory())
        assert not torch.equal(models.logits(model), whole)
    assert torch.equal(models.logits(trainer.model), whole)
    predicted = trainer.predict(models.token_examples(2, 3))
    assert predicted.metrics["test_loss"] > 0
    with pytest.raises(ConfigError, match="those who have one: ada, bob, eve"), trainer.personal("nobody"):
        pass


def test_text_is_evaluated_and_predicted(tmp_path: Path) -> None:
    tokenizer = models.tiny_tokenizer()
    text = datasets.Dataset.from_list([{"prompt": "Copy a word: ", "completion": f"word {n}"} for n in range(4)])
    trainer = models.federation(
        tmp_path,
        {"ada": {"train": text}},
        model=models.tiny_llama(vocab_size=len(tokenizer)),
        more={"processing_class": tokenizer},
        num_rounds=1,
        generation_examples=0,
    )
    trainer.train()
    assert trainer.evaluate(text)["eval_loss"] == pytest.approx(trainer.predict(text).metrics["test_loss"])


def test_an_untrained_trainer_leaves_a_finished_run_alone(tmp_path: Path) -> None:
    run(tmp_path, num_rounds=1)
    before = models.weight_files(tmp_path)
    other = models.federation(tmp_path, models.token_clients(SIZES))
    with pytest.raises(ConfigError, match="call train\\(\\) first"):
        other.save_model()
    assert models.weight_files(tmp_path) == before
    other.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_dataset": [1]}, "pass client_datasets"),
        ({"optimizers": (None, object())}, "optimizer_cls_and_kwargs"),
        ({"model_init": lambda: None}, "a run has one model"),
    ],
)
def test_arguments_of_one_training_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.federation(tmp_path, more=more)


def test_a_trial_and_an_unknown_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\(trial=...\)"):
        models.federation(tmp_path / "trial").train(trial=object())
    rows = models.token_examples(2, 1)
    with pytest.raises(DataError, match="split 'valid' is none of train, validation, test; did you mean 'validation'"):
        models.federation(tmp_path, {"ada": {"train": rows, "valid": rows}})


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", 0, [4.0, 4.0, 4.0, 4.0, 4.0]),
        ("linear", 0, [4.0, 3.25, 2.5, 1.75, 1.0]),
        ("cosine", 0, [4.0, 1 + 1.5 * (1 + 2**-0.5), 2.5, 1 + 1.5 * (1 - 2**-0.5), 1.0]),
        ("linear", 2, [4 / 3, 8 / 3, 4.0, 2.5, 1.0]),
    ],
)
def test_the_learning_rate_over_rounds(tmp_path: Path, scheduler: str, warmup: int, expected: list[float]) -> None:
    changes = {"round_lr_scheduler": scheduler, "round_lr_warmup": warmup, "learning_rate": 4.0}
    changes |= {} if scheduler == "constant" else {"round_lr_min": 1.0}
    trainer = models.federation(tmp_path, num_rounds=5, **changes)
    assert [round_learning_rate(trainer.args, number) for number in range(1, 6)] == pytest.approx(expected)


def test_the_round_s_learning_rate_is_what_clients_train_with(tmp_path: Path) -> None:
    listener = Listener()
    run(tmp_path, listener, round_lr_scheduler="linear", round_lr_min=0.0, logging_steps=1)
    rates = [log["learning_rate"] for log in listener.logs if "grad_norm" in log]
    assert rates == pytest.approx([1e-2] * 3 + [5e-3] * 3 + [0.0] * 3)


@pytest.mark.parametrize("file", ["run.json"])
def test_save_total_limit_is_keep_rounds(tmp_path: Path, file: str) -> None:
    trainer = run(tmp_path, save_total_limit=1)
    assert trainer.args.keep_rounds == 2
    assert trainer.store.committed() == [2, 3]
    assert len(json.loads((tmp_path / file).read_text())["rounds"]) == 3
