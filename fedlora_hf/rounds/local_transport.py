"""Clients whose data are here: they are trained in the one model there is, shared out over the processes of the run."""
# SPDX-License-Identifier: Apache-2.0

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedlora_hf.adapter.slot import slot_facts
from fedlora_hf.data.fingerprint import data_sha256
from fedlora_hf.data.prepare import ClientData
from fedlora_hf.errors import RoundError
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.write import opening
from fedlora_hf.rounds.federation import SERVER, Federation, Run
from fedlora_hf.rounds.judges import Functional
from fedlora_hf.rounds.judging import measured, planned, seed_of
from fedlora_hf.rounds.output import ClientFolders
from fedlora_hf.rounds.transport import Ask, Scores, Sent
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.training.local import StoppedError, failure_reason, free_memory
from fedlora_hf.training.lockstep import PassError
from fedlora_hf.training.personal import Personal
from fedlora_hf.training.stages import personal_stage, total_rounds
from fedlora_hf.training.together import Offered, Told, personal_together
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed
from fedlora_hf.util.stopwatch import part

logger = logging.getLogger(__name__)


class LocalTransport:
    """train_client: (client id, round) -> its update. train_clients: (client ids, round, who is told of each one).
    server: the server's own data, for the global stage. facts: for the run record, that only the caller knows."""

    def __init__(
        self,
        trainer: ClientTrainer,
        federation: Federation,
        train_client: Callable[[str, int], ClientUpdate],
        train_clients: Callable[[Sequence[str], int, Told], None],
        server: ClientData | None,
        facts: Mapping[str, Any],
    ) -> None:
        self.trainer, self.federation = trainer, federation
        self.train_client, self.train_clients = train_client, train_clients
        self.server, self.facts = server, dict(facts)
        self.args, self.store, self.processes = trainer.args, federation.store, trainer.processes
        self._data_sha256 = data_sha256(trainer.clients if server is None else {**trainer.clients, SERVER: server})

    def opening(self) -> RunRecord:
        examples = {client: data.train.num_examples for client, data in self.trainer.clients.items()}
        adapter = slot_facts(self.trainer.slot, self.args.adapter)
        sha256 = {"data": self._data_sha256, "base": self.trainer.base_sha256}
        return opening(self.args, self.federation.method, self.facts, examples, adapter, sha256)

    def present(self, run: Run, number: int) -> Iterable[str]:
        return self.trainer.clients

    def message_bytes(self, parts: Iterable[str]) -> int:
        return self.trainer.slot.message_bytes(parts)

    # ---- a round -----------------------------------------------------------------------------------------------------

    def train(self, ask: Ask) -> Sent:
        stopped = False
        with self.processes.all_or_none():
            for train in self._work(ask):
                with self.processes.each_or_none(), part("train"):
                    stopped = not train()
                if stopped:
                    break
        if any(self.processes.everyones(stopped)):
            self.trainer.control.should_training_stop = True
            return Sent(complete=False)
        shared = [part for part in ask.stage.parts if part not in self.federation.method.keeps]
        # A control variate goes each way beside the adapter.
        return Sent(message_bytes=self.message_bytes(shared) * (2 if self.args.scaffold else 1))

    def _work(self, ask: Ask) -> Iterator[Callable[[], bool]]:
        """What this process has to train, one call after the other: clients or, side by side, groups of them."""
        title, over = f"round {ask.number}/{total_rounds(self.args)}", self.trainer.progress.over
        if self.args.clients_at_once == 1:
            for client_id in over(self.trainer.claim(ask.cohort), title, len(ask.cohort)):
                yield partial(self.train_into_store, client_id, ask.number)
            return
        groups = -(-len(ask.cohort) // self.args.clients_at_once)
        for group in over(self.trainer.claim_groups(ask.cohort), title, groups):
            yield partial(self.train_group_into_store, group, ask.number)

    def train_group_into_store(self, group: Sequence[str], number: int) -> bool:
        """`train_into_store` of several clients, in lockstep; one by one where that fails as a whole.

        Where an earlier, interrupted run did some of them, all are trained again, in the same company: which other
        rows a product is taken with moves its last bits, and those who are done already are not written again.
        """
        todo = [client for client in group if self.store.finished(number, client) is None]
        if len(group) == 1 or not todo:
            return all(self.train_into_store(client, number) for client in todo)

        def told(client: str, found: ClientUpdate | Exception, moments: bytes) -> None:
            if client not in todo:
                return
            todo.remove(client)
            if isinstance(found, Exception):
                self.store.fail(number, client, failure_reason("training", found))
            else:
                with part("write"):
                    self.store.save(number, found, **({"optimizer": moments} if moments else {}))

        self.trainer.obeys_stop = True
        try:
            self.train_clients(group, number, told)
        except StoppedError:
            return False
        except PassError as error:
            reason = str(error)
        else:
            return True
        finally:
            self.trainer.obeys_stop = False
        free_memory()
        logger.warning("clients_at_once: a pass over %s clients failed (%s); one by one now", len(group), reason)
        return all(self.train_into_store(client, number) for client in todo)

    def train_into_store(self, client_id: str, number: int) -> bool:
        """Train a client unless an earlier, interrupted run already did; a client that fails is noted, not fatal.

        False when a callback asked for the end of the run meanwhile; nothing of this client is kept then.
        """
        if self.processes.agreed(self.store.finished(number, client_id) is not None):
            return True
        self.trainer.obeys_stop = True
        try:
            update = self.train_client(client_id, number)
            if self.processes.writes:
                more = {"optimizer": moments} if (moments := self.trainer.moments) else {}
                with part("write"):
                    self.store.save(number, update, **more)
        except RoundError:  # the processes differ: not this client's failure
            raise
        except StoppedError:
            return False
        except Exception as error:  # whatever a client raises is its own failure; the round goes on without it
            reason = failure_reason("training", error)
        else:
            return True
        finally:
            self.trainer.obeys_stop = False
        # Out of the handler, so that the error no longer holds the client's tensors.
        free_memory()
        if self.processes.writes:
            self.store.fail(number, client_id, reason)
        return True

    def train_on_server(self, ask: Ask) -> tuple[ClientUpdate, Mapping[str, Any]]:
        assert self.server is not None  # the options have been checked: a stage on the server has its data
        trainer, start = self.trainer, ask.run.state
        trainer.install(start)
        seed = derive_seed(self.args.seed, SERVER, ask.number)
        update = trainer.train_from(start, SERVER, self.server, ask.stage, seed)
        # The server sends what it trained to all, and gets nothing from anybody.
        return update, {"bytes_down": dict.fromkeys(trainer.clients, self.message_bytes(ask.stage.parts))}

    def judge(self, ask: Ask) -> Functional | None:
        seed = seed_of(self.args, ask.number)
        panel = planned(self.args, self.trainer.clients, ask.cohort, seed)
        if panel is None:
            return None
        with self.processes.all_or_none():
            updates = self.federation.updates(ask.number, ask.cohort)
            # Whoever the evidence of updates has flagged, or left no influence, is no judge of others.
            found = self.federation.combined(ask.run.record, ask.number, ask.cohort)
        sound = [update for update in updates if update.client_id in found.influence]
        validation = {judge: self.trainer.clients[judge].validation for judge in panel.examples}
        start, influence = ask.run.state, found.influence
        return measured(
            self.trainer.scorer, panel, validation, start, found.state, influence, sound, self.processes, seed
        )

    # ---- metrics and personal adapters -------------------------------------------------------------------------------

    def score_start(self, run: Run) -> Scores:
        return self.score(run)

    def score(self, run: Run) -> Scores:
        return self.trainer.test_metrics({client: run.global_of(client) for client in self.trainer.clients})

    def final_scores(self, run: Run) -> Mapping[str, Scores]:
        return {"global": self.score(run), "personalised": self.trainer.test_metrics(run.personalised)}

    def scorings(self) -> Mapping[str, int]:
        scores = self.trainer.scores
        own = (scores.taken, scores.reused)
        each = [own] if self.processes.together else self.processes.everyones(own)
        return {"taken": sum(taken for taken, _ in each), "reused": sum(reused for _, reused in each)}

    def personalise(
        self, run: Run, members: Sequence[str], refined: Mapping[str, AdapterState], folders: ClientFolders
    ) -> Mapping[str, Mapping[str, Any]]:
        chosen: dict[str, dict[str, Any]] = {}
        with self.processes.all_or_none():
            for client_id, make in self._personal_work(run, members, refined):
                with self.processes.each_or_none():
                    chosen[client_id] = self._personal_into(folders, run, client_id, make)
        return self.processes.gathered(chosen)

    def _personal_work(
        self, run: Run, members: Sequence[str], refined: Mapping[str, AdapterState]
    ) -> Iterator[tuple[str, Callable[[], Personal]]]:
        """This process's clients, each with what makes its personal adapter, or raises what it failed with."""
        over, make = self.trainer.progress.over, self.trainer.personal_adapter

        def offered(client_id: str) -> Offered:
            return Offered(run.global_of(client_id), self.federation.own(run.record, client_id), refined.get(client_id))

        if self.args.clients_at_once == 1 or not self.args.personal_steps:
            for client_id in over(self.trainer.claim(members), "personal adapter", len(members)):
                yield client_id, partial(make, client_id, *offered(client_id))
            return
        groups = -(-len(members) // self.args.clients_at_once)
        for group in over(self.trainer.claim_groups(members), "personal adapters", groups):
            found = personal_together(self.trainer, {client_id: offered(client_id) for client_id in group})
            for client_id in group:
                yield client_id, partial(_or_raise, found[client_id])

    def _personal_into(
        self, folders: ClientFolders, run: Run, client_id: str, make: Callable[[], Personal]
    ) -> dict[str, Any]:
        """Write a client's personal adapter; what was chosen and why, or why there is none."""
        run = replace(run, state=run.global_of(client_id))
        try:
            found = make()
        except RoundError:  # the processes differ: not this client's failure
            raise
        except Exception as error:  # its own failure: it has no personal adapter, the others do
            return {"failed": failure_reason("personal adapter", error)}
        if self.processes.writes:
            folders.write(client_id, found.state)
        part_bytes = self.message_bytes(personal_stage(self.args).parts)
        facts = self.federation.personal_facts(run, found.choice, found.state, part_bytes)
        return {"choice": str(found.choice), "validation_loss": found.losses_by_name(), **facts}


def _or_raise(found: Personal | Exception) -> Personal:
    if isinstance(found, Exception):
        raise found
    return found
