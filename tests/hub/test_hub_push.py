"""A run goes to a Hub and comes back through the real client: what is there, what never is, what is refused."""
# SPDX-License-Identifier: Apache-2.0

import pytest
from local_hub import LocalHub
from sample_run import write_run

ROOT = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
RECORD = ["run.json"]
REPORT = ["report/evidence.png", "report/index.html", "run.json"]


def client_files(*names):
    return [f"clients/{name}/{file}" for name in names for file in ("adapter_config.json", "adapter_model.safetensors")]


@pytest.fixture(scope="module")
def seen(hub, run_steps):
    return run_steps(hub, "push")


def test_a_push_is_one_commit_of_the_expected_files_in_a_private_repository(seen):
    assert seen["first_files"] == ROOT + RECORD
    assert seen["first_commits"] == 2  # the Hub's own first commit, and ours
    assert seen["private"] is True
    assert seen["warnings_first"] == 0
    assert "/alice/run/commit/" in seen["first_url"]


def test_client_adapters_go_only_when_asked_with_a_plain_warning_and_never_a_quarantined_one(seen):
    assert seen["with_clients"] == ROOT + client_files("ann", "ben", "eve") + REPORT
    assert len(seen["warnings"]) == 1
    assert "3 personal adapters" in seen["warnings"][0]
    assert "private data" in seen["warnings"][0]


def test_pushing_the_same_again_makes_no_commit(seen):
    assert seen["again"] == [True, 0]


def test_an_adapter_flagged_since_the_last_push_is_taken_out(seen):
    assert seen["flagged"] == ROOT + client_files("ann", "ben") + REPORT
    assert seen["before_flagged"] == ROOT + RECORD  # the tag still names the earlier commit


def test_clients_are_withdrawn_by_a_push_without_them(seen):
    assert seen["clients_withdrawn"] == ROOT + RECORD


def test_tags_move_to_the_commit_they_were_last_given_to(seen):
    tags = seen["moved"]
    assert tags["round-1"] == tags["head"]
    assert tags["round-2"] == seen["second_head"] != tags["head"]


def test_a_branch_is_made_when_missing(seen):
    same, branches = seen["branch"]
    assert same
    assert "try/one" in branches


def test_the_pushed_card_names_the_repository_and_what_is_in_it(seen):
    assert "PeftModel.from_pretrained(base, 'alice/run')" in seen["card"]
    assert "subfolder='clients/ann'" in seen["card"]
    assert "![evidence](report/evidence.png)" in seen["card"]
    assert "clients/eve" not in seen["card"]


def test_no_token_is_pushed_or_left_on_disk(seen):
    assert seen["secrets"] == [False, False]
    assert seen["leaks"] == []


def test_an_adapter_comes_back_alone_by_tag_commit_and_subfolder(seen):
    assert seen["fetched"] == [["adapter_config.json", "adapter_model.safetensors"], True]
    assert seen["by_commit"] is True
    assert seen["cached"] == 0


def test_a_run_comes_back_with_its_record(seen):
    files, flagged = seen["run"]
    assert files == sorted([*ROOT[1:], *client_files("ann", "ben"), "run.json"])
    assert flagged == seen["load_run"] == ["eve"]


def test_large_weights_travel_by_lfs_and_a_limit_stops_them_before_the_download(seen):
    assert seen["lfs_puts"] == 1
    assert seen["large"] is True
    assert seen["too_large"].startswith(
        "AdapterError: alice/large: adapter_model.safetensors has 12.6 MB, the limit is "
    )
    assert seen["downloads"] == 0


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("pickled", "AdapterError", "only pickled weights (adapter_model.bin)"),
        ("damaged", "AdapterError", "not a safetensors file"),
        ("anonymous", "AdapterError", "no such repository, or a private one"),
        ("missing", "AdapterError", "no such repository, or a private one"),
        ("deleted", "AdapterError", "no such repository, or a private one"),
        ("revision", "AdapterError", "no such branch, tag or commit"),
        ("subfolder", "AdapterError", "holds no adapter_model.safetensors"),
        ("no_record", "RecordError", "holds no run.json"),
        ("public", "ConfigError", "is a public repository"),
        ("other_owner", "ConfigError", "alice/run: "),
        ("not_allowed", "ConfigError", "refused (403)"),
        ("not_signed_in", "ConfigError", "alice/run: "),
    ],
)
def test_refusals_are_one_line_and_typed(seen, case, kind, text):
    message = seen["errors"][case]
    assert message.startswith(f"{kind}: ")
    assert text in message
    assert "\n" not in message
    assert "http" not in message


def test_a_refused_push_leaves_nothing_and_a_public_one_must_be_asked_for(seen):
    assert seen["open"] == []
    assert seen["opened"] == ROOT + RECORD


def test_the_hub_functions_need_no_torch(seen):
    assert seen["torch"] is False


def test_stock_peft_and_transformers_load_what_was_pushed(hub, run_steps, tmp_path):
    run = write_run(tmp_path / "run")
    pushed = run_steps(hub, "publish", LOCAL_RUN=str(run), REPO="alice/stock")
    assert pushed == {"xet": False, "lfs": True, "same": True}
    seen = run_steps(hub, "stock", LOCAL_RUN=str(run))
    assert seen.pop("imported") == []
    assert all(seen.values()), seen


def test_xet_left_enabled_works_where_files_are_small_enough_to_travel_inside_the_commit(run_steps, tmp_path):
    server = LocalHub(lfs=False)
    run = write_run(tmp_path / "run")
    seen = run_steps(server, "publish", LOCAL_RUN=str(run), REPO="alice/xet", HF_HUB_DISABLE_XET="0")
    server.close()
    assert seen == {"xet": True, "lfs": False, "same": True}
