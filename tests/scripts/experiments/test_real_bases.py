"""The experiments on real bases run end to end on a tiny one, go on from their csv files, and their numbers add up."""
# SPDX-License-Identifier: Apache-2.0

import statistics
from pathlib import Path

import models
import pytest
import sample_data

from scripts.experiments import gpu, real_attacks, real_methods, real_protocol, real_report
from scripts.experiments.real_cells import Table

pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    # A handful of clients of two steps are too few for clair's weights to settle, which it says.
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny base and generated records."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "dolly").mkdir()
    sample_data.write_dolly(folder / "dolly" / "databricks-dolly-15k.jsonl", 120)
    sample_data.write_natural_instructions(folder / "natural_instructions", tasks=3, instances=24)
    found = ["--base", str(models.save_base(folder / "base")), "--data", str(folder), "--cache", str(folder / "cache")]
    return [*found, "--max_length", "24", "--steps", "2", "--lora_r", "2", "--use_cpu", "--batch", "2"]


def test_methods_are_tuned_on_seeds_that_are_not_reported(flags: list[str], tmp_path: Path) -> None:
    given = [*flags, "--sources", "tasks", "--methods", "base", "fedavg", "pipeline", "--rates", "1e-3", "1e-2"]
    given += ["--seeds", "0", "1", "--examples", "12", "--test_share", "0.3", "--new_tokens", "2"]
    given += ["--output_dir", str(tmp_path)]
    real_methods.main(given)
    table = Table(tmp_path / "methods.csv", real_methods.KEY)
    tuned = [row for row in table.rows if int(row["tuning"])]
    assert {row["seed"] for row in tuned} == {"100"}
    assert {row["global_loss"] for row in tuned} == {""}
    reported = real_report.reported(table.rows, "base", "tasks")
    assert {row["seed"] for row in reported} == {"0", "1"}
    for method in ("fedavg", "pipeline"):
        # Each kind of adapter is scored at the rate that its own validation loss chose, and nowhere else.
        for kind in real_methods.KINDS:
            rates = {float(r["rate"]) for r in reported if r["method"] == method and r[f"{kind}_loss"] != ""}
            assert rates == {real_methods.best_rate(table.rows, "tasks", method, kind, [1e-3, 1e-2])}
    before = (tmp_path / "methods.csv").read_bytes()
    real_methods.main(given)
    assert (tmp_path / "methods.csv").read_bytes() == before
    # The gain of the whole, by hand: the mean difference to FedAvg of the same seed and client.
    found = real_report.gains(reported, "pipeline", "local", "token_accuracy")

    def mean(method: str) -> float:
        own = [row["local_token_accuracy"] for row in reported if row["method"] == method]
        return statistics.fmean(float(value) for value in own if value)

    values = [value for own in found.values() for value in own]
    assert statistics.fmean(values) == pytest.approx(100 * (mean("pipeline") - mean("fedavg")))
    low, high = real_report.summary(found)[1:3]
    assert low <= statistics.fmean(values) <= high


def test_a_rate_is_chosen_for_each_kind_of_adapter() -> None:
    losses = {(1e-3, "global"): 3.0, (1e-2, "global"): 2.0, (1e-3, "local"): 1.0, (1e-2, "local"): 4.0}
    rows = [
        {"data": "tasks", "method": method, "tuning": tuning, "rate": rate}
        | {f"{kind}_validation_loss": losses[rate, kind] * (1 if tuning else -1) for kind in real_methods.KINDS}
        for method in ("fedavg", "local")
        for tuning in (1, 0)
        for rate in (1e-3, 1e-2)
    ]
    rates = (1e-3, 1e-2)
    assert real_methods.chosen(rows, "tasks", "fedavg", rates) == {1e-2: ["global"], 1e-3: ["local"]}
    assert real_methods.chosen(rows, "tasks", "local", rates) == {1e-3: ["local"]}
    assert real_methods.chosen(rows, "tasks", "base", rates) == {0.0: ["global", "local"]}


def test_attacks_and_the_protocol_make_a_page(flags: list[str], tmp_path: Path) -> None:
    attacks = ["--splits", "iid", "--attacks", "none", "sign flip", "--clients", "4", "--bad", "1", "--tasks", "2"]
    out = ["--seeds", "0", "--output_dir", str(tmp_path / "made")]
    real_attacks.main([*flags, *attacks, *out, "--examples", "12"])
    rows = Table(tmp_path / "made" / "attacks.csv", real_attacks.KEY).rows
    assert [row["rule"] for row in rows] == 2 * list(real_attacks.RULES)
    assert {row["contaminated"] for row in rows if row["attack"] == "none"} == {"0"}
    protocol = ["--clients", "4", "--rounds", "2", "--every", "1", "--rank", "2", "--peaks", "1e-2", "--examples", "10"]
    real_protocol.main([*flags, *protocol, *out, "--strategies", "product_mean", "fedavg"])
    rounds = Table(tmp_path / "made" / "protocol.csv", real_protocol.KEY).rows
    assert [row["round"] for row in rounds] == 2 * ["0", "1", "2"]
    assert rounds[0]["loss"] == rounds[3]["loss"]  # one start, the same test examples
    real_report.main(["--results", str(tmp_path / "page"), "--take", str(tmp_path / "made")])
    text = (tmp_path / "page" / "tables.md").read_text(encoding="utf-8")
    assert "| sign flip | 1 |" in text
    assert "| 0.01 | fedavg |" in text
    assert (tmp_path / "page" / "attacks.png").stat().st_size > 5_000
    assert Table(tmp_path / "page" / "attacks.csv", real_attacks.KEY).rows == rows


def test_rates_fall_along_half_a_cosine() -> None:
    rates = [real_protocol.rate(5e-5, 1e-6, number, 11) for number in range(1, 12)]
    assert rates[0] == pytest.approx(5e-5)
    assert rates[5] == pytest.approx((5e-5 + 1e-6) / 2)
    assert rates[-1] == pytest.approx(1e-6)


def test_gpu_jobs_have_names_of_their_own_and_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    names = [job.name for job in gpu.jobs()]
    assert len(set(names)) == len(names) > 30
    parsers = {"real_methods": real_methods, "real_attacks": real_attacks, "real_protocol": real_protocol}
    places = dict.fromkeys(("data", "cache", "output_dir", "base_7m", "smollm2"), "x")
    for job in gpu.jobs():
        module, *flags = gpu.shlex.split(job.command.format(**places))
        if module in parsers:
            found = parsers[module].arguments(flags)
            assert all(flag in ("--model_dtype", "bfloat16") for flag in found.more), job.name
    assert gpu.main(["--data", "x", "--base_7m", "x", "--smollm2", "x", "--list"]) == 0
    assert f"{len(names)} of {len(names)} jobs to do" in capsys.readouterr().out
