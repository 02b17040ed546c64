"""What is said about the clients' training data before they train: answers that are empty, examples that are cut."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedlora_hf.util.say import say

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig
    from fedlora_hf.data.prepare import ClientData

_BATCH = 10_000


def empty_answers(examples: Any) -> int:
    """How many of the examples have an answer of nothing but white space; 0 where there are no texts of answers."""
    if "completion" not in examples.column_names:
        return 0
    texts = examples.select_columns("completion")
    return sum(
        not text.strip()
        for start in range(0, len(texts), _BATCH)
        for text in texts[start : start + _BATCH]["completion"]
    )


def notice(args: "FederatedConfig", clients: Iterable["ClientData"]) -> None:
    """Say, once for all clients, what a run would otherwise do without a word."""
    clients = list(clients)
    total = sum(data.train.num_examples for data in clients)
    if empty := sum(data.empty for data in clients):
        say(f"{empty} of {total} training answers are empty: there the model learns to say nothing")
    if unlearned := sum(data.unlearned for data in clients):
        say(f"{unlearned} of {total} training examples have no token to learn: their labels are -100")
    # Packed rows are full by design, and of what they hold nothing is cut but what is longer than a whole row.
    full = 0 if args.packing else sum(n >= args.max_length for data in clients for n in data.train.lengths)
    if full:
        say(
            f"{full} of {total} training examples fill max_length={args.max_length} tokens: a longer one loses the "
            "start of its prompt, then the end of its answer"
        )
