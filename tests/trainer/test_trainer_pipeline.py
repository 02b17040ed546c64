"""The direction/magnitude pipeline: each stage trains its own part, says so, and can be run alone."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from models import federation, token_clients, token_examples, weight_files
from torch.testing import assert_close

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.dirmag import PARTS
from fedlora_hf.errors import ConfigError
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.stage_costs import stage_costs
from fedlora_hf.training.stages import (
    GLOBAL_PARTS,
    PERSONAL_PARTS,
    personal_stage,
    round_stage,
    total_rounds,
)

pytestmark = pytest.mark.usefixtures("bare_output")
CLIENTS = {"ada": 6, "bob": 6, "eve": 6}


def pipeline(folder: Path, **changes):
    changes = {"aggregation": "dirmag_mean", "num_rounds": 2, "personal_steps": 2, "personalise": "method", **changes}
    trainer = federation(folder, token_clients(CLIENTS, held_out=2), pipeline="fedlora_optimizer", **changes)
    trainer.train()
    return trainer


def test_the_global_stage_moves_the_direction_of_a_alone_and_sends_nothing_else(tmp_path):
    entries = pipeline(tmp_path).run.record.rounds
    assert [entry["stage"] for entry in entries] == ["federated", "federated", "global"]
    changed = entries[2]["changed"]
    assert changed["A.direction"] > 1e-6
    assert changed["A.magnitude"] < 1e-7
    assert changed["B.direction"] == pytest.approx(0, abs=1e-12)
    assert changed["B.magnitude"] == 0
    whole, global_part = entries[0]["bytes_up"]["ada"], entries[2]["bytes_up"]["ada"]
    A = sum(factors.A.numel() for factors in read_adapter(tmp_path)[0].values())
    assert global_part == 4 * A < whole


def test_the_personal_stage_moves_the_magnitude_of_b_alone(tmp_path):
    trainer = pipeline(tmp_path)
    for client in CLIENTS:
        personal = read_adapter(tmp_path / "clients" / client)[0]
        for module, shared in trainer.run.state.items():
            mine = personal[module].rescaled(shared.scale)
            assert torch.equal(mine.A, shared.A)
            cosine = torch.nn.functional.cosine_similarity(mine.B, shared.B, dim=1)
            assert_close(cosine.abs(), torch.ones_like(cosine))
            assert not torch.allclose(mine.B, shared.B, rtol=1e-3)


def test_contaminated_clients_do_not_reach_the_global_stage(tmp_path):
    clients = token_clients({f"c{n}": 6 for n in range(8)}, held_out=2)
    trainer = federation(
        tmp_path, clients, pipeline="fedlora_optimizer", aggregation="clair", num_rounds=1, personal_steps=0
    )
    update = trainer.train_client

    def boosted(client, number):
        sent = update(client, number)
        if client != "c3":
            return sent
        start = trainer.run.state
        state = {m: start[m] + (f - start[m]) * 1e3 for m, f in sent.state.items()}
        factors = {m: f.truncated(2, start[m].scale)[0] for m, f in state.items()}
        return type(sent)(client, type(sent.state)(factors), sent.num_examples, sent.metrics)

    trainer.train_client = boosted
    trainer.train()
    assert "c3" in trainer.run.record.rounds[0]["flagged"]
    assert trainer.run.record.rounds[1]["weights"]["c3"] == 0


def test_a_server_with_data_of_its_own_trains_the_global_stage_alone(tmp_path):
    trainer = federation(
        tmp_path,
        token_clients(CLIENTS, held_out=2),
        pipeline="fedlora_optimizer",
        aggregation="dirmag_mean",
        num_rounds=1,
        personal_steps=0,
        server_dataset="proxy",
        more={"server_dataset": token_examples(6, 9)},
    )
    trainer.train()
    entry = trainer.run.record.rounds[1]
    assert entry["cohort"] == []
    assert list(entry["train_loss"]) == ["server"]
    assert entry["changed"]["A.direction"] > 1e-6
    assert entry["changed"]["B.magnitude"] == 0


def test_a_stage_can_be_run_alone_from_an_earlier_adapter(tmp_path):
    first = pipeline(tmp_path / "first", global_rounds=0, personal_steps=0)
    again = pipeline(tmp_path / "again", num_rounds=0, personal_steps=0, initial_adapter=str(tmp_path / "first"))
    assert [entry["stage"] for entry in again.run.record.rounds] == ["global"]
    for module, factors in first.run.state.items():
        assert_close(again.initial[module].dense(), factors.dense())
        assert torch.equal(again.run.state[module].B, again.initial[module].B)


def test_the_personal_stage_can_be_run_alone_and_again(tmp_path):
    pipeline(tmp_path / "first", personal_steps=0)
    given = {"num_rounds": 0, "global_rounds": 0, "initial_adapter": str(tmp_path / "first")}
    for rate in (1e-2, 5e-2):
        again = pipeline(tmp_path / str(rate), personal_learning_rate=rate, **given)
        assert again.run.record.rounds == []
        assert [cost.stage for cost in stage_costs(again.run.record)] == ["personal"]
    slow, fast = (read_adapter(tmp_path / rate / "clients" / "ada")[0] for rate in ("0.01", "0.05"))
    start = read_adapter(tmp_path / "first")[0]
    assert all(0 < (slow[m] - start[m]).norm() < (fast[m] - start[m]).norm() for m in start)


def test_a_finished_run_goes_on_with_one_more_global_round(tmp_path):
    pipeline(tmp_path / "whole", global_rounds=2)
    pipeline(tmp_path / "parts", global_rounds=1)
    resumed = pipeline(tmp_path / "parts", global_rounds=2, resume_from="last")
    assert [entry["stage"] for entry in resumed.run.record.rounds] == ["federated", "federated", "global", "global"]
    assert weight_files(tmp_path / "parts") == weight_files(tmp_path / "whole")


def test_a_client_starts_with_nothing_of_who_trained_before_it(tmp_path):
    """B = 0 has no direction of its own: it must not have that of the last client either."""
    alone = federation(tmp_path / "alone", token_clients(CLIENTS), adapter="dirmag").train_client("eve", 1)
    trainer = federation(tmp_path / "last", token_clients(CLIENTS), adapter="dirmag")
    last = [trainer.train_client(client, 1) for client in ("ada", "bob", "eve")][-1]
    for module, factors in alone.state.items():
        assert torch.equal(factors.B, last.state[module].B)
        assert torch.equal(factors.A, last.state[module].A)


def test_the_record_counts_what_each_stage_costs_a_client_and_moves(tmp_path):
    trainer = pipeline(tmp_path)
    federated, shared, personal = stage_costs(RunRecord.load(tmp_path))
    state = trainer.run.state
    A = sum(factors.A.numel() for factors in state.values())
    B = sum(factors.B.numel() for factors in state.values())
    out, rank = sum(factors.B.shape[0] for factors in state.values()), sum(factors.rank for factors in state.values())
    parts = 4 * (A + B + out + rank)  # directions and magnitudes
    assert (federated.rounds, federated.up, federated.down, federated.stored) == ("1 to 2", 2 * parts, 2 * parts, parts)
    assert (shared.rounds, shared.parts, shared.up, shared.stored) == ("3", "A.direction", 4 * A, 4 * A)
    assert (personal.parts, personal.up, personal.down, personal.stored) == ("B.magnitude", 0, 0, 4 * out)
    assert personal.moved["B.magnitude"] > 1e-3
    # A magnitude that became negative is a direction turned round, in the canonical form that is compared.
    assert max(personal.moved["A.direction"], personal.moved["A.magnitude"]) < 1e-6
    card = (tmp_path / "README.md").read_text()
    assert f"| personal | after | B.magnitude | 0 | 0 | {4 * out} |" in card


def test_the_server_sends_what_it_trained_and_gets_nothing(tmp_path):
    changes = {"num_rounds": 1, "personal_steps": 0, "server_dataset": "proxy", "aggregation": "dirmag_mean"}
    more = {"server_dataset": token_examples(6, 9)}
    trainer = federation(tmp_path, token_clients(CLIENTS), pipeline="fedlora_optimizer", more=more, **changes)
    trainer.train()
    entry = trainer.run.record.rounds[1]
    assert entry["bytes_up"] == {}
    A = sum(factors.A.numel() for factors in trainer.run.state.values())
    assert entry["bytes_down"] == dict.fromkeys(CLIENTS, 4 * A)


def test_without_a_pipeline_nothing_of_it_is_left(tmp_path):
    args = federation(tmp_path).args
    assert total_rounds(args) == args.num_rounds
    assert args.personal_steps == 0
    assert personal_stage(args).parts == ("A", "B")
    with pytest.raises(ConfigError, match="server_dataset"):
        federation(tmp_path, server_dataset="proxy")


def test_stages_name_the_parts_of_the_paper(tmp_path):
    args = federation(tmp_path, pipeline="fedlora_optimizer", num_rounds=1).args
    assert round_stage(args, ("A", "B"), 1).parts == ("A", "B")
    assert round_stage(args, ("A", "B"), 2).parts == GLOBAL_PARTS == ("A.direction",)
    assert personal_stage(args).parts == PERSONAL_PARTS == ("B.magnitude",)
    assert set(GLOBAL_PARTS + PERSONAL_PARTS) < set(PARTS)
