"""Which examples are scored together: of like lengths, so that little is padding, and never more than fits."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from fedlora_hf.data.tokenize import IGNORED


def right_sized(dataset: Any, batch_size: int) -> list[list[int]]:
    """The rows of a tokenised data set in batches, the longest first: [[row, ...], ...].

    A batch has at most as many tokens, padding included, as `batch_size` examples of the greatest length have, and at
    most as many answered ones as `batch_size` of those with the most answered: short examples are taken more at a
    time, for no more memory. Ties keep the order of the data set.
    """
    sizes = [_size(example) for example in dataset]
    if not sizes:
        return []
    most_tokens, most_answered = (batch_size * max(column) for column in zip(*sizes, strict=True))
    batches: list[list[int]] = []
    width = answered = 0
    for row in sorted(range(len(sizes)), key=lambda row: (-sizes[row][0], row)):
        length, own = sizes[row]
        answered += own
        if batches and width * (len(batches[-1]) + 1) <= most_tokens and answered <= most_answered:
            batches[-1].append(row)
        else:
            batches.append([row])
            width, answered = length, own
    return batches


def _size(example: Any) -> tuple[int, int]:
    """(tokens of an example, those of them that are answered; an example of a class has one answer)."""
    labels = example["labels"]
    return len(example["input_ids"]), sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1
