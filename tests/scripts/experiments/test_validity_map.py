"""The validity map: cohorts are what they claim, nothing is trained twice, rates add up, the script runs end to end."""
# SPDX-License-Identifier: Apache-2.0

import csv
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import pytest
import sample_data
import sample_updates
import torch

from scripts import make_base_model

NAMES = ("validity_map", "map_clients", "map_detection", "map_figures", "map_functional")
KINDS = ("random_outputs", "constant")


@pytest.fixture(scope="module")
def setting(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Generated records on a tiny base, two steps a client."""
    folder = tmp_path_factory.mktemp("validity")
    return scripts["map_clients"].Setting(
        name="tiny",
        title="Generated records",
        data=sample_data.write_dolly(folder / "dolly.jsonl", 200),
        base=models.save_base(folder / "base"),
        task="causal_lm",
        target_modules=("q_proj", "v_proj"),
        kinds=KINDS,
        max_length=24,
        steps=2,
    )


@pytest.fixture(scope="module")
def cached(scripts: dict[str, ModuleType], setting: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which one category each is trained."""
    folder: Path = tmp_path_factory.mktemp("cache")
    federation = scripts["map_clients"].trainer(setting, "one each", 0, folder)
    trained = list(scripts["map_clients"].train_missing(federation))
    assert trained == list(federation.clients)
    return folder


def test_what_was_trained_is_not_trained_again(scripts: dict[str, ModuleType], setting: Any, cached: Path) -> None:
    federation = scripts["map_clients"].trainer(setting, "one each", 0, cached)
    assert list(scripts["map_clients"].train_missing(federation)) == []
    lost = next(iter(federation.clients))
    place = federation.store.folder / ".open-1" / "clients" / lost
    before = (place / "adapter_model.safetensors").read_bytes()
    (place / "update.json").unlink()
    assert list(scripts["map_clients"].train_missing(federation)) == [lost]
    assert (place / "adapter_model.safetensors").read_bytes() == before


def test_half_a_federation_is_not_judged(
    scripts: dict[str, ModuleType], setting: Any, cached: Path, tmp_path: Path
) -> None:
    federation = scripts["map_clients"].trainer(setting, "one each", 0, tmp_path)
    assert next(scripts["map_clients"].train_missing(federation)) in federation.clients
    assert list(scripts["map_detection"].detect(setting, "one each", 0, tmp_path)) == []
    assert next(scripts["map_detection"].detect(setting, "one each", 0, cached))["clients"] == 8


def test_twins_differ_in_their_answers_alone(scripts: dict[str, ModuleType], setting: Any) -> None:
    clients = scripts["map_clients"].client_data(setting, "iid", 0)
    sound = [name for name in clients if "." not in name]
    pool = scripts["map_clients"].contaminated_pool(sorted(sound), 0)
    assert len(sound) == scripts["map_clients"].CLIENTS
    assert sorted(clients) == sorted([*sound, *(f"{client}.{kind}" for client in pool for kind in KINDS)])
    for client in pool:
        for split in ("train", "validation"):
            own, twin = clients[client][split], clients[f"{client}.constant"][split]
            assert own["prompt"][:] == twin["prompt"][:]
            assert len(set(twin["completion"][:])) == 1
            assert set(twin["completion"][:]).isdisjoint(own["completion"][:])


def test_only_what_the_base_has_not_seen_is_used(scripts: dict[str, ModuleType], setting: Any, tmp_path: Path) -> None:
    tasks = sample_data.write_natural_instructions(tmp_path / "tasks", tasks=2, instances=20)
    learned, held_out = make_base_model.read_texts([str(setting.data), str(tasks)], 0.5, 0)
    found = scripts["map_clients"].held_out((setting.data, tasks), 0.5)
    seen = {(text.prompt, text.completion) for text in learned}
    assert found == {(text.prompt, text.completion) for text in held_out} - seen
    assert found


def test_cohorts_replace_just_the_contaminated(scripts: dict[str, ModuleType], setting: Any, cached: Path) -> None:
    detection = scripts["map_detection"]
    updates = detection.trained(scripts["map_clients"].run_folder(setting, "one each", 0, cached))
    ids = detection.sound(updates, KINDS)
    assert len(ids) == 8
    seen = []
    for kind, share, sent, bad in detection.cohorts(updates, KINDS, 0):
        seen.append((kind, share, len(bad)))
        assert [update.client_id for update in sent] == ids
        changed = {u.client_id for u in sent if not sample_updates.same_bits(u.state, updates[u.client_id].state)}
        assert changed == bad
    kinds = (*KINDS, "sign flip", "Gaussian")
    assert seen == [("none", 0.0, 0), *((kind, *cell) for kind in kinds for cell in ((0.2, 2), (0.4, 3)))]


def test_spoiled_updates_are_what_they_say(scripts: dict[str, ModuleType]) -> None:
    own = sample_updates.cohort(1)[0].state
    flipped, random = scripts["map_detection"].sign_flip(own, 5), scripts["map_detection"].gaussian(own, 5)
    for module, factors in own.items():
        torch.testing.assert_close(flipped[module].dense(), -factors.dense())
        assert flipped[module].scale == random[module].scale == factors.scale
        assert random[module].norm() == pytest.approx(factors.norm(), rel=1e-5)
        cosine = (random[module].dense() * factors.dense()).sum() / factors.norm() ** 2
        assert abs(float(cosine)) < 0.7
    assert sample_updates.same_bits(random, scripts["map_detection"].gaussian(own, 5))
    assert not sample_updates.same_bits(random, scripts["map_detection"].gaussian(own, 1))


def test_auc(scripts: dict[str, ModuleType]) -> None:
    auc = scripts["map_detection"].auc
    scores = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}
    assert auc(scores, {"a"}) == 1
    assert auc(scores, {"b", "d"}) == 0
    assert auc(scores, {"b"}) == pytest.approx(1 / 6)  # ties with d, loses to a and c
    assert math.isnan(auc(scores, set()))


def test_cells_pool_counts_not_rates(scripts: dict[str, ModuleType]) -> None:
    def row(share: float, found: int, wrong: int) -> dict[str, Any]:
        facts = {"clients": 10, "contaminated": 2 if share else 0, "found": found, "wrongly_flagged": wrong}
        zeros = dict.fromkeys(("identifiable", "agreement", "auc_direction", "auc_subspace", "auc_scale"), 0.5)
        return {"data": "d", "split": "iid", "kind": "k" if share else "none", "share": share} | facts | zeros

    clean, cell = scripts["map_detection"].pooled([row(0.0, 0, 0), row(0.2, 2, 0), row(0.0, 0, 1), row(0.2, 1, 3)])
    assert math.isnan(clean["recall"])
    assert (clean["cohorts"], clean["false_positive_rate"], clean["precision"]) == (2, 0.05, 0)
    assert (cell["precision"], cell["recall"], cell["false_positive_rate"]) == (0.5, 0.75, 0.1875)
    assert cell["identifiable"] == 0.5


def test_a_cell_without_flags_has_no_precision(scripts: dict[str, ModuleType]) -> None:
    facts = {"clients": 5, "contaminated": 1, "found": 0, "wrongly_flagged": 0, "identifiable": 0, "agreement": 0.0}
    aucs = dict.fromkeys(("auc_direction", "auc_subspace", "auc_scale"), 0.5)
    (cell,) = scripts["map_detection"].pooled([{"data": "d", "split": "s", "kind": "k", "share": 0.2} | facts | aucs])
    assert math.isnan(cell["precision"])
    assert cell["recall"] == cell["false_positive_rate"] == 0


def test_the_script_judges_what_the_cache_holds(
    scripts: dict[str, ModuleType], setting: Any, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = scripts["validity_map"]
    monkeypatch.setattr(script, "settings", lambda args: (setting,))
    flags = ["--base", "x", "--encoder", "x", "--data", "x", "--cache", str(cached), "--output_dir", str(tmp_path)]
    for stage in ("detect", "functional"):
        monkeypatch.setattr(
            sys, "argv", ["validity_map.py", *flags, "--seeds", "1", "--judges", "5", "10", "--stage", stage]
        )
        script.main()
    with open(tmp_path / "cohorts.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 4 * 2
    assert {row["clients"] for row in rows} == {"8"}
    assert all(int(row["found"]) <= int(row["contaminated"]) for row in rows)
    assert "| Gaussian | 0.4 |" in (tmp_path / "tables.md").read_text(encoding="utf-8").replace(
        "tiny | one each | ", ""
    )
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    with open(tmp_path / "functional.csv", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["kind"], row["contaminated"]) for row in found[:3]] == [
        ("none", "0"),
        ("random_outputs", "3"),
        ("constant", "3"),
    ]
    # Every update, the start, the mean and what is between, on everybody with influence.
    clean = [int(row["evaluations"]) for row in found if row["judges"] == "10" and row["kind"] == "none"]
    assert all(0 < evaluations <= (8 + 3) * 8 for evaluations in clean)
