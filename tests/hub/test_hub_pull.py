"""Where adapters come from: names parsed, repositories that mean harm refused before a byte is downloaded."""
# SPDX-License-Identifier: Apache-2.0

import pytest
from local_hub import LocalHub, Repo
from sample_run import sample_record, write_adapter

from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.hub import Source, fetch_adapter, parse_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("user/repo", Source(repo_id="user/repo")),
        ("hub:user/repo", Source(repo_id="user/repo")),
        ("user/repo@round-3", Source(repo_id="user/repo", revision="round-3")),
        ("user/repo@try/one", Source(repo_id="user/repo", revision="try/one")),
        ("user/repo:clients/x", Source(repo_id="user/repo", subfolder="clients/x")),
        ("user/repo@v1.0:clients/x/", Source(repo_id="user/repo", revision="v1.0", subfolder="clients/x")),
    ],
)
def test_hub_names(text, source):
    assert parse_source(text) == source
    assert str(parse_source(str(source))) == str(source)


def test_a_folder_wins_over_a_repository_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "user" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("user/repo").folder is not None
    assert parse_source("hub:user/repo").folder is None
    assert fetch_adapter("user/repo") == parse_source("user/repo").folder


@pytest.mark.parametrize("text", ["repo", "", "./missing", "/no/such", "a/b/c", "user/re po", "user/repo@"])
def test_neither_folder_nor_repository(text):
    with pytest.raises(AdapterError, match="neither an existing folder nor"):
        parse_source(text)


@pytest.mark.parametrize("part", ["../x", "clients/../../x", "/etc", "a//b", "a\\b", "~/x", "a\nb", "con/x", "."])
def test_subfolders_stay_inside(part):
    with pytest.raises(AdapterError):
        parse_source(f"user/repo:{part}")


@pytest.mark.parametrize("revision", ["..", "a..b", "-x", "a//b", "/a", "a/", "x" * 300])
def test_bad_revisions(revision):
    with pytest.raises(ConfigError, match="not a branch, a tag or a commit"):
        parse_source(f"user/repo@{revision}")


def test_client_ids(tmp_path):
    (tmp_path / "north").mkdir()
    assert parse_source(tmp_path / "north").client_id == "north"
    assert parse_source("user/repo@v1").client_id == "user-repo"
    assert parse_source("user/repo:clients/x").client_id == "user-repo-clients-x"


def _files(tmp_path, **more):
    write_adapter(tmp_path / "adapter", 0)
    sample_record().save(tmp_path / "adapter")
    files = {path.name: (path.read_bytes(), False) for path in (tmp_path / "adapter").iterdir()}
    return files | {name: (content, False) for name, content in more.items()}


class Claimed(bytes):
    """Bytes that say they are more than they are."""

    def __len__(self):
        return 9 * 1024**3


def test_repositories_that_mean_harm(run_steps, tmp_path):
    server = LocalHub()
    repos = {
        "escape": _files(tmp_path) | {"clients/../adapter_config.json": (b"{}", False)},
        "crowd": _files(tmp_path) | {f"clients/{i}/adapter_config.json": (b"{}", False) for i in range(20_001)},
        "huge": _files(tmp_path) | {"adapter_model.safetensors": (Claimed(b"x"), False)},
        "code": _files(tmp_path) | {"run.json": (b'{"schema_version": 99}', False)},
        "state": _files(tmp_path)
        | {
            "rounds/1/state.json": (b"{}", False),
            "rounds/1/update.safetensors": (_files(tmp_path)["adapter_model.safetensors"][0], False),
            "rounds/1/optimizer.pt": (b"pickle", False),
            "modeling_evil.py": (b"import os", False),
            "clients/a/../../../evil/adapter_config.json": (b"{}", False),
        },
    }
    for name, files in repos.items():
        server.repos[f"alice/{name}"] = Repo(f"alice/{name}", private=False)
        server.repos[f"alice/{name}"].commit("main", files, "first")
    seen = run_steps(server, "hostile")
    server.close()
    assert "leads outside the repository" in seen["escape"]
    assert "more than 20000 files" in seen["crowd"]
    assert "9663.7 MB, the limit is 8589.9 MB; not downloaded" in seen["huge"]
    assert "schema_version 99" in seen["code"]
    assert all("alice/code" in line for line in seen["downloads"])
    assert "not downloaded" in seen["adapter"]
    assert seen["state"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "rounds/1/state.json",
        "rounds/1/update.safetensors",
        "run.json",
    ]
