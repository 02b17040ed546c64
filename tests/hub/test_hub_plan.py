"""What may leave this machine: exactly the expected files, and a folder that holds anything odd is refused."""
# SPDX-License-Identifier: Apache-2.0

import json
import os

import pytest
from sample_run import sample_record, write_run

from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.hub.plan import check_weights, make_plan, stale
from fedlora_hf.hub.push import push_folder
from fedlora_hf.record.record import RunRecord


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def plan_of(run, with_clients=True, with_client_facts=True):
    return make_plan(run, RunRecord.load(run), "user/repo", with_clients, with_client_facts)


def test_only_listed_files_go(run):
    (run / "notes.md").write_text("mine")
    (run / "clients" / "ann" / "training_args.bin").write_bytes(b"pickle")
    (run / "clients" / "stranger").mkdir()
    names = {path.split("/")[-1] for path in plan_of(run)}
    assert names == {
        "README.md",
        "run.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "evidence.png",
        "index.html",
    }
    assert not any("stranger" in path or "mal" in path or "rounds" in path for path in plan_of(run))


def test_the_side_car_goes_along(run):
    (run / "clients" / "ann" / "dirmag_config.json").write_text("{}")
    assert "clients/ann/dirmag_config.json" in plan_of(run)


@pytest.mark.parametrize("change", [{"flagged": ["ann"]}, {"quarantined": {"ann": "late finding"}}])
def test_clients_with_anything_against_them_stay_whatever_else_the_record_says(run, change):
    sample_record(**change).save(run)
    assert not any("ann" in path for path in plan_of(run))
    assert any("ben" in path for path in plan_of(run))


def test_unfit_names_stay(run):
    record = sample_record(clients={"../ann": {"collaborative": True}, "ben": {"collaborative": True}})
    assert [path for path in make_plan(run, record, "user/repo", True) if path.startswith("clients/")] == [
        "clients/ben/adapter_config.json",
        "clients/ben/adapter_model.safetensors",
    ]


@pytest.mark.parametrize("place", ["adapter_config.json", "clients/ann/adapter_model.safetensors", "clients", "report"])
def test_links_are_refused(run, tmp_path, place):
    (run / place).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", run / place)
    with pytest.raises(AdapterError, match="is a link"):
        plan_of(run)


def test_pickled_weights_are_refused_with_the_reason(run):
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled weights can run code"):
        plan_of(run)


def test_an_unfinished_run_is_refused(run):
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="no such file; give the output folder of a finished run"):
        plan_of(run)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"])
def test_weights_are_looked_at(run, content):
    (run / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="not a safetensors file"):
        plan_of(run)


def test_cut_weights_are_refused(run):
    path = run / "adapter_model.safetensors"
    check_weights(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="do not fill the file"):
        check_weights(path)


def test_tokens_stay(run):
    secret = "hf_" + "s" * 30
    options = {"hub_token": "anything", "note": f"used {secret}", "max_new_tokens": 64}
    sample_record(options=options).save(run)
    plan = plan_of(run)
    assert secret not in plan["run.json"].decode() + plan["README.md"].decode()
    pushed = json.loads(plan["run.json"])
    assert pushed["options"] == {"max_new_tokens": 64}
    assert pushed["command"] == []
    (run / "report" / "index.html").write_text(f"<p>{secret}</p>")
    with pytest.raises(ConfigError, match="looks like an access token"):
        plan_of(run)


def test_what_an_earlier_push_left_is_taken_away_and_nothing_else():
    plan = {"clients/ann/adapter_config.json": b"", "report/new.png": b""}
    remote = [
        "clients/ann/adapter_config.json",
        "clients/eve/adapter_model.safetensors",
        "report/old.png",
        "report/notes.md",
        "dirmag_config.json",
        "LICENSE",
        ".gitattributes",
    ]
    assert stale(remote, plan) == ["clients/eve/adapter_model.safetensors", "dirmag_config.json", "report/old.png"]


@pytest.mark.parametrize("name", ["run", "a/b/c", "../x", "user/", "user/re po", "user/x--y", "user/x.git", "u@x/y"])
def test_repository_names(run, name):
    with pytest.raises(ConfigError, match="must be user/name"):
        push_folder(run, name)


@pytest.mark.parametrize("option", ["tag", "revision"])
def test_tag_and_branch_names(run, option):
    with pytest.raises(ConfigError, match="not a branch, a tag or a commit"):
        push_folder(run, "user/repo", **{option: "a b"})
