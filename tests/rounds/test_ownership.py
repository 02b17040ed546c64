"""What a run may write into: nobody else's files, no input, no other kind of run, no run that has come further."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from fedlora_hf.errors import ConfigError
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds.ownership import REPLACED, WRITTEN, check_no_less, check_output
from fedlora_hf.util.lock import LOCK


def record(kind: str = "train", rounds: int = 2) -> RunRecord:
    return RunRecord(kind=kind, method="clair", seed=0, rounds=[{"round": n + 1} for n in range(rounds)])


def test_an_empty_or_missing_folder_and_one_with_other_files_are_free(tmp_path: Path) -> None:
    check_output(tmp_path / "new", "train")
    check_output(tmp_path, "train")
    (tmp_path / "notes.txt").write_text("mine")
    check_output(tmp_path, "train")


@pytest.mark.parametrize("name", [*WRITTEN, *REPLACED])
def test_what_other_hands_have_put_there_stays(tmp_path: Path, name: str) -> None:
    if name in REPLACED:
        (tmp_path / name / "mine").mkdir(parents=True)
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds {name} that no run has written.*pass another --output_dir"):
        check_output(tmp_path, "train")


def test_the_same_kind_of_run_may_be_run_again_and_another_may_not(tmp_path: Path) -> None:
    record().save(tmp_path)
    (tmp_path / "clients").mkdir()
    check_output(tmp_path, "train")
    with pytest.raises(ConfigError, match="holds a run of kind 'train', which 'aggregate' would replace"):
        check_output(tmp_path, "aggregate")


def test_an_interrupted_run_is_ours(tmp_path: Path) -> None:
    (tmp_path / "rounds" / ".open-1").mkdir(parents=True)
    record(rounds=0).save(tmp_path / "rounds" / ".open-1")
    (tmp_path / "adapter_config.json").write_text("{}")
    check_output(tmp_path, "train")
    (tmp_path / "rounds" / "mine").mkdir()
    with pytest.raises(ConfigError, match="that no run has written"):
        check_output(tmp_path, "train")
    (tmp_path / LOCK).write_text("")  # a run has begun here and was killed
    check_output(tmp_path, "train")


def test_a_run_that_could_not_write_its_first_record_may_begin_again(tmp_path: Path) -> None:
    (tmp_path / "rounds" / ".open-1" / "clients").mkdir(parents=True)
    check_output(tmp_path, "train")


@pytest.mark.parametrize(("out", "given"), [("in/a", "in/a"), ("in", "in/clients/a"), ("in/a/deeper", "in/a")])
def test_inputs_are_not_written_into(tmp_path: Path, out: str, given: str) -> None:
    (tmp_path / given).mkdir(parents=True)
    with pytest.raises(ConfigError, match="overlaps with the input"):
        check_output(tmp_path / out, "aggregate", [tmp_path / given])
    (tmp_path / "link").symlink_to(tmp_path / given)
    with pytest.raises(ConfigError, match="overlaps with the input"):
        check_output(tmp_path / out, "aggregate", [tmp_path / "link"])


def test_a_finished_run_is_not_replaced_by_less(tmp_path: Path) -> None:
    record(rounds=3).save(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run of 3 rounds, and this one has 0; call train\(\) first"):
        check_no_less(tmp_path, 0)
    check_no_less(tmp_path, 3)


@pytest.mark.parametrize("name", ["", "clients/a", "rounds", "groups/1/deeper"])
def test_what_a_run_has_read_is_not_replaced_by_it(tmp_path: Path, name: str) -> None:
    """A base whose folder is the output's would be an adapter afterwards, with another README."""
    read = tmp_path / "out" / name
    read.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"what the run reads is there \('.*'\), and would be changed; pass another"):
        check_output(tmp_path / "out", "train", beside=[read])


@pytest.mark.parametrize("name", ["../base", "base", ".."])
def test_what_a_run_has_read_may_lie_near(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", "train", beside=[tmp_path / "out" / name])
