"""Names, bases and weights of a collection of adapters: pure functions, without an adapter."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from fedlora_hf.commands.collection import bases_of, check_bases, read_weights
from fedlora_hf.errors import ConfigError


def test_bases_are_listed_with_the_most_common_first() -> None:
    configs = {
        "a": {"base_model_name_or_path": "x"},
        "b": {"base_model_name_or_path": "y", "revision": "r"},
        "c": {"base_model_name_or_path": "y", "revision": "r"},
        "d": {},
        "e": {"base_model_name_or_path": ["no", "text"]},
    }
    assert bases_of(configs) == {"not named": ["d", "e"], "y@r": ["b", "c"], "x": ["a"]}
    assert check_bases({"x": ["a", "b"]}, require_same=True) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a=2", "b=1"], {"a": 2, "b": 1}),
        (["a=0.1", "b=0.3"], {"a": 1, "b": 3}),
        (["a=1/3", "b=1/6"], {"a": 2, "b": 1}),
        (["a=100", "b=200"], {"a": 1, "b": 2}),
    ],
)
def test_weights_are_whole_numbers_in_the_given_proportions(given: list[str], expected: dict[str, int]) -> None:
    assert read_weights(given, ["a", "b"]) == expected


@pytest.mark.parametrize("text", ['{"a": 2, "b": 1}', "a: 2\nb: 1\n"])
def test_weights_from_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "w.yaml").write_text(text)
    assert read_weights([str(tmp_path / "w.yaml")], ["a", "b"]) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a=2"], "client 'b' has none"),
        (["a=2", "b=0"], "b=0 must be a number above 0"),
        (["a=2", "b=-1"], "b=-1 must be a number above 0"),
        (["a=2", "b=nan"], "b=nan must be a number above 0"),
        (["a=2", "b=many"], "b=many must be a number above 0"),
        (["a=2", "a=3", "b=1"], "'a' is given twice"),
        (["a=2", "b"], "'b' must be client=weight"),
        (["a=2", "bb=1"], "'bb' is no client here; did you mean 'b'?"),
        (["no/such/file"], "give a=2 b=1 ..., or a file"),
        (["a=1", "b=1e30"], "differ by too many digits"),
    ],
)
def test_weights_that_cannot_be(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_weights(given, ["a", "b"])
    assert message in str(error.value)
