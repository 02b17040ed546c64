"""Stacks of a cohort's factors: what they hold, how they are grouped, and that every method says the same from them."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch

from fedlora_hf.aggregation import rule_of
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.stacks import Stacks
from fedlora_hf.methods import method_named
from fedlora_hf.methods.settings import method_options
from fedlora_hf.numerics.clair import blocks
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors, Outline

CPU = torch.device("cpu")
SHAPES = {"a.q": (50, 40), "a.v": (30, 40), "b.q": (50, 40), "b.v": (30, 40), "c.q": (50, 40)}
CLIENTS = 9


def adapter(k: int, ranks: dict[str, int] | None = None, dtype: torch.dtype = torch.float32) -> AdapterState:
    own, state = torch.Generator().manual_seed(100 + k), {}
    for number, (module, (out, width)) in enumerate(SHAPES.items()):
        common, rank = torch.Generator().manual_seed(number), (ranks or {}).get(module, 4)
        B, A = torch.randn(out, rank, generator=own), torch.randn(rank, width, generator=own)
        if k < CLIENTS - 1:
            B[:, :2] += 12 * torch.randn(out, 2, generator=common)
            A[:2] += 3 * torch.randn(2, width, generator=common)
        state[module] = LoraFactors((A * torch.logspace(0, -1, rank)[:, None]).to(dtype), B.to(dtype), 0.5 + k % 2)
    return AdapterState(state)


def cohort(reference: AdapterState | None = None) -> Cohort:
    """The last client is unrelated to the others; one has a lower rank."""
    states = [adapter(k, {"a.q": 3} if k == 1 else None) for k in range(CLIENTS)]
    updates = tuple(ClientUpdate(f"c{k}", state, 10 + k) for k, state in enumerate(states))
    return Cohort(updates, "examples", tuple(SHAPES), reference=reference)


def stacks_of(own: Cohort, memory: int = 2**40) -> Stacks:
    return Stacks(own.updates, own.modules, CPU, memory)


def test_modules_of_one_shape_and_rank_are_groups_as_large_as_memory_allows() -> None:
    assert stacks_of(cohort()).groups == (("a.q", "b.q", "c.q"), ("a.v", "b.v"))
    assert stacks_of(cohort(), memory=1).groups == tuple((module,) for module in ("a.q", "b.q", "c.q", "a.v", "b.v"))


@pytest.mark.parametrize("memory", [1, 2**40], ids=["nothing is kept", "all is kept"])
def test_a_stack_holds_every_clients_factors_and_gives_them_back(memory: int) -> None:
    own = cohort()
    stacks = stacks_of(own, memory)
    for group in (*stacks.groups, stacks.groups[0]):
        stack = stacks.stacked(group)
        for m, module in enumerate(group):
            for k, update in enumerate(own.updates):
                W = stack.scales[m, k] * (stack.B[m, k].double() @ stack.A[m, k].double())
                torch.testing.assert_close(W, update.state[module].dense(torch.float64))
    for module in SHAPES:
        for update, there in zip(own.updates, stacks.factors(module), strict=True):
            here = update.state[module]
            assert torch.equal(there.A, here.A)
            assert torch.equal(there.B, here.B)
            assert there.scale == here.scale


def test_some_modules_of_a_group_in_any_order() -> None:
    stacks = stacks_of(cohort())
    whole = stacks.stacked(("a.q", "b.q", "c.q"))
    assert torch.equal(stacks.stacked(("c.q", "a.q")).B, whole.B[[2, 0]])
    assert torch.equal(stacks.stacked(("b.q",)).A, whole.A[1:2])


@pytest.mark.parametrize(
    ("dtypes", "kept"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_no_clients_numbers_are_rounded(dtypes: tuple[torch.dtype, torch.dtype], kept: torch.dtype) -> None:
    updates = [ClientUpdate(f"c{k}", adapter(k, dtype=dtype)) for k, dtype in enumerate(dtypes)]
    stack = Stacks(updates, tuple(SHAPES), CPU, 2**40).stacked(("a.v", "b.v"))
    assert stack.B.dtype == kept
    for k, update in enumerate(updates):
        assert torch.equal(stack.B[1, k], update.state["b.v"].B.to(kept))


def test_what_is_on_disk_is_read_once_a_reading_and_in_float32() -> None:
    read: list[str] = []

    class OnDisk(dict[str, LoraFactors]):
        def __getitem__(self, module: str) -> LoraFactors:
            read.append(module)
            return super().__getitem__(module)

    held = adapter(0, dtype=torch.bfloat16)
    outline = Outline({m: f.shape for m, f in held.items()}, dict.fromkeys(held, 4), dict.fromkeys(held, 0.5))
    updates = [ClientUpdate(name, AdapterState(OnDisk(held), outline=outline)) for name in "ab"]
    stacks = Stacks(updates, tuple(SHAPES), CPU, 2**40)
    read.clear()
    stack = stacks.stacked(("a.v", "b.v"))
    assert read == ["a.v", "a.v", "b.v", "b.v"]
    assert stack.B.dtype == torch.float32
    assert torch.equal(stack.A[0, 1], held["a.v"].A.float())


def combined(method: str, own: Cohort, **options: object) -> Aggregate:
    chosen = method_named(method)
    with torch.no_grad():
        return rule_of(chosen)(own, method_options(chosen, **options))


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As modules of few numbers are worked on, and as those of many are."""
    if request.param == "large":
        monkeypatch.setattr(blocks, "SMALL", 1)
        monkeypatch.setattr(blocks, "WIDTH", 16)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("started", [False, True], ids=["from nothing", "from a reference"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("clair", {}),
        ("clair", {"side": "input"}),
        ("clair", {"refine": "soft"}),
        ("clair", {"center": True}),
        ("clair", {"exact": True}),
        ("clair", {"rank": 2, "clip": 0.7}),
        ("product_mean", {}),
        ("multikrum", {}),
        ("geometric_median", {}),
        ("median", {}),
        ("ties", {}),
        ("fedavg", {}),
    ],
    ids=str,
)
def test_a_method_says_the_same_from_stacks(method: str, options: dict[str, object], started: bool) -> None:
    reference = AdapterState({m: f * 0.1 for m, f in adapter(0, {"a.v": 2}).items()}) if started else None
    own = cohort(reference)
    if method == "fedavg":  # which averages factors of one rank
        own = replace(own, updates=tuple(u for u in own.updates if u.client_id != "c1"))
    here = combined(method, own, **options)
    there = combined(method, replace(own, stacks=stacks_of(own), device=CPU), **options)
    assert there.flagged == here.flagged
    assert there.weights == pytest.approx(here.weights, abs=1e-6)
    assert list(there.personalised) == list(here.personalised)
    for module in SHAPES:
        V = here.state[module].dense()
        assert float((there.state[module].dense() - V).norm() / V.norm()) < 1e-4
        for client in list(here.personalised)[:2]:
            V = here.personalised[client][module].dense()
            assert float((there.personalised[client][module].dense() - V).norm() / V.norm()) < 1e-4
    for client, kinds in here.evidence.items():
        for kind, evidence in kinds.items():
            assert there.evidence[client][kind].score == pytest.approx(evidence.score, abs=1e-5)
    if method == "clair":
        assert here.flagged == ("c8",)


def test_a_part_of_the_cohort_does_not_see_the_stacks_of_all() -> None:
    own = cohort()
    own = replace(own, stacks=stacks_of(own), device=CPU)
    assert own.several is not None
    assert own.subset(["c0", "c2"]).several is None
    assert len(own.subset(["c0", "c2"]).factors("a.q")) == 2
