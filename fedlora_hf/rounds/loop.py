"""The rounds of a run from its beginning to its end, wherever the clients are.

The rules of a round (cohort, start, aggregation, commit) are `Federation`'s, the way to the clients is a `Transport`'s;
here is the order of things, and what must hold before the next one happens. What later rounds need is on disk before
it is used: after each commit the loop goes on from what it reads back.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedlora_hf.errors import RecordError
from fedlora_hf.hub.publishing import Publisher
from fedlora_hf.launch.heartbeat import heartbeat
from fedlora_hf.launch.leaving import leaving
from fedlora_hf.record.standing import collaborative
from fedlora_hf.record.write import add_metrics, check_same_run, mean_over_collaborative
from fedlora_hf.rounds.adopt import adopted
from fedlora_hf.rounds.federation import Federation, Run
from fedlora_hf.rounds.limits import check_budget, check_cohort
from fedlora_hf.rounds.output import ClientFolders, check_overwrite, write_run
from fedlora_hf.rounds.ownership import check_no_less, check_output
from fedlora_hf.rounds.store import unlike
from fedlora_hf.rounds.transport import Ask, Transport, Watcher
from fedlora_hf.training.stages import total_rounds
from fedlora_hf.util.disk import sweep
from fedlora_hf.util.lock import one_writer
from fedlora_hf.util.progress import Progress
from fedlora_hf.util.stopwatch import Stopwatch, part, timed

logger = logging.getLogger(__name__)


class RoundLoop:
    """One run. `run` is where it stands.

    Where several processes run, each has a loop of its own and all go through it alike: what is written is written by
    the first, and whatever fails in one of them fails in all (`processes.all_or_none`).
    """

    def __init__(
        self, federation: Federation, transport: Transport, watcher: Watcher, publisher: Publisher, progress: Progress
    ) -> None:
        self.federation, self.transport, self.watcher = federation, transport, watcher
        self.args, self.store, self.publisher, self.progress = federation.args, federation.store, publisher, progress
        self.processes = transport.processes
        self.run, self._begun = self._new_run(), False

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, those of the global stage included."""
        return total_rounds(self.args)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer of the output folder meanwhile; ConfigError where it is another's, or another writes.

        Where several processes run, one that is lost ends the others, which would wait for it.
        """
        with ExitStack() as held:
            held.enter_context(leaving())
            with self.processes.all_or_none():
                if self.processes.first:
                    check_output(self.args.output_dir, self.run.record.kind, beside=self._read())
                    held.enter_context(one_writer(self.args.output_dir))
            held.enter_context(heartbeat(self.processes.number, self.processes.count))
            yield

    def _read(self) -> list[str]:
        """The folders here that the run was made from: its base, its data, the adapter that it starts from."""
        args = self.args
        named: list[Any] = [self.run.record.model.get("name_or_path"), args.initial_adapter, args.server_dataset]
        for data in (args.dataset, args.validation_dataset, args.test_dataset):
            named += data.values() if isinstance(data, dict) else data if isinstance(data, list) else [data]
        return [name for name in named if isinstance(name, str) and os.path.isdir(name)]

    def train(self, resume: str | None = None) -> Run:
        """The rounds, and the personal adapters; `evaluate` and `write` are the caller's to ask for."""
        self.begin(resume)
        self.watcher.ready(self.run)
        if not self.run.round and (scores := self.transport.score_start(self.run)) is not None:
            add_metrics(self.run.record, "global", scores, "before")
        while self.run.round < self.num_rounds and not self.watcher.stopped:
            self.round(self.run.round + 1)
        if (best := self.watcher.best_round()) is not None and best != self.run.round:
            self.run = Run(self.run.round, self.store.state(best), self.run.record)
            self.run.record.rounds[-1]["result_of_round"] = best
            self.progress.say(f"the result is round {best}'s adapter, the best by {self.args.metric_for_best_model}")
        self.personalise()
        return self.run

    # ---- the beginning -----------------------------------------------------------------------------------------------

    def begin(self, resume: str | None) -> None:
        """Stand at the start of a new run, or after the round that `resume` names ("last", "3", "hub:user/name")."""
        if resume is not None and resume.startswith("hub:"):
            resume = adopted(resume, self.federation, self.processes, self._new_run().record)
        self.run = self._new_run()
        with self.processes.all_or_none():
            number, damage = (None, None) if resume is None else self.store.resumed(resume)
            # Before the first round is committed, its open folder tells which run it is of.
            earlier = self.store.record(number) if number else self.store.open_round_record(1) if number == 0 else None
            if earlier is not None:
                now = self.run.record
                now.clients = now.clients or earlier.clients  # over a network they are not known before they answer
                check_same_run(earlier, now)
        if damage is not None:
            # Not by way of the bar, which may be switched off: rounds that were done are lost.
            logger.warning("going on from round %s, the last that is whole: %s", number, damage)
        with self.processes.all_or_none():
            if self.processes.first:
                self._clear(number, new=earlier is None)
        if number and earlier is not None:
            state = self.store.state(number)
            if reason := unlike(state, self.federation.initial):
                raise RecordError(f"{self.store.folder / str(number)}: {reason}; its adapter is not of this model")
            self.run = Run(number, state, earlier, groups=self.store.groups(number))
        self._begun = True

    def _new_run(self) -> Run:
        return Run(0, self.federation.initial, self.transport.opening())

    def _clear(self, number: int | None, *, new: bool) -> None:
        """Remove from the output folder what the run that starts, or goes on after round `number`, has no use for."""
        if number is None:
            check_overwrite(self.args.output_dir, self.store)
        if new:
            self.store.clear()
            self.store.open(1, self.run.record)
        self.store.forget_after(number or 0)
        sweep(Path(str(self.args.output_dir)))

    # ---- a round -----------------------------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """One round: train the cohort, look at the updates, aggregate, commit."""
        with timed() as watch:
            self._round(number, watch)

    def _round(self, number: int, watch: Stopwatch) -> None:
        federation = self.federation
        self.watcher.round_begins(number)
        present = self.transport.present(self.run, number)
        ask = Ask(number, federation.stage(number), federation.cohort(number, present), self.run)
        if ask.stage.on_server:
            self._server_round(ask, watch)
        elif not self._client_round(ask, watch):
            self.progress.say(f"stopped in round {number}: it is not committed, and --resume_from last goes on with it")
            return
        state, record, groups = self.store.state(number), self.store.record(number), self.store.groups(number)
        self.run = Run(number, state, record, groups=groups)
        self._after(number, watch)

    def _client_round(self, ask: Ask, watch: Stopwatch) -> bool:
        """A round on the clients' data: nothing is changed before all that can be refused has been looked at.

        False when the run was stopped in the middle of it.
        """
        federation, run, number, cohort = self.federation, ask.run, ask.number, ask.cohort
        check_cohort(self.args, federation.method, len(cohort))
        check_budget(self.args, number, run.record.rounds, cohort)
        sent = self.transport.train(ask)
        if not sent.complete:
            return False
        if self.args.judged:
            with part("judge"):
                self._judge(ask)
        with self.processes.all_or_none():
            if federation.method.needs_server:
                with part("train"):
                    self._train_server(ask)
            if self.processes.first:
                with part("aggregate"):
                    outcome = federation.outcome(run, number, cohort)
                facts = {**sent.facts, **federation.stage_facts(number, cohort, self.transport.message_bytes)}
                seconds = watch.read()
                with part("write"):
                    federation.commit(
                        run, number, cohort, outcome, seconds=seconds, message_bytes=sent.message_bytes, facts=facts
                    )
        return True

    def _judge(self, ask: Ask) -> None:
        """Take functional evidence on the open round's updates and leave it beside them."""
        if self.store.functional(ask.number).evidence:
            return
        found = self.transport.judge(ask)
        if found is None:
            return
        with self.processes.all_or_none():
            if self.processes.first:
                self.store.note_functional(ask.number, found)

    def _train_server(self, ask: Ask) -> None:
        """Train on the server's own data, as a client would, what the method compares clients with."""
        done = self.store.server_update(ask.number) is not None
        if not self.processes.agreed(done) and (self.processes.first or self.processes.together):
            update, _ = self.transport.train_on_server(ask)
            if self.processes.first:
                self.store.save_server(ask.number, update)

    def _server_round(self, ask: Ask, watch: Stopwatch) -> None:
        """A round of the global stage on the server's own data: its result is the new global adapter."""
        with self.processes.all_or_none():
            if self.processes.first or self.processes.together:
                with part("train"):
                    update, facts = self.transport.train_on_server(ask)
                facts = {**facts, **self.federation.stage_facts(ask.number, [], self.transport.message_bytes)}
                if self.processes.first:
                    seconds = watch.read()
                    with part("write"):
                        self.federation.commit_on_server(ask.run, ask.number, update, seconds=seconds, facts=facts)

    def _after(self, number: int, watch: Stopwatch) -> None:
        """What follows a committed round: its metrics, a push, a word to whoever watches."""
        entry = self.run.record.rounds[-1]
        if self.watcher.wants_scores(number):
            self.score_round()
        with self.processes.all_or_none():
            if self.processes.first and self.publisher.pushes_rounds:
                with part("write"):
                    self.write(str(self.args.output_dir), report=False)
                    self.publisher.round(number)
        entry["seconds"] = watch.read()
        self.watcher.round_ended(entry)
        entry["seconds"] = watch.read()  # with what the watcher asked for; on disk with the next round

    def score_round(self) -> None:
        """Put the metrics of the global adapter after the last round into that round's entry, on disk too."""
        run = self.run
        with part("score"):
            scores = self.transport.score(run)
        run.record.rounds[-1]["metrics"] = {"global": mean_over_collaborative(run.record, scores)}
        self.amend()

    def amend(self) -> None:
        """Write the record of the last round again, with what was added to it."""
        with self.processes.all_or_none():
            if self.processes.first:
                with part("write"):
                    self.store.amend(self.run.round, self.run.record)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def personalise(self) -> None:
        """Give every collaborative client its personal adapter, as a folder of its own."""
        run, folders = self.run, ClientFolders(self.args.output_dir, self.store.config)
        with self.processes.all_or_none():
            if self.processes.first:
                folders.begin()
        members = collaborative(run.record)
        refined = self.federation.refined(run) if members else {}
        for client, facts in self.transport.personalise(run, members, refined, folders).items():
            run.record.clients[client]["personal"] = dict(facts)
        with self.processes.all_or_none():
            if self.processes.first:
                folders.publish()
        run.personalised = folders.read(members)

    def evaluate(self) -> None:
        """Put the metrics of the global adapter, and of the personal ones, into the record."""
        record = self.run.record
        if self.run.round and "before" not in record.metrics:  # told with the first updates
            first = {client: facts["metrics"].get("before") for client, facts in record.clients.items()}
            add_metrics(record, "global", {client: found for client, found in first.items() if found}, "before")
        for kind, scores in self.transport.final_scores(self.run).items():
            add_metrics(record, kind, scores)
        record.scorings = dict(self.transport.scorings())

    def write(self, folder: str, *, report: bool = True) -> None:
        """Write the global adapter, run.json, the card and, unless told not to, the report.

        ConfigError where they would replace what is not this run's, or a run that has come further.
        """
        check_output(folder, self.run.record.kind)
        if not self._begun:
            check_no_less(folder, self.run.round)
        write_run(folder, self.run.state, self.store.config, self.run.record, self.run.groups, report=report)
