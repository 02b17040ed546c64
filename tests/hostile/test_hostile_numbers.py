"""One client that sends whatever finite numbers it likes stops no method, and spoils no adapter beyond going on."""
# SPDX-License-Identifier: Apache-2.0

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_updates import SHAPES, cohort, same_bits, with_common_factor

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.soundness import FLOATS, unsound_state
from fedlora_hf.errors import ConvergenceWarning
from fedlora_hf.methods import METHODS
from fedlora_hf.numerics.clair import blocks
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors

HONEST = with_common_factor(cohort(5))
START = with_common_factor(cohort(1, seed=9))[0].state
SIZES = (0.0, 5e-324, 1e-300, 1e-45, 1e-38, 1e-20, 1e-6, 1.0, 999.0, 4e4, 1e6, 1e9, 1e38, 1e300)
SCALES = (2.0, -2.0, 1e-300, 5e-324, 1e-6, 1e-3, 1e3, 1e6, -1e6, 1e300)


def matrix(shape: tuple[int, int], size: float, pattern: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix whose entries are 0 or of that size (as far as the dtype has it), finite whatever the dtype."""
    found = torch.full(shape, size, dtype=torch.float64)
    if pattern == "one entry":
        found = torch.zeros(shape, dtype=torch.float64).index_put((torch.tensor(0), torch.tensor(0)), found[0, 0])
    elif pattern == "alternating":
        found[::2] *= -1
    elif pattern == "random":
        found *= torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return found.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@st.composite
def hostile(draw: st.DrawFn) -> ClientUpdate:
    """A client with any finite numbers, of any rank that the shapes allow, in any of its modules."""
    state = {}
    pattern = st.sampled_from(["constant", "one entry", "alternating", "random"])
    for module, (out, width) in SHAPES.items():
        rank, dtype = draw(st.sampled_from([1, 4, 12, out + width])), draw(st.sampled_from(FLOATS))
        A = matrix((rank, width), draw(st.sampled_from(SIZES)), draw(pattern), dtype)
        B = matrix((out, rank), draw(st.sampled_from(SIZES)), draw(pattern), dtype)
        state[module] = LoraFactors(A, B, draw(st.sampled_from(SCALES)))
    head = matrix((3, 6), draw(st.sampled_from(SIZES)), draw(pattern), torch.float32)
    return ClientUpdate("mal", AdapterState(state, {"score.weight": head}), draw(st.sampled_from([1, 30, 2**53 - 1])))


def combined(method: str, mal: ClientUpdate, **options: object) -> Aggregate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an iteration may end at its limit
        return aggregate([*HONEST, mal], method, server=server_of(method), **options)  # type: ignore[arg-type]


def server_of(method: str) -> AdapterState | None:
    """What the server trained on its own data, for a method that compares with it."""
    return HONEST[0].state if METHODS[method].needs_server else None


@pytest.mark.parametrize("small", [blocks.SMALL, 0], ids=["float64", "float32"])
@pytest.mark.parametrize("method", sorted(METHODS))
@given(mal=hostile(), going_on=st.booleans())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_method_is_stopped_by_one_client(
    method: str, small: int, monkeypatch: pytest.MonkeyPatch, mal: ClientUpdate, going_on: bool
) -> None:
    monkeypatch.setattr(blocks, "SMALL", small)  # stacks of more numbers than that are float32: no large layer needed
    honest = [client.client_id for client in HONEST]
    reference = None
    if going_on and not METHODS[method].restarts:
        reference = AdapterState({m: LoraFactors(HONEST[0].state[m].A, START[m].B, 2.0) for m in START}, START.extras)
    result = combined(method, mal, reference=reference, target_rank=4)
    assert set(result.quarantined) <= {"mal"}
    assert all("\n" not in reason for reason in result.quarantined.values())
    assert sum(result.weights.values()) == pytest.approx(1)
    assert {client for client in honest if client not in result.weights} == set()
    assert unsound_state(result.state) is None
    for client, state in result.personalised.items():
        assert client == "mal" or unsound_state(state) is None
    if METHODS[method].robust:
        assert result.weights.get("mal", 0.0) < 0.6
    if "mal" in result.quarantined:
        alone = aggregate(HONEST, method, reference=reference, target_rank=4, server=server_of(method))
        assert same_bits(result.state, alone.state)


@pytest.mark.parametrize("method", ["clair", "geometric_median", "multikrum", "product_mean", "fedavg"])
def test_a_layer_too_large_for_float64_is_not_overflown(method: str) -> None:
    side, rank = 1024, 32

    def factors(seed: int) -> LoraFactors:
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.randn(rank, side, generator=generator), torch.randn(side, rank, generator=generator)
        return LoraFactors(A, B * 0.01, 2.0)

    clients = [ClientUpdate(f"c{k}", AdapterState({"m": factors(k)}), 10) for k in range(31)]
    assert 32 * rank * 2 * side > blocks.SMALL
    large = LoraFactors(torch.full((rank, side), 1e6), torch.full((side, rank), 1e6), 1e6)
    result = combined_of([*clients, ClientUpdate("mal", AdapterState({"m": large}), 10)], method)
    assert list(result.quarantined) == ["mal"]
    assert "no trained adapter's is" in result.quarantined["mal"]
    assert unsound_state(result.state) is None


def combined_of(updates: list[ClientUpdate], method: str) -> Aggregate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return aggregate(updates, method, target_rank=8)


@pytest.mark.parametrize("method", ["fedavg", "dirmag_mean", "fedsa"])
def test_what_a_mean_of_hostile_factors_leaves_can_be_gone_on_from(method: str) -> None:
    """One client's A and another's B make a large global adapter; who starts from it is not quarantined for it."""
    A_only = replace(HONEST[0], client_id="mal-a", state=spoilt(1e5, 0.0))
    B_only = replace(HONEST[0], client_id="mal-b", state=spoilt(0.0, 4e4))
    first = aggregate([*HONEST, A_only, B_only], method)
    assert not first.quarantined
    next_round = [replace(client, state=first.state) for client in HONEST]
    second = aggregate(next_round, method, reference=first.state)
    assert not second.quarantined
    assert unsound_state(second.state) is None


def spoilt(a: float, b: float) -> AdapterState:
    own = HONEST[0].state
    return AdapterState({m: LoraFactors(f.A * 0 + a, f.B * 0 + b, f.scale) for m, f in own.items()}, own.extras)
