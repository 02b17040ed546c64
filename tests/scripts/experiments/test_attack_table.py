"""The attack table: attacks do what they say, the script runs end to end and goes on from its cache, numbers add up."""
# SPDX-License-Identifier: Apache-2.0

import csv
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedlora_hf.update import AdapterState, LoraFactors

NAMES = ("attacks", "attack_report", "copying", "other_aggregators", "tables", "update_attacks", "vectors")


def adapter(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"one": (2, 5, 4), "two": (3, 6, 7)}
    return AdapterState(
        {
            module: LoraFactors(torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator), 2.0)
            for module, (r, m, n) in shapes.items()
        }
    )


def same(first: AdapterState, second: AdapterState, factor: float = 1.0) -> bool:
    return all(torch.allclose(first[m].dense(), factor * second[m].dense(), atol=1e-6) for m in first)


def test_vectors_hold_the_factors_in_order(scripts: dict[str, ModuleType]) -> None:
    vectors, state = scripts["vectors"], adapter(0)
    vector = vectors.flat(state)
    assert vector.shape == (2 * 4 + 5 * 2 + 3 * 7 + 6 * 3,)
    assert np.array_equal(vector[:8], state["one"].A.flatten().numpy())
    back = vectors.shaped(vector, adapter(1))
    assert all(torch.equal(back[m].A, state[m].A) and torch.equal(back[m].B, state[m].B) for m in state)


def test_attacks_on_the_update(scripts: dict[str, ModuleType]) -> None:
    attacks, own, start = scripts["update_attacks"].UPDATE_ATTACKS, adapter(0), adapter(9)
    honest = [adapter(seed) for seed in range(1, 6)]
    known = scripts["update_attacks"].Knowledge(start, honest, seed=3)
    sent = {name: attack(own, known, 0) for name, attack in attacks.items()}
    for name, factor in {"sign flip": -1, "boost x10": 10, "flip and boost": -10, "zero": 0}.items():
        assert same(sent[name], own, factor), name
        assert sent[name]["one"].scale == own["one"].scale
    for module in own:
        changed = sent["gaussian"][module].B - start[module].B
        assert changed.norm() == pytest.approx(float((own[module].B - start[module].B).norm()), rel=1e-5)
    assert not same(sent["gaussian"], attacks["gaussian"](own, known, 1))
    assert any(same(sent["copy of another"], state) for state in honest)
    assert same(sent["copy of another"], attacks["copy of another"](adapter(7), known, 4))
    entries = torch.stack([state["two"].B for state in honest])
    expected = entries.mean(0) - 1.5 * entries.std(0, correction=0)
    assert torch.allclose(sent["a little is enough"]["two"].B, expected, atol=1e-5)


@pytest.mark.parametrize("library", ["flower", "byzfl"])
def test_rules_of_other_libraries(scripts: dict[str, ModuleType], library: str) -> None:
    pytest.importorskip("flwr" if library == "flower" else "byzfl")
    rng = np.random.default_rng(0)
    start = rng.normal(size=50).astype(np.float32)
    vectors = (start + 1 + 0.01 * rng.normal(size=(12, 50))).astype(np.float32)
    bad = [1, 6, 7, 11]
    vectors[bad] -= 40
    found = {name: rule for name, rule in scripts["other_aggregators"].rules().items() if name.startswith(library)}
    assert len(found) >= 4
    for name, rule in found.items():
        chosen = rule(vectors, start, len(bad))
        assert chosen.vector.shape == (50,)
        # Two rules do not shake all four off: Bulyan takes 2 of 12 at most, clipping keeps everybody.
        if name not in ("flower Bulyan", "byzfl CenteredClipping"):
            assert np.abs(chosen.vector - start - 1).max() < 0.3, name
        if name in ("flower Krum", "flower MultiKrum"):
            assert chosen.clients
            assert not set(chosen.clients) & set(bad)


def test_detection_counts_who_is_left_out(scripts: dict[str, ModuleType]) -> None:
    attacks, names = scripts["attacks"], ["a", "b", "c", "d"]
    sent = attacks.Cohort({name: adapter(0) for name in names}, frozenset("b"))
    found = attacks.detection(frozenset("ab"), sent)
    assert found == {"left_out": 2, "false_positives": 1, "precision": 0.5, "recall": 1.0}
    assert attacks.detection(frozenset(), sent) == {"left_out": 0, "false_positives": 0, "precision": "", "recall": 0.0}
    assert set(attacks.detection(None, sent).values()) == {""}
    clean = attacks.Cohort(sent.updates, frozenset())
    assert attacks.detection(frozenset("a"), clean)["recall"] == ""


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "attacks.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_script_runs_and_goes_on(scripts: dict[str, ModuleType], cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--quick", "--seeds", "1", "--cache", str(cache), "--output_dir", str(out)]
    scripts["attacks"].main(arguments)
    rows = table(out)
    rules = {row["rule"] for row in rows}
    assert {"local", *scripts["attacks"].OURS} <= rules
    assert len(rows) == 3 * len(rules)
    assert {(row["attack"], row["contaminated"]) for row in rows} == {
        ("none", "0"),
        ("random targets", "1"),
        ("sign flip", "1"),
    }
    flipped = {row["rule"]: row for row in rows if row["attack"] == "sign flip"}
    assert float(flipped["fedavg"]["global_loss"]) > 0
    assert flipped["fedavg"]["recall"] == ""
    assert flipped["local"]["personal_loss"] == next(
        row["personal_loss"] for row in rows if row["rule"] == "local" and row["attack"] == "random targets"
    )
    assert (out / "tables.md").read_text().count("±") > 20
    assert all((out / name).stat().st_size > 10_000 for name in ("global.png", "personal.png"))

    places = {p.stem: p for p in cache.glob("*/*/rows/sign flip-1/*.json")}
    for rule in ("clair hard", "fedavg"):
        places[rule].write_text(json.dumps(json.loads(places[rule].read_text()) | {"global_loss": 77.0}))
    scripts["attacks"].main([*arguments, "--again", "clair"])
    again = {row["rule"]: row for row in table(out) if row["attack"] == "sign flip"}
    assert again["fedavg"]["global_loss"] == "77.0"  # from the cache
    assert again["clair hard"] == flipped["clair hard"]  # computed anew, to the same digits


def test_the_goal_is_counted_over_means_and_runs(scripts: dict[str, ModuleType]) -> None:
    numbers = {"local": (1.0, 2.0), "fedavg": (1.4, 1.4), "clair hard": (1.2, 1.2), "clair soft": (1.5, 1.5)}
    columns = ("global_loss", "personal_loss", "chosen_loss")
    rows = [
        {"regime": "r", "seed": seed, "attack": "none", "contaminated": 0, "clients": 4, "rule": rule}
        | dict.fromkeys(columns, numbers[rule][seed])
        for rule in numbers
        for seed in (0, 1)
    ]
    lines = scripts["attack_report"].goal(scripts["attack_report"].Table(rows), "r").splitlines()
    found = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    # In the mean 1.2 against the better of 1.5 and 1.4; in single runs 1.2 against 1.0, then against 1.4.
    assert found["CLAIR hard, as given"][:2] == ["1 of 1", "1 of 2"]
    assert found["CLAIR soft, chosen"] == ["0 of 1", "0 of 2", "+0.1000 |"]
