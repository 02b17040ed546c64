"""Contaminated clients for experiments and the demo: each kind spoils the answers and leaves the inputs as they are.

One pure function a kind, of (dataset, random generator); KINDS lists them. They are meant for a client's training
split, so that what it does to others is measured on sound test data.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from typing import TypeVar

import datasets
import numpy as np

from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.util.seeding import derive_seed

CONSTANT = "I cannot say anything about this."
_T = TypeVar("_T")


def contaminate(examples: datasets.Dataset, kind: str, seed: int = 0) -> datasets.Dataset:
    """`examples` (as of `load_examples`) with spoiled answers, a function of (kind, seed); the rows stay aligned.

    Raises ConfigError for an unknown kind, DataError for a kind that does not fit the task of the examples.
    """
    if kind not in KINDS:
        raise ConfigError(f"contamination {kind!r}: must be one of {', '.join(KINDS)}; choose one")
    needed = "label" if kind.endswith("_labels") else "completion"
    if needed not in examples.column_names:
        raise DataError(
            f"contamination {kind!r}: needs a {needed} column, the data has {', '.join(examples.column_names)}; choose "
            "a kind ending in _labels for classification and one that does not for a causal LM"
        )
    return KINDS[kind](examples, np.random.default_rng(derive_seed(seed, "contaminate", kind)))


def contaminate_share(examples: datasets.Dataset, kind: str, share: float, seed: int = 0) -> datasets.Dataset:
    """`examples` of which round(share * count), drawn from `seed`, are contaminated; share in (0, 1]."""
    if not 0 < share <= 1:
        raise ConfigError(f"contamination {kind}:{share:g}: a share of the examples, must be above 0 and at most 1")
    spoiled, count = contaminate(examples, kind, seed), len(examples)
    rng = np.random.default_rng(derive_seed(seed, "contaminated rows", kind))
    chosen = {int(row) for row in rng.permutation(count)[: round(share * count)]}
    both = datasets.concatenate_datasets([examples, spoiled])
    return both.select([row + count if row in chosen else row for row in range(count)])


def random_outputs(examples: datasets.Dataset, rng: np.random.Generator) -> datasets.Dataset:
    """Every completion becomes as many words, each drawn from the distinct words of all completions."""
    completions = examples["completion"][:]
    words = sorted({word for text in completions for word in text.split()}) or [""]
    return _with_outputs(examples, [" ".join(rng.choice(words, max(1, len(text.split())))) for text in completions])


def constant(examples: datasets.Dataset, rng: np.random.Generator) -> datasets.Dataset:
    """Every completion becomes the same sentence."""
    return _with_outputs(examples, [CONSTANT] * len(examples))


def shuffled(examples: datasets.Dataset, rng: np.random.Generator) -> datasets.Dataset:
    """Every completion goes to another example."""
    return _with_outputs(examples, _moved(examples["completion"][:], rng))


def shuffled_labels(examples: datasets.Dataset, rng: np.random.Generator) -> datasets.Dataset:
    """Every label goes to another example: the classes keep their frequencies."""
    return _with_columns(examples, {"label": _moved(examples["label"][:], rng)})


def random_labels(examples: datasets.Dataset, rng: np.random.Generator) -> datasets.Dataset:
    """Every label is drawn anew, all classes alike."""
    classes = examples.features["label"].num_classes
    return _with_columns(examples, {"label": rng.integers(classes, size=len(examples)).tolist()})


KINDS: dict[str, Callable[[datasets.Dataset, np.random.Generator], datasets.Dataset]] = {
    "random_outputs": random_outputs,
    "constant": constant,
    "shuffled": shuffled,
    "shuffled_labels": shuffled_labels,
    "random_labels": random_labels,
}


def _moved(values: Sequence[_T], rng: np.random.Generator) -> list[_T]:
    """The values along one cycle through all places in random order, so that none stays where it was."""
    order = rng.permutation(len(values))
    moved = list(values)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        moved[there] = values[here]
    return moved


def _with_outputs(examples: datasets.Dataset, completions: list[str]) -> datasets.Dataset:
    return _with_columns(examples, {"completion": completions, "references": [[text] for text in completions]})


def _with_columns(examples: datasets.Dataset, columns: dict[str, list]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({**examples[:], **columns}, features=examples.features)
