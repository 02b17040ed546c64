"""Only what is trained and shared travels to the server; what a client keeps for itself stays on its node."""
# SPDX-License-Identifier: Apache-2.0

import logging
from pathlib import Path

import models
import pytest
import sample_updates
import torch
from flwr.app import Message, MessageType, RecordDict
from local_grid import NODES, Config, LocalGrid, plain, run

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.settings import read
from fedlora_hf.flower.share import changed, check_rank, remember, travelling, with_remembered
from fedlora_hf.flower.wire import put, take
from fedlora_hf.training.stages import Stage
from fedlora_hf.update import AdapterState, LoraFactors

pytestmark = pytest.mark.usefixtures("as_server", "bare_output")
CLIENTS = ["client-00", "client-01", "client-02", "client-03"]


class Watching(LocalGrid):
    """Notes the factors in every reply, by the kind of message: {"train": {"A"} ...}."""

    def __init__(self, config: Config) -> None:
        self.seen: dict[str, set[str]] = {}
        super().__init__(NODES, config, self._watch)

    def _watch(self, node: int, reply: Message) -> Message:
        for record in reply.content.array_records.values():
            self.seen.setdefault(reply.metadata.message_type, set()).update(key[0] for key in record)
        return reply


def state(rank: int, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            name: LoraFactors(torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator), 2.0)
            for name in ("q", "v")
        }
    )


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "sent"), [("fedavg", "AB"), ("ffa", "B"), ("fedsa", "A")])
def test_bytes_are_those_of_what_fedlora_train_says_must_travel(
    method: str, sent: str, config: Config, tmp_path: Path
) -> None:
    """Up what is trained and shared, and that alone; down the whole adapter: a node may be new, or have forgotten."""
    config |= {"aggregation": method, "num_rounds": 1}
    grid = Watching(config)
    done = FlowerRun(grid, *read(config)).train()
    here = plain(config, tmp_path / "plain").run
    assert grid.seen[MessageType.TRAIN] == set(sent)
    entry = done.record.rounds[0]
    assert entry["bytes_up"] == here.record.rounds[0]["bytes_up"]
    tensors = [getattr(factors, factor) for factors in done.state.values() for factor in sent]
    assert entry["bytes_up"]["client-00"] == 4 * sum(tensor.numel() for tensor in tensors)
    assert entry["bytes_down"] == dict.fromkeys(CLIENTS, done.state.nbytes())


def test_fedsas_clients_are_those_of_fedlora_train_though_their_factor_never_leaves_them(
    config: Config, tmp_path: Path
) -> None:
    """Every client's adapter, the common A and the losses to the bit; the server sees no B but the start's."""
    config |= {"aggregation": "fedsa", "personalise": "method", "num_rounds": 3}
    done, grid = run(config)
    here = plain(config, tmp_path / "plain").run
    for client in CLIENTS:
        mine, theirs = (tmp_path / name / "clients" / client for name in ("flower", "plain"))
        assert models.weight_files(mine) == models.weight_files(theirs)
    for module, factors in done.state.items():
        assert torch.equal(factors.A, here.state[module].A)
        assert not factors.B.any()
    for number in (1, 2, 3):
        mine, theirs = (record.rounds[number - 1]["train_loss"] for record in (done.record, here.record))
        assert mine == theirs
        for client in CLIENTS:
            kept = read_adapter(tmp_path / "flower" / "rounds" / str(max(number, 2)) / "clients" / client)[0]
            assert not any(factors.B.any() for factors in kept.values())
    assert done.record.metrics["after"]["personalised"] == here.record.metrics["after"]["personalised"]
    assert [entry["forgot"] for entry in done.record.rounds] == [[], [], []]
    assert set(grid.memory[100]["kept.arrays"]) == {f"B:{module}" for module in done.state}


def test_a_node_that_forgot_begins_anew_and_the_record_says_so(config: Config) -> None:
    config |= {"aggregation": "fedsa", "num_rounds": 3, "clients_per_round": 3}

    def change(node: int, reply: Message) -> Message:
        if len([kind for who, kind in grid.sent if kind == "train" and who == 101]) == 1:
            grid.memory[101].clear()
        return reply

    grid = LocalGrid(NODES, config, change)
    done = FlowerRun(grid, *read(config)).train()
    took_part = [entry["round"] for entry in done.record.rounds if "client-01" in entry["cohort"]]
    assert len(took_part) > 1
    for entry in done.record.rounds:
        assert entry["forgot"] == (["client-01"] if entry["round"] == took_part[1] else [])


def test_a_run_that_is_resumed_finds_no_memory_on_its_nodes_and_says_so(config: Config) -> None:
    """Flower keeps a node's memory for one run, and a resumed run is another."""
    config |= {"aggregation": "fedsa", "num_rounds": 1}
    run(config)
    done, _ = run(config | {"num_rounds": 2, "resume_from": "last"})
    assert [entry["forgot"] for entry in done.record.rounds] == [[], CLIENTS]


def test_a_machines_own_node_keeps_its_factor_at_the_end_too_unless_it_says_otherwise(
    config: Config, tmp_path: Path
) -> None:
    """One without a place for it is told so in the first round."""
    config |= {"aggregation": "fedsa", "personalise": "method", "min_nodes": 3, "num_rounds": 1}
    nodes = {
        7: {"client_id": "ada", "dataset": config["dataset"], "personal_dir": str(tmp_path / "ada")},
        8: {"client_id": "bob", "dataset": config["dataset"], "keep_personal": False},
        9: {"client_id": "eve", "dataset": config["dataset"]},
    }
    done, _ = run(config, nodes=nodes)
    assert done.record.clients["ada"]["personal"]["kept_by_node"]
    assert "personal_dir is missing: with fedsa a personal adapter stays" in done.record.quarantined["eve"]
    assert sorted(path.name for path in (tmp_path / "flower" / "clients").iterdir()) == ["bob"]
    for folder in (tmp_path / "ada", tmp_path / "flower" / "clients" / "bob"):
        assert any(factors.B.any() for factors in read_adapter(folder)[0].values())


def test_stages_of_the_pipeline_send_what_they_train(config: Config, tmp_path: Path) -> None:
    """The global stage A, whose directions it trains; a personal adapter the B in which it is not the global one."""
    config |= {"aggregation": "dirmag_mean", "num_rounds": 1}
    config["flags"] += " --pipeline fedlora_optimizer --personal_steps 2 --personalise method"
    grid = Watching(config)
    done = FlowerRun(grid, *read(config)).train()
    plain(config, tmp_path / "plain")
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")
    assert grid.seen[MessageType.EVALUATE] == {"B"}
    whole, directions = (entry["bytes_up"]["client-00"] for entry in done.record.rounds)
    assert whole == done.state.nbytes()
    assert directions == 4 * sum(factors.A.numel() for factors in done.state.values())


def test_a_personal_adapter_that_is_the_global_one_is_not_sent_again(config: Config, tmp_path: Path) -> None:
    config |= {"personalise": "method", "aggregation": "dirmag_mean", "num_rounds": 1}
    config["flags"] += " --pipeline fedlora_optimizer --personal_steps 0"
    grid = Watching(config)
    FlowerRun(grid, *read(config)).train()
    plain(config, tmp_path / "plain")
    assert grid.seen[MessageType.EVALUATE] == set()
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")


@pytest.mark.parametrize(("method", "flags"), [("ffa", ""), ("dirmag_mean", " --pipeline fedlora_optimizer")])
def test_another_rank_where_a_factor_is_common_is_quarantined_when_it_comes(
    method: str, flags: str, config: Config
) -> None:
    config |= {"aggregation": method, "num_rounds": 1}
    config["flags"] += flags
    nodes = {**NODES, 103: {**NODES[103], "lora_r": 1}}
    done, _ = run(config, nodes=nodes)
    entry = done.record.rounds[-1]
    assert list(entry["quarantined"]) == ["client-03"]
    assert "rank 1, must be 2: " in entry["quarantined"]["client-03"]


def test_nodes_of_other_ranks_share_a_factor_and_keep_the_other(config: Config, tmp_path: Path) -> None:
    nodes = {**NODES, 103: {**NODES[103], "lora_r": 1}}
    done, _ = run(config | {"aggregation": "fedsa", "personalise": "method"}, nodes=nodes)
    assert done.record.quarantined == {}
    for client, rank in (("client-00", 2), ("client-03", 1)):
        personal = read_adapter(tmp_path / "flower" / "clients" / client)[0]
        assert {factors.rank for factors in personal.values()} == {rank}
        assert all(factors.B.any() for factors in personal.values())


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_what_travels_is_what_is_trained_and_not_kept() -> None:
    assert travelling(Stage("federated", ("A", "B"), 1.0), ()) == ("A", "B")
    assert travelling(Stage("federated", ("B",), 1.0), ()) == ("B",)
    assert travelling(Stage("federated", ("A", "B"), 1.0), ("B",)) == ("A",)
    assert travelling(Stage("global", ("A.direction",), 1.0), ()) == ("A",)


def test_the_rest_is_put_back_to_the_bit_in_the_scale_of_what_came() -> None:
    sent, start = state(2, 1), state(2, 2)
    content = RecordDict()
    size = put(content, "update", sent, factors=("A",))
    assert size == 4 * 2 * 2 * 5
    arrived = take(content, "update", ("A",), start)
    for module in sent:
        assert torch.equal(arrived[module].A, sent[module].A)
        assert torch.equal(arrived[module].B, start[module].B)
    halved = AdapterState({module: LoraFactors(f.A, f.B, 1.0) for module, f in sent.items()})
    put(content, "update", halved, factors=("A",))
    assert torch.equal(take(content, "update", ("A",), start)["q"].B, 2 * start["q"].B)


def refusal(content: RecordDict, start: AdapterState) -> str:
    with pytest.raises(UpdateError) as refused:
        take(content, "update", ("A",), start)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_was_not_asked_for_or_does_not_fit_is_refused_in_one_line() -> None:
    content, start = RecordDict(), state(2, 2)
    put(content, "update", state(2, 1))
    assert "array 'B:q': must be one of A:, X: and a name" in refusal(content, start)
    put(content, "update", state(2, 1).restricted({"q"}), factors=("A",))
    assert "module 'v': needs A, a scale and nothing else" in refusal(content, start)
    put(content, "update", state(10, 1), factors=("A",))
    assert "wrong shape: A of q is (10, 5), must be like (2, 5)" in refusal(content, start)
    wide = {module: LoraFactors(torch.ones(2, 9), torch.ones(4, 2), 2.0) for module in start}
    put(content, "update", AdapterState(wide), factors=("A",))
    assert "wrong shape: A of q is (2, 9), must be like (2, 5)" in refusal(content, start)
    put(content, "update", AdapterState({m: f * 0.0 for m, f in start.items()}), factors=("A",))
    assert "scale of 'q': is 0" in refusal(content, start)


def test_a_node_remembers_its_own_factor_alone_and_nothing_that_is_not_finite() -> None:
    memory, own, other = RecordDict(), state(2, 1), state(2, 2)
    assert with_remembered(other, memory, ("B",)) is other
    remember(memory, own, ("B",))
    spoiled = AdapterState({module: LoraFactors(f.A, f.B * torch.nan, f.scale) for module, f in own.items()})
    remember(memory, spoiled, ("B",))
    found = with_remembered(other, memory, ("B",))
    expected = {module: LoraFactors(other[module].A, own[module].B, 2.0) for module in own}
    assert sample_updates.same_bits(found, AdapterState(expected))


def test_changed_factors_are_found_to_the_bit() -> None:
    first, second = state(2, 1), state(2, 2)
    mixed = AdapterState({module: LoraFactors(first[module].A, second[module].B, 2.0) for module in first})
    assert changed(first, first) == ()
    assert changed(mixed, first) == ("B",)
    assert changed(mixed, second) == ("A",)
    assert changed(state(3, 1), first) == ("A", "B")
    check_rank(state(3, 1), first, ())
    with pytest.raises(UpdateError, match="q: rank 3, must be 2: A was not trained"):
        check_rank(state(3, 1), first, ("A",))


def test_what_the_global_adapter_is_is_said_where_the_method_has_none(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On the terminal, in the record and on the card; without an initial adapter it is the base model."""
    with caplog.at_level(logging.WARNING, "flwr"):
        done, _ = run(config | {"aggregation": "fedsa", "num_rounds": 1})
    said = "the mean of the clients' A with the B that the run began with (B is 0 at first"
    assert f"the global adapter is {said}" in caplog.text
    assert done.record.method_info["global_adapter"].startswith(said)
    assert f"The global adapter is {said}" in (tmp_path / "flower" / "README.md").read_text(encoding="utf-8")
    assert not any(factors.B.any() for factors in done.state.values())
    here = plain(config | {"aggregation": "fedsa", "num_rounds": 1}, tmp_path / "plain").run
    assert here.record.method_info["global_adapter"].startswith("the mean of the clients' A with the mean of their B")
    assert all(factors.B.any() for factors in here.state.values())
