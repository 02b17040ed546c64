"""The ready project under trainers/flower in Flower's own simulation engine leaves what `fedlora train` leaves."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import plain

from fedlora_hf.adapter.files import read_adapter
from scripts.checks.flower_daemons import Daemons

PROJECT = Path(__file__).resolve().parents[2]
SIMULATED = {"num-supernodes": 4, "client-resources-num-cpus": 1, "init-args-num-cpus": 2}


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A SuperLink for simulations, and what is needed to submit runs to it."""
    with Daemons(tmp_path_factory.mktemp("superlink"), {"OMP_NUM_THREADS": "1"}) as daemons:
        daemons.superlink("--insecure", "--simulation")
        yield daemons


@pytest.mark.slow
@pytest.mark.usefixtures("bare_output")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
@pytest.mark.parametrize("method", ["fedavg", "clair", "fedsa"])
def test_the_same_seeds_and_cohort_give_the_same_adapters(
    method: str, superlink: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    """Two rounds, to 1e-6. Of fedsa the clients' adapters: their B lasts on their nodes from message to message."""
    config |= {"aggregation": method, "personalise": "method" if method == "fedsa" else "select"}
    status = superlink.wait(superlink.submit(PROJECT / "trainers" / "flower", config, SIMULATED), 500)
    assert status == "finished:completed", superlink.log("superlink")[-3000:]
    plain(config, tmp_path / "plain")
    folders = [Path("clients") / f"client-0{number}" for number in range(4)] + [Path()] * (method != "fedsa")
    for folder in folders:
        (mine, _), (theirs, _) = (read_adapter(tmp_path / name / folder) for name in ("flower", "plain"))
        for module in theirs:
            torch.testing.assert_close(mine[module].A, theirs[module].A, atol=1e-6, rtol=0)
            torch.testing.assert_close(mine[module].B, theirs[module].B, atol=1e-6, rtol=0)
    here, there = (
        json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8")) for name in ("flower", "plain")
    )
    assert here["rounds"][-1]["collaborative"] == there["rounds"][-1]["collaborative"]
    assert (tmp_path / "flower" / "report" / "index.html").is_file()
    assert (tmp_path / "flower" / "rounds" / "2").is_dir()
    assert len({facts["node"] for facts in here["clients"].values()}) == 4
    if method == "fedsa":  # the common B never changes: from round 2 on A alone goes down
        first, second = (entry["bytes_down"] for entry in here["rounds"])
        assert all(second[client] < 0.7 * first[client] for client in first)


@pytest.mark.slow
@pytest.mark.usefixtures("bare_output")
def test_rounded_changes_and_judges_elsewhere_in_separate_processes(
    superlink: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    more = {"aggregation": "clair", "num_rounds": 1, "wire_dtype": "int8"}
    run = superlink.submit(
        PROJECT / "trainers" / "flower",
        {**config, **more, "flags": f"{config['flags']} --functional_judges 3"},
        SIMULATED,
    )
    assert superlink.wait(run, 500) == "finished:completed", superlink.log("superlink")[-3000:]
    record = json.loads((tmp_path / "flower" / "run.json").read_text(encoding="utf-8"))
    entry = record["rounds"][0]
    assert entry["quarantined"] == {}
    assert all(up < 0.4 * entry["bytes_down"][client] for client, up in entry["bytes_up"].items())
    assert set(entry["judging"]["judges"]) <= set(entry["cohort"])
    assert len(entry["effects"]) == 4
