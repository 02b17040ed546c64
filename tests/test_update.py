"""The algebra of updates: every operation against the dense matrix it stands for."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_updates import cohort, dense, factors

from fedlora_hf.errors import UpdateError
from fedlora_hf.update import (
    AdapterState,
    ClientUpdate,
    Evidence,
    LoraFactors,
    sorted_updates,
    state_sum,
)


def random_factors(seed: int, rank: int, scale: float = 1.0) -> LoraFactors:
    return factors(torch.Generator().manual_seed(seed), (7, 9), rank, scale)


scales = st.floats(0.1, 8) | st.floats(-8, -0.1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 5), scales, scales)
def test_sums_and_multiples_are_exact(seed: int, r: int, s: int, scale: float, other_scale: float) -> None:
    one, two = random_factors(seed, r, scale), random_factors(seed + 1, s, other_scale)
    W, V = one.dense(torch.float64), two.dense(torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-4}
    assert torch.allclose((one + two).dense(torch.float64), W + V, **close)
    assert torch.allclose((one - two).dense(torch.float64), W - V, **close)
    assert torch.allclose((0.5 * one).dense(torch.float64), 0.5 * W, **close)
    assert torch.allclose((-one).dense(torch.float64), -W, **close)
    assert (one + two).rank == r + s
    assert one.norm() == pytest.approx(float(W.norm()), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 5), scales, scales)
def test_another_scale_is_the_same_update(seed: int, rank: int, scale: float, other: float) -> None:
    one = random_factors(seed, rank, scale)
    W = one.dense(torch.float64)
    assert one.rescaled(other).scale == other
    assert torch.allclose(one.rescaled(other).dense(torch.float64), W, rtol=1e-5, atol=1e-4)
    whole, lost = one.truncated(8, other)
    assert (whole.rank, whole.scale) == (8, other)
    assert lost <= 1e-12
    assert torch.allclose(whole.dense(torch.float64), W, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("alpha", "rank", "rslora"), [(16, 4, False), (16, 16, True), (8, 8, False)])
def test_the_scale_travels_with_the_factors(alpha: int, rank: int, rslora: bool) -> None:
    scale = alpha / rank**0.5 if rslora else alpha / rank
    one = random_factors(0, rank, scale)
    assert torch.allclose(one.dense(), alpha / (rank**0.5 if rslora else rank) * one.B @ one.A)


def test_truncation_is_the_best_there_is_and_says_what_it_loses() -> None:
    one = random_factors(1, 5, 2.0)
    W = one.dense(torch.float64)
    cut, lost = one.truncated(2, 2.0)
    energy = torch.linalg.svdvals(W).square()
    assert lost == pytest.approx(float(energy[2:].sum() / energy.sum()))
    assert float((W - cut.dense(torch.float64)).norm() ** 2) == pytest.approx(float(energy[2:].sum()), rel=1e-5)


def test_padding_changes_nothing_and_never_loses_rank() -> None:
    one = random_factors(2, 3, 2.0)
    assert torch.equal(one.padded(5).dense(), one.dense())
    assert one.padded(5).rank == 5
    with pytest.raises(UpdateError, match="rank 2: below the factors' own 3"):
        one.padded(2)


def test_sums_of_half_precision_are_float32_and_of_double_stay_double() -> None:
    one, two = random_factors(0, 2, 0.3), random_factors(1, 2, 0.7)
    half = one.to(torch.bfloat16) + two.to(torch.bfloat16)
    assert half.A.dtype == half.B.dtype == torch.float32
    assert torch.allclose(half.dense(), one.to(torch.bfloat16).dense() + two.to(torch.bfloat16).dense(), atol=1e-5)
    double = one.to(torch.float64) + two.to(torch.float64)
    assert double.A.dtype == torch.float64
    assert torch.allclose(double.dense(torch.float64), one.dense(torch.float64) + two.dense(torch.float64), atol=1e-12)


@pytest.mark.parametrize(("A", "B"), [((2, 5), (7, 3)), ((5,), (7, 5)), ((2, 5, 1), (7, 2))])
def test_factors_that_do_not_fit_are_refused_in_one_line(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(UpdateError, match="one r") as caught:
        LoraFactors(torch.zeros(A), torch.zeros(B))
    assert "\n" not in str(caught.value)


def test_factors_must_be_tensors_and_leave_their_graph_behind() -> None:
    with pytest.raises(UpdateError, match="B is list: must be a torch tensor"):
        LoraFactors(torch.zeros(2, 5), [[0.0, 0.0]])  # type: ignore[arg-type]
    live = LoraFactors(torch.zeros(2, 5, requires_grad=True), torch.zeros(7, 2, requires_grad=True))
    assert not live.A.requires_grad
    assert not live.dense().requires_grad


def test_updates_of_different_modules_cannot_be_added() -> None:
    with pytest.raises(UpdateError, match="shapes"):
        random_factors(0, 2) + LoraFactors(torch.zeros(2, 5), torch.zeros(7, 2))


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        random_factors(0, 2).scale = 3.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        cohort(1)[0].num_examples = 3  # type: ignore[misc]


class OnDemand(Mapping[str, LoraFactors]):
    """Stands for a file: counts what is read."""

    def __init__(self, state: Mapping[str, LoraFactors]) -> None:
        self.state, self.reads = state, 0

    def __getitem__(self, module: str) -> LoraFactors:
        self.reads += 1
        return self.state[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_a_state_reads_only_what_is_asked_for() -> None:
    source = OnDemand({"b": random_factors(0, 2), "a": random_factors(1, 2)})
    state = AdapterState(source)
    assert list(state) == ["a", "b"]
    assert source.reads == 0
    loaded = state.in_memory()
    assert source.reads == 2
    assert loaded.norm() == state.norm()
    assert source.reads == 4


def test_a_restricted_state_reads_nothing_and_has_nothing_else() -> None:
    source = OnDemand({"b": random_factors(0, 2), "a": random_factors(1, 2)})
    state = AdapterState(source, {"head": torch.ones(1), "bias": torch.ones(1)}).restricted({"a", "bias"})
    assert "a" in state
    assert source.reads == 0
    assert list(state) == ["a"]
    assert list(state.extras) == ["bias"]
    assert "b" not in state
    assert list(AdapterState(state)) == ["a"]
    assert dense(state.in_memory()).shape == (63,)


def test_state_norm_bytes_and_sum() -> None:
    one, two = (client.state for client in cohort(2, ranks=(2, 3)))
    assert one.norm() == pytest.approx(float(dense(one).norm()))
    numbers = sum(f.A.numel() + f.B.numel() for f in one.values()) + one.extras["score.weight"].numel()
    assert one.nbytes() == 4 * numbers
    total = state_sum(one, two)
    assert torch.allclose(dense(total), dense(one) + dense(two), atol=1e-4)
    assert torch.equal(total.extras["score.weight"], two.extras["score.weight"])


def test_plain_mappings_become_states_and_updates_sort_by_id() -> None:
    updates = [ClientUpdate(name, {"m": random_factors(0, 2)}) for name in ("b", "a", "10", "9")]  # type: ignore[arg-type]
    assert all(isinstance(update.state, AdapterState) for update in updates)
    assert [update.client_id for update in sorted_updates(updates)] == ["10", "9", "a", "b"]


@pytest.mark.parametrize(("score", "threshold", "flagged"), [(2.0, 1.0, True), (1.0, 1.0, False), (9.0, None, False)])
def test_evidence_flags_above_its_threshold(score: float, threshold: float | None, flagged: bool) -> None:
    assert Evidence(score, threshold).flagged is flagged
