"""`fedlora methods`: every method with its options, as `--aggregation_options` takes them."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import fields

import pytest

from fedlora_hf import cli
from fedlora_hf.aggregation import rule_of
from fedlora_hf.commands.methods import describe
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import METHODS
from fedlora_hf.methods.settings import read_options


def test_all_methods_with_options_and_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for method in METHODS.values():
        assert f"{method.name}: {method.title}" in shown
        assert method.paper in shown
        for item in fields(method.options):
            assert f"{item.name}=" in shown


@pytest.mark.parametrize("name", METHODS)
def test_the_shown_defaults_are_read_back_as_the_defaults(name: str) -> None:
    method, text = METHODS[name], describe(name)
    assert method.title in text
    names = [item.name for item in fields(method.options)]
    words = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.endswith(")")]
    given = [word for word in words if word.split("=")[0] in names]
    assert [word.split("=")[0] for word in given] == names
    assert method.options(**read_options(method, given)) == method.options()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_rule(name: str) -> None:
    assert rule_of(METHODS[name]).__name__ == name


def test_an_unknown_method_is_told_its_likeness() -> None:
    with pytest.raises(ConfigError, match="did you mean 'multikrum'"):
        describe("multikrun")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("num_contaminated=2 normalise=True", {"num_contaminated": 2, "normalise": True}),
        (["num_contaminated=none"], {"num_contaminated": None}),
        ('{"num_selected": 3}', {"num_selected": 3}),
        ({"num_selected": 3}, {"num_selected": 3}),
        ([""], {}),
        (None, {}),
    ],
)
def test_one_grammar(given: object, options: dict[str, object]) -> None:
    assert read_options(METHODS["multikrum"], given) == options  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["normalise=2", "num_selected=1.5", "num_selected='2", "=3", "[1]", '{"a"', "speed=1"]
)
def test_what_cannot_be_read_is_refused_in_one_line(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(METHODS["multikrum"], given)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)
