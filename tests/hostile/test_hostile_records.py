"""`fedlora report`, `push` and resuming on bad records and folders: done, or one line; nothing outside is touched."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import shutil
from pathlib import Path
from typing import Any

import arena
import bad_adapters
import bad_records
import models
import pytest

from fedlora_hf.commands.launch import exit_code
from fedlora_hf.hub import write_card
from fedlora_hf.hub.plan import make_plan
from fedlora_hf.record.record import RunRecord
from fedlora_hf.report.page import render_page
from fedlora_hf.report.view import Run
from fedlora_hf.util.sums import write_sums

SIZES = {"ada": 4, "bob": 6, "eve": 5}
CLIENTS = models.token_clients(SIZES, held_out=2)


def train(out: Path, **changes: Any) -> int:
    def action() -> None:
        models.federation(out, CLIENTS, evaluate_rounds=True, **changes).train()

    return exit_code(action)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a sound run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora_hf.rounds.output.write_report", lambda record, folder: [])
        assert train(out) == 0
    return out


@pytest.fixture(scope="module")
def texts(finished: Path) -> list[tuple[str, bytes]]:
    return bad_records.texts(json.loads((finished / "run.json").read_text()))


@pytest.mark.slow
def test_report_card_and_push_of_bad_records(
    tmp_path: Path, capsys: Any, finished: Path, texts: list[tuple[str, bytes]]
) -> None:
    """The commands' own readers and writers on every record; figures, which take the longest, on some of them below."""
    assert len(texts) >= 200
    out, outside = shutil.copytree(finished, tmp_path / "out"), tmp_path / "outside"
    outside.mkdir()
    read = 0
    for name, text in texts:
        (out / "run.json").write_bytes(text)
        before = arena.tree(out)

        def action() -> None:
            record = RunRecord.load(out)
            assert render_page(Run.of(RunRecord.from_dict(json.loads(record.to_json()))), {}).isascii() is not None
            write_card(out)
            plan = make_plan(out, record, "user/name", with_clients=True)
            assert all(not path.startswith(("/", ".")) and ".." not in path for path in plan)

        try:
            code, _ = arena.called(lambda: exit_code(action), capsys)
        except Exception as error:
            raise AssertionError(f"record {name!r}") from error
        read += code == 0
        changed = {path for path, facts in arena.tree(out).items() if before.get(path) != facts}
        assert changed <= {str(out / "README.md")}, name
        assert not list(outside.iterdir())
    assert 50 < read < len(texts) - 60  # some are harmless, and many are not


@pytest.mark.parametrize("number", range(3, 203, 25))
def test_the_report_command(
    tmp_path: Path, capsys: Any, finished: Path, texts: list[tuple[str, bytes]], number: int
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "run.json").write_bytes(texts[number][1])
    before = arena.tree(tmp_path)
    arena.run(["report", str(out)], capsys)
    changed = {path for path, facts in arena.tree(tmp_path).items() if before.get(path) != facts}
    assert all(path.startswith(str(out / "report")) for path in changed)


@pytest.mark.slow
@pytest.mark.usefixtures("bare_output")
def test_going_on_from_bad_records(tmp_path: Path, capsys: Any, finished: Path, texts: list[tuple[str, bytes]]) -> None:
    """The last committed round has the bad record: it is gone on from, or the round before, or refused."""
    sound = models.weight_files(finished)
    codes = []
    for name, text in texts[::4]:
        out = shutil.copytree(finished, tmp_path / f"out{len(codes)}")
        (out / "rounds" / "2" / "run.json").write_bytes(text)
        write_sums(out / "rounds" / "2")  # as whoever damages a record on purpose would
        try:
            code, said = arena.called(lambda: train(out, resume_from="last"), capsys)  # noqa: B023
        except Exception as error:
            raise AssertionError(f"record {name!r}") from error
        codes.append(code)
        if code == 2:
            assert "the run to resume" in said, (name, said)
        elif models.weight_files(out) != sound:
            # What was replaced is the last round's verdict, so the personal adapters may be those of other clients.
            assert (out / bad_adapters.WEIGHTS).read_bytes() == sound[bad_adapters.WEIGHTS], name
        shutil.rmtree(out)
    assert {0, 2} == set(codes)


def _replace(path: Path, content: str) -> None:
    path.write_text(content)


def _link(path: Path, target: Path) -> None:
    shutil.move(path, target)
    path.symlink_to(target)


def _scaled(folder: Path, **changes: Any) -> None:
    shutil.rmtree(folder / "clients", ignore_errors=True)
    for name in (bad_adapters.CONFIG, bad_adapters.WEIGHTS):
        (folder / name).unlink()
    shutil.copytree(bad_adapters.write_sound(folder / "new", 3, **changes), folder, dirs_exist_ok=True)


TWO, BOB = "rounds/2", "rounds/2/clients/bob"
# name: (what is done to the folder, the exit code; None: either)
DAMAGES: dict[str, Any] = {
    "round named ³": lambda out: (out / "rounds" / "³").mkdir(),
    "round named ٣": lambda out: (out / "rounds" / "٣").mkdir(),
    "round named 03": lambda out: (out / "rounds" / "03").mkdir(),
    "round named -1": lambda out: (out / "rounds" / "-1").mkdir(),
    "round of many digits": lambda out: (out / "rounds" / ("9" * 200)).mkdir(),
    "round a file": lambda out: _replace(out / "rounds" / "3", "x"),
    "empty round": lambda out: (out / "rounds" / "3").mkdir(),
    "round a link": lambda out: (out / "rounds" / "3").symlink_to("2"),
    "update.json a list": lambda out: _replace(out / BOB / "update.json", "[]"),
    "update.json deep": lambda out: _replace(out / BOB / "update.json", "[" * 100_000),
    "metrics a list": lambda out: _replace(out / BOB / "update.json", '{"num_examples": 3, "metrics": [1]}'),
    "metric a text": lambda out: _replace(out / BOB / "update.json", '{"num_examples": 3, "metrics": {"a": "b"}}'),
    "failure deep": lambda out: _replace(out / BOB / "failure.json", "{" * 100_000),
    "failure a mapping": lambda out: _replace(out / BOB / "failure.json", '{"a": "\\u001b[2J"}'),
    "functional a list": lambda out: _replace(out / TWO / "functional.json", "[]"),
    "functional odd": lambda out: _replace(out / TWO / "functional.json", '{"bob": ["x", []]}'),
    "weights cut": lambda out: bad_adapters._rewrite(out / TWO / bad_adapters.WEIGHTS, lambda b: b[:-3]),
    "weights NaN": lambda out: bad_adapters._rewrite(out / TWO / bad_adapters.WEIGHTS, lambda b: b[:-4] + b"\xff" * 4),
    "config cut": lambda out: bad_adapters._rewrite(out / TWO / bad_adapters.CONFIG, lambda b: b[:-9]),
    "another model's": lambda out: _scaled(out / TWO, width=24),
    "stray file": lambda out: _replace(out / TWO / "clients" / "stray", "x"),
    "stray client": lambda out: (out / TWO / "clients" / "../clients/zoe").mkdir(),
    "personal a file": lambda out: (shutil.rmtree(out / "clients"), _replace(out / "clients", "x")),
    "open a file": lambda out: _replace(out / "rounds" / ".open-3", "x"),
}


@pytest.mark.usefixtures("bare_output")
@pytest.mark.parametrize("name", DAMAGES)
def test_going_on_in_a_damaged_folder(tmp_path: Path, capsys: Any, finished: Path, name: str) -> None:
    out = shutil.copytree(finished, tmp_path / "out", symlinks=True)
    DAMAGES[name](out)
    code, _ = arena.called(lambda: train(out, resume_from="last"), capsys)
    if code == 0:
        assert (out / bad_adapters.WEIGHTS).read_bytes() == (finished / bad_adapters.WEIGHTS).read_bytes()


@pytest.mark.usefixtures("bare_output")
@pytest.mark.parametrize("part", ["rounds", "rounds/2", "rounds/1", "rounds/2/clients", "rounds/.open-3", "clients"])
def test_nothing_is_removed_or_written_through_a_link(tmp_path: Path, capsys: Any, finished: Path, part: str) -> None:
    out, outside = shutil.copytree(finished, tmp_path / "out"), tmp_path / "outside"
    (out / "rounds" / ".open-3").mkdir()
    _link(out / part, outside)
    before = arena.tree(outside)
    arena.called(lambda: train(out, resume_from="last", num_rounds=4, keep_rounds=2), capsys)
    assert arena.tree(outside) == before
    arena.called(lambda: train(out, resume_from="1"), capsys)
    assert arena.tree(outside) == before


def test_push_refuses_links_and_pickles(tmp_path: Path, capsys: Any, finished: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    for name in ("run.json", "adapter_config.json", bad_adapters.WEIGHTS):
        out = shutil.copytree(finished, tmp_path / f"out-{name}")
        (out / name).unlink()
        (out / name).symlink_to(secret)
        code, _ = arena.run(["push", str(out), "--repo_id", "user/name"], capsys)
        assert code == 2
    out = shutil.copytree(finished, tmp_path / "out-pickle")
    os.rename(out / bad_adapters.WEIGHTS, out / "adapter_model.bin")
    code, said = arena.run(["push", str(out), "--repo_id", "user/name"], capsys)
    assert code == 2
    assert "pickled weights" in said
