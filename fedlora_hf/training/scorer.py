"""Scores any adapter on any split, in the one model there is."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from fedlora_hf.adapter.slot import AdapterSlot, set_frozen
from fedlora_hf.launch.processes import Processes
from fedlora_hf.training.answers import answer_metrics
from fedlora_hf.training.metrics import generate_answers, held_out_metrics, loss_by_owner, row_scores
from fedlora_hf.update import AdapterState

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig


class Scorer:
    """Puts an adapter into the model and measures it there."""

    def __init__(
        self,
        model: nn.Module,
        slot: AdapterSlot,
        collate: Any,
        tokenizer: Any,
        args: "FederatedConfig",
        processes: Processes,
    ) -> None:
        self.model, self.slot, self.collate, self.tokenizer, self.args = model, slot, collate, tokenizer, args
        self.processes = processes
        self.blank = slot.read()
        self.ranks = {module: factors.rank for module, factors in self.blank.items()}

    def install(self, state: AdapterState) -> None:
        """Put any adapter into the model; one of a higher rank than the model's stands beside it, frozen."""
        if all(factors.rank <= self.ranks.get(module, factors.rank) for module, factors in state.items()):
            set_frozen(self.slot.model, None)
            self.slot.write(state)
        else:
            set_frozen(self.slot.model, state)
            self.slot.write(AdapterState({name: f * 0.0 for name, f in self.blank.items()}, state.extras))

    def metrics(self, state: AdapterState, dataset: Any) -> dict[str, float]:
        """Loss and accuracy of an adapter on a tokenised split; see `evaluation.held_out_metrics`."""
        self.install(state)
        return held_out_metrics(
            self.model,
            dataset,
            self.collate,
            task=self.args.task,
            batch_size=self.args.per_device_eval_batch_size,
            processes=self.processes,
        )

    def losses(self, state: AdapterState, rows: Sequence[Any], owners: Sequence[str]) -> dict[str, float]:
        """{owner: loss of an adapter on its rows}, of tokenised rows of several clients that are scored together."""
        self.install(state)
        found = row_scores(
            self.model,
            rows,
            self.collate,
            task=self.args.task,
            batch_size=self.args.per_device_eval_batch_size,
            processes=self.processes,
        )
        return loss_by_owner(found, owners)

    def answers(self, state: AdapterState, questions: Any) -> dict[str, float]:
        """{"exact_match", "rouge_l"} of greedy answers to raw examples; {} where there are none, or no tokenizer."""
        return self.answers_of(state, {"": questions}).get("", {})

    def answers_of(self, state: AdapterState, questions: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """{client: {"exact_match", "rouge_l"}} of one adapter's greedy answers to several clients' questions, which
        share batches; a client without any is left out, and all are without a tokenizer."""
        asked = {client: own for client, own in questions.items() if own}
        if not asked or self.tokenizer is None:
            return {}
        answers = iter(self.texts(state, [prompt for own in asked.values() for prompt in own["prompt_ids"][:]]))
        return {
            client: answer_metrics(list(islice(answers, len(own))), own["references"][:])
            for client, own in asked.items()
        }

    def texts(self, state: AdapterState, prompts: list[list[int]]) -> list[str]:
        """Greedy answers to the ids of prompts."""
        self.install(state)
        return generate_answers(self.slot.model, prompts, self.tokenizer, max_new_tokens=self.args.max_new_tokens)
