"""Sequence classification on Flower: the head is trained on the nodes, meaned by the server, which has no weights."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import models
import pytest
import sample_data
import torch
from local_grid import Config, plain, run
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedlora_hf.adapter import slot as adapters
from fedlora_hf.flower.settings import read
from fedlora_hf.flower.weightless import weightless_base

# Four clients of a few steps each are too few for clair's weights to settle, which it says.
pytestmark = [
    pytest.mark.usefixtures("as_server", "bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]
HEAD = "score.weight"
LABELS = sorted(sample_data.CATEGORIES)


@pytest.fixture
def classes(config: Config) -> Config:
    """The run's configuration: which of the categories an instruction is of; the base has no head of its own."""
    config["labels"] = ",".join(LABELS)
    config["flags"] += " --task sequence_classification"
    return config


@pytest.mark.parametrize("method", ["clair", "fedavg", "stacking"])
def test_a_run_leaves_what_fedlora_train_leaves(method: str, classes: Config, tmp_path: Path) -> None:
    """Adapters and heads to the bit, metrics before and after; the head that the base lacks is drawn from the seed."""
    classes |= {"aggregation": method, "evaluate_rounds": True}
    done, _ = run(classes)
    here = plain(classes, tmp_path / "plain")
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")
    assert done.record.metrics == here.run.record.metrics
    assert set(done.record.metrics["after"]["personalised"]) == {"loss", "accuracy"}
    assert done.record.adapter == here.run.record.adapter
    assert not torch.equal(done.state.extras[HEAD], here.initial.extras[HEAD])


def test_a_head_of_the_checkpoint_is_what_nodes_start_from(classes: Config, tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "classifier", classifier=True)
    rows = [{**row, "mood": ("good", "bad", "so so")[n % 3]} for n, row in enumerate(sample_data.dolly_records(64))]
    (tmp_path / "moods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    classes |= {"model_name_or_path": str(base), "dataset": str(tmp_path / "moods.jsonl"), "label_column": "mood"}
    classes |= {"labels": "good,so so,bad", "num_rounds": 1}
    run(classes)
    here = plain(classes, tmp_path / "plain")
    stored = AutoModelForSequenceClassification.from_pretrained(base).state_dict()[HEAD]
    assert torch.equal(here.initial.extras[HEAD], stored)
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")


def test_nodes_that_have_some_of_the_classes_only_agree_by_their_names(classes: Config, tmp_path: Path) -> None:
    """Two nodes with a file each, of other classes, do what `fedlora train` does with both files in one."""
    rows = {"ada": [], "bob": []}
    for row in sample_data.dolly_records(64):
        rows["ada" if LABELS.index(row["category"]) < 3 else "bob"].append(row)
    nodes = {}
    for place, (client, own) in enumerate(rows.items()):
        path = tmp_path / f"{client}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        nodes[7 + place] = {"client_id": client, "dataset": str(path)}
    both = [{**row, "client": client} for client, own in rows.items() for row in own]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both), encoding="utf-8")
    classes |= {"dataset": "", "min_nodes": 2}
    run(classes, nodes=nodes)
    del classes["labels"]  # by default those of all the data, sorted
    del classes["num_clients"]  # the file says who they are
    plain(classes | {"dataset": str(tmp_path / "both.jsonl"), "partition_by": "client"}, tmp_path / "plain")
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")


def test_an_initial_adapter_brings_its_head(classes: Config, tmp_path: Path) -> None:
    run(classes | {"num_rounds": 1, "output_dir": str(tmp_path / "first")})
    classes |= {"initial_adapter": str(tmp_path / "first"), "seed": 7}
    run(classes)
    plain(classes, tmp_path / "plain")
    assert models.weight_files(tmp_path / "flower") == models.weight_files(tmp_path / "plain")


def test_a_head_of_another_size_is_quarantined_when_it_comes(classes: Config) -> None:
    """By the shapes that the server knows, though it is the majority that has other classes."""
    own = {100: {}, 101: {"labels": ",".join([*LABELS, "another"])}, 102: {"labels": ",".join([*LABELS, "one"])}}
    nodes = {node: {"partition-id": node - 100, "num-partitions": 4, **more} for node, more in own.items()}
    done, _ = run(classes | {"min_nodes": 3, "num_rounds": 1}, nodes=nodes)
    reason = f"wrong shape: {HEAD} is ({len(LABELS) + 1}, 16), must be ({len(LABELS)}, 16)"
    assert done.record.quarantined == {"client-01": reason, "client-02": reason}
    assert done.state.extras[HEAD].shape == (len(LABELS), 16)


def test_a_label_that_is_not_among_those_agreed_is_that_nodes_failure(classes: Config) -> None:
    nodes = {7 + place: {"client_id": client, "dataset": classes["dataset"]} for place, client in enumerate("ab")}
    nodes[8]["labels"] = ",".join([*LABELS[1:], "another"])
    done, _ = run(classes | {"min_nodes": 2, "num_rounds": 1}, nodes=nodes)
    assert list(done.record.quarantined) == ["b"]
    assert f"holds '{LABELS[0]}', which is none of labels=" in done.record.quarantined["b"]


def test_what_is_left_loads_with_plain_peft(classes: Config, tmp_path: Path) -> None:
    done, _ = run(classes)
    base = AutoModelForSequenceClassification.from_pretrained(classes["model_name_or_path"], num_labels=len(LABELS))
    model = PeftModel.from_pretrained(base, tmp_path / "flower")
    weights = model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(weights, done.state.extras[HEAD])


def test_the_weightless_model_knows_the_heads_shape_and_holds_no_base(classes: Config) -> None:
    args, _ = read(classes)
    base = weightless_base(args)
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in base.parameters()}
    assert sum(stored.values()) < 1000 < sum(parameter.numel() for parameter in base.parameters())
    slot = adapters.AdapterSlot(adapters.with_adapter(base, adapters.peft_config(args), args.seed))
    assert slot.read().extras[HEAD].shape == (len(LABELS), 16)
