"""The component-wise mean as an aggregation rule."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.dirmag_mean import dirmag_mean
from fedlora_hf.aggregation.fedavg import fedavg
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.means import DirMagMeanOptions
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors


def factors(seed: int, rank: int = 2, scale: float = 2.0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator), scale)


def cohort(*members: LoraFactors) -> Cohort:
    updates = tuple(ClientUpdate(f"c{i}", AdapterState({"q": member})) for i, member in enumerate(members))
    return Cohort(updates, "uniform", ("q",))


def test_one_client_and_equal_clients_give_the_client():
    for members in ([factors(0)], [factors(0)] * 3):
        result = dirmag_mean(cohort(*members), DirMagMeanOptions()).state["q"]
        assert result.scale == 2.0
        torch.testing.assert_close(result.A, factors(0).A)
        torch.testing.assert_close(result.B, factors(0).B)


def test_rows_have_the_mean_of_the_clients_lengths_which_fedavg_shortens():
    members = cohort(factors(0), factors(1))
    ours = dirmag_mean(members, DirMagMeanOptions()).state["q"]
    lengths = torch.stack([factors(seed).A.norm(dim=1) for seed in (0, 1)]).mean(0)
    torch.testing.assert_close(ours.A.norm(dim=1), lengths)
    averaged = fedavg(members, NoOptions()).state["q"]
    assert (averaged.A.norm(dim=1) < lengths).all()


def test_a_client_of_lower_rank_has_no_say_in_the_directions_it_lacks():
    small, large = factors(0, rank=1), factors(1, rank=2)
    result = dirmag_mean(cohort(small, large), DirMagMeanOptions()).state["q"]
    assert result.rank == 2
    torch.testing.assert_close(result.A[1], large.A[1] / 2)


def test_scales_are_made_equal_first():
    same = LoraFactors(factors(0).A, factors(0).B * 2, scale=1.0)
    result = dirmag_mean(cohort(factors(0), same), DirMagMeanOptions()).state["q"]
    torch.testing.assert_close(result.dense(), factors(0).dense())


def test_the_axis_is_an_option_and_is_checked():
    members = cohort(factors(0), factors(1))
    rows, columns = (dirmag_mean(members, DirMagMeanOptions(axis_a=axis)).state["q"] for axis in ("row", "column"))
    assert not torch.allclose(rows.A, columns.A)
    torch.testing.assert_close(rows.B, columns.B)
    with pytest.raises(ConfigError, match="axis_b='both': must be 'row' or 'column'"):
        DirMagMeanOptions(axis_b="both")
