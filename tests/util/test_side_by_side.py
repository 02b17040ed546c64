"""Modules worked on at once: the same results in the same order, errors passed on, torch's threads as they were."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator

import pytest
import torch

from fedlora_hf.util.side_by_side import side_by_side


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_results_come_in_order_each_of_one_thread_and_without_a_graph() -> None:
    weight = torch.ones(3, requires_grad=True)

    def work(item: int) -> tuple[int, int, bool]:
        return item, torch.get_num_threads(), (weight * item).requires_grad

    assert list(side_by_side(work, range(7), True)) == [(item, 1, False) for item in range(7)]
    assert torch.get_num_threads() == 3
    assert list(side_by_side(work, range(2), False)) == [(0, 3, True), (1, 3, True)]


@pytest.mark.usefixtures("three_threads")
def test_an_error_is_passed_on_and_threads_are_given_back() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("item 2")
        return item

    with pytest.raises(ValueError, match="item 2"):
        list(side_by_side(work, range(6), True))
    assert torch.get_num_threads() == 3
