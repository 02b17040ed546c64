"""What of a record leaves: an allow-list; paths, names and facts of single clients stay unless they are asked for."""
# SPDX-License-Identifier: Apache-2.0

import json
import re
from pathlib import Path

import pytest
from sample_record import sample_record
from sample_run import write_run

from fedlora_hf.hub import public, render_card
from fedlora_hf.hub.plan import make_plan
from fedlora_hf.record.record import RunRecord

HUB = (Path(__file__).resolve().parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
HOME = "/home/alice.meyer/St-Mary/oncology-7"


def private_record() -> RunRecord:
    """A record with a private path or name wherever a user can leave one."""
    record = sample_record(num_clients=6, rounds=2, flagged=2)
    record.command = ["fedlora", "train", "--dataset", f"{HOME}/patients.jsonl", "--output_dir", f"{HOME}/out"]
    record.options |= {"dataset": f"{HOME}/patients.jsonl", "run_name": "grant my_hf_" + "A" * 30, "logging_dir": HOME}
    record.options |= {"aggregation": "clair", "unheard_of": HOME, "target_modules": ["q_proj"], "nested": {"a": HOME}}
    record.model |= {"name_or_path": f"{HOME}/secret-base", "note": HOME}
    record.data |= {"dataset": f"{HOME}/patients.jsonl", "files": [HOME], "unheard_of": HOME}
    record.diagnosis["copies"] = [["client-000", "client-001"]]
    record.modules["a"] = {"rank": 2, "evidence": {"client-000": 1.0}}
    record.rounds[0]["unheard_of"] = HOME
    return record


def test_no_path_name_or_token_is_sent() -> None:
    text = public.public_record(private_record()).to_json()
    for needle in ("alice", "St-Mary", "oncology", "patients", "secret-base", "hf_AAAA", "/out", "unheard_of"):
        assert needle not in text


def test_without_client_facts_nothing_is_said_of_a_single_client() -> None:
    sent = public.public_record(private_record())
    text = sent.to_json()
    assert "client-0" not in text
    assert "broken" not in text
    assert sent.data["cohort"] == {"clients": 6, "flagged": 2, "quarantined": 1}
    first, whole = sent.rounds[0], private_record().rounds[0]
    assert (first["cohort"], first["flagged"], first["quarantined"]) == (7, 2, 1)
    losses = list(whole["train_loss"].values())
    assert first["train_loss"] == {"mean": pytest.approx(sum(losses) / len(losses))}
    assert "weights" not in first
    assert "evidence" not in first
    assert sent.metrics == private_record().metrics


def test_with_client_facts_clients_go_and_paths_stay() -> None:
    sent, whole = public.public_record(private_record(), with_client_facts=True), private_record()
    assert (sent.clients, sent.flagged, sent.similarity) == (whole.clients, whole.flagged, whole.similarity)
    sent.rounds[0].pop("unheard_of")  # a round goes whole: nothing but ours is in it
    assert "alice" not in sent.to_json()


def test_what_is_sent_is_sent_once_more_unchanged() -> None:
    sent = public.public_record(private_record())
    again = public.public_record(sent)
    assert (again.options, again.model, again.metrics) == (sent.options, sent.model, sent.metrics)


def test_a_push_holds_no_private_word(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for config in run.rglob("adapter_config.json"):
        content = json.loads(config.read_text()) | {"base_model_name_or_path": f"{HOME}/secret-base"}
        config.write_text(json.dumps(content))
    private_record().save(run)
    plan = make_plan(run, RunRecord.load(run), "user/repo", with_clients=False)
    assert sorted(plan) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"]
    for name, content in plan.items():
        text = content if isinstance(content, bytes) else content.read_bytes()
        assert not re.search(rb"alice|St-Mary|oncology|patients|client-0", text), name
    assert json.loads(plan["adapter_config.json"])["base_model_name_or_path"] == "secret-base"
    assert "Of 6 clients 2 were flagged" in plan["README.md"].decode()  # type: ignore[union-attr]


def test_the_page_lists_what_leaves() -> None:
    """docs/hub.md names every field of the allow-list, row by row."""
    rows = dict(re.findall(r"^\| (`.*?) \| (.*) \|$", HUB.split("What of `run.json` goes")[1], flags=re.MULTILINE))
    named = {field: set(re.findall(r"`(\w+)`", text)) for field, text in rows.items()}
    whole = next(field for field in rows if field.startswith("`kind`"))
    assert set(re.findall(r"`(\w+)`", whole)) == {*public._WHOLE, "schema_version"}
    assert named["`options`"] == set(public._WORDS)
    assert named["`model`"] == {*public._MODEL, "name_or_path"}
    assert named["`data`"] == {*public._DATA, "dataset", "wording"}
    assert named["`rounds`"] == {*public._ROUND, *public._ROUND_MEANS}
    assert {"adapter", "base"} == named["`sha256`"] == set(public._SHA256)
    assert named["`modules`"] == set(public._MODULE)
    assert named["`diagnosis`"] == set(public._SAID)


def test_how_examples_were_worded_goes_and_a_files_name_stays() -> None:
    """Whoever asks a pushed adapter has to know; the card that is rendered from it says so."""
    record = sample_record(num_clients=3, rounds=1, flagged=0)
    form = "Instruction:\n...\n\nAnswer:\n"
    record.data["wording"] = {"chat_template": "none", "instructions": "own wording", "example": form}
    assert public.public_record(record).data["wording"] == record.data["wording"]
    own = {"chat_template": "our_clinic.jinja", "instructions": "chat template", "example": "Ms Smith"}
    record.data["wording"] = own
    assert public.public_record(record).data["wording"] == {"chat_template": "file", "instructions": "chat template"}
    record.data["wording"] = {}
    assert "wording" not in public.public_record(record).data


def test_a_rehearsal_is_one_on_the_hub_too() -> None:
    record = private_record()
    assert "A rehearsal" not in render_card(record)
    client = min(record.clients)
    record.clients[client]["contaminated"] = "sign_flip"
    assert f"contaminated on purpose: {client} (sign" in render_card(record).replace("\\", "")
    sent = public.public_record(record)
    assert sent.data["cohort"]["rehearsed"] == 1
    assert "1 of the clients was contaminated on purpose." in render_card(sent)
    assert client not in render_card(sent)
