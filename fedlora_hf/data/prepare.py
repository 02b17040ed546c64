"""One client's data as the trainer takes it, and the examples of a data set divided among clients."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets

from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.contaminate import KINDS, contaminate_share
from fedlora_hf.data.rows import TokenRows
from fedlora_hf.data.tokenize import tokenize_examples
from fedlora_hf.errors import DataError
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's tokenised splits; `questions`: the raw test examples with prompt and references, for generation."""

    train: TokenRows
    validation: datasets.Dataset | None = None
    test: datasets.Dataset | None = None
    questions: datasets.Dataset | None = None


def divided(args: "FederatedConfig", examples: datasets.Dataset, partition_by: str) -> dict[str, Any]:
    """{client id: splits} of the examples, as the options say."""
    return make_clients(
        examples,
        partition_by=partition_by,
        num_clients=args.num_clients,
        dirichlet_alpha=args.dirichlet_alpha,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
        max_examples_per_client=args.max_examples_per_client,
        seed=args.seed,
    )


def prepare_client(client_id: str, data: Any, tokenizer: Any, args: "FederatedConfig") -> ClientData:
    """A client's data as the trainer takes it (a Dataset, or {"train", "validation", "test"}), ready for the model.

    Examples are as `data.formats.load_examples` makes them, or already tokenised (input_ids and labels).
    Raises DataError for a client without a training example or without a column to train on.
    """
    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if not len(splits.get("train") or ()):
        raise DataError(f"client {client_id!r}: 0 training examples; at least 1 is needed; drop it or give it data")
    test = splits.get("test") or None
    if test is not None and args.max_eval_examples is not None:
        test = test.select(range(min(args.max_eval_examples, len(test))))
    questions = None
    if test is not None and "references" in test.column_names and args.task == "causal_lm":
        questions = test.select(range(min(args.generation_examples, len(test))))

    spoiled = args.contaminated.get(client_id)
    if spoiled is not None and spoiled.kind in KINDS:
        share, seed = spoiled.strength or 1.0, derive_seed(args.seed, "rehearsal", client_id)
        splits["train"] = contaminate_share(splits["train"], spoiled.kind, share, seed)

    def tokenised(examples: Any) -> Any:
        if not examples or "input_ids" in examples.column_names:
            return examples or None
        needed = ("prompt", "completion") if args.task == "causal_lm" else ("text", "label")
        if not set(needed) <= set(examples.column_names):
            raise DataError(
                f"client {client_id!r}: columns {', '.join(examples.column_names)}; needs {' and '.join(needed)}, or "
                "input_ids and labels; load the data with fedlora_hf.data.formats.load_examples"
            )
        if tokenizer is None:
            raise DataError(f"client {client_id!r}: text without a tokenizer; pass processing_class=tokenizer")
        return tokenize_examples(examples, tokenizer, max_length=args.max_length, task=args.task)

    train = TokenRows(tokenised(splits["train"]))
    return ClientData(train, tokenised(splits.get("validation")), tokenised(test), questions or None)
