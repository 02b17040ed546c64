"""The server's side of a run: who takes part in a round, what a client starts from, how a round is closed.

It knows no model and no data, so it is the same whether clients are trained in this process or on other machines.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.attacks import ATTACKS
from fedlora_hf.aggregation.groups import aggregate_groups
from fedlora_hf.aggregation.partial import mean_of_trained
from fedlora_hf.aggregation.ranks import cut_to
from fedlora_hf.aggregation.server_optimizer import space_of, stepped
from fedlora_hf.errors import RoundError
from fedlora_hf.methods.method import Method
from fedlora_hf.methods.settings import method_options
from fedlora_hf.record.changes import component_changes
from fedlora_hf.record.evidence import past_rounds
from fedlora_hf.record.groups import standing_groups
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import last_rounds, needed_updates
from fedlora_hf.record.write import add_round
from fedlora_hf.rounds.limits import check_suspects
from fedlora_hf.rounds.outcome import Outcome, Start
from fedlora_hf.rounds.rehearsal import rehearsed
from fedlora_hf.rounds.residual import grown, split
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.training.control import Controls, next_server
from fedlora_hf.training.personal import Choice, with_kept
from fedlora_hf.training.stages import Stage, StageName, personal_stage, round_stage
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, compressed, state_sum
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig

SERVER = "server"  # who trains on the server's own data
OPTIMIZER, SCAFFOLD = "optimizer/", "scaffold/"  # how names of what the server remembers begin


@dataclass
class Run:
    """Where a run stands: the last committed round, the global adapter after it, the record, the personal adapters.

    groups: {name: its global adapter} where clients were found to be of several groups; the first one's is `state`.
    """

    round: int
    state: AdapterState
    record: RunRecord
    personalised: Mapping[str, AdapterState] = field(default_factory=dict)
    groups: Mapping[str, AdapterState] = field(default_factory=dict)

    def global_of(self, client_id: str) -> AdapterState:
        """The global adapter that a client starts from: its group's, where there are several."""
        group = self.record.clients.get(client_id, {}).get("group")
        return self.groups.get(str(group), self.state)


@dataclass(frozen=True, eq=False)
class Federation:
    """The rules of one run. initial: the adapter before the first round; rank: of the adapters that clients train."""

    args: "FederatedConfig"
    method: Method
    store: RoundStore
    initial: AdapterState
    rank: int

    def stage(self, number: int) -> Stage:
        return round_stage(self.args, self.method.trained(number), number)

    def cohort(self, number: int, ids: Iterable[str]) -> list[str]:
        """The clients of a round, sorted: all, or `clients_per_round` drawn from (seed, round); none on the server."""
        known = [] if self.stage(number).on_server else sorted(ids)
        if self.args.clients_per_round is None or self.args.clients_per_round >= len(known):
            return known
        rng = np.random.default_rng(derive_seed(self.args.seed, "cohort", number))
        return sorted(rng.choice(known, self.args.clients_per_round, replace=False).tolist())

    def start(self, run: Run, client_id: str) -> Start:
        """What a client starts the next round from: the global adapter, with what the method lets it keep."""
        if self.method.restarts:
            # A head has no sum to stand on: it goes on from the mean.
            return Start(AdapterState(self.initial, run.state.extras), run.state if run.round else None)
        if self.method.residual:
            return Start(*split(run.state, self.initial))
        own = self.last_update(run.record, client_id) if self.method.keeps else None
        start = run.global_of(client_id)
        return Start(start if own is None else with_kept(start, own.state, self.method.keeps))

    def controls(self, run: Run, client_id: str) -> Controls | None:
        """SCAFFOLD's control variates for a client's next round; None where the run is not SCAFFOLD's."""
        if not self.args.scaffold or self.stage(run.round + 1).name is not StageName.FEDERATED:
            return None
        last = last_rounds(run.record).get(client_id)
        return Controls(
            self._remembered(run.round, SCAFFOLD), {} if last is None else self.store.control(last, client_id)
        )

    def _remembered(self, number: int, what: str) -> dict[str, Tensor]:
        """What the server remembers after a round (0: before the first) under names that begin so, without that."""
        memory = self.store.memory(number) if number else {}
        return {name.removeprefix(what): tensor for name, tensor in memory.items() if name.startswith(what)}

    def last_update(self, record: RunRecord, client_id: str) -> ClientUpdate | None:
        """The client's update of the last round it took part in, read from disk; None if there is none."""
        number = last_rounds(record).get(client_id)
        return None if number is None else self.store.kept(number, client_id)

    def moments(self, record: RunRecord, client_id: str) -> bytes:
        """The state of a client's optimizer after the last round it took part in."""
        number = last_rounds(record).get(client_id)
        return b"" if number is None else self.store.optimizer(number, client_id)

    def own(self, record: RunRecord, client_id: str) -> AdapterState | None:
        """A client's own whole adapter, as it left its last round; with what it stood on, where rounds restart."""
        last = self.last_update(record, client_id)
        if last is None:
            return None
        number = last_rounds(record)[client_id]
        if number == 1 or not (self.method.restarts or self.method.residual):
            return last.state
        state = self.store.state(number - 1)
        under = state if self.method.restarts else split(state, self.initial)[1]
        return last.state if under is None else state_sum(under, last.state)

    def combined(self, record: RunRecord, number: int, cohort: Sequence[str]) -> Aggregate:
        """The aggregate of a round's updates: a pure function of what the store holds, open round or committed."""
        updates = self.updates(number, cohort)
        if not updates:
            reason = self.store.failure(number, cohort[0])
            raise RoundError(f"round {number}: all {len(cohort)} clients failed; {cohort[0]!r} with: {reason}")
        if self.args.clusters == "auto":
            return self._by_group(record, number, updates)
        past, functional = past_rounds(record, number), self.store.functional(number).evidence
        return self._aggregated(updates, number, past=past, functional=functional)

    def _by_group(self, record: RunRecord, number: int, updates: Sequence[ClientUpdate]) -> Aggregate:
        """The same where every group of clients that agree has a global adapter of its own."""
        states = self.store.groups(number - 1) if number > 1 else {}
        standing = standing_groups(record, number, self._reference(number), states)
        options = self._options(self.method.name)

        def rule(
            updates: Sequence[ClientUpdate], *, method: str, reference: AdapterState | None, since: int
        ) -> Aggregate:
            past = past_rounds(record, number, since)
            return self._aggregated(updates, number, method, reference=reference, past=past)

        return aggregate_groups(updates, standing, number, rule, method_options(self.method, **options))

    def _options(self, method: str) -> dict[str, Any]:
        """The method's own options; none for a method that stands in for the run's."""
        return cast(dict[str, Any], self.args.aggregation_options) if method == self.args.aggregation else {}

    def updates(self, number: int, cohort: Sequence[str]) -> list[ClientUpdate]:
        """A round's updates as they reached the server: what the clients sent or, in a rehearsal, what attackers who
        know the others' made of theirs. Clients that failed have none."""
        found = [self.store.update(number, client) for client in cohort if not self.store.failure(number, client)]
        attackers = {c: how for c, how in self.args.contaminated.items() if how.kind in ATTACKS}
        if not attackers.keys() & {update.client_id for update in found}:
            return found

        def rule(states: Mapping[str, AdapterState]) -> AdapterState:
            return self._aggregated([ClientUpdate(client, state) for client, state in states.items()], number).state

        start = self._reference(number) or self.initial
        return rehearsed(found, self.args.contaminated, start, rule, self.args.seed, number)

    def _reference(self, number: int) -> AdapterState | None:
        """What a round's clients started to train from; None for what is the same in every round, or in the first."""
        if number == 1 or self.method.restarts:
            return None
        state = self.store.state(number - 1)
        return split(state, self.initial)[0] if self.method.residual else state

    def _aggregated(
        self, updates: Sequence[ClientUpdate], number: int, method: str | None = None, **more: Any
    ) -> Aggregate:
        """method: another than the run's. more: arguments of `aggregate`."""
        method, place = method or self.args.aggregation, self.args.aggregation_device
        more.setdefault("reference", self._reference(number))
        combined = aggregate(
            updates,
            method,
            weight_by=self.args.weight_by,
            weight_cap=self.args.weight_cap,
            target_rank=None if self.method.restarts or self.method.residual else self.rank,
            server=self.store.server_update(number),
            device="cpu" if self.args.use_cpu and place == "auto" else place,
            **more,
            **self._options(method),
        )
        ranks = {module: factors.rank for module, factors in self.initial.items()}
        uneven = len(set(ranks.values())) > 1 and not (self.method.restarts or self.method.residual)
        return cut_to(combined, ranks) if uneven else combined

    def outcome(self, run: Run, number: int, cohort: Sequence[str]) -> Outcome:
        """What the open round's updates come to; RoundError when too few of them can be used, StoppedError
        when more are suspect than `max_suspects`."""
        combined = self.combined(run.record, number, cohort)
        failures = {client: reason for client in cohort if (reason := self.store.failure(number, client))}
        quarantined = dict(sorted({**failures, **combined.quarantined}.items()))
        usable = [u for u in self.updates(number, cohort) if u.client_id not in quarantined]
        if len(usable) < self.args.server_min_clients:
            raise RoundError(
                f"round {number}: {len(usable)} usable updates, server_min_clients={self.args.server_min_clients}; "
                "nothing was changed; lower server_min_clients, or mend the clients and pass --resume_from last"
            )
        check_suspects(self.args.max_suspects, number, cohort, combined.flagged, quarantined)
        combined = self._in_stage(run, number, combined, usable)
        combined, memory = self._stepped(run, number, combined)
        memory = {**memory, **self._variate(run, number, usable)}
        state, start = combined.state, run.state
        if self.method.restarts:
            start = self.initial
            if run.round:
                state = compressed(state_sum(run.state, combined.state))
        elif self.method.residual:
            start, state = split(run.state, self.initial)[0], grown(run.state, combined.state, self.initial)
        return Outcome(state, start, combined, usable, quarantined, memory)

    def _stepped(self, run: Run, number: int, combined: Aggregate) -> tuple[Aggregate, Mapping[str, Tensor]]:
        """The aggregate after the server optimizer's step, and the optimizer's state; in federated rounds alone."""
        rule, stage = self.args.server_rule, self.stage(number)
        if rule is None or stage.name is not StageName.FEDERATED:
            return combined, {}
        memory = self._remembered(number - 1, OPTIMIZER)
        found = stepped(rule, space_of(self.method), run.state, combined.state, memory, stage.parts)
        modules = {**combined.modules, **found.modules}
        diagnosis = {**combined.diagnosis, "server_optimizer_began": not memory}
        combined = replace(combined, state=found.state, modules=modules, diagnosis=diagnosis)
        return combined, {f"{OPTIMIZER}{name}": tensor for name, tensor in found.memory.items()}

    def _variate(self, run: Run, number: int, usable: Sequence[ClientUpdate]) -> Mapping[str, Tensor]:
        """SCAFFOLD's control variate of the server after the round; {} where the run is not SCAFFOLD's."""
        if not self.args.scaffold:
            return {}
        before, last = self._remembered(number - 1, SCAFFOLD), last_rounds(run.record)
        changes = (
            (self.store.control(last[c], c) if c in last else {}, self.store.control(number, c))
            for c in (update.client_id for update in usable)
        )
        after = next_server(before, changes, len(run.record.clients))
        return {f"{SCAFFOLD}{name}": tensor for name, tensor in after.items()}

    def _in_stage(self, run: Run, number: int, combined: Aggregate, usable: Sequence[ClientUpdate]) -> Aggregate:
        """The aggregate; in the global stage only of the parts that are trained, with the method's weights."""
        stage = self.stage(number)
        if stage.name is not StageName.GLOBAL or not self.method.weighted:
            return combined
        means = mean_of_trained(usable, combined.weights, run.state, stage.parts)
        return replace(combined, state=AdapterState(means, combined.state.extras))

    def commit(
        self,
        run: Run,
        number: int,
        cohort: Sequence[str],
        outcome: Outcome,
        *,
        seconds: Mapping[str, float],
        message_bytes: int | None,
        facts: Mapping[str, Any],
    ) -> None:
        """Write the round's entry into the record and commit the round.

        seconds: of the round's parts so far. message_bytes: what a client sends and is sent. facts: for its entry.
        """
        judged = self.store.functional(number)
        add_round(
            run.record,
            number,
            cohort,
            outcome.usable,
            outcome.combined,
            outcome.quarantined,
            outcome.start,
            seconds,
            stage=self.stage(number).name,
            message_bytes=message_bytes,
            functional=judged.evidence,
            effects={client: asdict(effect) for client, effect in judged.effects.items()},
            judging=judged.facts,
            starts={client: run.global_of(client) for client in cohort} if run.groups else {},
        )
        run.record.rounds[-1] |= dict(facts)
        self.store.save_groups(number, {name: group.state for name, group in outcome.combined.groups.items()})
        self.store.commit(number, outcome.state, run.record, outcome.memory)
        needed = needed_updates(run.record, self.args.keep_rounds)
        # What a client learned stands on the global adapter of the round before, where rounds restart.
        bases = {n - 1 for n, _ in needed} if self.method.restarts or self.method.residual else set()
        self.store.prune(self.args.keep_rounds, needed, bases)

    def commit_on_server(
        self, run: Run, number: int, update: ClientUpdate, *, seconds: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        """Commit a round that was trained on the server's own data: the update is the new global adapter.

        seconds, facts: as for `commit`.
        """
        combined = Aggregate(update.state, modules=run.record.modules, diagnosis=run.record.diagnosis)
        name = self.stage(number).name
        add_round(run.record, number, [], [update], combined, {}, run.state, seconds, stage=name)
        run.record.rounds[-1] |= {"bytes_up": {}, **facts}
        self.store.open(number)
        self.store.commit(number, update.state, run.record)

    def stage_facts(
        self, number: int, clients: Iterable[str], part_bytes: Callable[[Sequence[str]], int]
    ) -> dict[str, Any]:
        """For a round's entry in the record: the parts it trains, and the bytes a client has to keep of them."""
        parts = self.stage(number).parts
        return {"parts": list(parts), "bytes_stored": dict.fromkeys(clients, part_bytes(parts))}

    def personal_facts(self, run: Run, choice: Choice, state: AdapterState, part_bytes: int) -> dict[str, Any]:
        """For a client's entry in the record: what it trained for itself, what that moved, and the bytes to keep.

        part_bytes: of what the personal stage trains.
        """
        return {
            "parts": list(personal_stage(self.args).parts) if choice.tuned else [],
            "changed": component_changes(run.state, state),
            "bytes_stored": choice.bytes_stored(part_bytes, state.nbytes()),
        }

    def refined(self, run: Run) -> Mapping[str, AdapterState]:
        """{client: the adapter that the method refined for it} after the last round; empty where it refines nothing."""
        cohort = run.record.rounds[-1]["cohort"] if run.round else []
        # No updates are here before the first round, after one on the server, and of a round that came from the Hub.
        came = [client for client in cohort if not self.store.failure(run.round, client)]
        if all(self.store.kept(run.round, client) is None for client in came):
            return {}
        return self.combined(run.record, run.round, cohort).personalised
