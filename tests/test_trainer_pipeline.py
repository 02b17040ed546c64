"""The direction/magnitude pipeline: each stage trains its own part, says so, and can be run alone."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from models import federation, token_clients, token_examples
from torch.testing import assert_close

from fedlora_hf.dirmag import PARTS
from fedlora_hf.errors import ConfigError
from fedlora_hf.files import read_adapter
from fedlora_hf.stages import GLOBAL_PARTS, PERSONAL_PARTS, personal_stage, round_stage, total_rounds

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
