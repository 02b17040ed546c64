"""A run that was interrupted goes on to the same bits, from a committed round or from the middle of an open one."""
# SPDX-License-Identifier: Apache-2.0

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from fedlora_hf import FederatedTrainer
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.update import ClientUpdate

# Three clients of a few steps each are too few for clair's weights to settle, which it says.
pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]


class Killed(BaseException):
    """As a signal would be: nothing in the trainer may catch it."""


def trainer_in(folder: Path, **changes: Any) -> FederatedTrainer:
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
    return models.federation(folder, clients, **{"num_rounds": 3, **changes})


def counted(trainer: FederatedTrainer, die_at: tuple[int, str] | None = None) -> list[tuple[int, str]]:
    """Note every (round, client) that is trained; die at one of them."""
    calls: list[tuple[int, str]] = []
    train_client = trainer.train_client

    def noted(client_id: str, number: int) -> ClientUpdate:
        if (number, client_id) == die_at:
            raise Killed
        calls.append((number, client_id))
        return train_client(client_id, number)

    trainer.train_client = noted  # type: ignore[method-assign]
    return calls


def numbers(folder: Path) -> dict[str, Any]:
    """run.json without what the clock says and what may differ between a run and its resumption."""
    record = json.loads((folder / "run.json").read_text())
    del record["created"], record["scorings"]
    for entry in record["rounds"]:
        del entry["seconds"]
    for name in ("num_rounds", "resume_from"):
        record["options"].pop(name, None)
    return record


@pytest.mark.parametrize("method", ["fedavg", "fedsa", "stacking", "clair"])
def test_going_on_from_a_committed_round_gives_the_same_bits(tmp_path: Path, method: str) -> None:
    trainer_in(tmp_path / "whole", aggregation=method).train()
    trainer_in(tmp_path / "parts", aggregation=method, num_rounds=1).train()
    resumed = trainer_in(tmp_path / "parts", aggregation=method, resume_from="last")
    calls = counted(resumed)
    resumed.train()
    assert calls == [(number, client) for number in (2, 3) for client in ("ada", "bob", "eve")]
    assert models.weight_files(tmp_path / "parts") == models.weight_files(tmp_path / "whole")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_metrics_of_rounds_before_are_kept(tmp_path: Path) -> None:
    trainer_in(tmp_path / "whole", evaluate_rounds=True).train()
    trainer_in(tmp_path / "parts", evaluate_rounds=True, num_rounds=1).train()
    trainer_in(tmp_path / "parts", evaluate_rounds=True, resume_from="last").train()
    assert all(entry["metrics"]["global"]["loss"] > 0 for entry in numbers(tmp_path / "parts")["rounds"])
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run that died in round 2, when two of its three clients were done."""
    trainer = trainer_in(tmp_path / "parts")
    counted(trainer, die_at=(2, "eve"))
    with pytest.raises(Killed):
        trainer.train()
    return tmp_path / "parts"


def test_finished_clients_of_an_open_round_are_not_trained_again(tmp_path: Path, interrupted: Path) -> None:
    trainer_in(tmp_path / "whole").train()
    resumed = trainer_in(interrupted)
    calls = counted(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert calls == [(2, "eve"), (3, "ada"), (3, "bob"), (3, "eve")]
    assert models.weight_files(interrupted) == models.weight_files(tmp_path / "whole")
    assert not list(interrupted.glob("**/.*"))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "update.json"])
def test_a_client_left_damaged_in_an_open_round_is_trained_again(tmp_path: Path, interrupted: Path, file: str) -> None:
    trainer_in(tmp_path / "whole").train()
    damaged = interrupted / "rounds" / ".open-2" / "clients" / "bob" / file
    damaged.write_bytes(damaged.read_bytes()[:-40])
    resumed = trainer_in(interrupted, resume_from="last")
    calls = counted(resumed)
    resumed.train()
    assert calls == [(2, "bob"), (2, "eve"), (3, "ada"), (3, "bob"), (3, "eve")]
    assert models.weight_files(interrupted) == models.weight_files(tmp_path / "whole")


def test_going_back_to_an_earlier_round(tmp_path: Path) -> None:
    trainer_in(tmp_path / "run", keep_rounds=0).train()
    before = models.weight_files(tmp_path / "run")
    again = trainer_in(tmp_path / "run", keep_rounds=0, resume_from="1")
    calls = counted(again)
    again.train()
    assert len(calls) == 6
    assert models.weight_files(tmp_path / "run") == before


def test_a_finished_run_is_only_evaluated_again(tmp_path: Path) -> None:
    trainer_in(tmp_path).train()
    before, record = models.weight_files(tmp_path), numbers(tmp_path)
    again = trainer_in(tmp_path, resume_from="last")
    calls = counted(again)
    again.train()
    assert calls == []
    assert models.weight_files(tmp_path) == before
    assert numbers(tmp_path) == record


@pytest.mark.parametrize("kept", [2, 3])
def test_every_round_that_is_kept_can_be_gone_on_from(tmp_path: Path, kept: int) -> None:
    """fedsa needs each client's B, which may be older than the rounds that are kept."""
    options: dict[str, Any] = {
        "aggregation": "fedsa",
        "clients_per_round": 1,
        "num_rounds": 8,
        "local_steps": 1,
        "keep_rounds": kept,
        "personalise": "method",
    }
    trainer = trainer_in(tmp_path / "run", **options)
    trainer.train()
    before = models.weight_files(tmp_path / "run")["adapter_model.safetensors"]
    for number in range(8 - kept + 1, 8):
        shutil.copytree(tmp_path / "run", tmp_path / str(number))
        trainer_in(tmp_path / str(number), **options, resume_from=str(number)).train()
        assert models.weight_files(tmp_path / str(number))["adapter_model.safetensors"] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate=0.5: the run to resume has 0.01"),
        ({"aggregation": "median"}, "aggregation='median': the run to resume has 'fedavg'"),
        ({"seed": 7}, "seed: 7; the run to resume has 42"),
        ({"lora_r": 4}, "lora_r=4: the run to resume has 2"),
    ],
)
def test_another_run_is_not_a_resumption(
    tmp_path: Path, interrupted: Path, changes: dict[str, Any], message: str
) -> None:
    before = models.weight_files(interrupted)
    with pytest.raises(ConfigError) as caught:
        trainer_in(interrupted, resume_from="last", **changes).train()
    assert message in str(caught.value)
    assert models.weight_files(interrupted) == before


def test_other_clients_are_not_a_resumption(interrupted: Path) -> None:
    other = models.federation(
        interrupted, models.token_clients({"ada": 4, "kim": 6}, held_out=2), num_rounds=3, resume_from="last"
    )
    with pytest.raises(ConfigError, match=r"clients: .*kim"):
        other.train()


def test_an_unfinished_run_is_not_thrown_away_untold(interrupted: Path) -> None:
    before = models.weight_files(interrupted)
    with pytest.raises(ConfigError, match=r"holds an unfinished run \(round 1 is committed\)") as caught:
        trainer_in(interrupted).train()
    assert "--resume_from last" in str(caught.value)
    assert models.weight_files(interrupted) == before


def test_a_finished_run_may_be_run_anew(tmp_path: Path) -> None:
    trainer_in(tmp_path).train()
    before = models.weight_files(tmp_path)
    trainer = trainer_in(tmp_path)
    calls = counted(trainer)
    trainer.train()
    assert len(calls) == 9
    assert models.weight_files(tmp_path) == before


@pytest.mark.parametrize("where", ["9", "0", "first", "-1"])
def test_a_round_that_is_not_there(tmp_path: Path, interrupted: Path, where: str) -> None:
    with pytest.raises(ConfigError, match=r"must be 'last' or a committed round \(1\)"):
        trainer_in(interrupted, resume_from=where).train()


def test_resuming_where_nothing_is_begins(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, num_rounds=1, resume_from="last")
    calls = counted(trainer)
    trainer.train()
    assert len(calls) == 3


@pytest.mark.parametrize(
    "file", ["run.json", "adapter_config.json", "adapter_model.safetensors", "clients/bob/adapter_model.safetensors"]
)
def test_a_last_round_cut_short_is_run_again_from_the_one_before(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_in(tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    damaged = tmp_path / "cut" / "rounds" / "3" / file
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(RecordError, match=r"rounds/3.*; pass --resume_from last for the last round that is whole"):
        trainer_in(tmp_path / "cut", resume_from="3").train()
    resumed = trainer_in(tmp_path / "cut", resume_from="last", disable_tqdm=False)
    calls = counted(resumed)
    resumed.train()
    assert calls == [(3, client) for client in ("ada", "bob", "eve")]
    assert "going on from round 2, the last that is whole: " in caplog.text
    assert models.weight_files(tmp_path / "cut") == models.weight_files(tmp_path / "whole")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def flipped(place: Path) -> None:
    path = place / "clients" / "bob" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x20
    path.write_bytes(content)


def zeroed(place: Path) -> None:
    path = place / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def swapped(place: Path) -> None:
    shutil.copy(place / "clients/ada/adapter_model.safetensors", place / "clients/bob/adapter_model.safetensors")


def verdict(place: Path) -> None:
    record = json.loads((place / "run.json").read_text())
    record["flagged"] = record["rounds"][-1]["flagged"] = ["eve"]
    (place / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("change", [flipped, zeroed, swapped, verdict])
def test_a_round_whose_contents_were_changed_is_not_resumed_from(
    tmp_path: Path, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_in(tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "changed")
    change(tmp_path / "changed" / "rounds" / "3")
    with pytest.raises(RecordError, match="is not the file that was written: its sha256 differs"):
        trainer_in(tmp_path / "changed", resume_from="3").train()
    trainer_in(tmp_path / "changed", resume_from="last").train()
    assert "going on from round 2" in caplog.text
    assert models.weight_files(tmp_path / "changed") == models.weight_files(tmp_path / "whole")


def test_other_data_or_another_base_is_not_gone_on_with(tmp_path: Path) -> None:
    trainer_in(tmp_path, num_rounds=1).train()
    other = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
    ids = [row["input_ids"] for row in other["bob"]["train"]]
    other["bob"]["train"] = Dataset.from_dict({"input_ids": ids[::-1], "labels": ids[::-1]})
    with pytest.raises(ConfigError, match="data: the clients' examples are not those of the run to resume"):
        models.federation(tmp_path, other, num_rounds=3, resume_from="last").train()
    base = models.tiny_llama()
    next(base.parameters()).data.mul_(1.5)
    with pytest.raises(ConfigError, match="base: the base model's weights are not those of the run to resume"):
        trainer_in(tmp_path, resume_from="last", model=base).train()


def test_where_no_round_is_whole_nothing_is_thrown_away(tmp_path: Path) -> None:
    trainer_in(tmp_path).train()
    for number in (2, 3):
        (tmp_path / "rounds" / str(number) / "run.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecordError, match=r"rounds/3: run\.json .*; no earlier round can be resumed either"):
        trainer_in(tmp_path, resume_from="last").train()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that died in its first round, when one client was done."""
    trainer = trainer_in(tmp_path / "parts")
    counted(trainer, die_at=(1, "bob"))
    with pytest.raises(Killed):
        trainer.train()
    return tmp_path / "parts"


def test_a_first_round_is_gone_on_with_by_the_same_run_alone(tmp_path: Path, begun: Path) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate=0\.5: the run to resume has 0\.01"):
        trainer_in(begun, resume_from="last", learning_rate=0.5).train()
    trainer_in(tmp_path / "whole").train()
    resumed = trainer_in(begun, resume_from="last")
    calls = counted(resumed)
    resumed.train()
    assert calls[:2] == [(1, "bob"), (1, "eve")]
    assert models.weight_files(begun) == models.weight_files(tmp_path / "whole")


def test_a_run_begun_anew_takes_nothing_from_the_first_round_of_another(begun: Path) -> None:
    trainer = trainer_in(begun, learning_rate=0.5)
    calls = counted(trainer)
    trainer.train()
    assert len(calls) == 9


def test_a_refused_resumption_removes_nothing(tmp_path: Path) -> None:
    trainer_in(tmp_path, keep_rounds=0).train()
    with pytest.raises(ConfigError, match=r"learning_rate=0\.5"):
        trainer_in(tmp_path, resume_from="1", learning_rate=0.5, keep_rounds=0).train()
    assert trainer_in(tmp_path).store.committed() == [1, 2, 3]


def test_what_a_killed_process_left_is_swept(tmp_path: Path, interrupted: Path) -> None:
    trainer_in(tmp_path / "whole").train()
    for place in (".", "rounds", "rounds/.open-2", "rounds/.open-2/clients"):
        (interrupted / place / ".run.json.4711.tmp").write_text("half")
        (interrupted / place / ".bob.gone").mkdir()
        (interrupted / place / ".bob.gone" / "adapter_model.safetensors").write_text("half")
    trainer_in(interrupted, resume_from="last").train()
    assert not list(interrupted.rglob(".*"))
    assert models.weight_files(interrupted) == models.weight_files(tmp_path / "whole")
