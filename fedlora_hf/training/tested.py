"""Adapters on the clients' test splits: each once, and answers to several clients' questions in common batches."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedlora_hf.training.computed import computed_metrics
from fedlora_hf.training.scores import Metrics
from fedlora_hf.update import AdapterState

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer

TEST = "test"


def tested(trainer: "ClientTrainer", states: Mapping[str, AdapterState]) -> dict[str, Metrics]:
    """{client: metrics of its adapter on its test split}, of those that have one.

    Each client is evaluated by one process, or by all where they work together; all get everybody's.
    """
    processes, found = trainer.processes, dict[str, Metrics]()
    with processes.all_or_none():
        fresh: dict[str, list[str]] = {}  # clients by the adapter they were scored with here and now
        for client in trainer.progress.over(trainer.assigned(states), "evaluating"):
            if trainer.clients[client].test is None:
                continue
            adapter = trainer.scores.fingerprint(states[client])
            known = trainer.scores.known(adapter, client, TEST, _about(trainer, client))
            if known is None:
                with processes.each_or_none():
                    known = trainer.scorer.metrics(states[client], trainer.clients[client].test)
                    known |= computed_metrics(trainer, trainer.clients[client].test)
                fresh.setdefault(adapter, []).append(client)
            found[client] = known
        for adapter, clients in fresh.items():
            questions = {client: trainer.clients[client].questions for client in clients}
            with processes.each_or_none():
                for client, answers in trainer.scorer.answers_of(states[clients[0]], questions).items():
                    found[client] |= answers
            for client in clients:
                trainer.scores.taken += 1
                trainer.scores.note(adapter, client, TEST, found[client], _about(trainer, client))
    everyones = processes.gathered(found)
    _note_others(trainer, states, {client: metrics for client, metrics in everyones.items() if client not in found})
    return everyones


def _note_others(trainer: "ClientTrainer", states: Mapping[str, AdapterState], others: Mapping[str, Metrics]) -> None:
    """Remember what other processes measured of an adapter that all clients share."""
    if others and len({id(state) for state in states.values()}) == 1:
        adapter = trainer.scores.fingerprint(next(iter(states.values())))
        for client, metrics in others.items():
            trainer.scores.note(adapter, client, TEST, metrics, _about(trainer, client))


def _about(trainer: "ClientTrainer", client: str) -> tuple[object, ...]:
    data = trainer.clients[client]
    return data.test, data.questions, trainer.compute_metrics, trainer.args.max_new_tokens
