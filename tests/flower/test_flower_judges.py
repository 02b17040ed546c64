"""Clients judge others' updates on their own validation data, when the run says so; their word is bounded."""
# SPDX-License-Identifier: Apache-2.0

import logging
from pathlib import Path

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from local_grid import Config, plain, run

from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.flower.exchange import Reply
from fedlora_hf.flower.judging import JUDGE, LOSSES, read_losses
from fedlora_hf.flower.node import _items
from fedlora_hf.rounds.judges import BROKEN

PART = {"0": 0, "1": "ada"}


def answer(losses: dict[str, object]) -> Reply:
    return Reply(7, RecordDict({LOSSES: MetricRecord(losses)}))  # type: ignore[arg-type]


def test_losses_are_read_under_the_keys_that_were_asked_for() -> None:
    assert read_losses(answer({"0": 2.5, "1": 3}), PART) == {0: 2.5, "ada": 3.0}


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ({"0": 2.5}, "1 losses for 2 adapters"),
        ({"0": 2.5, "1": 2.5, "2": 2.5}, "3 losses for 2 adapters"),
        ({"0": 2.5, "ada": 2.5}, "2 losses for 2 adapters: must be one for each it was sent, and no other"),
        ({"0": 2.5, "1": float("nan")}, "loss of adapter 1 is nan: must be from 0 to 1e"),
        ({"0": 2.5, "1": float("inf")}, "loss of adapter 1 is inf"),
        ({"0": -1e-9, "1": 2.5}, "loss of adapter 0 is -1e-09"),
        ({"0": 2 * BROKEN, "1": 2.5}, "loss of adapter 0 is 2000000"),
        ({"0": [2.5], "1": 2.5}, "loss of adapter 0 is"),
    ],
)
def test_a_lying_judge_is_not_heard_at_all(losses: dict[str, object], reason: str) -> None:
    with pytest.raises(UpdateError, match=reason) as refused:
        read_losses(answer(losses), PART)
    assert "\n" not in str(refused.value)


def test_no_answer_and_no_losses_are_refused() -> None:
    for reply in (Reply(7, None, "the node is gone"), Reply(7, RecordDict())):
        with pytest.raises(UpdateError, match=r"node 7: the node is gone|0 losses for 2 adapters"):
            read_losses(reply, PART)


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(config: Config) -> Config:
    nodes = {"num_clients": 6, "min_nodes": 6}
    return {**config, **nodes, "aggregation": "clair", "num_rounds": 1, "local_steps": 6, "functional_judges": 5}


SIX = {100 + place: {"partition-id": place, "num-partitions": 6} for place in range(6)}


@pytest.mark.usefixtures("as_server", "bare_output")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_clients_judge_as_fedlora_train_does_and_are_told(
    judged: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everybody judges, so the panel is the same; its losses are."""
    with caplog.at_level(logging.INFO, "flwr"):
        done, grid = run(judged, nodes=SIX)
    here = plain(judged, tmp_path / "plain").run.record
    mine, theirs = done.record.rounds[0], here.rounds[0]
    assert len(theirs["effects"]) == 6
    for client, effect in theirs["effects"].items():
        assert mine["effects"][client] == pytest.approx(effect, rel=1e-4, abs=1e-6)
        here_said, there_said = here.clients[client]["evidence"], done.record.clients[client]["evidence"]
        assert there_said["functional"]["score"] == pytest.approx(here_said["functional"]["score"], rel=1e-3, abs=1e-6)
    assert mine["judging"]["judges"] == theirs["judging"]["judges"]
    assert min(mine["judging"]["bytes_down"].values()) > 6 * mine["bytes_up"]["client-00"]
    judges = [node for node, kind in grid.sent if kind == JUDGE]
    assert len(judges) == 2 * len(mine["judging"]["judges"])  # nine adapters, eight of them in the first message
    assert "client-00: up to 5 other clients are sent its update to score, and could keep it" in caplog.text
    assert "adapters made of other clients' updates, and could keep a copy" in caplog.text


@pytest.mark.usefixtures("as_server", "bare_output")
@pytest.mark.parametrize("asked", [{}, {"functional_judges": "auto"}, {"functional_judges": 0}])
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_off_unless_the_run_names_a_number(config: Config, asked: Config) -> None:
    done, grid = run({**config, "aggregation": "clair", "num_rounds": 1, **asked})
    assert JUDGE not in {kind for _, kind in grid.sent}
    assert "judging" not in done.record.rounds[0]


@pytest.mark.usefixtures("as_server", "bare_output")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_a_judge_that_lies_about_a_loss_is_dropped_and_recorded(judged: Config) -> None:
    def lie(node: int, reply: Message) -> Message:
        if node == 101 and LOSSES in reply.content and "global" not in reply.content:
            reply.content[LOSSES]["0"] = float("nan")
        return reply

    done, _ = run(judged, lie, SIX)
    assert "loss of adapter 0 is nan" in done.record.clients["client-01"]["dropped"]["judging"]
    assert "client-01" not in done.record.rounds[0]["judging"]["judges"]
    assert done.record.rounds[0]["effects"]["client-00"]["judges"] == 4


@pytest.mark.usefixtures("as_server", "bare_output")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_a_node_that_will_not_be_judged_takes_no_part(judged: Config) -> None:
    done, _ = run(judged, nodes={**SIX, 102: {**SIX[102], "judging": False}})
    assert "judging=false: this run sends a client's updates to other clients" in done.record.quarantined["client-02"]


def test_a_node_cannot_change_who_judges() -> None:
    with pytest.raises(ConfigError, match="functional_judges=0: is the server's alone"):
        _items({"num_rounds": 2}, {"client_id": "ada", "functional_judges": 0})
