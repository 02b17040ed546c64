"""Clients that are nodes on a network: orders go out to them as messages, updates and metrics come back.

A client's update is looked at when it comes, and written into the round's folder at once: a server that is started
again with resume_from=last asks only those who had not answered.
"""
# SPDX-License-Identifier: Apache-2.0

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora_hf.adapter.slot import AdapterSlot, slot_facts
from fedlora_hf.aggregation.screening import expected_shapes
from fedlora_hf.errors import FedLoraError, UpdateError, one_line
from fedlora_hf.flower.exchange import Reply, exchange
from fedlora_hf.flower.feedback import LOSSY, carries
from fedlora_hf.flower.held import Downlink, Parcel
from fedlora_hf.flower.judging import judged_by_clients
from fedlora_hf.flower.replies import (
    check,
    check_control,
    config,
    fingerprint,
    numbers,
    received,
    sent_fingerprint,
)
from fedlora_hf.flower.roster import Roster, addressed
from fedlora_hf.flower.roster_file import read_roster
from fedlora_hf.flower.settings import Settings
from fedlora_hf.flower.share import check_rank, global_adapter, travelling
from fedlora_hf.flower.wire import SCAFFOLD, holds, put, put_tensors, take, take_tensors, tensor_bytes
from fedlora_hf.launch.processes import Processes
from fedlora_hf.loading import limited, load_base, load_server_data
from fedlora_hf.methods.method import Method
from fedlora_hf.record import claims
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import last_rounds
from fedlora_hf.record.write import newcomer, opening
from fedlora_hf.rounds.federation import SERVER, Federation, Run
from fedlora_hf.rounds.judges import Functional
from fedlora_hf.rounds.outcome import Start
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
        self.downlink = Downlink()
        self._prints: dict[str, str] = {}  # of what clients sent in the round under way
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
        if self.method.keeps:
            record.method_info["global_adapter"] = global_adapter(self.method)
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
        sent, came = dict.fromkeys(ask.cohort, 0), dict.fromkeys(ask.cohort, 0)
        forgot: dict[str, list[str]] = {what: [] for what in self._kept_by_clients()}
        start, self._prints = self._common_start(ask.run), {}
        states = {"start": start.state} | ({} if start.frozen is None else {"frozen": start.frozen})
        parcels = {name: Parcel.of(state) for name, state in states.items()}

        def order(client: str) -> RecordDict:
            content, size = self._order(ask, client, parcels)
            sent[client] += size
            return content

        for client, reply in self._talk(asked, MessageType.TRAIN, order):
            if reply.content is not None:
                came[client] = tensor_bytes(reply.content, "update") + tensor_bytes(reply.content, SCAFFOLD)
            if self._receive(ask, client, reply):
                for what in self._forgotten(ask, client, reply):
                    forgot[what].append(client)
        nodes = {client: ask.run.record.clients[client]["node"] for client in ask.cohort}
        facts: dict[str, Any] = {"nodes": nodes, "bytes_up": came, "bytes_down": sent, "fingerprints": self._seen(ask)}
        return Sent(facts | {what: sorted(clients) for what, clients in forgot.items()})

    def _talk(
        self, clients: Sequence[str], kind: str, order: Callable[[str], RecordDict]
    ) -> Iterator[tuple[str, Reply]]:
        """Send each client its order; the replies as they come. Who lost what an order builds on is sent the whole."""
        names, whole = {self.roster.nodes[client]: client for client in clients}, set()
        seconds = self.settings.round_seconds

        def again(reply: Reply) -> Message | None:
            client = names[reply.node]
            if client in whole or config(reply).get("lacks") is not True:
                return None
            whole.add(client)
            self.downlink.forget(client)
            logger.info("client %s no longer holds what changes build on: it is sent the whole", client)
            return next(iter(addressed(self.roster.nodes, [client], kind, order, seconds)))

        messages = addressed(self.roster.nodes, clients, kind, order, seconds)
        for reply in exchange(self.grid, messages, seconds, again):
            self.downlink.heard(names[reply.node], config(reply))
            yield names[reply.node], reply

    def _common_start(self, run: Run) -> Start:
        """What all clients start the next round from: what some keep for themselves is on their nodes."""
        return self.federation.start(run, SERVER)

    def _order(self, ask: Ask, client: str, parcels: Mapping[str, Parcel]) -> tuple[RecordDict, int]:
        """What a client is sent to train a round, and the bytes of its tensors."""
        controls = self.federation.controls(ask.run, client)
        config: dict[str, Any] = {"round": ask.number, "score": ask.number == 1, "scaffold": controls is not None}
        if self.args.judged and isinstance(self.args.functional_judges, int):
            config["judges"] = self.args.functional_judges
        content = RecordDict({"config": ConfigRecord(config)})
        size = sum(self.downlink.put(content, name, parcel, client) for name, parcel in parcels.items())
        if controls is not None:  # the client's own variate is on its node
            size += put_tensors(content, SCAFFOLD, controls.server)
        return content, size

    def _receive(self, ask: Ask, client: str, reply: Reply) -> bool:
        """Put an update into the open round, or note why it cannot be used; whether it can be."""
        stage, start = ask.stage, self._common_start(ask.run).state
        try:
            factors = travelling(stage, self.method.keeps)
            update, dropped = received(client, reply, factors, start)
            check_rank(update.state, start, stage.untrained)
            check(update, self.shapes)
            own = sent_fingerprint(reply.content, update, factors)
            self._check_new(ask, update, own, start, factors)
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
        self._prints[client] = own
        facts = ask.run.record.clients[client]
        facts["num_examples"] = update.num_examples
        self._note(ask.run, client, "facts", dropped)
        if before := self._scores(ask.run, client, reply, "before"):
            facts["metrics"]["before"] = before
        return True

    def _check_new(self, ask: Ask, update: ClientUpdate, own: str, start: AdapterState, factors: Sequence[str]) -> None:
        """UpdateError for what the same client has sent before, unless it is what it was sent: nothing was learned.

        own: the fingerprint of what it sent.
        """
        earlier = [e["round"] for e in ask.run.record.rounds if e.get("fingerprints", {}).get(update.client_id) == own]
        if earlier and fingerprint(update.state, factors) != fingerprint(start, factors):
            raise UpdateError(
                f"the update is the one of round {earlier[-1]} again, to the bit; a client must train in every round"
            )

    def _seen(self, ask: Ask) -> dict[str, str]:
        """{client: fingerprint of the update it sent} of the open round, for `_check_new` in later ones."""
        factors = travelling(ask.stage, self.method.keeps)
        came = {client: self.store.finished(ask.number, client) for client in ask.cohort}
        found = {client: fingerprint(update.state, factors) for client, update in came.items() if update is not None}
        return {client: self._prints.get(client, own) for client, own in found.items()}

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

    def _kept_by_clients(self) -> dict[str, tuple[str, str]]:
        """{what clients keep on their nodes, as the record names it: (the flag that tells its loss, the loss told)}."""
        own = ("fresh", "what it kept for itself and began anew")
        rounding = ("fresh_residual", "what rounding its last update left over: nothing is added to this one")
        lossy = self.settings.wire_dtype in LOSSY and carries(self.method)
        return ({"forgot": own} if self.method.keeps else {}) | ({"forgot_residual": rounding} if lossy else {})

    def _forgotten(self, ask: Ask, client: str, reply: Reply) -> list[str]:
        """What a client that took part before has lost of what it keeps on its node."""
        said = config(reply) if client in last_rounds(ask.run.record) else {}
        lost = {what: told for what, (flag, told) in self._kept_by_clients().items() if said.get(flag) is True}
        for told in lost.values():
            logger.warning("round %d: client %s has lost %s", ask.number, client, told)
        return list(lost)

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

    def judge(self, ask: Ask) -> Functional | None:
        """By as many clients as functional_judges says, who are sent the others' updates; None where it names no
        number: whether others may see a client's update is not to be decided by what costs little."""
        if not isinstance(self.args.functional_judges, int):
            return None
        found, said = judged_by_clients(self._talk, self.federation, ask, self._online)
        for judge, reason in said.dropped.items():
            self._note(ask.run, judge, "judging", reason)
        return found

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
        parcel = Parcel.of(run.state)

        def order(client: str) -> RecordDict:
            content = RecordDict({"config": ConfigRecord({"personal": client in members})})
            self.downlink.put(content, "global", parcel, client)
            if client in members and (own := self.federation.own(run.record, client)) is not None:
                put(content, "own", own)
            if client in members and client in refined:
                put(content, "refined", refined[client])
            return content

        return self._talk(clients, MessageType.EVALUATE, order)
