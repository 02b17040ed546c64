"""The server's own part in a run: its optimizer, its data, a residual under what clients train, factors in turn."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sample_updates import dense, relative, same_bits

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.server_optimizer import server_rule, stepped
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.rounds.residual import split
from fedlora_hf.rounds.store import MEMORY

pytestmark = pytest.mark.usefixtures("bare_output")


def run(folder: Path, **changes: Any) -> Any:
    trainer = models.federation(folder, **{"aggregation": "product_mean", "keep_rounds": 0, "num_rounds": 3, **changes})
    trainer.train()
    return trainer


def test_avgm_at_its_plainest_leaves_the_method_s_bytes(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    other = run(tmp_path / "avgm", server_optimizer="avgm", server_momentum=0.0)
    assert models.weight_files(tmp_path / "plain") == models.weight_files(tmp_path / "avgm")
    assert same_bits(plain.run.state, other.run.state)


@pytest.mark.parametrize(
    ("method", "space", "kind"), [("product_mean", "product", "avgm"), ("fedavg", "factors", "adam")]
)
def test_a_round_is_stepped_from_its_start_with_the_last_round_s_state(
    tmp_path: Path, method: str, space: Any, kind: str
) -> None:
    trainer = run(tmp_path, aggregation=method, server_optimizer=kind, server_learning_rate=0.5)
    rule = server_rule(kind, 0.5)
    assert rule is not None
    start, memory = trainer.initial, {}
    for number in (1, 2, 3):
        updates = [trainer.store.update(number, client) for client in ("ada", "bob", "eve")]
        reference = start if number > 1 else None
        mean = aggregate(updates, method, target_rank=trainer.rank, reference=reference).state
        start, memory, _ = stepped(rule, space, start, mean, memory)
        assert relative(dense(trainer.store.state(number)), dense(start)) < 1e-5
        assert sorted(trainer.federation._remembered(number, "optimizer/")) == sorted(memory)
        start = trainer.store.state(number)
    assert [e["diagnosis"]["server_optimizer_began"] for e in trainer.run.record.rounds if "diagnosis" in e] in (
        [],
        [True, False, False],
    )


def test_the_optimizer_s_state_is_committed_and_resumed(tmp_path: Path) -> None:
    options = {"server_optimizer": "yogi", "aggregation": "fedavg"}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path / "parts", **options, num_rounds=2)
    resumed = run(tmp_path / "parts", **options, resume_from="last")
    assert same_bits(whole.run.state, resumed.run.state)
    assert all(torch.equal(t, resumed.store.memory(3)[name]) for name, t in whole.store.memory(3).items())


def test_a_damaged_state_of_the_optimizer_is_found_before_a_run_goes_on(tmp_path: Path) -> None:
    trainer = run(tmp_path, server_optimizer="avgm", num_rounds=2)
    (trainer.store.folder / "2" / MEMORY).write_bytes(b"cut short")
    assert MEMORY in str(trainer.store.damage(2))
    with pytest.raises(RecordError, match=r"server\.safetensors: not readable"):
        trainer.store.memory(2)
    assert trainer.store.last_sound()[0] == 1


@pytest.mark.parametrize("method", ["stacking", "local", "fedex"])
def test_a_server_optimizer_needs_a_mean_that_clients_go_on_from(tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=f"server_optimizer with aggregation '{method}'"):
        models.federation(tmp_path, aggregation=method, server_optimizer="adam")


def test_rolora_trains_b_then_a_and_every_mean_is_exact(tmp_path: Path) -> None:
    trainer = run(tmp_path, aggregation="rolora")
    start = trainer.initial
    for number, frozen in ((1, "A"), (2, "B"), (3, "A")):
        updates = [trainer.store.update(number, client) for client in ("ada", "bob", "eve")]
        state = trainer.store.state(number)
        for module in state:
            for update in updates:
                assert torch.equal(getattr(update.state[module], frozen), getattr(start[module], frozen))
            assert torch.equal(getattr(state[module], frozen), getattr(start[module], frozen))
        exact = aggregate(updates, "stacking").state
        assert relative(dense(state), dense(exact)) < 1e-5
        start = state


def test_fedex_clients_train_the_mean_factors_on_top_of_the_residual(tmp_path: Path) -> None:
    trainer = run(tmp_path, aggregation="fedex")
    under = None
    for number in (1, 2, 3):
        updates = [trainer.store.update(number, client) for client in ("ada", "bob", "eve")]
        exact = dense(aggregate(updates, "stacking").state) + (0 if under is None else dense(under))
        state = trainer.store.state(number)
        assert relative(dense(state), exact) < 1e-4
        first, under = split(state, trainer.initial)
        mean = aggregate(updates, "fedavg").state
        assert same_bits(first, mean)
    assert under is not None
    start = trainer.federation.start(trainer.run, "ada")
    assert same_bits(start.state, first)
    assert start.frozen is not None
    assert torch.equal(dense(start.frozen), dense(under))


def test_fltrust_compares_with_what_the_server_trained(tmp_path: Path) -> None:
    trainer = run(tmp_path, aggregation="fltrust")
    for number in (1, 2, 3):
        server = trainer.store.server_update(number)
        assert server is not None
        updates = [trainer.store.update(number, client) for client in ("ada", "bob", "eve")]
        start = trainer.store.state(number - 1) if number > 1 else None
        expected = aggregate(updates, "fltrust", target_rank=trainer.rank, reference=start, server=server)
        assert same_bits(trainer.store.state(number), expected.state)
    assert sorted(trainer.run.record.clients) == ["ada", "bob", "eve"]
    assert trainer.state.global_step == trainer.state.max_steps - (trainer.args.personal_steps or 0) * 3


def test_server_data_and_fltrust_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregation='fltrust' without server_dataset"):
        models.federation(tmp_path, aggregation="fltrust", server_dataset=None)
    with pytest.raises(ConfigError, match="only the global stage of a pipeline and fltrust train on the server"):
        models.federation(tmp_path, aggregation="multikrum", server_dataset="server.jsonl")
