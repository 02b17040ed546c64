"""What must hold before a run goes on, for `fedlora train` and for Flower alike: both go through the same loop."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from local_grid import NODES, Config, LocalGrid, plain

from fedlora_hf.adapter.files import read_adapter, write_adapter
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.settings import read
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.training.local import LocalTraining

pytestmark = pytest.mark.usefixtures("as_server", "bare_output")
Run = Callable[..., Any]


class Killed(BaseException):
    """What nothing catches."""


def by_trainer(config: Config) -> None:
    flags = [f"--resume_from={config['resume_from']}"] if "resume_from" in config else []
    plain({name: value for name, value in config.items() if name != "resume_from"}, Path(config["output_dir"]), *flags)


def by_flower(config: Config) -> None:
    FlowerRun(LocalGrid(NODES, config), *read(config)).train()


@pytest.fixture(params=[by_trainer, by_flower], ids=["trainer", "flower"])
def run(request: pytest.FixtureRequest, config: Config) -> Run:
    """Run the configuration with these changes, in its output folder."""
    return lambda **changes: request.param({**config, **changes})


@pytest.fixture
def out(config: Config) -> Path:
    return Path(config["output_dir"])


@pytest.fixture
def killed_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Start a run that dies when a round has all its updates and is not committed yet."""

    def start(number: int) -> None:
        commit = RoundStore.commit

        def killed(store: RoundStore, now: int, *args: Any) -> None:
            if now == number:
                raise Killed
            commit(store, now, *args)

        with monkeypatch.context() as patch:
            patch.setattr(RoundStore, "commit", killed)
            with pytest.raises(Killed):
                run()

    return start


def test_an_open_first_round_goes_on_with_the_updates_it_has(
    run: Run, killed_in: Callable[[int], None], out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(output_dir=str(tmp_path / "whole"))
    killed_in(1)
    (out / ".run.json.0123456789abcdef.tmp").write_text("left by a process that was killed")
    trained: list[int] = []
    steps = LocalTraining.run
    monkeypatch.setattr(LocalTraining, "run", lambda training: (trained.append(training.seed), steps(training))[1])
    run(resume_from="last")
    assert len(trained) == len(NODES)  # round 2 alone
    assert models.weight_files(out) == models.weight_files(tmp_path / "whole")
    assert not list(out.glob("**/.*"))


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"aggregation": "median"}, {"lora_r": 3}, {"seed": 7}])
def test_an_open_first_round_of_other_options_is_not_gone_on_from(
    run: Run, killed_in: Callable[[int], None], out: Path, change: dict[str, Any]
) -> None:
    killed_in(1)
    before = models.weight_files(out)
    (name,) = change
    with pytest.raises(ConfigError, match=rf"{name}[=:].*; (the run|pass)"):
        run(resume_from="last", **change)
    assert models.weight_files(out) == before != {}


def test_a_committed_round_of_other_options_is_not_gone_on_from(run: Run, out: Path) -> None:
    run(num_rounds=1)
    before = models.weight_files(out)
    with pytest.raises(ConfigError, match=r"learning_rate=0\.5: the run to resume has 0\.01"):
        run(resume_from="last", learning_rate=0.5)
    assert models.weight_files(out) == before


def test_an_adapter_of_another_model_is_not_gone_on_from(run: Run, out: Path) -> None:
    run(num_rounds=1)
    place = out / "rounds" / "1"
    state, config = read_adapter(place)
    state = state.in_memory()
    write_adapter(place, state.restricted(sorted(state)[1:]), config)
    with pytest.raises(RecordError, match=r"rounds/1: module .* is in one of them only; its adapter is not of this"):
        run(resume_from="last")


def test_an_unfinished_run_is_not_thrown_away_untold(run: Run, killed_in: Callable[[int], None], out: Path) -> None:
    killed_in(2)
    before = models.weight_files(out)
    with pytest.raises(ConfigError, match=r"holds an unfinished run \(round 1 is committed\)"):
        run()
    assert models.weight_files(out) == before


def test_a_finished_run_may_be_run_anew(run: Run, out: Path) -> None:
    run()
    before = models.weight_files(out)
    run()
    assert models.weight_files(out) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": "fedavg", "scaffold": True},
        {"aggregation": "fedex"},
        {"aggregation": "rolora"},
        {"aggregation": "fedavg", "server_optimizer": "yogi"},
        {"aggregation": "fltrust", "server_dataset": ""},
    ],
)
def test_what_spans_rounds_gives_the_same_bits_on_both(config: Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Control variates, a residual under the trained factors, factors in turn."""
    if "server_dataset" in changes:
        changes = {**changes, "server_dataset": config["dataset"]}
    found = {}
    for name, engine in (("trainer", by_trainer), ("flower", by_flower)):
        engine({**config, **changes, "output_dir": str(tmp_path / name)})
        files = models.weight_files(tmp_path / name)
        found[name] = {path: data for path, data in files.items() if "clients" not in path}
    assert found["trainer"] == found["flower"] != {}
