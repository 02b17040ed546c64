"""No adapter is scored on a split twice in a run; answers of several clients share batches; the counts are recorded."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import datasets
import models
import pytest
import sample_data
import torch

from fedlora_hf import FederatedTrainer
from fedlora_hf.record.record import RunRecord
from fedlora_hf.training import scores
from fedlora_hf.training.scores import Scores, fingerprint_of
from fedlora_hf.update import AdapterState, LoraFactors


def state(value: float = 1.0, scale: float = 2.0, extra: float | None = None, name: str = "layer") -> AdapterState:
    extras = {} if extra is None else {"head": torch.full((2,), extra)}
    return AdapterState({name: LoraFactors(torch.full((1, 3), value), torch.ones(2, 1), scale)}, extras)


def test_a_fingerprint_is_of_all_that_an_adapter_does() -> None:
    assert fingerprint_of(state()) == fingerprint_of(state())
    others = [state(1.5), state(scale=1.0), state(extra=0.0), state(extra=1.0), state(name="other")]
    assert len({fingerprint_of(one) for one in [state(), *others]}) == 6
    half = AdapterState({"layer": state()["layer"].to(torch.bfloat16)})
    assert fingerprint_of(half) != fingerprint_of(state())


def test_metrics_are_measured_once_for_an_adapter_a_client_and_a_split() -> None:
    known, data = Scores(), object()
    first = known.once(state(), "ada", "test", lambda: {"loss": 1.0}, (data,))
    assert first == known.once(state(), "ada", "test", pytest.fail, (data,)) == {"loss": 1.0}
    for change in ((state(2.0), "ada", "test"), (state(), "bob", "test"), (state(), "ada", "validation")):
        assert known.once(*change, lambda: {"loss": 2.0}, (data,)) == {"loss": 2.0}
    # Other data under the same name are other data.
    assert known.once(state(), "ada", "test", lambda: {"loss": 3.0}, (object(),)) == {"loss": 3.0}
    assert (known.taken, known.reused) == (5, 1)


def test_what_is_given_out_may_be_changed() -> None:
    known = Scores()
    known.once(state(), "ada", "test", lambda: {"loss": 1.0})["loss"] = 9.0
    found = known.known(fingerprint_of(state()), "ada", "test")
    assert found == {"loss": 1.0}
    found["rouge_l"] = 1.0
    assert known.known(fingerprint_of(state()), "ada", "test") == {"loss": 1.0}


def test_the_oldest_goes_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "KEPT", 2)
    known = Scores()
    for client in "abc":
        known.note("adapter", client, "test", {"loss": 1.0})
    assert known.known("adapter", "a", "test") is None
    assert known.known("adapter", "c", "test") == {"loss": 1.0}


def counted(trainer: FederatedTrainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(adapter, split) of every scoring of the model from now on."""
    seen: list[tuple[str, str]] = []
    names = {
        id(getattr(data, split)): f"{client}/{split}"
        for client, data in trainer.clients.items()
        for split in ("validation", "test")
    }
    measure = trainer.scorer.metrics

    def noted(adapter: AdapterState, split: Any) -> dict[str, float]:
        seen.append((fingerprint_of(adapter), names[id(split)]))
        return measure(adapter, split)

    monkeypatch.setattr(trainer.scorer, "metrics", noted)
    return seen


def test_nothing_is_scored_twice_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=3)
    trainer = models.federation(tmp_path / "run", clients, eval_strategy="epoch", personalise="validation")
    seen = counted(trainer, monkeypatch)
    trainer.train()
    assert len(seen) == len(set(seen))
    choices = [facts["personal"]["choice"] for facts in trainer.run.record.clients.values()]
    own = sum(choice != "global" for choice in choices)
    tests, validations = ([name for _, name in seen if name.endswith(kind)] for kind in ("test", "validation"))
    # The adapter before, after each of two rounds, and every personal one that is not the global adapter.
    assert len(tests) == 3 * 3 + own
    assert len(validations) == sum(len(f["personal"]["validation_loss"]) for f in trainer.run.record.clients.values())
    # The last round's adapter comes again in the end, for every client, and as somebody's personal one.
    assert trainer.run.record.scorings == {"taken": len(seen), "reused": 3 + (3 - own)}
    assert RunRecord.load(tmp_path / "run").scorings == trainer.run.record.scorings

    before = trainer.evaluate()
    assert len(seen) == len(set(seen))  # asked again, nothing is scored
    monkeypatch.setattr(trainer, "compute_metrics", lambda found: {"answered": float(len(found.label_ids))})
    assert trainer.evaluate() == {**before, "eval_global_answered": 3.0, "eval_personalised_answered": 3.0}


def test_a_run_that_reuses_scores_leaves_what_one_that_does_not_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        clients = models.token_clients({"ada": 4, "bob": 6}, held_out=3)
        trainer = models.federation(tmp_path / name, clients, eval_strategy="epoch", personalise="validation")
        trainer.train()
        return models.weight_files(tmp_path / name), trainer.run.record.metrics

    once = run("once")
    monkeypatch.setattr(Scores, "known", lambda *args, **kwargs: None)
    assert run("again") == once


def test_answers_of_several_clients_share_batches_and_are_each_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models.tiny_tokenizer()
    records = sample_data.dolly_records(24)
    clients = {}
    for place, name in enumerate(("ada", "bob")):
        rows = [
            {"prompt": r["instruction"], "completion": r["response"], "references": [r["response"]]}
            for r in records[12 * place : 12 * place + 12]
        ]
        parts = {"train": rows[:4], "validation": rows[4:8], "test": rows[8:]}
        clients[name] = {split: datasets.Dataset.from_list(some) for split, some in parts.items()}
    trainer = models.federation(
        tmp_path,
        clients,
        model=models.tiny_llama(vocab_size=len(tokenizer)),
        more={"processing_class": tokenizer},
        generation_examples=3,
        max_new_tokens=5,
        max_length=96,
    )
    calls, generate = [], trainer.model.generate

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", noted)
    found = trainer.test_metrics(dict.fromkeys(trainer.clients, trainer.initial))
    assert calls == [6]
    for client, data in trainer.clients.items():
        assert {"rouge_l": found[client]["rouge_l"]} == trainer.scorer.answers(trainer.initial, data.questions)
