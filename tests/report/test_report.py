"""The report: figures and page from a record alone, whole, escaped, the same every time, whatever is missing."""
# SPDX-License-Identifier: Apache-2.0

import html
import json
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_record import sample_record

from fedlora_hf.aggregation import aggregate
from fedlora_hf.record.record import RunRecord
from fedlora_hf.report import write_report
from fedlora_hf.report.diagnosis import MEANINGS, diagnosis
from fedlora_hf.report.page import render_page
from fedlora_hf.report.tables import tables
from fedlora_hf.report.view import Run
from fedlora_hf.report.words import UNSEEN, plain_words
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

ALL = ["evidence", "similarity", "training", "clients", "stages", "spectrum", "cost"]
VOID = {"meta", "link", "img", "source", "br"}
HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Checks that every tag is closed in order, and keeps what a browser would fetch, its tags and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in {"href", "src", "srcset", "action", "data"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(record: RunRecord) -> Page:
    """The page without its figures, which is quick."""
    return Page(render_page(Run.of(record), {}))


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_every_figure_is_written_and_the_page_last(written):
    assert [path.name for path in written] == [*(f"{name}.png" for name in ALL), "index.html"]
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(path.name for path in written)
    for path in written[:-1]:
        width, height = png_size(path)
        assert width >= 1000
        assert height >= 400


def test_page_is_well_formed_and_fetches_nothing(written):
    text = written[-1].read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    inside = {address for address in page.addresses if address.startswith("#")}
    assert inside == {f"#{name}" for name in ["short", *ALL, "origin"]}
    assert {address[1:] for address in inside} <= set(page.ids)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert sum(address.startswith("data:image/png;base64,") for address in page.addresses) == 4 * len(ALL)
    assert "script" not in page.tags
    assert not page.handlers
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_page_names_who_was_flagged_and_why_and_who_was_quarantined():
    record = sample_record(12, 3, 4, 0)
    text = page_of(record).text
    assert "Of 13 clients, 4 were flagged as contaminated and 1 was quarantined as unusable." in text
    for client in record.flagged:
        score = record.clients[client]["evidence"]["direction"]
        assert f"(direction {score['score']:.3g}, threshold {score['threshold']:.3g})" in text
    assert record.quarantined["broken"] in text
    assert "Common structure: shared subspace yes, common direction yes." in text
    assert "fedlora train --model_name_or_path base" in text
    assert "2.13.0" in text
    assert all(client in text for client in record.clients)
    assert "num_items" not in text


def test_page_says_who_is_near_the_line_what_was_kept_and_what_cannot_be_seen():
    record = sample_record(12, 3, 0, 0)
    for place, facts in enumerate(record.clients.values()):
        facts["influence"] = place / 100
    record.suspicious = {"client-003": {"kind": "direction", "of_line": 0.75}}
    text = page_of(record).text
    assert "Close to the line (1), not flagged" in text
    assert "client-003: stands far from the rest in the direction of its update: 0.75 of 1.00, not enough" in text
    assert "; kept 3 % of its influence; " in text
    assert UNSEEN in text
    assert "influence kept" in text
    text = page_of(sample_record(12, 3, 4, 0)).text
    assert "Close to the line" not in text
    assert UNSEEN not in text
    assert "influence kept" not in text


def test_page_of_200_clients_lists_them_all():
    record = sample_record(200, 2, 30, 1)
    text = page_of(record).text
    assert "Every client in numbers (201)" in text
    assert "Flagged (30)" in text
    assert all(client in text for client in record.clients)


def test_200_clients_are_drawn(tmp_path):
    written = write_report(sample_record(200, 1, 60, 3), tmp_path)
    assert [path.stem for path in written[:-1]] == [name for name in ALL if name != "stages"]


def hostile_record() -> RunRecord:
    record = sample_record(3, 2, 1, 0)
    odd = [HOSTILE, "$\\frac{", "$a$b$", "x" * 96, "日本\x07", "a\nb", '"><img src=x onerror=alert(1)>', "9" * 50]
    for client in odd:
        record.clients[client] = record.clients["client-000"]
        record.quarantined[f"q{client}"] = f"reason {client}"
        record.rounds[0]["train_loss"][client] = 1.0
    record.flagged = [*odd[:2], "client-002"]
    record.similarity = {"ids": odd[:2], "cosine": [[1, 0.5], [0.5, 1]]}
    record.modules = {name: {"rank": 1, "spectrum": [2.0, 1.0], "discarded_energy": 0.1} for name in odd}
    record.method, record.created, record.command = HOSTILE, HOSTILE, ["fedlora", HOSTILE]
    for field in (record.method_info, record.model, record.data, record.options, record.diagnosis, record.versions):
        field.update({HOSTILE: HOSTILE, "title": HOSTILE, "name_or_path": HOSTILE, "dataset": HOSTILE})
    record.diagnosis["words"] = f"two words {HOSTILE}"
    for entry in record.rounds:
        entry["stage"] = f"{HOSTILE}{entry['round']}"
        entry["metrics"][HOSTILE] = {HOSTILE: 1.0}
        entry["seconds"] = {HOSTILE: 1.0, "$x": 2.0}
    record.clients["client-000"]["evidence"][HOSTILE] = {"score": 2.0, "threshold": 1.0}
    record.clients["client-000"]["metrics"]["global"] = {HOSTILE: 1.0}
    return record


def test_hostile_names_are_shown_and_never_run(tmp_path):
    text = write_report(hostile_record(), tmp_path)[-1].read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert not page.handlers
    assert "<script" not in text
    assert html.escape(HOSTILE, quote=False).replace("'", "&#39;") in text
    assert HOSTILE in page.text
    assert page.tags.count("img") == len(list((tmp_path / "report").glob("*.png"))) == len(ALL)


def test_empty_record_gives_a_page_that_says_what_is_missing(tmp_path):
    written = write_report(RunRecord(kind="train", method="fedavg", seed=0), tmp_path)
    assert [path.name for path in written] == ["index.html"]
    text = Page(written[0].read_text(encoding="utf-8")).text
    assert text.count("recorded") >= len(ALL)
    assert "The record names no clients." in text
    assert "Figures that this report has not (7)" in text


def test_what_the_record_has_no_numbers_for_has_no_section():
    record = RunRecord(kind="aggregate", method="fedavg", seed=0, clients={"a": {}, "b": {}})
    page = page_of(record)
    assert page.ids == ["short", "evidence", "origin"]
    assert "What everyone gained" not in page.text
    assert "The numbers behind this" not in page.text
    assert {address for address in page.addresses if address.startswith("#")} == {"#short", "#evidence", "#origin"}


def test_nulls_and_wrong_types_are_left_out_not_fatal(tmp_path):
    empty = {"score": None, "threshold": None}
    record = RunRecord(
        kind="aggregate",
        method="clair",
        seed=0,
        clients={
            "a": {"collaborative": True, "weight": None, "evidence": {"scale": empty}, "metrics": {"global": None}},
            "b": {"collaborative": None, "evidence": 3, "metrics": {"global": {"loss": None}, "local": [1]}},
            "c": {"evidence": {"scale": {"score": 1.0, "threshold": None}, "direction": True}},
            "d": {"collaborative": False},
        },
        rounds=[{"round": None, "metrics": 5, "train_loss": {"a": None}, "seconds": None}, {"bytes_up": {"a": 7}}, {}],
        flagged=["zz"],
        modules={"m": {"rank": None, "spectrum": [None, 0.0]}, "n": {"spectrum": 4}, "o": {"discarded_energy": 0.0}},
        metrics={"before": None, "after": {"global": {"loss": None}, "personalised": 4}},
        similarity={"ids": ["a", "b"], "cosine": [[1, None]]},
        diagnosis={"x": None, "y": [1, [2, {"z": True}]], "k": {"a": 0.5}},
    )
    written = write_report(record, tmp_path)
    assert [path.stem for path in written[:-1]] == ["evidence", "spectrum", "cost"]
    text = Page(written[-1].read_text(encoding="utf-8")).text
    assert "no score of it above a threshold" in text
    assert "a: 0.5" in text


def test_one_client_one_round_is_drawn(tmp_path):
    written = write_report(sample_record(1, 1, 0, 0), tmp_path)
    assert [path.stem for path in written[:-1]] == ["evidence", "training", "clients", "spectrum", "cost"]
    assert "Of 1 client, none was flagged, none quarantined." in written[-1].read_text(encoding="utf-8")


def test_the_rounds_time_is_told_by_part():
    record = sample_record(2, 2, 0, 0)
    record.rounds[0]["seconds"] = {"write": 1.0, "train": 2.0, "other": 0.5}
    record.rounds[1]["seconds"] = {"train": 6.0, "idle": 0.5}
    (table,) = tables(Run.of(record))["cost"]
    assert [[cell.text for cell in row[:3]] for row in table.rows] == [
        ["train", "8.0 s", "80 %"],
        ["write", "1.0 s", "10 %"],
        ["idle", "0.5 s", "5 %"],
        ["other", "0.5 s", "5 %"],
    ]
    assert table.about == "Of 10.0 s that the rounds took, 80 % went into train."
    for entry in record.rounds:
        entry["seconds"] = {}
    assert tables(Run.of(record))["cost"] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.dictionaries(
    st.sampled_from(["evidence", "metrics", "weight", "round", "stage", "cohort", "quarantined", "seconds", "bytes_up"])
    | st.text(max_size=3),
    JSON,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(clients=st.dictionaries(st.text(max_size=4), ENTRY, max_size=3), rounds=st.lists(ENTRY, max_size=3), junk=JSON)
def test_any_json_gives_a_well_formed_page(clients, rounds, junk):
    record = RunRecord(kind="train", method="clair", seed=0, clients=clients, rounds=rounds)
    record.metrics = record.diagnosis = record.similarity = {"after": junk, "ids": junk, "before": junk}
    record.modules = {"m": {"rank": junk, "spectrum": junk, "discarded_energy": junk}}
    record.flagged, record.command = [junk], [junk]
    page_of(record)


def test_the_same_record_gives_the_same_bytes_whatever_the_users_settings(written, tmp_path):
    record = RunRecord.from_dict(json.loads(sample_record(12, 3, 4, 0).to_json()))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.parse_math": False}):
        again = write_report(record, tmp_path)
        assert matplotlib.rcParams["font.size"] == 30
    changed = [path.name for path, other in zip(written, again, strict=True) if path.read_bytes() != other.read_bytes()]
    assert changed == []
    assert not any(mark in written[0].read_bytes() for mark in (b"tEXt", b"tIME"))


def test_a_figure_that_no_longer_applies_is_removed(tmp_path):
    stale = tmp_path / "report" / "similarity.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    write_report(RunRecord(kind="train", method="fedavg", seed=0), tmp_path)
    assert not stale.exists()


def test_importing_the_report_loads_no_drawing_library_and_drawing_no_pyplot(tmp_path):
    code = (
        "import sys; from fedlora_hf.report import write_report; from fedlora_hf.record.record import RunRecord;"
        "print(sorted({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)));"
        "r = RunRecord('train', 'm', 0, modules={'a': {'discarded_energy': 0.1}});"
        f"print([p.name for p in write_report(r, {str(tmp_path)!r})], 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['spectrum.png', 'index.html'] False"]


def test_every_number_of_the_diagnosis_has_its_sentence():
    record = sample_record(12, 3, 4, 0)
    record.diagnosis |= {"copies": [["a", "b"]], "krum_scores": {"a": 1.0}, "nothing": [], "invented": 3}
    sentences, findings = diagnosis(Run.of(record))
    assert sentences == ["Common structure: shared subspace yes, common direction yes."]
    names = ["agreement", "copies", "identifiable", "invented", "krum scores", "shared energy"]
    assert [finding.name for finding in findings] == names
    assert all(finding.meaning.endswith(".") for finding in findings)
    text = page_of(record).text
    assert all(meaning in text for _, _, meaning in findings)


def test_the_methods_own_numbers_all_have_a_meaning():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states = [AdapterState({"m": LoraFactors(torch.randn(2, 8), torch.randn(8, 2), 1.0)}) for _ in range(7)]
    updates = [ClientUpdate(f"c{n}", state, 10) for n, state in enumerate(states)]
    found = {name for method in ("clair", "multikrum") for name in aggregate(updates, method).diagnosis}
    assert len(found) > 10
    assert sorted(found - set(MEANINGS)) == ["summary"]


def test_values_of_a_diagnosis_read_as_words():
    values = ([], {}, True, None, 0.25, [1, "two"], {"a": False})
    assert [plain_words(value) for value in values] == [
        "none",
        "none",
        "yes",
        "not recorded",
        "0.25",
        "1, two",
        "a: no",
    ]


def test_page_tells_who_claims_far_more_examples_than_the_others():
    record = sample_record(6, 0, 1, 0)
    assert "far above" not in page_of(record).text
    said = "claims 1000000 examples: counted as 30 (weight_cap 3)"
    record.clients["client-000"] |= {"weight": 0.25, "claimed_weight": 0.9999, "outlier_claim": said}
    text = page_of(record).text
    assert "Claims (1): numbers of examples far above the others'" in text
    assert said in text
    assert "0.25 (claimed 1)" in text
