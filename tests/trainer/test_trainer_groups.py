"""Several global adapters in a run: who starts from which, what is left behind, resuming to the bit, refusals."""
# SPDX-License-Identifier: Apache-2.0

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from models import federation, weight_files

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.hub.card import render_card
from fedlora_hf.hub.plan import make_plan
from fedlora_hf.hub.public import public_record
from fedlora_hf.record.record import RunRecord, check_complete
from fedlora_hf.rounds.groups import read_groups, write_groups
from fedlora_hf.using.finished import Finished

MANY, FEW = [f"many-{number}" for number in range(5)], ["few-0", "few-1"]
SETTINGS = {
    "aggregation": "clair",
    "clusters": "auto",
    "local_steps": 4,
    "learning_rate": 2e-2,
    "num_rounds": 2,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def _cycles(first: int, count: int, seed: int) -> datasets.Dataset:
    """Sentences that count upwards, round and round, within eight tokens from `first` on."""
    starts = torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [[first + (start + place) % 8 for place in range(10)] for start in starts]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def clients() -> dict[str, dict[str, datasets.Dataset]]:
    """Five clients whose sentences are of some tokens, and two whose are of others; each with held-out ones."""
    where = dict.fromkeys(MANY, 2) | dict.fromkeys(FEW, 40)
    return {
        name: {
            kind: _cycles(first, count, 100 * place + count)
            for kind, count in (("train", 12), ("validation", 4), ("test", 5))
        }
        for place, (name, first) in enumerate(where.items())
    }


def run_in(folder: Path | str, **changes: Any) -> FederatedTrainer:
    trainer = federation(folder, clients(), **{**SETTINGS, **changes})
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups") / "out"
    run_in(folder)
    return folder


def test_every_group_has_an_adapter_that_its_clients_start_from(finished: Path) -> None:
    record = RunRecord.load(finished)
    for entry in record.rounds:
        assert {name: facts["clients"] for name, facts in entry["groups"].items()} == {"1": MANY, "2": FEW}
        assert entry["groups"]["2"]["since"] == 1
        assert entry["flagged"] == []
    assert {client: facts["group"] for client, facts in record.clients.items()} == dict.fromkeys(
        MANY, "1"
    ) | dict.fromkeys(FEW, "2")
    assert "look alike" in record.diagnosis["groups"]
    first, second = (weight_files(finished / "rounds" / str(number)) for number in (1, 2))
    # The output folder has the last round's, and each group's is its own.
    last = weight_files(finished)
    assert last["groups/2/adapter_model.safetensors"] == second["groups/2/adapter_model.safetensors"]
    assert len({last["adapter_model.safetensors"], last["groups/2/adapter_model.safetensors"]}) == 2
    assert second["groups/2/adapter_model.safetensors"] != first["groups/2/adapter_model.safetensors"]
    # The few get from their group what one adapter for all does not give them.
    few = [record.clients[client]["metrics"] for client in FEW]
    assert all(found["global"]["loss"] < found["before"]["loss"] - 0.05 for found in few)


def test_a_run_goes_on_to_the_bit(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "rounds" / "2")
    for name in ("groups", "clients"):
        shutil.rmtree(copy / name)
    trainer = federation(copy, clients(), **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    assert weight_files(copy) == weight_files(finished)
    assert RunRecord.load(copy).rounds[-1]["groups"] == RunRecord.load(finished).rounds[-1]["groups"]


def test_a_round_without_its_groups_is_damaged(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "rounds" / "2" / "groups")
    store = federation(copy, clients(), **SETTINGS).store
    assert store.damage(2) is not None
    assert store.damage(1) is None


@pytest.mark.parametrize(
    "groups",
    [{"1": {"since": 0}}, {"../x": {"clients": [], "since": 0}}, {"2": {"clients": ["nobody"], "since": 0}}, {"2": []}],
)
def test_a_record_with_groups_that_are_none_is_not_gone_on_from(finished: Path, groups: dict[str, Any]) -> None:
    record = RunRecord.load(finished)
    record.rounds[-1]["groups"] = groups
    with pytest.raises(RecordError, match="round 2: holds groups that are none"):
        check_complete(record, 2, "here")
    public_record(record)  # and says nothing that breaks what only reads it
    render_card(record)


def test_a_finished_run_is_used_and_measured_again(finished: Path, tmp_path: Path) -> None:
    run = Finished.read(finished)
    assert run.groups == ["2"]
    assert [adapter.name for adapter in run.adapters(groups=["2"])] == ["group 2"]
    assert [adapter.name for adapter in run.adapters(groups=["1"])] == ["global"]
    assert [adapter.name for adapter in run.adapters(everything=True)][:3] == ["base", "global", "group 2"]
    with pytest.raises(ConfigError, match=r"group='7': is no group of .*; known are 1, 2"):
        run.adapters(groups=["7"])
    trainer = federation(finished, clients(), **SETTINGS)
    trainer._stand_after(run.record)
    again = trainer.loop.transport.score(trainer.run)
    for client in FEW:
        assert again[client]["loss"] == run.record.clients[client]["metrics"]["global"]["loss"]
    trainer.loop.write(str(tmp_path / "elsewhere"), report=False)
    assert Finished.read(tmp_path / "elsewhere").groups == ["2"]


def test_what_a_push_sends_of_groups(finished: Path) -> None:
    record = RunRecord.load(finished)
    plan = make_plan(finished, record, "ada/run", with_clients=False)
    assert {"groups/2/adapter_config.json", "groups/2/adapter_model.safetensors"} <= set(plan)
    public = public_record(record)
    assert public.rounds[-1]["groups"] == {"1": {"members": 5}, "2": {"members": 2}}
    assert not any(client in public.to_json() for client in (*MANY, *FEW))
    card = render_card(public, "ada/run")
    assert "groups/2 (2 clients)" in card
    assert "look alike in their updates" in card
    assert "groups/2" in (finished / "README.md").read_text()
    page = (finished / "report" / "index.html").read_text()
    assert "Each group has a global adapter of its own" in page
    assert "look alike in their updates" in page


def test_a_run_of_one_group_takes_the_folder_of_an_earlier_one_away(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert list(read_groups(copy)) == ["2"]
    write_groups(copy, {"1": read_groups(copy)["2"]}, {})
    assert not (copy / "groups").exists()
    assert Finished.read(copy).groups == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregation": "fedavg"}, "clusters=auto: has an effect with aggregation clair only"),
        ({"clusters": "3"}, "clusters=3: must be 1 or auto"),
        ({"clients_per_round": 4}, "clusters=auto: has no effect beside clients_per_round"),
        ({"server_optimizer": "avgm"}, "with server_optimizer none only"),
        ({"functional_judges": 2}, "with functional_judges 0 or auto only"),
        ({"pipeline": "fedlora_optimizer"}, "with pipeline none only"),
        ({"contaminate": ["few-0=sybils"]}, "contaminate few-0=sybils: its rehearsal knows one start for all"),
    ],
)
def test_what_groups_do_not_go_with_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        FederatedConfig(output_dir=str(tmp_path), **{"aggregation": "clair", "clusters": "auto", **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_number_may_be_a_number(tmp_path: Path) -> None:
    assert FederatedConfig(output_dir=str(tmp_path), clusters=1).clusters == "1"
