"""Runs over a grid without a network: equal to `fedlora train`, and whole whatever single nodes do."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from flwr.app import ConfigRecord, Message
from local_grid import NODES, Change, Config, LocalGrid, plain, run
from peft import PeftModel

from fedlora_hf.adapter import slot as adapters
from fedlora_hf.errors import ConfigError, FedLoraError, RoundError
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.settings import Settings, read
from fedlora_hf.flower.weightless import weightless_base
from fedlora_hf.flower.wire import put, take
from fedlora_hf.update import AdapterState, LoraFactors

pytestmark = pytest.mark.usefixtures("as_server", "bare_output")
CLIENTS = ["client-00", "client-01", "client-02", "client-03"]


def update_changed(node: int, how: Callable[[LoraFactors], LoraFactors]) -> Change:
    """A node whose every update is another than it should be."""

    def change(sender: int, reply: Message) -> Message:
        if sender == node and "update.arrays" in reply.content:
            state = take(reply.content, "update")
            put(reply.content, "update", AdapterState({name: how(factors) for name, factors in state.items()}))
        return reply

    return change


# ---- the same as fedlora train ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["clair", "fedavg", "stacking", "ffa", "dirmag_mean"])
def test_a_run_leaves_what_fedlora_train_leaves(method: str, config: Config, tmp_path: Path) -> None:
    """Global and personal adapters to the bit, metrics, evidence: the same seeds, cohort and code. Methods that restart
    rounds, that freeze a factor; the others differ in a pure function on the server. Of the one that lets a client keep
    a factor see test_flower_share."""
    config |= {"aggregation": method, "clients_per_round": 3, "evaluate_rounds": True}
    done, _ = run(config)
    here = plain(config, tmp_path / "plain")
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")
    record = here.run.record
    assert done.record.metrics["after"] == record.metrics["after"]
    first = done.record.rounds[0]["cohort"]
    for client, facts in record.clients.items():
        if client not in first:  # who is not asked to train in round 1 is not asked to score what it starts from either
            del facts["metrics"]["before"]
        assert {**facts, "node": done.record.clients[client]["node"]} == done.record.clients[client]
    for mine, theirs in zip(done.record.rounds, record.rounds, strict=True):
        same = set(theirs) - {"seconds", "bytes_up", "bytes_down"}
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}


def test_the_pipeline_of_directions_and_magnitudes_too(config: Config, tmp_path: Path) -> None:
    config |= {"aggregation": "dirmag_mean", "num_rounds": 1}
    config["flags"] += " --pipeline fedlora_optimizer --personal_steps 2"
    done, _ = run(config)
    plain(config, tmp_path / "plain")
    assert [entry["stage"] for entry in done.record.rounds] == ["federated", "global"]
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")


def test_the_global_stage_on_the_servers_own_data(config: Config, tmp_path: Path) -> None:
    """Trained where the server is, with the base model; the nodes are asked for nothing in that round."""
    config |= {"aggregation": "dirmag_mean", "num_rounds": 1, "evaluate_rounds": True}
    config["flags"] += f" --pipeline fedlora_optimizer --personal_steps 2 --server_dataset {config['dataset']}"
    done, grid = run(config)
    here = plain(config, tmp_path / "plain").run
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")
    assert sum(kind == "train" for _, kind in grid.sent) == len(NODES)
    mine, theirs = done.record.rounds[-1], here.record.rounds[-1]
    same = set(theirs) - {"seconds", "bytes_down"}
    assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    assert mine["bytes_down"] == {}
    assert done.record.metrics == here.record.metrics


def test_clipping_and_noise_are_the_nodes_before_anything_is_sent(config: Config, tmp_path: Path) -> None:
    config["flags"] += " --dp_clip 0.01 --dp_noise_multiplier 0.5 --dp_seed 3"
    done, _ = run(config)
    here = plain(config, tmp_path / "plain")
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")
    assert done.record.privacy == here.run.record.privacy
    assert done.record.rounds[0]["train_loss"] == {}


def test_a_data_set_of_the_nodes_own_is_that_client_of_fedlora_train(config: Config, tmp_path: Path) -> None:
    """Two nodes with a file each do what `fedlora train --partition_by client` does with both files in one."""
    from sample_data import dolly_records

    everything = []
    nodes = {}
    for place, client in enumerate(("ada", "bob")):
        rows = dolly_records(64)[place::2]
        path = tmp_path / f"{client}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        everything += [{**row, "client": client} for row in rows]
        nodes[7 + place] = {"client_id": client, "dataset": str(path), "personal_dir": str(tmp_path / f"at {client}")}
    nodes[8]["keep_personal"] = True
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in everything), encoding="utf-8")
    config |= {"dataset": "", "min_nodes": 2, "aggregation": "product_mean"}
    done, _ = run(config, nodes=nodes)
    del config["num_clients"]  # the file says who they are
    plain(config | {"dataset": str(both), "partition_by": "client"}, tmp_path / "plain", "--client_column", "client")
    mine, theirs = (models.weight_files(tmp_path / name) for name in ("flower", "plain"))
    kept = "clients/bob/adapter_model.safetensors"
    assert mine == {name: content for name, content in theirs.items() if name != kept}
    assert (tmp_path / "at bob" / "adapter_model.safetensors").read_bytes() == theirs[kept]
    assert done.record.clients["bob"]["personal"]["kept_by_node"]
    assert [client["node"] for client in done.record.clients.values()] == ["7", "8"]


def test_the_weightless_model_gives_the_same_adapter_and_holds_nothing(config: Config) -> None:
    args, _ = read(config)
    full = plain(config | {"num_rounds": 0}, Path(args.output_dir))
    base = weightless_base(args)
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in base.parameters()}
    assert sum(stored.values()) < 1000 < sum(parameter.numel() for parameter in base.parameters())
    slot = adapters.AdapterSlot(adapters.with_adapter(base, adapters.peft_config(args), args.seed))
    assert slot.config() == full.slot.config()
    for module, factors in slot.read().items():
        assert torch.equal(factors.A, full.initial[module].A)


def test_what_is_left_loads_with_plain_peft(config: Config, tmp_path: Path) -> None:
    run(config)
    base = models.tiny_llama(vocab_size=len(models.tiny_tokenizer()))
    model = PeftModel.from_pretrained(base, tmp_path / "flower")
    assert model.peft_config["default"].base_model_name_or_path == config["model_name_or_path"]
    assert sorted(path.name for path in (tmp_path / "flower").iterdir() if not path.name.startswith(".")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "clients",
        "rounds",
        "run.json",
    ]


# ---- nodes that do not do what they should ---------------------------------------------------------------------------


def test_nan_is_quarantined_with_its_node_and_a_reason_and_touches_no_mean(config: Config, tmp_path: Path) -> None:
    spoiled = update_changed(102, lambda factors: LoraFactors(factors.A * torch.nan, factors.B, factors.scale))
    done, _ = run(config, spoiled)
    assert list(done.record.quarantined) == ["client-02"]
    assert "is not finite (NaN or Inf)" in done.record.quarantined["client-02"]
    assert done.record.rounds[-1]["nodes"]["client-02"] == done.record.clients["client-02"]["node"] == "102"
    assert all(factors.A.isfinite().all() for factors in done.state.values())
    assert not (tmp_path / "flower" / "clients" / "client-02").exists()
    assert sorted(done.record.rounds[0]["weights"]) == ["client-00", "client-01", "client-03"]


def test_a_contaminated_node_is_flagged_by_its_id(config: Config) -> None:
    nodes = {100 + place: {"partition-id": place, "num-partitions": 8} for place in range(8)}
    spoiled = update_changed(103, lambda factors: factors * -30.0)
    done, _ = run(config | {"aggregation": "clair", "num_clients": 8, "min_nodes": 8}, spoiled, nodes)
    assert done.record.flagged == ["client-03"]
    assert done.record.clients["client-03"]["node"] == "103"
    assert done.record.rounds[1]["weights"].get("client-03", 0.0) == 0.0


@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_mixed_ranks_and_bfloat16_do_not_stop_a_round(config: Config) -> None:
    nodes = {node: {**facts, "lora_r": 1 + node % 4} for node, facts in NODES.items()}
    done, grid = run(config | {"aggregation": "clair", "wire_dtype": "bfloat16", "lora_r": 3}, nodes=nodes)
    assert done.record.quarantined == {}
    sent = done.record.rounds[0]["bytes_up"]
    assert [sent[client] / sent["client-00"] for client in CLIENTS] == [1, 2, 3, 4]
    down = done.record.rounds[0]["bytes_down"]
    assert set(down.values()) == {6 * sent["client-00"]}  # rank 3 in float32
    assert {factors.rank for factors in done.state.values()} == {3}
    for client in CLIENTS:
        update = FlowerRun(grid, *read(grid.config)).store.update(2, client)
        assert all(factors.norm() > 0 for factors in update.state.values())


def test_a_node_that_raises_or_is_gone_is_quarantined_and_the_round_goes_on(config: Config) -> None:
    grid = LocalGrid(
        NODES, config, lambda node, reply: 1 / 0 if node == 101 and "update.arrays" in reply.content else reply
    )
    started = FlowerRun(grid, *read(config))
    started.roster.wait(4, 60)
    grid.gone = {103}
    done = started.train()
    assert done.round == 2
    assert done.record.quarantined == {
        "client-01": "node 101: its ClientApp raised: <class 'ZeroDivisionError'>:<'division by zero'>",
        "client-03": "node 103: the node is gone: Node Unavailable",
    }
    assert done.record.clients["client-00"]["collaborative"]


def test_a_node_that_does_not_answer_is_left_out_in_time(config: Config) -> None:
    grid = LocalGrid(NODES, config | {"round_seconds": 0.5})
    started = FlowerRun(grid, *read(grid.config))
    started.roster.wait(4, 60)
    grid.mute = {100}
    done = started.train()
    assert done.record.quarantined == {"client-00": "node 100: no answer within 0.5 s"}


def test_a_second_node_under_a_name_that_is_taken_is_refused(config: Config) -> None:
    nodes = {**NODES, 200: {"client_id": "client-01"}, 201: {"client_id": "../../etc"}}
    done, grid = run(config, nodes=nodes)
    assert done.record.data["refused_nodes"] == {
        "200": "client 'client-01' is node 101 already, which is connected",
        "201": done.record.data["refused_nodes"]["201"],
    }
    assert "client id '../../etc'" in done.record.data["refused_nodes"]["201"]
    assert {node for node, kind in grid.sent if kind != "query"} == set(NODES)


def test_lies_about_numbers_do_not_enter(config: Config) -> None:
    def change(node: int, reply: Message) -> Message:
        if "facts" in reply.content and node == 100:
            reply.content["facts"]["num_examples"] = float("nan")
        if "facts" in reply.content and node == 101:
            reply.content["facts"]["num_examples"] = -5
        if "config" in reply.content and node == 102:
            reply.content["config"] = ConfigRecord({"client_id": "client-02", "choice": "x" * 10_000})
        return reply

    done, _ = run(config, change)
    assert list(done.record.quarantined) == ["client-00", "client-01"]
    reason = done.record.clients["client-02"]["personal"]["failed"]
    assert reason.startswith("personal choice 'xxx")
    assert len(reason) <= 300


# ---- going on, and being told ----------------------------------------------------------------------------------------


def test_a_run_resumes_and_asks_only_who_had_not_answered(config: Config, tmp_path: Path) -> None:
    run(config)
    whole = models.weight_files(tmp_path / "flower")
    config["output_dir"] = str(tmp_path / "again")

    class Crash(BaseException):
        """What is not an error of a node's."""

    def change(node: int, reply: Message) -> Message:
        if len([kind for who, kind in grid.sent if kind == "train"]) == 7:
            raise Crash
        return reply

    grid = LocalGrid(NODES, config, change)
    with pytest.raises(Crash):
        FlowerRun(grid, *read(config)).train()
    assert sorted(path.name for path in (tmp_path / "again" / "rounds").iterdir()) == ["1"]
    again = LocalGrid(NODES, config | {"resume_from": "last"})
    FlowerRun(again, *read(again.config)).train()
    assert sum(kind == "train" for _, kind in again.sent) == 4
    assert models.weight_files(tmp_path / "again") == whole


def test_a_run_goes_on_from_the_last_round_that_is_whole(config: Config, tmp_path: Path) -> None:
    run(config)
    out = tmp_path / "flower"
    whole, rounds = models.weight_files(out), sorted((out / "rounds").iterdir(), key=lambda path: int(path.name))
    adapter = rounds[-1] / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-20])
    again = LocalGrid(NODES, config | {"resume_from": "last"})
    FlowerRun(again, *read(again.config)).train()
    assert sum(kind == "train" for _, kind in again.sent) == len(NODES)
    assert models.weight_files(out) == whole


def test_updates_of_an_open_round_are_not_asked_for_again(config: Config, tmp_path: Path) -> None:
    config["server_min_clients"] = 4
    grid = LocalGrid(NODES, config)
    started = FlowerRun(grid, *read(config))
    started.roster.wait(4, 60)
    grid.gone = {103}
    with pytest.raises(RoundError, match="3 usable updates, server_min_clients=4"):
        started.train()
    again = LocalGrid(NODES, config | {"resume_from": "last", "server_min_clients": 4})
    done = FlowerRun(again, *read(again.config)).train()
    first = [node for node, kind in again.sent if kind == "train"][: -len(NODES)]
    assert first == [103]  # three had answered
    assert done.record.rounds[0]["quarantined"] == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_name_or_path": ""}, "model_name_or_path is missing"),
        ({"model_name_or_path": "no/such/folder"}, "give a folder or a Hub id of a model"),
        ({"wire_dtype": "int8"}, "wire_dtype='int8': must be one of float32"),
        ({"round_seconds": 0}, "round_seconds=0: must be above 0"),
        ({"num_round": 3}, "num_round=3: is neither a flag of fedlora train nor"),
        ({"flags": "--task sequence_classification"}, "task='sequence_classification' without labels: the server has"),
        ({"labels": "good"}, "labels=good: must be two or more"),
        ({"aggregation": "clair", "flags": "--functional_judges 2"}, "functional_judges=2: clients' data are not here"),
        ({"aggregation": "clair", "flags": "--clusters auto"}, "clusters=auto: a Flower run has one global adapter"),
        ({"resume_from": "hub:user/repo@round-1"}, "a Flower run resumes from its output folder"),
    ],
)
def test_bad_configuration_is_refused_in_one_line(config: Config, changes: Config, reason: str) -> None:
    with pytest.raises((ConfigError, FedLoraError), match=reason) as refused:
        run(config | changes)
    assert "\n" not in str(refused.value)


def test_too_few_nodes_is_one_line_that_names_who_was_refused(config: Config) -> None:
    config |= {"min_nodes": 5, "wait_seconds": 0.5}
    with pytest.raises(RoundError, match=r"4 clients answered within 0\.5 s, min_nodes=5.*node 200: client id ' '"):
        run(config, nodes={**NODES, 200: {"client_id": " "}})


def test_an_empty_text_is_a_flag_left_out() -> None:
    args, settings = read({"clients_per_round": "", "num_rounds": 4, "flags": "--lora_r 5", "min_nodes": 3})
    assert (args.clients_per_round, args.num_rounds, args.lora_r) == (None, 4, 5)
    assert settings == Settings(min_nodes=3, flags="--lora_r 5")


@pytest.mark.parametrize("method", ["multikrum", "fedavg"])
def test_a_claimed_number_of_examples_does_not_own_the_mean(config: Config, method: str) -> None:
    def boast(sender: int, reply: Message) -> Message:
        if sender == 102 and "update.arrays" in reply.content:
            reply.content["facts"]["num_examples"] = 10**12
        return reply

    done, _ = run(config | {"aggregation": method}, boast)
    entry, client = done.record.rounds[-1], done.record.clients["client-02"]
    assert entry["claimed_weights"]["client-02"] > 0.999
    assert entry["weights"]["client-02"] == client["weight"] < 0.6
    assert client["num_examples"] == 10**12
    assert "claims 1000000000000 examples" in client["outlier_claim"]
    assert list(entry["outlier_claims"]) == ["client-02"]


def test_what_is_the_servers_alone_is_refused_on_a_node() -> None:
    from fedlora_hf.flower.node import _items

    with pytest.raises(ConfigError, match="hub_license='mit': is the server's alone, and has no effect on a node"):
        _items({"num_rounds": 2}, {"client_id": "ada", "hub_license": "mit"})
