"""`datasets.Dataset.map` for our own steps: no bar of its own, and a cache whose key says all that the result needs."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import datasets
from datasets.fingerprint import Hasher, generate_random_fingerprint

_DIGESTS: "WeakKeyDictionary[Any, tuple[int, str]]" = WeakKeyDictionary()


def quiet_map(
    dataset: datasets.Dataset,
    function: Callable[..., dict[str, list[Any]]],
    features: datasets.Features,
    key: str | None = None,
    **more: Any,
) -> datasets.Dataset:
    """The columns of `features`, and no other, that `function` makes of each batch; `more` is `Dataset.map`'s.

    key: the cache's, of everything that the result depends on; None for data in memory, which has no cache.
    """
    with quiet():
        return dataset.map(
            function,
            batched=True,
            remove_columns=dataset.column_names,
            features=features,
            new_fingerprint=key or generate_random_fingerprint(),
            **more,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of `datasets`, one a client, for what takes no time."""
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def tokenizer_digest(tokenizer: Any) -> str:
    """What of a tokenizer decides ids: its vocabulary, rules, special tokens and template, not how it last cut or
    padded, which changes with every call."""
    size, known = _DIGESTS.get(tokenizer, (-1, ""))
    if size == len(tokenizer):
        return known
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    what = (type(tokenizer).__name__, rules, {k: str(v) for k, v in tokenizer.special_tokens_map.items()})
    digest = Hasher.hash(json.dumps(what, sort_keys=True, default=str))
    _DIGESTS[tokenizer] = (len(tokenizer), digest)
    return digest
