"""Who speaks for whom: with a roster file, without one, and where a run goes on."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from local_grid import NODES, Config, LocalGrid

from fedlora_hf.errors import ConfigError, RoundError
from fedlora_hf.flower import roster as rosters
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.roster import Roster
from fedlora_hf.flower.roster_file import read_roster
from fedlora_hf.flower.settings import read

pytestmark = pytest.mark.usefixtures("as_server", "bare_output")


class Names:
    """A grid whose nodes only say who they are; `asked` counts the questions to each."""

    def __init__(self, names: Mapping[int, Any]) -> None:
        self.names, self.asked = dict(names), dict.fromkeys(names, 0)
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node, name = message.metadata.dst_node_id, str(len(self._waiting))
            message.metadata.__dict__["_message_id"] = name
            self.asked[node] = self.asked.get(node, 0) + 1
            content = RecordDict({"config": ConfigRecord({"client_id": self.names[node]})})
            self._waiting[name] = Message(content, reply_to=message)
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._waiting[name] for name in ids]


def met(names: Mapping[int, Any], **options: Any) -> tuple[Names, Roster]:
    """A grid of nodes with these names, and a roster that has met them."""
    grid = Names(names)
    roster = Roster(grid, **options)  # type: ignore[arg-type]
    roster.online()
    return grid, roster


def test_a_roster_binds_a_name_whoever_comes_first() -> None:
    grid, roster = met({1: "hospital_a"}, bound={1: "clinic", 2: "hospital_a"})
    grid.names |= {2: "hospital_a", 3: "hospital_b"}
    assert roster.online() == ["hospital_a"]
    assert roster.nodes == {"hospital_a": 2}
    assert "the roster has it as 'clinic'" in roster.refused[1]
    assert "node 3" not in roster.nodes
    assert roster.refused[3].startswith("is not in the roster")
    assert 3 not in grid.asked


def test_a_roster_gives_a_client_a_second_node_while_the_first_is_away() -> None:
    grid, roster = met({1: "a"}, bound={1: "a", 2: "a"})
    roster.proved.add("a")
    grid.names[2] = "a"
    roster.online()
    assert roster.nodes == {"a": 1}
    del grid.names[1]
    assert roster.online() == ["a"]
    assert roster.nodes == {"a": 2}


def test_a_node_that_is_away_keeps_its_name() -> None:
    grid, roster = met({1: "a", 2: "b"})
    del grid.names[1]
    grid.names[3] = "a"
    assert roster.online() == ["b"]
    assert "is node 1, which is away and keeps its name" in roster.refused[3]
    grid.names[1] = "a"
    assert roster.online() == ["a", "b"]
    assert roster.nodes["a"] == 1


@pytest.mark.parametrize(("proved", "heard"), [(False, ["a"]), (True, [])])
def test_a_disputed_name_is_inherited_only_before_the_first_update(proved: bool, heard: list[str]) -> None:
    grid, roster = met({1: "a"})
    grid.names[2] = "a"
    roster.online()
    assert roster.refused == {2: "client 'a' is node 1 already, which is connected"}
    roster.proved |= {"a"} if proved else set()
    del grid.names[1]
    assert roster.online() == heard
    assert (2 in roster.refused) is proved


def test_a_refused_node_is_asked_again_and_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    grid = Names({1: "../etc"})
    roster = Roster(grid)  # type: ignore[arg-type]
    monkeypatch.setattr(rosters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rosters, "exchange", at_once)
    asked = []
    for _ in range(20):
        roster.online()
        asked.append(grid.asked[1])
        now[0] += 10
    assert asked[:4] == [1, 1, 1, 2]  # after 30 seconds
    assert asked[-1] == 3  # and after 60 more, then 120
    grid.names[1] = "mended"
    now[0] += 120
    assert roster.online() == ["mended"]
    assert roster.refused == {}


def at_once(grid: Names, messages: Iterable[Message], seconds: float) -> Iterable[rosters.Reply]:
    """An exchange without waiting, which would need the clock."""
    for message in messages:
        (answer,) = grid.pull_messages(grid.push_messages([message]))
        yield rosters.Reply(message.metadata.dst_node_id, answer.content)


def test_names_equal_but_for_case_are_one() -> None:
    grid, roster = met({1: "Hospital_A", 2: "hospital_a", 3: "hospital-a"})
    assert roster.online() == ["Hospital_A", "hospital-a"]
    assert "is 'Hospital_A' but for case or Unicode form" in roster.refused[2]
    grid.names[4] = "ｈospital-a"  # a wide h: unfit as a name, whatever it looks like
    roster.online()
    assert 4 in roster.refused


def test_a_run_that_goes_on_knows_its_nodes() -> None:
    grid = Names({5: "a", 7: "other"})
    roster = Roster(grid)  # type: ignore[arg-type]
    roster.remember({"a": 6, "flagged": 7})
    assert roster.online() == ["flagged"]  # node 7 is who it was, whatever it says now
    assert "is node 6, which is away" in roster.refused[5]


def test_names_may_be_given_anew_but_only_of_nodes_that_are_gone() -> None:
    grid = Names({5: "a", 7: "other"})
    roster = Roster(grid, anew=True)  # type: ignore[arg-type]
    roster.remember({"a": 6, "flagged": 7})
    assert roster.online() == ["a", "flagged"]
    del grid.names[5]
    grid.names[8] = "a"
    assert roster.online() == ["flagged"]
    assert 8 in roster.refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is something else"),
        ("[1, 2]", "is something else"),
        ("{}", "names no node"),
        ("1: [a]", "is something else"),
        ("1: a\n1: b", "node 1 is named twice"),
        ('{"1": "a", "2": "A"}', "is 'a' but for case"),
        ("ssh-rsa AAAA: a", "is no node id; write the number that `flwr supernode list` shows"),
        ("1: ../etc", "client id '../etc'"),
        ("{1: a", "not readable"),
        (None, "no such file"),
    ],
)
def test_a_roster_file_that_is_none_is_refused_in_one_line(text: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "roster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as refused:
        read_roster(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ['{"12": "a", "13": "b", "14": "b"}', "12: a\n13: b\n14: b\n"])
def test_a_roster_file_is_json_or_yaml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "roster"
    path.write_text(text)
    assert read_roster(str(path)) == {12: "a", 13: "b", 14: "b"}


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(config: Config) -> Config:
    return {**config, "num_rounds": 1, "local_steps": 1, "wait_seconds": 0.3}


def moved(by: int) -> dict[int, Any]:
    """The same clients on nodes with other ids."""
    return {node + by: facts for node, facts in NODES.items()}


def went_on(config: Config, nodes: dict[int, Any], **more: Any) -> Any:
    grid = LocalGrid(nodes, {**config, "num_rounds": 2, "resume_from": "last", **more})
    return FlowerRun(grid, *read(grid.config)).train().record


def test_a_run_goes_on_with_the_nodes_it_had(short: Config, tmp_path: Path) -> None:
    FlowerRun(LocalGrid(NODES, short), *read(short)).train()
    with pytest.raises(RoundError, match=r"0 clients answered .*'client-00' is node 100, which is away"):
        went_on(short, moved(200))
    record = went_on(short, moved(200), names_anew=True)
    assert [facts["node"] for facts in record.clients.values()] == ["300", "301", "302", "303"]
    roster = tmp_path / "roster.json"
    roster.write_text('{"400": "client-00", "401": "client-01", "402": "client-02", "403": "client-03"}')
    record = went_on(short, moved(300), num_rounds=3, roster=str(roster))
    assert record.rounds[-1]["nodes"]["client-03"] == "403"


def test_a_node_bound_in_the_roster_takes_over(short: Config, tmp_path: Path) -> None:
    roster = tmp_path / "roster.yaml"
    roster.write_text("".join(f"{node}: client-0{node % 100}\n" for node in NODES) + "300: client-03\n")
    grid = LocalGrid(NODES, {**short, "roster": str(roster)})
    started = FlowerRun(grid, *read(grid.config))
    started.roster.wait(4, 60)
    grid.nodes[300] = grid.nodes.pop(103)
    done = started.train()
    assert done.record.clients["client-03"]["node"] == "300"
    assert done.record.rounds[0]["nodes"]["client-03"] == "300"


def test_another_node_does_not_take_over_without_a_roster(short: Config) -> None:
    grid = LocalGrid(NODES, {**short, "min_nodes": 3})
    started = FlowerRun(grid, *read(grid.config))
    started.roster.wait(4, 60)
    grid.nodes[300] = grid.nodes.pop(103)
    done = started.train()
    assert done.record.rounds[0]["cohort"] == ["client-00", "client-01", "client-02"]
    assert "which is away and keeps its name" in done.record.data["refused_nodes"]["300"]
