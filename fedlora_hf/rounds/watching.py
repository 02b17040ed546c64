"""The loop of rounds in Trainer's terms: a round is an epoch, scores are evaluations, a committed round is a save.

Trainer's state, control and callbacks are told what they would be told of one long training, so that trackers,
EarlyStoppingCallback and load_best_model_at_end work as they do there.
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedlora_hf.errors import ConfigError
from fedlora_hf.record.lines import claims_line, round_line, round_log
from fedlora_hf.rounds.federation import Run

if TYPE_CHECKING:
    from fedlora_hf.rounds.loop import RoundLoop
    from fedlora_hf.training.client_trainer import ClientTrainer

_DEFAULT_SAVE_STEPS = 500  # TrainingArguments': of one long training, here every round


def scored_after(args: Any, number: int) -> bool:
    """Whether the global adapter is scored after round `number`, by eval_strategy, eval_steps and eval_delay."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "no" or number < args.eval_delay:
        return False
    return strategy == "epoch" or number % max(1, int(args.eval_steps or 1)) == 0


class TrainerWatcher:
    """A `Watcher` that keeps a trainer's state.

    steps_of: round number -> optimizer steps of all who train in it. score_dataset: the metrics of the global adapter
    on the trainer's own eval_dataset, {} where it has none.
    """

    loop: "RoundLoop"

    def __init__(
        self, trainer: "ClientTrainer", steps_of: Callable[[int], int], score_dataset: Callable[[], dict[str, float]]
    ) -> None:
        self.trainer, self.steps_of, self.score_dataset = trainer, steps_of, score_dataset
        self.args = trainer.args
        self.began = False
        self._best: int | None = None
        self._counted = (0, 0)  # steps and tokens of all processes, up to the last round

    @property
    def stopped(self) -> bool:
        """Whether a callback asked for the run to end."""
        return bool(self.trainer.control.should_training_stop)

    def best_round(self) -> int | None:
        # A stop was for the rounds; the personal steps after them are taken all the same.
        self.trainer.control.should_training_stop = False
        return self._best if self.args.load_best_model_at_end else None

    # ---- what the loop tells -----------------------------------------------------------------------------------------

    def ready(self, run: Run) -> None:
        """Trainer's state of a training that begins, or goes on after `run.round`."""
        trainer, state, self.began = self.trainer, self.trainer.state, True
        numbers = range(1, self.loop.num_rounds + 1)
        steps = {number: self.steps_of(number) for number in numbers}
        state.log_history, state.best_metric, state.best_global_step, self._best = [], None, None, None
        state.max_steps = sum(steps.values()) + int(self.args.personal_steps or 0) * len(trainer.clients)
        state.num_train_epochs, state.epoch = self.loop.num_rounds, run.round
        state.global_step = sum(steps[number] for number in numbers if number <= run.round)
        state.num_input_tokens_seen = sum(entry.get("input_tokens", 0) for entry in run.record.rounds)
        self._counted = (state.global_step, state.num_input_tokens_seen)
        state.compute_steps(self.args, state.max_steps)
        # Evaluations and saves are counted in rounds, here; DefaultFlowCallback would count them in steps.
        state.eval_steps = state.save_steps = sys.maxsize
        trainer.control.should_training_stop = False
        for entry in run.record.rounds:
            if metrics := _metrics(entry):
                self._note_best(entry["round"], metrics)
        trainer.tell("on_train_begin")

    def round_begins(self, number: int) -> None:
        self.trainer.state.epoch = number - 1
        before = self.loop.run.record.metrics.get("before", {}).get("global")
        if number == 1 and self.args.eval_on_start and before:
            self._evaluated({f"eval_global_{name}": value for name, value in before.items()})
        self.trainer.tell("on_epoch_begin")

    def wants_scores(self, number: int) -> bool:
        return scored_after(self.args, number)

    def round_ended(self, entry: dict[str, Any]) -> None:
        trainer, number = self.trainer, entry["round"]
        self._count(entry)
        trainer.state.epoch = number
        if str(getattr(self.args.logging_strategy, "value", self.args.logging_strategy)) != "no":
            logs = round_log(entry)
            if trainer.step_log.told and "loss" in logs:  # "loss" is the steps' curve
                logs["round_loss"] = logs.pop("loss")
            trainer.log(logs)
        trainer.progress.say(round_line(entry, self.loop.num_rounds))
        if warning := claims_line(self.loop.run.record.rounds):
            trainer.progress.say(warning)
        trainer.control.should_evaluate = trainer.control.should_save = False
        trainer.tell("on_epoch_end")
        is_best = False
        if trainer.control.should_evaluate or self.wants_scores(number):
            is_best = self._round_evaluated(entry)
        if self._saves(number, is_best) or trainer.control.should_save:
            trainer.tell("on_save")

    # ---- evaluations and saves ---------------------------------------------------------------------------------------

    def _round_evaluated(self, entry: dict[str, Any]) -> bool:
        """Tell the callbacks the metrics of the round; whether it is the best so far."""
        if not entry["metrics"].get("global"):
            self.loop.score_round()
        if found := self.score_dataset():
            entry["eval_dataset"] = found
            self.loop.amend()
            self.trainer.log(dict(found))
        metrics = _metrics(entry)
        self._evaluated(metrics)  # EarlyStoppingCallback compares with the best before
        return self._note_best(entry["round"], metrics)

    def _evaluated(self, metrics: dict[str, float]) -> None:
        trainer = self.trainer
        trainer.control = trainer.callback_handler.on_evaluate(self.args, trainer.state, trainer.control, metrics)

    def _note_best(self, number: int, metrics: Mapping[str, float]) -> bool:
        name, state = self.args.metric_for_best_model, self.trainer.state
        if name is None:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise ConfigError(f"metric_for_best_model={name!r}: is not among {', '.join(sorted(metrics))}; name one")
        value, best = metrics[name], state.best_metric
        if best is not None and not (value > best if self.args.greater_is_better else value < best):
            return False
        state.best_metric, state.best_global_step, self._best = value, state.global_step, number
        store = self.loop.store
        state.best_model_checkpoint, store.protected = str(store.folder / str(number)), {number}
        return True

    def _saves(self, number: int, is_best: bool) -> bool:
        strategy = str(getattr(self.args.save_strategy, "value", self.args.save_strategy))
        if strategy == "steps":
            every = 1 if self.args.save_steps == _DEFAULT_SAVE_STEPS else max(1, int(self.args.save_steps))
            return number % every == 0
        return strategy == "epoch" or (strategy == "best" and is_best)

    def _count(self, entry: dict[str, Any]) -> None:
        """Bring steps and tokens to what all processes have done together."""
        state, processes = self.trainer.state, self.trainer.processes
        mine = (state.global_step - self._counted[0], state.num_input_tokens_seen - self._counted[1])
        all_mine = processes.everyones(mine)
        # Processes that share a client's batches take the same steps, each with tokens of its own.
        steps = mine[0] if processes.together else sum(steps for steps, _ in all_mine)
        tokens = sum(tokens for _, tokens in all_mine)
        self._counted = (self._counted[0] + steps, self._counted[1] + tokens)
        state.global_step, state.num_input_tokens_seen = self._counted
        if self.args.include_num_input_tokens_seen != "no":
            entry["input_tokens"] = tokens
            self.loop.amend()


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """A round's metrics under the names that Trainer's users see; {} of a round that was not scored."""
    scored = entry["metrics"].get("global", {})
    return {f"eval_global_{name}": value for name, value in scored.items()} | dict(entry.get("eval_dataset", {}))
