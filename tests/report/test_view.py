"""What the report reads out of a record, and how it words and places it."""
# SPDX-License-Identifier: Apache-2.0

import pytest
from sample_record import sample_record

from fedlora_hf.record.record import RunRecord
from fedlora_hf.report import words
from fedlora_hf.report.columns import Columns
from fedlora_hf.report.gains import gains
from fedlora_hf.report.round_figures import stage_change
from fedlora_hf.report.style import label
from fedlora_hf.report.view import COLLABORATIVE, FLAGGED, LEFT_OUT, QUARANTINED, Run, natural


def test_states_and_order_of_clients():
    record = RunRecord("train", "clair", 0, clients={"c10": {}, "c2": {}, "b": {"collaborative": False}, "f": {}})
    record.flagged, record.quarantined = ["f"], {"q": "holds NaN"}
    found = [(client.id, client.state) for client in Run.of(record).clients]
    assert found == [
        ("c2", COLLABORATIVE),
        ("c10", COLLABORATIVE),
        ("b", LEFT_OUT),
        ("f", FLAGGED),
        ("q", QUARANTINED),
    ]


def test_natural_order_survives_digits_of_any_script_and_length():
    assert sorted(["a10", "a9", "a²", "a" + "9" * 400], key=natural)[:2] == ["a9", "a10"]


@pytest.mark.parametrize(
    "found",
    [
        {"loss": 2.0},
        {"loss": {"a": 1.0, "b": 3.0, "bad": 99.0}},
        {"a": {"loss": 1.0}, "b": {"loss": 3.0}, "bad": {"loss": 99.0}},
    ],
)
def test_round_metrics_are_read_as_means_or_per_client(found):
    record = RunRecord("train", "clair", 0, clients={"a": {}, "b": {}, "bad": {}}, flagged=["bad"])
    record.rounds = [{"round": 1, "metrics": {"global": found}}]
    run = Run.of(record)
    assert run.mean_metric(run.rounds[0], "global", "loss") == 2.0
    assert run.mean_metric(run.rounds[0], "local", "loss") is None


def test_a_stage_changes_what_the_stage_before_it_left():
    record = RunRecord("train", "clair", 0, metrics={"before": {"global": {"loss": 5.0}}})
    record.rounds = [
        {"round": n, "stage": stage, "metrics": {"global": {"loss": loss}}}
        for n, stage, loss in ((1, "local", 4.0), (2, "local", 3.0), (3, "global", None), (4, "personal", 2.5))
    ]
    run = Run.of(record)
    assert [(name, len(entries)) for name, entries in run.stages] == [("local", 2), ("global", 1), ("personal", 1)]
    changes = [stage_change(run, place, "global", "loss") for place in range(3)]
    assert changes == [(5.0, 3.0), (3.0, None), (3.0, 2.5)]


def test_evidence_of_the_last_round_stands_in_where_a_client_has_none():
    record = RunRecord("train", "clair", 0, clients={"a": {}})
    record.rounds = [{"evidence": {"a": {"scale": {"score": 2.0, "threshold": 1.0}}}}]
    assert Run.of(record).clients[0].evidence["scale"].above


def test_reason_falls_back_to_the_rounds_that_flagged():
    record = RunRecord("train", "clair", 0, clients={"a": {}}, flagged=["a"])
    record.rounds = [{"round": 1, "flagged": ["a"]}, {"round": 2, "flagged": []}, {"round": 3, "flagged": ["a"]}]
    run = Run.of(record)
    assert words.reason_of(run, run.clients[0]).startswith("flagged in round 1, 3;")


def test_verdict_says_when_nobody_was_judged():
    run = Run.of(RunRecord("train", "fedavg", 0, clients={"a": {}, "b": {}}))
    assert words.verdict(run) == "Of 2 clients, none was quarantined; the method flags nobody."


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (12.0, "12"), (1234567.0, "1,234,567"), (0.123456, "0.1235")]
)
def test_numbers_as_people_read_them(value, text):
    assert words.figure_of(value) == text


@pytest.mark.parametrize(("size", "text"), [(None, "–"), (512, "512 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_bytes_as_people_read_them(size, text):
    assert words.bytes_of(size) == text


@pytest.mark.parametrize(
    ("clients", "flagged", "named"), [(1, 0, 1), (12, 4, 12), (54, 4, 54), (200, 8, 8), (200, 36, 36), (200, 60, 0)]
)
def test_columns_name_as_many_clients_as_fit(clients, flagged, named):
    judged = [client for client in Run.of(sample_record(clients, 1, flagged, 0)).clients if client.evidence]
    columns = Columns.of(judged)
    assert len(columns.named) == named
    assert all(late > early for early, late in zip(columns.places, columns.places[1:], strict=False))
    assert [client.state for client in columns.clients[clients - flagged :]] == [FLAGGED] * flagged
    if columns.divider is not None:
        assert columns.places[clients - flagged - 1] < columns.divider < columns.places[clients - flagged]
    if 1 < named < clients:
        pitch = columns.places[-1] - columns.places[-2]
        assert 8.2 * pitch / (columns.places[-1] - columns.places[0]) > 0.13  # inches: an upright name's height


def test_labels_are_short_printable_and_not_mathematics():
    assert label("$x$\n日") == r"\$x\$??"
    assert len(label("a" * 96)) == 22


def near_the_line() -> RunRecord:
    """Nobody flagged; one client near the line, one that has turned, one that kept all of its influence."""
    record = RunRecord("train", "clair", 0)
    evidence = {"direction": {"score": 0.6, "threshold": 0.85}}
    for client, kept in (("a", 0.38), ("b", 0.0), ("c", 1.0)):
        facts = {"collaborative": True, "weight": 0.3, "num_examples": 10, "evidence": evidence, "metrics": {}}
        record.clients[client] = {**facts, "influence": kept}
    record.suspicious = {"a": {"kind": "direction", "of_line": 0.706}, "b": {"kind": "drift", "of_line": 1.4}}
    return record


def test_who_is_near_the_line_is_named_with_what_it_kept_and_what_would_decide_it():
    run = Run.of(near_the_line())
    first, second = (words.suspicion_of(client) for client in run.suspicious)
    assert first.startswith("turned away from where it pointed in earlier rounds, which alone flags nobody; kept 0 %")
    assert second == (
        "stands far from the rest in the direction of its update: 0.71 of 1.00, not enough to flag; kept 38 % of its "
        "influence; --functional_judges would look at it with others' data, and more rounds would tell more"
    )
    assert [words.kept_of(client) for client in run.clients] == [
        "kept 38 % of its influence",
        "kept 0 % of its influence",
        "",
    ]
    run.clients[0].evidence["functional"] = run.clients[0].evidence["direction"]
    assert words.suspicion_of(run.clients[0]).endswith("; more rounds would decide it")


def test_beside_nobody_was_flagged_stands_what_evidence_cannot_see():
    record = near_the_line()
    assert words.unseen(Run.of(record)) == words.UNSEEN
    record.flagged = ["a"]
    assert words.unseen(Run.of(record)) == ""
    assert words.unseen(Run.of(RunRecord("train", "fedavg", 0, clients={"a": {}}))) == ""


def test_malformed_suspicions_are_left_out():
    record = near_the_line()
    record.suspicious = {"a": "x", "b": {"kind": "drift"}, "c": {"kind": 3, "of_line": 0.7}}
    run = Run.of(record)
    assert [client.id for client in run.suspicious] == ["c"]
    assert words.suspicion_of(run.suspicious[0]).startswith("has a high 3 score: 0.70 of 1.00")


def test_a_record_that_does_not_name_who_is_near_is_read_for_it():
    record = near_the_line()
    record.suspicious = {}
    record.clients["b"]["evidence"] = {"direction": {"score": 0.5, "threshold": 0.85}}
    assert [(client.id, client.suspicion) for client in Run.of(record).suspicious] == [
        ("a", ("direction", pytest.approx(0.706, abs=1e-3))),
        ("c", ("direction", pytest.approx(0.706, abs=1e-3))),
    ]
    record.rounds = [{"round": 1, "suspicious": {}}]  # such a record knows that nobody is
    assert Run.of(record).suspicious == []


def gained(**found: dict[str, float]) -> RunRecord:
    """{client: {view: loss}} as a record."""
    views = {c: {view: {"loss": loss} for view, loss in losses.items()} for c, losses in found.items()}
    return RunRecord("train", "clair", 0, clients={c: {"metrics": metrics} for c, metrics in views.items()})


def test_what_everyone_gained_is_counted_and_who_lost_is_named():
    record = gained(
        a={"before": 3.0, "global": 2.0, "personalised": 1.0, "local": 1.5},
        b={"before": 3.0, "global": 2.5, "local": 2.0},
        c={"before": 3.0, "global": 2.0, "personalised": 3.5},
    )
    record.metrics = {"before": {"global": {"loss": 3.0}}, "after": {"global": {"loss": 2.167}}}
    assert gains(Run.of(record)) == [
        "Mean loss (how much the right answers surprise the model; lower is better) on the clients' own test data was "
        "3 with the base model; it is 2.17 with the global adapter.",
        "2 of 3 clients do better than with the base model; worse off: c (3 → 3.5).",
        "1 of 2 clients does better than with training alone; worse off: b (2 → 2.5).",
    ]
    assert gains(Run.of(RunRecord("train", "clair", 0, clients={"a": {}}))) == []


def test_at_most_five_of_those_who_lost_are_named():
    record = gained(**{f"c{n}": {"before": 1.0, "global": 2.0} for n in range(9)})
    assert gains(Run.of(record))[-1].endswith("c4 (1 → 2) and 4 more.")


def judged_run() -> RunRecord:
    """One client flagged by others' losses, one near that line."""
    record = RunRecord("train", "clair", 0, flagged=["a"])
    for client, raised, change, score in (("a", 7, 0.014, 0.3), ("b", 5, 0.002, 0.07)):
        evidence = {"functional": {"score": score, "threshold": 0.1}}
        effect = {"raised": raised, "judges": 9, "change": change}
        record.clients[client] = {"collaborative": client != "a", "evidence": evidence, "effect": effect, "metrics": {}}
    record.suspicious = {"b": {"kind": "functional", "of_line": 0.7}}
    panel = {"judges": {"a": 4, "b": 4, "c": 3}, "cost": 0.081}
    record.rounds = [{"round": 1, "judging": panel, "seconds": {"train": 10.0, "judge": 1.2, "aggregate": 1.0}}]
    return record


def test_what_an_update_does_to_others_is_said_in_numbers():
    run = Run.of(judged_run())
    first, second = sorted(run.clients, key=lambda client: client.id)
    assert words.reason_of(run, first).startswith(
        "its update raises the loss of 7 of 9 others by 1.4 % (median) (funct"
    )
    assert words.suspicion_of(second) == (
        "raises the loss of 5 of 9 others by 0.2 % (median): 0.70 of 1.00, not enough to flag; more rounds would "
        "decide it"
    )
    assert words.effect_of((2, 9, -0.05)) == "lowers the loss of 7 of 9 others by 5.0 % (median)"
    assert words.effect_of((9, 9, 3.5)) == "raises the loss of 9 of 9 others by 350 % (median)"


def test_who_judged_is_said_with_the_cost_planned_and_measured():
    assert words.judging(Run.of(judged_run())) == (
        "Each update was tried on the validation data of 3 clients (11 examples), at 8.1 % of the training's cost by "
        "tokens, 12.0 % of its time."
    )
    assert words.judging(Run.of(near_the_line())) == ""


@pytest.mark.parametrize("value", [None, 3, {}, {"raised": 2}, {"raised": 9, "judges": 2, "change": 0.1}])
def test_a_malformed_effect_is_left_out(value):
    record = judged_run()
    record.clients["a"]["effect"] = value
    run = Run.of(record)
    flagged = next(client for client in run.clients if client.id == "a")
    assert flagged.effect is None
    assert "raises the loss on other clients' validation data" in words.reason_of(run, flagged)


def test_a_rehearsal_says_who_was_contaminated_on_purpose():
    record = sample_record(4, 1, 1, 0)
    assert words.rehearsal(Run.of(record)) == ""
    first, second = sorted(record.clients)[:2]
    record.clients[first]["contaminated"] = "sign_flip:2"
    assert f"1 client was contaminated on purpose by --contaminate, {first} (sign_flip:2;" in words.rehearsal(
        Run.of(record)
    )
    record.clients[second]["contaminated"] = "random_targets"
    assert "2 clients were contaminated on purpose" in words.rehearsal(Run.of(record))
