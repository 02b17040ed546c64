"""Clients contaminated on purpose: wrong data, wrong updates, marked in the record; and who judges them."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
import torch
from sample_updates import dense, relative, same_bits

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.update_attacks import KINDS
from fedlora_hf.data import contaminate
from fedlora_hf.data.formats import load_examples
from fedlora_hf.errors import ConfigError
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util import rehearsal
from fedlora_hf.util.rehearsal import Contamination, read_contaminate

pytestmark = pytest.mark.usefixtures("bare_output")
ALL = {*rehearsal.DATA_KINDS, *KINDS}


def run(folder: Path, **changes: Any) -> Any:
    trainer = models.federation(folder, **{"aggregation": "product_mean", "keep_rounds": 0, **changes})
    trainer.train()
    return trainer


def first(trainer: Any, client: str) -> AdapterState:
    return trainer.store.update(1, client).state


def test_the_list_of_data_kinds_is_that_of_the_data() -> None:
    assert sorted(rehearsal.DATA_KINDS) == sorted(contaminate.KINDS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (None, {}),
        (["bob=shuffled"], {"bob": Contamination("shuffled")}),
        (["a=b=boost:3", "ada=sign_flip"], {"a=b": Contamination("boost", 3.0), "ada": Contamination("sign_flip")}),
        ("x:y=gaussian:0.5", {"x:y": Contamination("gaussian", 0.5)}),
    ],
)
def test_what_is_read(words: Any, found: dict[str, Contamination]) -> None:
    assert read_contaminate(words, ALL) == found


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bob", "must be CLIENT=KIND"),
        ("=boost", "must be CLIENT=KIND"),
        ("bob=evil", "kind must be one of boost, constant"),
        ("bob=boost:x", "strength must be a finite number"),
        ("bob=boost:", "strength must be a finite number"),
        ("bob=zero:1", "zero has no strength"),
        ("bob=boost bob=zero", "named twice"),
    ],
)
def test_what_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_contaminate(word, ALL)


@pytest.mark.parametrize(("kind", "factor"), [("sign_flip", -1.0), ("boost:3", 3.0), ("zero", 0.0)])
def test_an_update_attack_acts_on_the_change_in_product_space(tmp_path: Path, kind: str, factor: float) -> None:
    honest, bad = run(tmp_path / "honest"), run(tmp_path / "bad", contaminate=[f"bob={kind}"])
    assert same_bits(first(honest, "ada"), first(bad, "ada"))
    change = dense(first(honest, "bob")) - dense(honest.initial)
    assert relative(dense(first(bad, "bob")) + 1e-3, factor * change + dense(honest.initial) + 1e-3) < 1e-5
    assert bad.run.record.clients["bob"]["contaminated"] == kind
    assert "contaminated" not in bad.run.record.clients["ada"]
    assert bad.run.record.options["contaminate"] == [f"bob={kind}"]


def test_noise_has_the_change_s_norm_and_another_direction(tmp_path: Path) -> None:
    honest, bad = run(tmp_path / "honest"), run(tmp_path / "bad", contaminate=["bob=gaussian:2"])
    for module, own in first(honest, "bob").items():
        begin = honest.initial[module].dense(torch.float64)
        change = own.dense(torch.float64) - begin
        sent = first(bad, "bob")[module].dense(torch.float64) - begin
        assert float(sent.norm() / change.norm()) == pytest.approx(2.0, rel=0.2)  # but for what the rank cuts
        assert abs(float((sent * change).sum() / sent.norm() / change.norm())) < 0.7


@pytest.mark.parametrize("kind", ["sign_flip", "boost:4", "gaussian", "zero"])
def test_a_frozen_factor_stays_frozen_under_attack(tmp_path: Path, kind: str) -> None:
    trainer = run(tmp_path, aggregation="ffa", contaminate=[f"bob={kind}"])
    for module, factors in first(trainer, "bob").items():
        assert torch.equal(factors.A, trainer.initial[module].A)
    assert trainer.run.record.quarantined == {}


def test_wrong_data_are_trained_on(tmp_path: Path) -> None:
    size = len(models.tiny_tokenizer())
    write = sample_data.write_dolly
    clients = {
        name: load_examples(str(write(tmp_path / f"{name}.jsonl", 6, seed)))
        for seed, name in enumerate(("ada", "bob", "eve"))
    }
    more = {"processing_class": models.tiny_tokenizer()}
    trainers = {}
    for kind in ("", "bob=constant", "bob=constant:0.5"):
        folder = tmp_path / (kind or "honest").replace(":", "-")
        changes = {"contaminate": [kind]} if kind else {}
        trainers[kind] = models.federation(
            folder, clients, model=models.tiny_llama(vocab_size=size), more=more, **changes
        )
    rows = {kind: [trainer.clients["bob"].train[k]["labels"] for k in range(6)] for kind, trainer in trainers.items()}
    differing = {
        kind: sum(list(a) != list(b) for a, b in zip(rows[""], found, strict=True)) for kind, found in rows.items()
    }
    assert differing == {"": 0, "bob=constant": 6, "bob=constant:0.5": 3}
    same = [list(t.clients["ada"].train[0]["labels"]) for t in trainers.values()]
    assert same[0] == same[1] == same[2]


@pytest.mark.parametrize("kind", ["little", "sybils", "white-box"])
def test_attackers_who_know_the_others_change_what_the_server_reads_and_nothing_on_disk(
    tmp_path: Path, kind: str
) -> None:
    honest, bad = (
        run(tmp_path / "honest", num_rounds=1),
        run(tmp_path / "bad", num_rounds=1, contaminate=[f"bob={kind}"]),
    )
    for client in ("ada", "bob", "eve"):
        assert same_bits(first(honest, client), first(bad, client))
    sent = {u.client_id: u.state for u in bad.federation.updates(1, ["ada", "bob", "eve"])}
    assert same_bits(sent["ada"], first(bad, "ada"))
    assert relative(dense(sent["bob"]), dense(first(bad, "bob"))) > 0.1
    again = {u.client_id: u.state for u in bad.federation.updates(1, ["ada", "bob", "eve"])}
    assert same_bits(sent["bob"], again["bob"])
    updates = [ClientUpdate(client, state, bad.store.update(1, client).num_examples) for client, state in sent.items()]
    expected = aggregate(updates, "product_mean", target_rank=bad.rank)
    assert same_bits(bad.run.state, expected.state)
    assert bad.run.record.clients["bob"]["contaminated"] == kind


def test_a_resumed_rehearsal_is_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", num_rounds=3, contaminate=["bob=slow-drift"])
    run(tmp_path / "parts", num_rounds=2, contaminate=["bob=slow-drift"])
    resumed = run(tmp_path / "parts", num_rounds=3, contaminate=["bob=slow-drift"], resume_from="last")
    assert same_bits(whole.run.state, resumed.run.state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contaminate": ["bob=min-max:2"]}, "min-max has no strength"),
        ({"contaminate": ["bob=min-max"], "aggregation": "ffa"}, "aggregation ffa freezes one"),
    ],
)
def test_attacks_that_cannot_be(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        models.federation(tmp_path, **changes)


def test_a_client_that_is_none_of_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contaminate 'mal': is none of the clients \(ada, bob, eve\)"):
        models.federation(tmp_path, contaminate=["mal=boost"])
