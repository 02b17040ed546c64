"""Aggregation on another device: the same flags, nearly the same numbers, nothing made in the wrong place."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch

from fedlora_hf.aggregation import _worked, aggregate, device, rule_of
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.stacks import Stacks
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import method_named
from fedlora_hf.methods.settings import method_options
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair import blocks
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors
from tests.other_device import PLACE, Elsewhere, OtherDevice

METHODS = ("clair", "product_mean", "median", "trimmed_mean", "multikrum", "geometric_median")
MODULES, CLIENTS, SIZE, RANK = ("up", "down"), 10, 60, 4


def cohort_of(reference: AdapterState | None = None) -> Cohort:
    """Clients that share two directions, the last one unrelated to them."""
    updates = []
    for k in range(CLIENTS):
        own, state = torch.Generator().manual_seed(100 + k), {}
        for m, module in enumerate(MODULES):
            common = torch.Generator().manual_seed(m)
            B, A = torch.randn(SIZE, RANK, generator=own), torch.randn(RANK, SIZE, generator=own)
            if k < CLIENTS - 1:
                B[:, :2] += 4 * torch.randn(SIZE, 2, generator=common)
                A[:2] += torch.randn(2, SIZE, generator=common)
            state[module] = LoraFactors(A, B, 0.5)
        updates.append(ClientUpdate(f"c{k}", AdapterState(state), 10 + k))
    return Cohort(tuple(updates), "examples", tuple(sorted(MODULES)), reference=reference)


def combined(method: str, cohort: Cohort) -> Aggregate:
    chosen = method_named(method)
    with torch.no_grad():
        return rule_of(chosen)(cohort, method_options(chosen))


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As modules of few numbers are worked on, and as those of many are."""
    if request.param == "large":
        monkeypatch.setattr(blocks, "SMALL", 1)
        monkeypatch.setattr(blocks, "WIDTH", 16)
        monkeypatch.setattr(lowrank, "FULL_SVD", 32)
        monkeypatch.setattr("fedlora_hf.numerics.clair.refine.ITERATED", 32)
    return str(request.param)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("several", [False, True], ids=["module by module", "several at once"])
@pytest.mark.parametrize("started", [False, True], ids=["from nothing", "from a reference"])
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_where_it_belongs(method: str, started: bool, several: bool) -> None:
    reference = AdapterState({m: f * 0.1 for m, f in cohort_of().updates[0].state.items()}) if started else None
    cohort = cohort_of(reference)
    here = combined(method, cohort)
    with OtherDevice() as other:
        stacks = Stacks(cohort.updates, cohort.modules, PLACE, 2**40) if several else None
        there = combined(method, replace(cohort, stacks=stacks, device=PLACE))
        state = device.moved(there.state, torch.device("cpu"))
        home = torch.device("cpu")
        personal = {client: device.moved(adapter, home) for client, adapter in there.personalised.items()}
    assert other.used & {"mm", "bmm", "addmm_"}
    assert there.flagged == here.flagged
    assert there.weights == pytest.approx(here.weights, abs=1e-6)
    for module in MODULES:
        W, V = state[module].dense(), here.state[module].dense()
        assert float((W - V).norm() / V.norm()) < 1e-4
        assert there.modules[module]["discarded_energy"] == pytest.approx(
            here.modules[module]["discarded_energy"], rel=1e-3
        )
        for client, adapter in here.personalised.items():
            V = adapter[module].dense()
            assert float((personal[client][module].dense() - V).norm() / V.norm()) < 1e-4
    if method == "clair":
        assert here.flagged == ("c9",)


@pytest.mark.parametrize("method", METHODS)
def test_updates_that_are_there_already_are_stacked_there(method: str) -> None:
    cohort = cohort_of()
    with OtherDevice():
        updates = tuple(replace(u, state=device.moved(u.state, PLACE)) for u in cohort.updates)
        stacks = Stacks(updates, cohort.modules, PLACE, 2**40)
        there = combined(method, replace(cohort, updates=updates, stacks=stacks, device=PLACE))
        state = device.moved(there.state, torch.device("cpu"))
    here = combined(method, cohort)
    assert there.flagged == here.flagged
    for module in MODULES:
        torch.testing.assert_close(state[module].dense(), here.state[module].dense(), rtol=1e-4, atol=1e-4)


def test_the_other_device_refuses_what_cuda_refuses() -> None:
    with OtherDevice():
        there = torch.ones(3, 3).to(PLACE)
        assert isinstance(torch.zeros(2, device=PLACE), Elsewhere)
        assert float((there @ there).sum()) == 27
        assert not isinstance(there.cpu(), Elsewhere)
        with pytest.raises(RuntimeError, match="two"):
            there @ torch.ones(3, 3)


def test_a_device_that_is_not_there_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = cohort_of().updates
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="aggregation_device=cuda: this machine has 0 CUDA devices; pass auto or cpu"):
        aggregate(updates, "clair", device="cuda")
    with pytest.raises(ConfigError, match="aggregation_device='gpu': must be auto, cpu, cuda"):
        aggregate(updates, "clair", device="gpu")
    with pytest.raises(ConfigError, match="aggregation_device=cuda:1"):
        FederatedConfig(output_dir="x", aggregation_device="cuda:1", use_cpu=True)
    with pytest.raises(ConfigError, match="aggregation_device=tpu"):
        FederatedConfig(output_dir="x", aggregation_device="tpu", use_cpu=True)
    assert device.chosen_device("auto", updates) == torch.device("cpu")


def test_auto_asks_for_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = cohort_of().updates
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**31, 2**32))
    assert device.chosen_device("auto", updates) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**29, 2**32))
    assert device.chosen_device("auto", updates) == torch.device("cpu")
    assert device.chosen_device("cpu", updates) == torch.device("cpu")


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_device_without_room_is_left_for_the_cpu_unless_it_was_asked_for(
    choice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    updates, rule = cohort_of().updates, rule_of(method_named("clair"))

    def crowded(cohort: Cohort, options: object) -> Aggregate:
        if cohort.several is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rule(cohort, options)

    monkeypatch.setattr("fedlora_hf.aggregation.chosen_device", lambda *_: PLACE)
    monkeypatch.setattr("fedlora_hf.aggregation.rule_of", lambda _: crowded)
    monkeypatch.setattr("fedlora_hf.util.say._SAID", set())
    if choice == "cuda":
        with pytest.raises(torch.OutOfMemoryError):
            aggregate(updates, "clair", device=choice)
        return
    found = aggregate(updates, "clair", device=choice)
    assert "meta has no room for it, so it is done on the CPU" in caplog.text
    here = combined("clair", cohort_of())
    assert all(torch.equal(found.state[module].A, here.state[module].A) for module in MODULES)


def test_a_device_without_room_is_left_for_the_cpu_by_updates_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device | None] = []

    def crowded(cohort: Cohort, options: object) -> Aggregate:
        asked.append(cohort.device)
        if cohort.device == PLACE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert type(cohort.factors("up")[0].A) is torch.Tensor
        return Aggregate(AdapterState({}))

    monkeypatch.setattr("fedlora_hf.aggregation.chosen_device", lambda *_: PLACE)
    monkeypatch.setattr("fedlora_hf.aggregation.rule_of", lambda _: crowded)
    with OtherDevice():
        updates = tuple(replace(u, state=device.moved(u.state, PLACE)) for u in cohort_of().updates)
        # Past screening, which takes the simulated device for what its name says: no values.
        _worked(replace(cohort_of(), updates=updates), method_named("product_mean"), None, "auto")
    assert asked == [PLACE, torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_flags_whom_the_cpu_flags(method: str) -> None:
    updates = cohort_of().updates
    here, there = aggregate(updates, method, device="cpu"), aggregate(updates, method, device="cuda")
    assert there.flagged == here.flagged
    for module in MODULES:
        W, V = there.state[module].dense(), here.state[module].dense()
        assert W.device.type == "cpu"
        assert float((W - V).norm() / V.norm()) < 1e-4
