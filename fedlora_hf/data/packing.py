"""Packing: several short examples in one sequence, each with positions of its own and blind to the others.

What tells the model's attention where an example ends are the position ids, which start again at 0: transformers makes
the block-diagonal mask of them, or hands them to the kernels for sequences of variable length, where no attention mask
and no cache is given. `check_packing` makes sure that a model does.
"""
# SPDX-License-Identifier: Apache-2.0

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from fedlora_hf.data.collate import Example
from fedlora_hf.data.tokenize import IGNORED
from fedlora_hf.errors import ConfigError


class PackedRows(Sequence[Example]):
    """Rows of up to `max_length` tokens, each of several rows of `rows`, which are put in largest first.

    A packed row has `position_ids`. The first token of an example has no label: nothing before it is its own.
    """

    def __init__(self, rows: Any, max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        self.lengths_of_examples = list(rows.lengths)
        self.bins = fill(self.lengths_of_examples, max_length)

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def num_examples(self) -> int:
        """Examples in all rows together."""
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sum(self.lengths_of_examples[place] for place in places) for places in self.bins]

    @property
    def largest_id(self) -> int:
        """The largest token id of any row."""
        return int(self.rows.largest_id)

    @property
    def mean_length(self) -> float:
        """Tokens of a row, on average."""
        return sum(self.lengths_of_examples) / len(self)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices: a loader asks for rows
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for place in self.bins[index]:
            row = self.rows[place]
            ids += row["input_ids"]
            labels += [IGNORED, *row["labels"][1:]]
            positions += range(len(row["input_ids"]))
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of `lengths` in bins whose sums are at most `capacity`, by best-fit decreasing: the longest first,
    each into the fullest bin that has room (at most 11/9 of the fewest bins, and one more; Johnson 1973). A length
    above the capacity has a bin of its own. Deterministic; bins in the order of their first index, indices sorted."""
    free: dict[int, list[list[int]]] = defaultdict(list)
    rooms: list[int] = []
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(rooms, lengths[place])
        if at < len(rooms):
            room = rooms[at]
            chosen = free[room].pop()
            if not free[room]:
                rooms.pop(at)
        else:
            room, chosen = max(capacity, lengths[place]), []
            bins.append(chosen)
        chosen.append(place)
        left = room - lengths[place]
        if not free[left]:
            insort(rooms, left)
        free[left].append(chosen)
    return sorted(sorted(places) for places in bins)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Make sure that an example in a packed row is computed as it is alone; ConfigError for a model that mixes them.

    Two examples of 6 tokens are put in one row; the second's logits must be at least ten times nearer to its logits
    alone than those of the same tokens in a row without positions are.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = (torch.arange(12, device=device) * 7 + 3) % min(model.get_input_embeddings().weight.shape[0], 1000)
    positions = torch.arange(6, device=device).repeat(2)
    try:
        alone = model(input_ids=ids[None, 6:]).logits.float()
        packed = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[:, 6:].float()
        mixed = model(input_ids=ids[None]).logits[:, 6:].float()
        sound = bool((packed - alone).abs().max() <= 0.1 * (mixed - alone).abs().max())
    except (TypeError, ValueError, RuntimeError, IndexError):
        sound = False
    finally:
        model.train(was_training)
    if not sound:
        raise ConfigError(
            f"packing: {type(model).__name__} does not keep packed examples apart by their positions; leave --packing "
            "out, or load the model with another attn_implementation"
        )
