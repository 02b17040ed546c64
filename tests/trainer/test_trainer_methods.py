"""Every aggregation method through the trainer: what is trained, what is kept, what stock PEFT loads afterwards."""
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch
from peft import PeftModel
from torch import Tensor

from fedlora_hf import FederatedTrainer
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.methods import METHODS
from fedlora_hf.training.local import LocalTraining
from fedlora_hf.update import AdapterState

# Four clients of a few steps each are too few for clair's weights to settle, which it says.
pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]
FOUR = {"ada": 4, "bob": 6, "eve": 5, "kim": 8}


def loaded_logits(folder: Path, model: Any) -> Tensor:
    """Logits of `model` with the adapter in `folder`, by stock PEFT."""
    return models.logits(PeftModel.from_pretrained(model, str(folder)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_adapters_that_stock_peft_loads(tmp_path: Path, method: str) -> None:
    trainer = models.federation(tmp_path, models.token_clients(FOUR, held_out=2), aggregation=method)
    trainer.train()
    trainer.scorer.install(trainer.run.state)
    installed = models.logits(trainer.model)
    assert (installed - models.logits(models.tiny_llama())).abs().max() > 1e-4 or method == "local"
    torch.testing.assert_close(loaded_logits(tmp_path, models.tiny_llama()), installed, atol=2e-6, rtol=1e-5)
    assert sorted(trainer.run.personalised) == sorted(set(FOUR) - set(trainer.run.record.flagged))
    for client, state in trainer.run.personalised.items():
        trainer.scorer.install(state)
        found = loaded_logits(tmp_path / "clients" / client, models.tiny_llama())
        torch.testing.assert_close(found, models.logits(trainer.model), atol=2e-6, rtol=1e-5)


def test_adapters_load_where_this_package_is_not(tmp_path: Path) -> None:
    """In a process of its own that could not import fedlora_hf if it tried."""
    models.tiny_llama().save_pretrained(tmp_path / "base")
    models.federation(tmp_path / "run", num_rounds=1).train()
    code = """
import sys, torch
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "fedlora_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, target, *adapters = sys.argv[1:]
ids = torch.arange(2, 34).reshape(4, 8)
found = {}
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        found[adapter] = model(input_ids=ids).logits
assert "fedlora_hf" not in sys.modules
torch.save(found, target)
"""
    folders = [tmp_path / "run", tmp_path / "run" / "clients" / "eve"]
    arguments = [str(tmp_path / "base"), str(tmp_path / "logits.pt"), *map(str, folders)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    for folder in folders:
        here = loaded_logits(folder, models.tiny_llama())
        torch.testing.assert_close(found[str(folder)], here, atol=1e-6, rtol=1e-5)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[FederatedTrainer], dict[tuple[int, str], AdapterState]]:
    """Watch a trainer: {(round, client): the adapter in the model as the client's local steps begin}."""

    def watch(trainer: FederatedTrainer) -> dict[tuple[int, str], AdapterState]:
        found: dict[tuple[int, str], AdapterState] = {}
        current: list[tuple[int, str]] = []
        train_client, run = trainer.train_client, LocalTraining.run

        def noted(client_id: str, number: int) -> Any:
            current.append((number, client_id))
            return train_client(client_id, number)

        def seen(steps: LocalTraining) -> Any:
            found[current[-1]] = trainer.slot.read()
            return run(steps)

        monkeypatch.setattr(trainer, "train_client", noted)
        monkeypatch.setattr(LocalTraining, "run", seen)
        return found

    return watch


def update(trainer: FederatedTrainer, number: int, client: str) -> AdapterState:
    return trainer.store.update(number, client).state


def test_every_client_starts_a_round_from_the_global_adapter(tmp_path: Path, starts: Any) -> None:
    trainer = models.federation(tmp_path)
    found = starts(trainer)
    trainer.train()
    assert sorted(found) == [(number, client) for number in (1, 2) for client in ("ada", "bob", "eve")]
    for (number, _), start in found.items():
        expected = trainer.initial if number == 1 else trainer.store.state(1)
        assert sample_updates.same_bits(start, expected)


def test_ffa_never_changes_the_common_factor(tmp_path: Path) -> None:
    trainer = models.federation(tmp_path, aggregation="ffa")
    trainer.train()
    states = [trainer.run.state, *(update(trainer, number, client) for number in (1, 2) for client in trainer.clients)]
    for state in states:
        for module in state:
            assert torch.equal(state[module].A, trainer.initial[module].A)
            assert state[module].B.abs().max() > 0


def test_fedsa_clients_keep_their_own_factor(tmp_path: Path, starts: Any) -> None:
    trainer = models.federation(tmp_path, aggregation="fedsa", keep_rounds=0)
    found = starts(trainer)
    trainer.train()
    for client in trainer.clients:
        start, own, common = found[2, client], update(trainer, 1, client), trainer.store.state(1)
        for module in start:
            assert torch.equal(start[module].B, own[module].B)
            assert torch.equal(start[module].A, common[module].A)
            others = [update(trainer, 1, other)[module].B for other in trainer.clients if other != client]
            assert all(not torch.equal(start[module].B, B) for B in others)


def test_fedsa_remembers_a_client_that_sat_rounds_out(tmp_path: Path, starts: Any) -> None:
    """Each round draws one client of three, so one's B may be many rounds old."""
    trainer = models.federation(tmp_path, aggregation="fedsa", clients_per_round=1, num_rounds=8, local_steps=1, seed=3)
    found = starts(trainer)
    last: dict[str, AdapterState] = {}
    for number in range(1, 9):
        trainer.args.num_rounds = number
        trainer.args.resume_from = "last"
        trainer.train()
        (client,) = trainer.federation.cohort(number, trainer.clients)
        if client in last:
            start = found[number, client]
            assert all(torch.equal(start[module].B, last[client][module].B) for module in start)
        last[client] = update(trainer, number, client).in_memory()
    assert len(last) > 1


def test_stacking_adds_exact_sums_under_fresh_factors(tmp_path: Path, starts: Any) -> None:
    trainer = models.federation(tmp_path, models.token_clients(FOUR), aggregation="stacking", keep_rounds=0)
    found = starts(trainer)
    trainer.train()
    expected: Any = 0.0
    for number in (1, 2):
        for client in FOUR:
            assert sample_updates.same_bits(found[number, client], trainer.initial)
            expected = expected + FOUR[client] / sum(FOUR.values()) * sample_updates.dense(
                update(trainer, number, client)
            )
        assert sample_updates.relative(sample_updates.dense(trainer.store.state(number)), expected) < 1e-6
    ranks = {factors.rank for factors in trainer.run.state.values()}
    assert min(ranks) > trainer.rank


def test_stacking_trains_on_top_of_what_was_stacked(tmp_path: Path) -> None:
    """With no training in round 2, its updates are nothing and the global adapter stays."""
    trainer = models.federation(tmp_path, models.token_clients(FOUR), aggregation="stacking", num_rounds=1)
    trainer.train()
    start = trainer.federation.start(trainer.run, "ada")
    trainer.install(start.state, start.frozen)
    stacked = loaded_logits(tmp_path, models.tiny_llama())
    torch.testing.assert_close(models.logits(trainer.model), stacked, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("method", "drawn"), [("stacking", 1), ("fedex", 2), ("fedsa", 1), ("local", 1), ("clair", 3)])
def test_client_sampling_over_many_rounds_keeps_what_is_needed(tmp_path: Path, method: str, drawn: int) -> None:
    trainer = models.federation(
        tmp_path,
        models.token_clients(FOUR, held_out=1),
        aggregation=method,
        clients_per_round=drawn,
        num_rounds=7,
        local_steps=1,
        keep_rounds=2,
        seed=1,
    )
    trainer.train()
    took_part = {client for entry in trainer.run.record.rounds for client in entry["cohort"]}
    assert all(trainer.federation.last_update(trainer.run.record, client) is not None for client in took_part)
    assert set(trainer.run.personalised) == set(FOUR) - set(trainer.run.record.flagged)


def test_proximal_term_pulls_towards_the_start(tmp_path: Path) -> None:
    def distance(folder: str, **options: Any) -> tuple[float, AdapterState]:
        trainer = models.federation(
            tmp_path / folder, num_rounds=1, local_steps=6, optim="sgd", learning_rate=0.1, **options
        )
        trainer.train()
        start = sample_updates.dense(trainer.initial)
        moved = [(sample_updates.dense(update(trainer, 1, c)) - start).norm().item() for c in trainer.clients]
        return sum(moved), trainer.run.state.in_memory()

    none, without = distance("none")
    zero, with_zero = distance("zero", fedprox_mu=0.0)
    some, _ = distance("some", fedprox_mu=1.0)
    more, _ = distance("more", fedprox_mu=4.0)
    assert zero == none
    assert sample_updates.same_bits(without, with_zero)
    assert more < some < none


def test_cohorts_are_drawn_from_seed_and_round(tmp_path: Path) -> None:
    clients = models.token_clients(dict.fromkeys("abcdefgh", 2))
    one, two = (models.federation(tmp_path, clients, clients_per_round=3, seed=5) for _ in range(2))
    other = models.federation(tmp_path, clients, clients_per_round=3, seed=6)
    drawn = [one.federation.cohort(number, one.clients) for number in range(1, 9)]
    assert [two.federation.cohort(number, two.clients) for number in range(8, 0, -1)] == drawn[::-1]
    assert [other.federation.cohort(number, other.clients) for number in range(1, 9)] != drawn
    assert all(len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in drawn)
    assert len(set(map(tuple, drawn))) > 4
    assert set().union(*drawn) == set("abcdefgh")


def test_weights_are_by_examples_or_uniform(tmp_path: Path) -> None:
    for weight_by, expected in (("examples", [4 / 15, 6 / 15, 5 / 15]), ("uniform", [1 / 3] * 3)):
        trainer = models.federation(tmp_path / weight_by, num_rounds=1, weight_by=weight_by)
        trainer.train()
        assert list(trainer.run.record.rounds[0]["weights"].values()) == pytest.approx(expected)
        total = sum(
            w * update(trainer, 1, c)["model.layers.0.self_attn.q_proj"].B
            for c, w in zip(trainer.clients, expected, strict=True)
        )
        torch.testing.assert_close(trainer.run.state["model.layers.0.self_attn.q_proj"].B, total)


@pytest.mark.parametrize("method", ["fedavg", "dirmag_mean", "ffa", "clair", "stacking"])
def test_direction_magnitude_adapters_are_written_as_stock_lora(tmp_path: Path, method: str) -> None:
    trainer = models.federation(tmp_path, models.token_clients(FOUR, held_out=1), aggregation=method, adapter="dirmag")
    trainer.train()
    assert read_adapter(tmp_path)[1]["peft_type"] == "LORA"
    trainer.scorer.install(trainer.run.state)
    found = loaded_logits(tmp_path, models.tiny_llama())
    torch.testing.assert_close(found, models.logits(trainer.model), atol=2e-6, rtol=1e-5)
    assert (found - models.logits(models.tiny_llama())).abs().max() > 1e-4
