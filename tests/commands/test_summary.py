"""The final table: who was flagged and why, first; what every client had before and has now; never broken rows."""
# SPDX-License-Identifier: Apache-2.0

import io

from rich.console import Console
from sample_record import sample_record

from fedlora_hf.commands.summary import MAX_CLIENTS, print_summary
from fedlora_hf.record.record import RunRecord


def shown(record: RunRecord, terminal: bool = False, width: int = 80) -> str:
    text = io.StringIO()
    print_summary(record, "out", Console(file=text, force_terminal=terminal, width=width, color_system=None))
    return text.getvalue()


def test_flagged_and_quarantined_clients_stand_first_with_the_evidence() -> None:
    record = sample_record(12, 3, 4, 0)
    rows = [line for line in shown(record).splitlines() if line.startswith("│")]
    assert len(rows) == len(record.clients)
    left_out = {*record.flagged, *record.quarantined} & set(record.clients)
    assert {row.split("│")[1].strip() for row in rows[: len(left_out)]} == left_out
    for row in rows:
        name, verdict, weight, before, alone, common, personal = (cell.strip() for cell in row.strip("│").split("│"))
        facts = record.clients[name]
        if name in record.flagged:
            kind, score = verdict.removeprefix("flagged: ").split(" ")[:2]
            assert f"{facts['evidence'][kind]['score']:.2f}" == score
        elif name not in record.quarantined:
            assert verdict == "collaborative"
            assert float(weight) > 0
            expected = [facts["metrics"][view]["loss"] for view in ("before", "local", "global", "personalised")]
            assert [before, alone, common, personal] == [f"{loss:.3f}" for loss in expected]


def test_many_clients_are_cut_off_and_the_flagged_are_not() -> None:
    record = sample_record(200, 2, 10, 0)
    text = shown(record)
    assert all(client in text for client in record.flagged)
    assert f"and {len(record.clients) - MAX_CLIENTS} more, in run.json" in text


def test_every_statement_is_one_line_whatever_the_width() -> None:
    record = sample_record()
    record.diagnosis["summary"] = "common structure: shared subspace yes, " * 8
    for terminal in (True, False):
        lines = shown(record, terminal, width=60).splitlines()
        assert record.diagnosis["summary"].rstrip() in map(str.rstrip, lines)
        assert lines[-1] == "Adapters, run.json, README.md and report/index.html are in out"


def test_near_the_line_and_what_was_not_seen_are_said() -> None:
    record = sample_record(6, 1, 0, 0)
    record.suspicious = {"client-001": {"kind": "scale", "of_line": 0.8}}
    record.clients["client-001"]["influence"] = 0.38
    text = shown(record)
    assert "near the line: client-001: stands far from the rest in the size of its update: 0.80 of 1.00, not" in text
    assert "collaborative, kept 38 %" in text
    assert "nobody was flagged: Evidence on updates cannot see" in text
    assert "nobody was flagged" not in shown(sample_record(6, 1, 2, 0))


def test_what_others_losses_say_is_told_in_words() -> None:
    record = sample_record(6, 1, 1, 0)
    (client,) = record.flagged
    record.clients[client]["evidence"] = {"functional": {"score": 0.3, "threshold": 0.1}}
    record.clients[client]["effect"] = {"raised": 4, "judges": 5, "change": 0.014}
    record.rounds[-1]["judging"] = {"judges": {"a": 4, "b": 2}, "cost": 0.05}
    text = shown(record, width=200)
    assert "flagged: functional 0.30 > 0.10; raises the loss of 4 of 5 others by 1.4 % (median)" in text
    assert "Each update was tried on the validation data of 2 clients (6 examples), at 5.0 % of" in text


def test_a_claim_far_above_the_others_is_a_warning_and_stands_beside_the_weight() -> None:
    record = sample_record(6, 0, 1, 0)
    client = sorted(set(record.clients) - {*record.flagged, *record.quarantined})[0]
    said = "claims 1000000 examples, 1e+05 times the cohort's median of 10: counted as 30 (weight_cap 3)"
    record.clients[client] |= {"weight": 0.25, "claimed_weight": 0.9999, "outlier_claim": said}
    text = shown(record, width=200)
    assert f"warning: {client} {said}" in text
    assert "0.250 (claimed 1.000)" in text
    assert text.count("claimed") == 1
