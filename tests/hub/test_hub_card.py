"""The card tells what the record says, all of it from the record, and nothing a record holds can act as markup."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from sample_run import sample_record, write_run

from fedlora_hf.hub import render_card, write_card
from fedlora_hf.hub.text import fenced, markdown, one_line
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.redaction import redacted

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
NASTY = "x](http://evil.example) <script>alert(1)</script> | `a` **b** ![i](j)\n---\n# title\nkey: [\u202e"


def front(card):
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


@pytest.mark.parametrize("folder", sorted(CARDS.iterdir()), ids=lambda folder: folder.name)
def test_golden_cards(folder):
    """After a wanted change: python -c 'from fedlora_hf.hub import write_card; write_card("model_cards/<name>")'."""
    figures = sorted(f"report/{path.name}" for path in folder.glob("report/*.png"))
    assert render_card(RunRecord.load(folder), figures=figures) == (folder / "README.md").read_text(encoding="utf-8")


def test_front_matter_is_what_the_hub_indexes():
    told = front(render_card(sample_record(), "alice/run"))
    assert told["base_model"] == "lab/tiny"
    assert told["datasets"] == ["lab/texts"]
    assert told["library_name"] == "peft"
    assert told["pipeline_tag"] == "text-generation"
    assert {"fedlora_hf", "federated-learning", "lora", "fedavg"} <= set(told["tags"])
    (index,) = told["model-index"]
    assert index["name"] == "run"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "lab/texts", "type": "lab/texts"}
    assert result["metrics"] == [{"type": "loss", "value": 1.5, "name": "loss (global)"}]


@pytest.mark.parametrize("path", ["/home/me/model", "./model", "C:\\models\\m", "~/m", "a/b/c", "data/set.jsonl"])
def test_local_paths_name_nothing_on_the_hub_and_do_not_leave_whole(path):
    card = render_card(sample_record(model={"name_or_path": path}, data={"dataset": path}))
    assert "base_model" not in front(card)
    assert "datasets" not in front(card)
    assert path not in card


def test_a_path_that_looks_like_a_hub_id_is_local_when_the_record_says_so():
    told = front(render_card(sample_record(model={"name_or_path": "out/base", "local": True})))
    assert "base_model" not in told


def test_rejected_clients_are_shown_with_evidence_thresholds_and_reasons():
    clients = {
        "eve": {"collaborative": False, "evidence": {"direction": {"score": 0.91, "threshold": 0.5}}},
        "ann": {"collaborative": True, "evidence": {"direction": {"score": 0.1, "threshold": 0.5}}},
    }
    card = render_card(sample_record(flagged=["eve"], clients=clients))
    assert "| eve | flagged | **direction 0.91 &gt; 0.5** | - |" in card
    assert "| mal | quarantined | - | NaN in lora_B |" in card
    assert "subfolder='clients/ann'" in card
    assert "clients/eve" not in card


def test_results_put_before_and_after_side_by_side():
    metrics = {"before": {"global": {"loss": 4.0}}, "after": {"global": {"loss": 3.0}, "personalised": {"loss": 2.5}}}
    card = render_card(sample_record(metrics=metrics))
    assert "| metric | before | global adapter | personal adapters |" in card
    assert "| loss | 4 | 3 | 2.5 |" in card


def test_only_figures_of_the_report_are_embedded():
    card = render_card(sample_record(), figures=["report/evidence.png", "http://evil/x.png", "report/../x.png"])
    assert "![evidence](report/evidence.png)" in card
    assert "evil" not in card
    assert ".." not in card


def test_nothing_in_a_record_acts_as_markup():
    clean = render_card(sample_record())
    card = render_card(
        sample_record(
            command=["fedlora", NASTY, "```"],
            options={NASTY: NASTY},
            method_info={"title": NASTY, "paper": NASTY, "averages": NASTY},
            model={"name_or_path": NASTY, "task": NASTY, "license": NASTY},
            data={"dataset": NASTY, "partition_by": NASTY, "language": [NASTY]},
            adapter={NASTY: NASTY},
            versions={NASTY: NASTY},
            created=NASTY,
            flagged=[NASTY],
            quarantined={NASTY: NASTY},
            diagnosis={NASTY: NASTY},
            clients={NASTY: {"collaborative": True, "evidence": {NASTY: {"score": 1.0, "threshold": 0.0}}}},
            metrics={"after": {"global": {NASTY: 1.0}}},
            rounds=[{"round": NASTY, "stage": NASTY, "cohort": [NASTY], "flagged": [NASTY]}],
        )
    )
    body = card.split("---\n", 2)[2]
    outside = body.split("```")[0] + "".join(body.split("````")[2::2])  # the nasty command's fence is longer
    assert "alert" in outside
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    assert "\u202e" not in card
    headings, expected = ([line for line in text.splitlines() if line.startswith("## ")] for text in (card, clean))
    assert headings == expected
    assert set(front(card)) <= {*front(clean), "license", "language"}
    tables = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") in (3, 5, 9) for line in tables)


@pytest.mark.parametrize("value", [None, 3, "x", [], [None, {}, [1]], {"a": {"b": [1]}}, {"after": [1]}, float("inf")])
def test_no_value_of_a_field_stops_the_card(value):
    blank = sample_record()
    for field in dataclasses.fields(RunRecord):
        present = getattr(blank, field.name)
        if isinstance(present, dict):
            changed = {"x": value, "evidence": value, "title": value, "paper": value, "averages": value, "after": value}
            changed |= {"name_or_path": value, "dataset": value, "license": value, "language": value, "task": value}
            if field.name in ("clients", "modules"):
                changed = {"x": dict.fromkeys(("collaborative", "evidence", "rank", "discarded_energy"), value)}
        elif field.name == "rounds":
            changed = [dict.fromkeys(("round", "cohort", "flagged", "train_loss", "seconds", "bytes_up"), value)]
        elif isinstance(present, list):
            changed = [value]
        else:
            continue
        assert front(render_card(sample_record(**{field.name: changed})))


def test_write_card_replaces_the_placeholders(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "README.md").write_text("[More Information Needed]")
    card = write_card(run).read_text()
    assert "More Information" not in card
    assert "![evidence](report/evidence.png)" in card
    assert list(run.glob("clients/*/README.md")) == []


def test_commands_are_shown_without_secrets():
    secret = "hf_" + "a" * 30
    command = f"fedlora --hub_token abc --token=xyz {secret} --max_new_tokens 5 --tokenizer t"
    assert " ".join(redacted(command.split())) == (
        "fedlora --hub_token *** --token=*** *** --max_new_tokens 5 --tokenizer t"
    )


def test_text_helpers():
    assert one_line("a\r\n b\u2028c\x00") == "a b c"
    assert one_line("x" * 10, limit=5) == "xxxx…"
    assert markdown("q_proj _x_ *y* <b>") == "q_proj \\_x\\_ \\*y\\* &lt;b&gt;"
    assert fenced("a ``` b", "shell") == "````shell\na ``` b\n````"


def test_claims_far_above_the_others_are_told_and_what_the_method_makes_of_counts():
    said = "claims 9 examples, 9 times the cohort's median of 1: believed, the method trusts counts"
    clients = {
        "ann": {"collaborative": True, "outlier_claim": said},
        "bob": {"collaborative": True, "outlier_claim": ""},
        "eve": {"collaborative": True, "outlier_claim": ["no text"]},
    }
    card = render_card(
        sample_record(clients=clients, method_info={"counts": "clients' numbers of examples are trusted"})
    )
    assert "- ann claims 9 examples, 9 times the cohort's median of 1: believed" in card
    assert "- weights: clients' numbers of examples are trusted" in card
    assert "- eve" not in card
    assert "far above" not in render_card(sample_record())
