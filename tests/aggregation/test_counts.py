"""What a claimed number of examples counts for: capped where a method is robust, said aloud where it is trusted."""
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_updates import cohort, same_bits, with_common_factor

from fedlora_hf.aggregation import aggregate as combine
from fedlora_hf.aggregation.counts import IMPLAUSIBLE, believed, limited
from fedlora_hf.commands.manual import manual
from fedlora_hf.commands.methods import describe
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import METHODS
from fedlora_hf.methods.method import SAID
from fedlora_hf.update import Aggregate, ClientUpdate

ROBUST = sorted(name for name, method in METHODS.items() if method.robust)
PLAIN = sorted(set(METHODS) - set(ROBUST))
CLIENTS = with_common_factor(cohort(6))  # 10, 20 ... 60 examples
LIAR = [*CLIENTS[:5], replace(CLIENTS[5], num_examples=10**12)]


def aggregate(updates: list[ClientUpdate], method: str, **options: Any) -> Aggregate:
    """As the package's; a method that needs a server's update gets the first client's."""
    if METHODS[method].needs_server:
        options.setdefault("server", CLIENTS[0].state)
    return combine(updates, method, **options)


claims = st.dictionaries(st.text("abc", min_size=1), st.integers(1, 2**53 - 1), min_size=1)


@given(claims=claims, cap=st.floats(1, 100))
def test_nobody_counts_for_more_than_the_cap_times_the_median(claims: dict[str, int], cap: float) -> None:
    used, outliers = believed(claims, cap, "capped")
    assert list(used) == list(claims)
    assert all(0 < count <= cap * median(claims.values()) for count in used.values())
    assert {client for client in claims if used[client] != claims[client]} <= set(outliers)
    assert all(claims[client] > cap * median(claims.values()) for client in outliers)
    assert all("\n" not in said and str(claims[client]) in said for client, said in outliers.items())


@given(claims=claims)
def test_a_plain_mean_trusts_what_can_be_a_count(claims: dict[str, int]) -> None:
    used, outliers = believed(claims, 3.0, "trusted")
    middle = median(claims.values())
    for client, claim in claims.items():
        assert used[client] == (claim if claim <= IMPLAUSIBLE * middle else math.floor(3 * middle))
    assert set(outliers) == set(believed(claims, 3.0, "capped").outliers)


def test_an_infinite_cap_believes_everything() -> None:
    assert believed({"a": 1, "b": 10**12, "c": 1}, math.inf, "capped") == ({"a": 1, "b": 10**12, "c": 1}, {})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_counts_within_the_cap_change_no_bit(method: str) -> None:
    result, open_ = aggregate(CLIENTS, method), aggregate(CLIENTS, method, weight_cap=math.inf)
    assert same_bits(result.state, open_.state)
    assert dict(result.weights) == dict(open_.weights)
    assert result.outlier_claims == {}
    assert dict(result.claimed_weights) == pytest.approx({f"client{k}": (k + 1) / 21 for k in range(6)})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_false_count_does_not_own_the_mean(method: str) -> None:
    # By the count alone: clair's influence moves weights besides.
    result = aggregate(LIAR, method, **({"influence": "flags"} if method == "clair" else {}))
    assert list(result.outlier_claims) == ["client5"]
    assert "claims 1000000000000 examples" in result.outlier_claims["client5"]
    assert result.claimed_weights["client5"] > 0.999
    assert result.weights["client5"] < 0.5
    if METHODS[method].counts == "capped":
        told = sorted(weight for weight in result.weights.values() if weight)
        assert result.weights["client5"] <= 3 * median(told) + 1e-9


@pytest.mark.parametrize("method", ["clair", "multikrum"])
def test_the_cap_is_what_the_option_says(method: str) -> None:
    result = aggregate(LIAR, method, weight_cap=2)
    told = [weight for weight in result.weights.values() if weight]
    assert result.weights["client5"] <= 2 * median(told) + 1e-9
    smaller = [*CLIENTS[:5], replace(CLIENTS[5], num_examples=10**6)]
    assert same_bits(result.state, aggregate(smaller, method, weight_cap=2).state)
    assert not same_bits(result.state, aggregate(LIAR, method).state)


def test_where_weights_follow_from_counts_a_capped_claim_is_the_cap() -> None:
    capped = [*CLIENTS[:5], replace(CLIENTS[5], num_examples=2 * 35)]  # the median of 10 ... 50 and a large one is 35
    assert same_bits(aggregate(LIAR, "multikrum", weight_cap=2).state, aggregate(capped, "multikrum").state)


def test_weights_are_held_to_the_median_of_those_that_count() -> None:
    weights = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.1, "e": 0.1, "liar": 0.8}
    held = limited(weights, {"liar": 2.0})
    assert held == pytest.approx({"a": 0, "b": 0, "c": 0, "d": 0.25, "e": 0.25, "liar": 0.5})
    assert limited(weights, {}) == weights
    assert limited({"a": 0.0, "b": 0.0}, {"a": 2.0}) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_uniform_weights_ask_for_no_counts(method: str) -> None:
    result = aggregate(LIAR, method, weight_by="uniform")
    assert result.outlier_claims == {}
    assert set(result.claimed_weights.values()) == {1 / 6}


@pytest.mark.parametrize("cap", [0, 0.99, -3, math.nan, "3", None, True])
def test_a_cap_below_one_is_refused(cap: object) -> None:
    with pytest.raises(ConfigError, match="weight_cap="):
        aggregate(CLIENTS, "clair", weight_cap=cap)  # type: ignore[arg-type]


def test_every_method_says_what_it_makes_of_counts() -> None:
    assert {METHODS[name].counts for name in PLAIN} == {"trusted"}
    assert {METHODS[name].counts for name in ROBUST} == {"capped", "unused"}
    assert "trusted" in SAID["trusted"]
    capped = [name for name in METHODS if METHODS[name].counts == "capped"]
    unused = [name for name in METHODS if METHODS[name].counts == "unused"]
    assert sorted(capped) == ["centred_clipping", "clair", "geometric_median", "multikrum", "norm_clipping"]
    assert sorted(unused) == ["bulyan", "fltrust", "median", "trimmed_mean"]
    said = manual()
    assert f"held to weight_cap times the cohort's median: {', '.join(capped)}\n" in said
    assert f"every client counts once: {', '.join(unused)}\n" in said
    for name, method in METHODS.items():
        assert SAID[method.counts][:30] in " ".join(describe(name).split())
