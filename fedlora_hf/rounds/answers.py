"""Answers to a few of the clients' test questions, by the adapters before and after a run."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from itertools import islice
from typing import Any

from fedlora_hf.record.answers import Answered
from fedlora_hf.record.standing import collaborative
from fedlora_hf.rounds.federation import Run
from fedlora_hf.training.client_trainer import ClientTrainer


def sample_answers(trainer: ClientTrainer, run: Run, most: int) -> list[Answered]:
    """At most `most` questions of collaborative clients, each answered greedily by the adapter the run began with, the
    global one and the client's own; on every process the same. Fewer, where there are fewer, is said."""
    sizes = {client: len(trainer.clients[client].questions or ()) for client in collaborative(run.record)}
    turns = chosen(sizes, most)
    if len(turns) < most:
        trainer.progress.say(f"report_answers={most}: there are {len(turns)} test questions (generation_examples)")
    numbers: dict[str, list[int]] = {}
    for client, number in turns:
        numbers.setdefault(client, []).append(number)
    found: dict[str, list[Answered]] = {}
    with trainer.processes.all_or_none():
        for client in trainer.progress.over(trainer.assigned(sorted(numbers)), "answering"):
            with trainer.processes.each_or_none():
                found[client] = _answered(trainer, run, client, numbers[client])
    everyones = trainer.processes.gathered(found)
    return [everyones[client][numbers[client].index(number)] for client, number in turns]


def _answered(trainer: ClientTrainer, run: Run, client: str, numbers: list[int]) -> list[Answered]:
    questions: Any = trainer.clients[client].questions.select(numbers)  # type: ignore[union-attr]
    asked = trainer.processing_class.batch_decode(questions["prompt_ids"][:], skip_special_tokens=True)
    states = {"before": trainer.initial, "shared": run.state, "own": run.personalised.get(client)}
    answers = {
        name: [""] * len(numbers) if state is None else trainer.scorer.texts(state, questions["prompt_ids"][:])
        for name, state in states.items()
    }
    return [
        Answered(client, asked[place].strip(), tuple(questions["references"][place]), **_each(answers, place))
        for place in range(len(numbers))
    ]


def _each(answers: Mapping[str, list[str]], place: int) -> dict[str, str]:
    return {name: texts[place].strip() for name, texts in answers.items()}


def chosen(questions: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    """[(client, number of its question)], at most `most`: everybody's first, then everybody's second ...

    questions: {client: how many it has}.
    """
    rounds = max(questions.values(), default=0)
    turns = ((client, turn) for turn in range(rounds) for client in sorted(questions) if turn < questions[client])
    return list(islice(turns, most))
