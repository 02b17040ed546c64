"""The experiments on methods: what they run exists, and their tables say what the csv says."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from fedlora_hf.config import FederatedConfig
from fedlora_hf.methods import METHODS, method_named
from fedlora_hf.methods.settings import method_options
from scripts.experiments import methods_rounds, methods_table


def test_every_method_that_averages_in_one_round_is_in_the_table(tmp_path: Path) -> None:
    for method, options in methods_table.RULES.values():
        method_options(method_named(method), **{k: v for k, v in options.items() if k != "target_rank"})
    in_rounds = {str(changes["aggregation"]) for changes in methods_rounds.VARIANTS.values()}
    others = {"local", "stacking", "dirmag_mean", "fedsa"}  # a baseline, fedex's sum, another adapter, no global one
    assert {method for method, _ in methods_table.RULES.values()} | in_rounds | others == set(METHODS)
    for changes in methods_rounds.VARIANTS.values():
        FederatedConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **changes)


def test_the_table_of_one_round_has_means_the_best_bold_and_the_worst(tmp_path: Path) -> None:
    file = tmp_path / "methods.csv"
    rows = ["0,none,fedavg,2.0,0.5", "1,none,fedavg,3.0,0.5", "0,none,median,2.25,0.5", "0,sign flip,fedavg,9.0,0.1"]
    file.write_text("\n".join([",".join(methods_table.COLUMNS), *rows]) + "\n", encoding="utf-8")
    lines = methods_table.table(file).splitlines()
    assert "| fedavg | 2.500 |  |  | **9.000** |  |  |  | 9.000 |" in lines
    assert "| median | **2.250** |  |  |  |  |  |  | 2.250 |" in lines


def test_the_table_of_rounds_has_means_and_spreads(tmp_path: Path) -> None:
    file = tmp_path / "rounds.csv"
    rows = ["0,ffa,2.0,0.4,1000", "1,ffa,2.5,0.6,3000"]
    file.write_text("\n".join([",".join(methods_rounds.COLUMNS), *rows]) + "\n", encoding="utf-8")
    assert "| ffa | 2.250 | 0.500 | 0.500 | 2 | 2 |" in methods_rounds.table(file).splitlines()
