"""`fedlora aggregate` with a bad adapter among sound ones: it is quarantined, or does no harm, and the others count."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path
from typing import Any

import arena
import bad_adapters
import pytest

pytestmark = pytest.mark.usefixtures("bare_output")
CASES = bad_adapters.cases(seed=0)
FEDAVG = ("--method", "fedavg")
SOUND = ("ada", "bob", "eve")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """Folders of sound adapters, and the weights of their aggregate."""
    folder = tmp_path_factory.mktemp("sound")
    adapters = [str(bad_adapters.write_sound(folder / name, seed)) for seed, name in enumerate(SOUND)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora_hf.rounds.output.write_report", lambda record, folder: [])
        assert arena.main(["aggregate", *adapters, "--output_dir", str(folder / "out"), "--method", "fedavg"]) == 0
    return adapters, (folder / "out" / bad_adapters.WEIGHTS).read_bytes()


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200
    assert len({name for name, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("name", "damage"), CASES, ids=[name for name, _ in CASES])
def test_a_bad_adapter_among_sound_ones(
    tmp_path: Path, capsys: Any, sound: tuple[list[str], bytes], name: str, damage: bad_adapters.Damage
) -> None:
    adapters, expected = sound
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    damage(bad_adapters.write_sound(inputs / "mal", 7))
    before = arena.tree(tmp_path, Path(adapters[0]).parent)
    flags = ["--output_dir", str(out), "--method", "fedavg"]
    code, _ = arena.run(["aggregate", *adapters, str(inputs / "mal"), *flags], capsys)
    after = arena.tree(tmp_path, Path(adapters[0]).parent)
    assert {path: facts for path, facts in after.items() if not path.startswith(str(out))} == before
    assert not list(tmp_path.rglob("executed"))
    assert code == 0
    record = json.loads((out / "run.json").read_text())
    assert set(record["quarantined"]) <= {"mal"}
    assert all(reason.isprintable() for reason in record["quarantined"].values())
    if "mal" in record["quarantined"]:
        assert (out / bad_adapters.WEIGHTS).read_bytes() == expected
        assert not (out / "clients" / "mal").exists()
    written = json.loads((out / bad_adapters.CONFIG).read_text())
    assert written["peft_type"] == "LORA"
    assert not written.get("auto_mapping")


@pytest.mark.parametrize("first", ["auto_mapping", "target_modules", "base_model_name_or_path"])
def test_a_config_that_comes_first_is_not_passed_on(
    tmp_path: Path, capsys: Any, sound: tuple[list[str], bytes], first: str
) -> None:
    """The output's config is made from that of the first usable client in the alphabet: what is odd in it stays out."""
    nasty: dict[str, Any] = {
        "auto_mapping": {"base_model_class": "system", "parent_library": "os"},
        "target_modules": {"a": 1},
        "base_model_name_or_path": {"x": [1]},
    }
    bad_adapters._changed(**{first: nasty[first]})(bad_adapters.write_sound(tmp_path / "aaa", 7))
    out = tmp_path / "out"
    code, _ = arena.run(["aggregate", str(tmp_path / "aaa"), *sound[0], "--output_dir", str(out), *FEDAVG], capsys)
    assert code == 0
    assert json.loads((out / bad_adapters.CONFIG).read_text()).get(first) != nasty[first]


NAMES = {
    "accents": ("caf\u00e9", "caf\u00e8"),
    "bidi": ("\u202egnp", "\u202dgnp"),
    "blank": ("a b", "a\tb"),
    "newline": ("x\ny", "x\ry"),
    "dots": ("a..b", "a.b"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_become_one_folder_stay_two_clients(tmp_path: Path, capsys: Any, kind: str) -> None:
    folders = [str(bad_adapters.write_sound(tmp_path / name, n)) for n, name in enumerate(NAMES[kind])]
    code, said = arena.run(["aggregate", *folders, "--output_dir", str(tmp_path / "out"), *FEDAVG], capsys)
    assert code == 0, said
    names = os.listdir(tmp_path / "out" / "clients")
    assert len({name.lower() for name in names}) == 2
    assert all(name.isascii() and name.isprintable() for name in names)


@pytest.mark.parametrize(
    "name",
    ["CON", "nul.txt", "-rf", "...", "\u202e", "x" * 255, "\x1b[31mred", "a\0"[:1], "\udc80", "<b>", "$(reboot)"],
)
def test_any_folder_name_becomes_a_fit_id(
    tmp_path: Path, capsys: Any, sound: tuple[list[str], bytes], name: str
) -> None:
    folder = bad_adapters.write_sound(tmp_path / "in" / name, 7)
    out = tmp_path / "out"
    code, said = arena.run(["aggregate", str(folder), *sound[0], "--output_dir", str(out), *FEDAVG], capsys)
    assert code == 0, said
    names = sorted(os.listdir(out / "clients"))
    assert all(n.isascii() and n.isprintable() and "/" not in n for n in names)
    assert not said.count("\x1b")


SOURCES = [
    "",
    " ",
    "..",
    "/",
    "\0",
    "a\0b",
    "user/repo@../../x",
    "user/repo@main:../../../etc",
    "user/repo:/etc/passwd",
    "user/repo:a/../b",
    "hub:/etc",
    "hub:..",
    ":::",
    "@",
    "user/repo@\u202emain",
    "us\u0435r/rep\u043e",
    "x" * 100_000,
    "user/repo@" + "x" * 100_000,
    "https://example.org/x",
    "file:///etc/passwd",
    "user/repo/extra",
    "user/..",
    "-/-",
]


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_a_source_that_is_none(tmp_path: Path, capsys: Any, source: str) -> None:
    code, _ = arena.run(["aggregate", source, "--output_dir", str(tmp_path / "out")], capsys)
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_the_same_folder_twice_is_refused(tmp_path: Path, capsys: Any) -> None:
    folder = str(bad_adapters.write_sound(tmp_path / "ada", 0))
    code, said = arena.run(["aggregate", folder, folder, "--output_dir", str(tmp_path / "out")], capsys)
    assert code == 2
    assert "ada: is given twice; name every adapter once" in said


@pytest.mark.parametrize("name", ["clients", ".clients.tmp", "report", "run.json", "README.md", bad_adapters.WEIGHTS])
def test_links_in_the_output_folder_lead_nowhere(
    tmp_path: Path, capsys: Any, sound: tuple[list[str], bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output folder from elsewhere may hold links; nothing is written, or removed, through one."""
    outside, out = tmp_path / "outside", tmp_path / "out"
    (outside / "ada").mkdir(parents=True)
    (outside / "ada" / "README.md").write_text("precious")
    (outside / "file").write_text("precious")
    out.mkdir()
    (out / name).symlink_to(outside if "." not in name[1:] or name == ".clients.tmp" else outside / "file")
    before = arena.tree(outside)
    monkeypatch.undo()  # the report is written for once
    arena.run(["aggregate", *sound[0], "--output_dir", str(out), "--method", "fedavg"], capsys)
    assert arena.tree(outside) == before
