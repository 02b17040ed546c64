"""Groups from similarities: planted ones are found, one kind of clients is not parted, opposed ones are no group."""
# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor

from fedlora_hf.numerics.clair.groups import everyone, groups


def blocks(sizes: list[int], within: float, between: float, noise: float = 0.02, seed: int = 0) -> Tensor:
    """Cosines of clients in groups of these sizes, in order; sizes of one are clients on their own."""
    which = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    alike = (which[:, None] == which).double()
    similarity = within * alike + between * (1 - alike)
    wobble = noise * torch.randn(similarity.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (similarity + (wobble + wobble.T) / 2**0.5).fill_diagonal_(1.0)


def members(similarity: Tensor, chance: float = 0.02) -> list[list[int]]:
    return [group.members for group in groups(similarity, chance)]


def test_a_minority_that_agrees_is_a_group_however_few_clients_stand_alone() -> None:
    assert members(blocks([10, 2], 0.5, 0.05)) == [[*range(10)], [10, 11]]
    assert members(blocks([7, 3, 2], 0.5, 0.1)) == [[*range(7)], [7, 8, 9], [10, 11]]
    # Two on their own are in no group; asked for, they join the largest, whose core judges them.
    alone = blocks([7, 3, 1, 1], 0.5, 0.0)
    found = groups(alone, 0.02)
    assert [group.members for group in found] == [[*range(7)], [7, 8, 9]]
    assert [group.members for group in everyone(alone, found)] == [[*range(7), 10, 11], [7, 8, 9]]
    # One that is like the smaller group joins that.
    alone[10, 7:10] = alone[7:10, 10] = 0.45
    assert 10 in everyone(alone, found)[1].members


def test_clients_of_one_kind_are_not_parted() -> None:
    for seed in range(20):
        assert members(blocks([12], 0.5, 0.0, noise=0.1, seed=seed)) == [[*range(12)]]
        assert members(blocks([8, 4], 0.5, 0.3, noise=0.05, seed=seed)) == [[*range(12)]]
        # Nothing in common: pairs that happen to be alike are no groups.
        assert members(blocks([1] * 12, 1.0, 0.0, noise=0.05, seed=seed), chance=0.05) == [[*range(12)]]


def test_clients_that_agree_with_nobody_hide_no_group() -> None:
    for seed in range(10):
        found = members(blocks([7, 3, 1, 1, 1], 0.5, 0.0, noise=0.02, seed=seed))
        assert found == [[*range(7)], [7, 8, 9]]


def test_three_groups_are_found_where_chance_is_wide() -> None:
    assert members(blocks([12, 5, 3], 0.9, 0.2), chance=0.12) == [[*range(12)], [*range(12, 17)], [17, 18, 19]]


def test_what_chance_may_explain_is_not_parted() -> None:
    similarity = blocks([10, 2], 0.5, 0.05)
    assert len(groups(similarity, 0.08)) == 2
    assert len(groups(similarity, 0.2)) == 1


def test_where_no_group_is_a_majority_there_is_one() -> None:
    assert members(blocks([3, 3, *[1] * 6], 0.5, 0.0)) == [[*range(12)]]
    assert members(blocks([5, 4, 3], 0.5, 0.0)) == [[*range(12)]]
    assert members(blocks([6, 6], 0.5, 0.0)) == [[*range(12)]]
    assert members(blocks([7, 5], 0.5, 0.0)) == [[*range(7)], [*range(7, 12)]]


def test_clients_that_point_against_the_others_are_no_group() -> None:
    opposed = blocks([8, 2], 0.5, -0.5)
    assert members(opposed) == [[*range(10)]]
    both = blocks([8, 3, 2], 0.5, 0.0)
    both[:8, 11:] = both[11:, :8] = -0.5
    assert members(both) == [[*range(8)], [8, 9, 10]]


def test_the_order_of_clients_changes_no_group() -> None:
    similarity = blocks([6, 4, 2], 0.5, 0.05)
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = [sorted(int(turned[k]) for k in group) for group in members(similarity[turned][:, turned])]
    assert found == members(similarity)


def test_what_a_group_says_of_itself() -> None:
    first, second = groups(blocks([4, 2], 0.5, 0.1, noise=0.0), 0.01)
    assert abs(first.within - 0.5) < 1e-12
    assert abs(first.between - 0.1) < 1e-12
    assert abs(second.within - 0.5) < 1e-12
    assert abs(second.between - 0.1) < 1e-12
