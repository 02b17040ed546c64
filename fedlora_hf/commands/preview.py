"""`fedlora preview`: the first examples of each client as the model sees them, trained tokens marked; no training."""
# SPDX-License-Identifier: Apache-2.0

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import datasets

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.labels import class_counts
from fedlora_hf.data.prepare import divided, wording_of
from fedlora_hf.data.tokenize import IGNORED, tokenize_examples
from fedlora_hf.data.wording import Wording
from fedlora_hf.errors import ConfigError, one_line
from fedlora_hf.flags import parse
from fedlora_hf.loading import load_data, load_tokenizer, longest_sequence, names_of

_LOOKED_AT = 1000  # examples that tell whether there are chats among them
USAGE = """usage: fedlora preview --model_name_or_path MODEL --dataset DATA [--examples N] [--OPTION VALUE ...]

Prints the first N examples (2) of each client as the model would see them, without loading the model: tokens that are
trained stand in [[ ]]. Every option of fedlora train is understood; fedlora train --help lists them.
"""


def preview(arguments: Sequence[str]) -> None:
    """Print, for each client, how many examples it has and the first of them. ConfigError, DataError as in training."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--examples", default="2")
    known, rest = own.parse_known_args(list(arguments))
    if not known.examples.isdecimal() or int(known.examples) < 1:
        raise ConfigError(f"examples={known.examples}: must be a whole number of 1 or more; 2 is usual")
    args = parse(rest)
    for line in lines(args, int(known.examples)):
        print(line)  # noqa: T201


def lines(args: FederatedConfig, examples: int) -> Iterator[str]:
    """What `preview` prints."""
    for name in ("model_name_or_path", "dataset"):
        if not getattr(args, name):
            raise ConfigError(f"--{name} is missing: a preview needs it; see fedlora preview --help")
    tokenizer = load_tokenizer(args)
    loaded = load_data(args)
    clients = divided(args, loaded, args.partition_by)
    wording = wording_of(args, tokenizer)
    yield from _about(args, wording, loaded.train)
    length = min(args.max_length, longest_sequence(args) or args.max_length)
    told = names_of(args, loaded, clients)
    for client_id, splits in clients.items():
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
        yield f"\n== {one_line(told.get(client_id, client_id))} ({sizes} examples)"
        chosen = splits["train"].select(range(min(examples, len(splits["train"]))))
        rows = tokenize_examples(chosen, tokenizer, max_length=length, task=args.task, wording=wording)
        for number, (example, row) in enumerate(zip(chosen, rows, strict=True), start=1):
            yield from _shown(number, example, row, tokenizer, chosen.features)


def _about(args: FederatedConfig, wording: Wording, examples: datasets.Dataset) -> Iterator[str]:
    if args.task != "causal_lm":
        counts = class_counts(examples)
        yield "classes: " + ", ".join(f"{one_line(name, 40)} {count}" for name, count in counts.items())
        return
    worded = wording.template is not None and "chat" in examples.column_names and any(examples[:_LOOKED_AT]["chat"])
    yield f"worded by the chat template ({wording.origin})" if worded else "worded by fedlora_hf, or as the data are"
    yield "[[ ]]: the tokens that are trained"


def _shown(number: int, example: Any, row: Any, tokenizer: Any, features: datasets.Features) -> Iterator[str]:
    if not isinstance(row["labels"], list):
        yield f"-- {number}: {len(row['input_ids'])} tokens, class {features['label'].int2str(example['label'])!r}"
        yield tokenizer.decode(row["input_ids"])
        return
    trained = sum(label != IGNORED for label in row["labels"])
    yield f"-- {number}: {len(row['input_ids'])} tokens, {trained} of them trained"
    yield marked(row["input_ids"], row["labels"], tokenizer)


def marked(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    """The text of the ids, special tokens too, with what is trained in double brackets."""
    text = ""
    for learned, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        text += f"[[{piece}]]" if learned else piece
    return text
