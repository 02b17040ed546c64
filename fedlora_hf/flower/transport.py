"""Clients that are nodes on a network: orders go out to them as messages, updates and metrics come back.

A client's update is looked at when it comes, and written into the round's folder at once: a server that is started
again with resume_from=last asks only those who had not answered.
"""
# SPDX-License-Identifier: Apache-2.0

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora_hf.adapter.slot import AdapterSlot, slot_facts
from fedlora_hf.aggregation.screening import expected_shapes
from fedlora_hf.errors import FedLoraError, UpdateError, one_line
from fedlora_hf.flower.exchange import Reply, exchange
from fedlora_hf.flower.replies import check, check_control, config, fingerprint, numbers, received
from fedlora_hf.flower.roster import Roster, addressed
from fedlora_hf.flower.roster_file import read_roster
from fedlora_hf.flower.settings import Settings
from fedlora_hf.flower.share import check_rank, travelling
from fedlora_hf.flower.wire import SCAFFOLD, holds, put, put_tensors, take, take_tensors, tensor_bytes
from fedlora_hf.launch.processes import Processes
from fedlora_hf.loading import limited, load_base, load_server_data
from fedlora_hf.methods.method import Method
from fedlora_hf.record import claims
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import last_rounds
from fedlora_hf.record.write import newcomer, opening
from fedlora_hf.rounds.federation import SERVER, Federation, Run
from fedlora_hf.rounds.output import ClientFolders
from fedlora_hf.rounds.transport import Ask, Scores, Sent
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.training.personal import Choice
from fedlora_hf.training.stages import FACTORS, personal_stage
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed
from fedlora_hf.util.stopwatch import part

logger = logging.getLogger("flwr")


class FlowerTransport:
    """method: with what its clients keep, which is on their nodes; `federation` starts them from the global adapter."""

    def __init__(
        self, grid: Grid, settings: Settings, slot: AdapterSlot, federation: Federation, method: Method
    ) -> None:
        self.grid, self.settings, self.slot, self.federation, self.method = grid, settings, slot, federation, method
        self.args, self.store, self.processes = federation.args, federation.store, Processes()
        self.shapes = expected_shapes([], slot.read(), "quarantine")
        bound = read_roster(settings.roster) if settings.roster else None
        self.roster = Roster(grid, bound, anew=settings.names_anew)
        self._online: list[str] = []  # clients whose nodes were connected when the round under way began
        self._final: dict[str, dict[str, dict[str, float]]] = {}

    def opening(self) -> RunRecord:
        """Clients enter the record as they answer."""
        args = self.args
        facts = {
            "model": {"name_or_path": args.model_name_or_path, "task": args.task, "license": args.hub_license},
            "data": {
                "dataset": args.dataset,
                "partition_by": "node",
                "language": args.hub_language,
                "metrics": claims.SELF_REPORTED,
            },
        }
        record = opening(args, self.method, facts, {}, slot_facts(self.slot, args.adapter))
        record.versions["flwr"] = importlib.metadata.version("flwr")
        return record

    def present(self, run: Run, number: int) -> Iterable[str]:
        """Those whose nodes are connected, and those who have answered already, before the server was started again."""
        self._online = self.roster.online()
        self._enter(run, self._online)
        return {*self._online, *self._answered(run, number)}

    def _answered(self, run: Run, number: int) -> set[str]:
        return {client for client in run.record.clients if self.store.finished(number, client) is not None}

    def _enter(self, run: Run, clients: Sequence[str]) -> None:
        """See that the record knows these clients, and their nodes."""
        for client in clients:
            known = run.record.clients.setdefault(client, newcomer(None, self.args.contaminated.get(client)))
            known["node"] = str(self.roster.nodes.get(client, known.get("node")))
        run.record.data["refused_nodes"] = {str(node): why for node, why in self.roster.refused.items()}

    def message_bytes(self, parts: Iterable[str]) -> int:
        return self.slot.message_bytes(parts)

    # ---- a round -----------------------------------------------------------------------------------------------------

    @part("train")  # the nodes train; the server waits for them
    def train(self, ask: Ask) -> Sent:
        answered = self._answered(ask.run, ask.number)
        asked = [client for client in ask.cohort if client not in answered]
        clients = {self.roster.nodes[client]: client for client in asked}
        sent, came = dict.fromkeys(ask.cohort, 0), dict.fromkeys(ask.cohort, 0)
        forgot = []  # clients that have lost what they keep for themselves

        def order(client: str) -> RecordDict:
            content, sent[client] = self._order(ask, client)
            return content

        seconds = self.settings.round_seconds
        messages = addressed(self.roster.nodes, asked, MessageType.TRAIN, order, seconds)
        for reply in exchange(self.grid, messages, seconds):
            client = clients[reply.node]
            if reply.content is not None:
                came[client] = tensor_bytes(reply.content, "update") + tensor_bytes(reply.content, SCAFFOLD)
            if self._receive(ask, client, reply) and self._has_forgotten(ask, client, reply):
                forgot.append(client)
        nodes = {client: ask.run.record.clients[client]["node"] for client in ask.cohort}
        facts: dict[str, Any] = {"nodes": nodes, "bytes_up": came, "bytes_down": sent, "fingerprints": self._seen(ask)}
        return Sent(facts | ({"forgot": sorted(forgot)} if self.method.keeps else {}))

    def _order(self, ask: Ask, client: str) -> tuple[RecordDict, int]:
        """What a client is sent to train a round, and the bytes of its tensors."""
        start = self.federation.start(ask.run, client)
        controls = self.federation.controls(ask.run, client)
        config: dict[str, Any] = {"round": ask.number, "score": ask.number == 1, "scaffold": controls is not None}
        content = RecordDict({"config": ConfigRecord(config)})
        size = put(content, "start", start.state)
        if controls is not None:  # the client's own variate is on its node
            size += put_tensors(content, SCAFFOLD, controls.server)
        return content, size + (put(content, "frozen", start.frozen) if start.frozen is not None else 0)

    def _receive(self, ask: Ask, client: str, reply: Reply) -> bool:
        """Put an update into the open round, or note why it cannot be used; whether it can be."""
        stage, start = ask.stage, self.federation.start(ask.run, client).state
        try:
            factors = travelling(stage, self.method.keeps)
            update, dropped = received(client, reply, factors, start)
            check_rank(update.state, start, stage.untrained)
            check(update, self.shapes)
            self._check_new(ask, update, start, factors)
            if self.args.scaffold and reply.content is not None:
                control = take_tensors(reply.content, SCAFFOLD)
                check_control(control, self.message_bytes(stage.parts))
                update = replace(update, control=control)
            with part("write"):
                self.store.save(ask.number, update)
        except (FedLoraError, ValueError, OverflowError) as error:
            reason = one_line(error, 300)
            self.store.fail(ask.number, client, reason)
            logger.warning("round %d: client %s, node %d: %s", ask.number, client, reply.node, reason)
            return False
        self.roster.proved.add(client)
        facts = ask.run.record.clients[client]
        facts["num_examples"] = update.num_examples
        self._note(ask.run, client, "facts", dropped)
        if before := self._scores(ask.run, client, reply, "before"):
            facts["metrics"]["before"] = before
        return True

    def _check_new(self, ask: Ask, update: ClientUpdate, start: AdapterState, factors: Sequence[str]) -> None:
        """UpdateError for what the same client has sent before, unless it is what it was sent: nothing was learned."""
        own = fingerprint(update.state, factors)
        earlier = [e["round"] for e in ask.run.record.rounds if e.get("fingerprints", {}).get(update.client_id) == own]
        if earlier and own != fingerprint(start, factors):
            raise UpdateError(
                f"the update is the one of round {earlier[-1]} again, to the bit; a client must train in every round"
            )

    def _seen(self, ask: Ask) -> dict[str, str]:
        """{client: fingerprint of the update it sent} of the open round, for `_check_new` in later ones."""
        factors = travelling(ask.stage, self.method.keeps)
        came = {client: self.store.finished(ask.number, client) for client in ask.cohort}
        return {client: fingerprint(update.state, factors) for client, update in came.items() if update is not None}

    def _scores(self, run: Run, client: str, reply: Reply, kind: str) -> dict[str, float]:
        """The metrics of that kind in a reply, as far as they can be true; {} where there are none."""
        found, dropped = claims.scores(numbers(reply, kind))
        self._note(run, client, kind, dropped)
        return found

    def _note(self, run: Run, client: str, kind: str, dropped: str) -> None:
        """Record what of a client's numbers was dropped, and why."""
        if dropped:
            run.record.clients[client].setdefault("dropped", {})[kind] = dropped
            logger.warning("client %s: its numbers (%s) are dropped: %s", client, kind, dropped)

    def _has_forgotten(self, ask: Ask, client: str, reply: Reply) -> bool:
        """Whether a client that took part before has lost what the method lets it keep."""
        took_part = client in last_rounds(ask.run.record)
        if not (self.method.keeps and took_part and config(reply).get("fresh")):
            return False
        logger.warning("round %d: client %s has lost what it kept for itself and began anew", ask.number, client)
        return True

    def train_on_server(self, ask: Ask) -> tuple[ClientUpdate, Mapping[str, Any]]:
        """With the base model, here; no message is sent."""
        trainer, start = self._trainer, ask.run.state
        trainer.install(start)
        seed = derive_seed(self.args.seed, SERVER, ask.number)
        update = trainer.train_from(start, SERVER, trainer.clients[SERVER], ask.stage, seed)
        return update, {"nodes": {}, "bytes_down": {}}

    @cached_property
    def _trainer(self) -> ClientTrainer:
        """The base model and the server's own data; loaded when a global round first needs them."""
        labels = self.args.labels if self.args.task == "sequence_classification" else None
        base, tokenizer, max_length = load_base(self.args, labels)
        data = load_server_data(self.args, labels)
        return ClientTrainer(base, limited(self.args, max_length), {SERVER: data}, processing_class=tokenizer)

    def judge(self, ask: Ask) -> None:
        """Nobody: the clients' data are not here."""

    # ---- metrics and personal adapters -------------------------------------------------------------------------------

    def score_start(self, run: Run) -> None:
        """Clients tell it with their first update."""

    def score(self, run: Run) -> Scores:
        asked = self._ask(run, self._online, (), {})
        return {client: self._scores(run, client, reply, "global") for client, reply in asked}

    def final_scores(self, run: Run) -> Mapping[str, Scores]:
        """As they came with the personal adapters: one message asks for both."""
        return {kind: {c: found for c, found in scores.items() if found} for kind, scores in self._final.items()}

    def scorings(self) -> Mapping[str, int]:
        return {}  # the nodes score

    def personalise(
        self, run: Run, members: Sequence[str], refined: Mapping[str, AdapterState], folders: ClientFolders
    ) -> Mapping[str, Mapping[str, Any]]:
        """All who are connected score the global adapter; the members also choose an adapter, and score that."""
        clients = [client for client in self.roster.online() if client in run.record.clients]
        self._enter(run, clients)
        self._final = {"global": {}, "personalised": {}}
        chosen = {}
        for client, reply in self._ask(run, clients, members, refined):
            for kind, scores in self._final.items():
                scores[client] = self._scores(run, client, reply, kind)
            if client in members:
                chosen[client] = self._personal(run, client, reply, folders)
        return chosen

    def _personal(self, run: Run, client: str, reply: Reply, folders: ClientFolders) -> dict[str, object]:
        """Write the personal adapter that a client sent; what the record says of it."""
        if reply.content is None:
            return {"failed": f"node {reply.node}: {reply.failure}"}
        said = config(reply)
        try:
            choice = Choice.parse(str(said.get("choice", "")))
            losses, dropped = claims.losses(numbers(reply, "losses"))
            self._note(run, client, "losses", dropped)
            facts: dict[str, object] = {"choice": str(choice), "validation_loss": losses}
            if not holds(reply.content, "personal"):
                return {**facts, "kept_by_node": True}
            factors = tuple(factor for factor in FACTORS if factor in str(said.get("factors", "AB")))
            state = take(reply.content, "personal", factors, None if factors == FACTORS else run.state)
            check(ClientUpdate(client, state), self.shapes)
            folders.write(client, state)
        except (FedLoraError, ValueError, OverflowError) as error:
            return {"failed": one_line(error, 300)}
        part_bytes = self.message_bytes(personal_stage(self.args).parts)
        return facts | self.federation.personal_facts(run, choice, state, part_bytes)

    def _ask(
        self, run: Run, clients: Sequence[str], members: Sequence[str], refined: Mapping[str, AdapterState]
    ) -> Iterator[tuple[str, Reply]]:
        """Send the global adapter to score, to the members also what they may choose from; the replies as they come."""
        seconds = self.settings.round_seconds

        def order(client: str) -> RecordDict:
            content = RecordDict({"config": ConfigRecord({"personal": client in members})})
            put(content, "global", run.state)
            if client in members and (own := self.federation.own(run.record, client)) is not None:
                put(content, "own", own)
            if client in members and client in refined:
                put(content, "refined", refined[client])
            return content

        names = {self.roster.nodes[client]: client for client in clients}
        messages = addressed(self.roster.nodes, clients, MessageType.EVALUATE, order, seconds)
        for reply in exchange(self.grid, messages, seconds):
            yield names[reply.node], reply
