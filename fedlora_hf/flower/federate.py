"""A run on Flower, seen from the server: rounds of messages out and updates in, then what `fedlora train` leaves.

The rules of the rounds are `Federation`'s. A client's update is looked at when it comes, and written into the round's
folder at once: a server that is started again with resume_from=last asks only those who had not answered.
"""
# SPDX-License-Identifier: Apache-2.0

import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora_hf.adapter import slot as adapters
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.aggregation import method_named
from fedlora_hf.aggregation.screening import Shapes, examine, expected_shapes, mismatch
from fedlora_hf.commands.train import load_base, load_server_data
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError, FedLoraError, UpdateError, one_line
from fedlora_hf.flower.exchange import Reply, exchange
from fedlora_hf.flower.hollow import hollow_base
from fedlora_hf.flower.roster import Roster, addressed
from fedlora_hf.flower.settings import Settings
from fedlora_hf.flower.share import check_rank, travelling
from fedlora_hf.flower.wire import holds, put, take, tensor_bytes
from fedlora_hf.hub.publishing import Publisher
from fedlora_hf.record import write as bookkeeping
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds import output
from fedlora_hf.rounds.federation import SERVER, Federation, Run, check_cohort
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.training.stages import FACTORS, personal_stage, total_rounds
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.progress import Steps
from fedlora_hf.util.seeding import derive_seed

logger = logging.getLogger("flwr")
MAX_METRICS = 32  # of one kind, in one reply


class FlowerRun:
    """One run. `run` is where it stands; the record says which node spoke for each client."""

    def __init__(self, grid: Grid, args: FederatedConfig, settings: Settings) -> None:
        _check(args)
        self.grid, self.args, self.settings = grid, args, settings
        model = adapters.with_adapter(hollow_base(args), adapters.peft_config(args), args.seed)
        self.slot = adapters.AdapterSlot(model)
        rank, head = adapters.slot_rank(self.slot), {}
        if args.initial_adapter is not None:
            given = read_adapter(args.initial_adapter)[0].in_memory()
            adapters.write_initial(self.slot, AdapterState(given, {}), args.initial_adapter)
            head = dict(given.extras)
        self.shapes = expected_shapes([], self.slot.read(), "quarantine")
        # A head comes with the base's weights, which are not here: before the first round only the nodes have it.
        self.initial = AdapterState(self.slot.read(), head)
        self.method = method_named(args.aggregation)
        self.store = RoundStore(f"{args.output_dir}/rounds", self.slot.config())
        # What clients keep for themselves is on their nodes: here they start from the global adapter.
        self.federation = Federation(args, replace(self.method, keeps=()), self.store, self.initial, rank)
        self.steps = Steps(enabled=not args.disable_tqdm)
        self.forgot: list[str] = []  # clients of the round under way that have lost what they keep for themselves
        self.roster, self.publisher = Roster(grid), Publisher(args, self.steps)
        self.run = Run(0, self.initial, self._opening())

    # ---- the run -----------------------------------------------------------------------------------------------------

    def train(self) -> Run:
        """Run the rounds and write `output_dir`."""
        self._begin()
        self.roster.wait(self.settings.min_nodes, self.settings.wait_seconds)
        while self.run.round < total_rounds(self.args):
            number = self.run.round + 1
            (self._server_round if self.federation.stage(number).on_server else self._round)(number)
        self._finish()
        return self.run

    def _begin(self) -> None:
        resume = self.args.resume_from
        number, damage = (None, None) if resume is None else self.store.resumed(resume)
        if damage is not None:
            self.steps.say(f"going on from round {number}, the last that is whole: {damage}")
        if number is None:
            output.check_overwrite(self.args.output_dir, self.store)
            self.store.clear()
        else:
            self.store.forget_after(number)
        if number:
            earlier, now = self.store.record(number), self.run.record
            now.clients = earlier.clients  # who they are is not known before they answer
            bookkeeping.check_same_run(earlier, now)
            self.run = Run(number, self.store.state(number), earlier)

    def _opening(self) -> RunRecord:
        """The record of a run that is about to begin; clients enter it as they answer."""
        args = self.args
        facts = {
            "model": {"name_or_path": args.model_name_or_path, "task": args.task, "license": args.hub_license},
            "data": {"dataset": args.dataset, "partition_by": "node", "language": args.hub_language},
        }
        record = bookkeeping.opening(args, self.method, facts, {}, adapters.slot_facts(self.slot, args.adapter))
        record.versions["flwr"] = importlib.metadata.version("flwr")
        return record

    def _enter(self, clients: Sequence[str]) -> None:
        """See that the record knows these clients, and their nodes."""
        for client in clients:
            known = self.run.record.clients.setdefault(client, bookkeeping.newcomer(None))
            known["node"] = str(self.roster.nodes.get(client, known.get("node")))
        self.run.record.data["refused_nodes"] = {str(node): why for node, why in self.roster.refused.items()}

    # ---- a round -----------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        """Ask the cohort for updates, and close the round with those that can be used."""
        began, seconds = time.perf_counter(), self.settings.round_seconds
        online = self.roster.online()
        self._enter(online)
        answered = [client for client in self.run.record.clients if self.store.finished(number, client) is not None]
        cohort = self.federation.cohort(number, {*online, *answered})
        check_cohort(self.args, self.method, len(cohort))
        asked = [client for client in cohort if client not in answered]
        clients = {self.roster.nodes[client]: client for client in asked}
        sent: dict[str, int] = dict.fromkeys(cohort, 0)
        came = dict(sent)
        self.forgot.clear()

        def order(client: str) -> RecordDict:
            content, sent[client] = self._order(number, client)
            return content

        messages = addressed(self.roster.nodes, asked, MessageType.TRAIN, order, seconds)
        for reply in exchange(self.grid, messages, seconds):
            came[clients[reply.node]] = self._receive(number, clients[reply.node], reply)
        nodes = {client: self.run.record.clients[client]["node"] for client in cohort}
        facts = {"nodes": nodes, "bytes_up": came, "bytes_down": sent}
        facts |= self.federation.stage_facts(number, cohort, self.slot.message_bytes)
        self.federation.close(
            self.run,
            number,
            cohort,
            seconds=time.perf_counter() - began,
            facts=facts | ({"forgot": sorted(self.forgot)} if self.method.keeps else {}),
        )
        self.run = Run(number, self.store.state(number), self.store.record(number))
        self._after(number, online)

    def _server_round(self, number: int) -> None:
        """A round of the global stage on the server's own data, with the base model; no message is sent."""
        began, run, trainer = time.perf_counter(), self.run, self._trainer
        online = self.roster.online()
        self._enter(online)
        trainer.slot.write(run.state)
        seed, steps = derive_seed(self.args.seed, SERVER, number), trainer.num_steps(SERVER)
        stage, data = self.federation.stage(number), trainer.clients[SERVER]
        update = trainer.trained(SERVER, data, run.state, stage, steps, seed)
        facts = {"nodes": {}, "bytes_down": {}, **self.federation.stage_facts(number, [], self.slot.message_bytes)}
        self.federation.close_on_server(run, number, update, seconds=time.perf_counter() - began, facts=facts)
        self.run = Run(number, self.store.state(number), self.store.record(number))
        self._after(number, online)

    @cached_property
    def _trainer(self) -> ClientTrainer:
        """The base model and the server's own data; loaded when a global round first needs them."""
        labels = self.args.labels if self.args.task == "sequence_classification" else None
        base, tokenizer = load_base(self.args, labels)
        data = load_server_data(self.args, labels)
        return ClientTrainer(base, self.args, {SERVER: data}, processing_class=tokenizer)

    def _order(self, number: int, client: str) -> tuple[RecordDict, int]:
        """What a client is sent to train a round, and the bytes of its tensors."""
        start = self.federation.start(self.run, client)
        content = RecordDict({"config": ConfigRecord({"round": number, "score": number == 1})})
        size = put(content, "start", start.state)
        return content, size + (put(content, "carry", start.carry) if start.carry is not None else 0)

    def _receive(self, number: int, client: str, reply: Reply) -> int:
        """Put an update into the open round, or note why it cannot be used; the bytes of its tensors."""
        stage, start = self.federation.stage(number), self.federation.start(self.run, client).state
        size = 0 if reply.content is None else tensor_bytes(reply.content, "update")
        try:
            update, before = received(client, reply, travelling(stage, self.method.keeps), start)
            check_rank(update.state, start, stage.untrained)
            check(update, self.shapes)
            self.store.save(number, update)
        except (FedLoraError, ValueError, OverflowError) as error:
            reason = one_line(error, 300)
            self.store.fail(number, client, reason)
            logger.warning("round %d: client %s, node %d: %s", number, client, reply.node, reason)
            return size
        facts = self.run.record.clients[client]
        facts["num_examples"] = update.num_examples
        if before:
            facts["metrics"]["before"] = before
        took_part = client in bookkeeping.last_rounds(self.run.record)
        if self.method.keeps and took_part and config(reply).get("fresh"):
            logger.warning("round %d: client %s has lost what it kept for itself and began anew", number, client)
            self.forgot.append(client)
        return size

    def _after(self, number: int, online: Sequence[str]) -> None:
        """What follows a committed round: its metrics, a line in the log, a push."""
        entry, record = self.run.record.rounds[-1], self.run.record
        if self.args.evaluate_rounds:
            found = {client: metrics(reply, "global") for client, reply in self._ask(online, ())}
            entry["metrics"] = {"global": bookkeeping.mean_over_collaborative(record, found)}
            self.store.amend(number, record)
        logger.info("%s", bookkeeping.round_line(entry, total_rounds(self.args)))
        if self.publisher.pushes_rounds:
            output.write_run(self.args.output_dir, self.run.state, self.store.config, record, report=False)
            self.publisher.round(number)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Let every client score the global adapter and the collaborative ones choose their own; write everything."""
        run, folders = self.run, output.ClientFolders(self.args.output_dir, self.store.config)
        online, members = self.roster.online(), bookkeeping.collaborative(run.record)
        self._enter([client for client in online if client in run.record.clients])
        folders.begin()
        scores: dict[str, dict[str, dict[str, float]]] = {"global": {}, "personalised": {}}
        for client, reply in self._ask([c for c in online if c in run.record.clients], members):
            for kind, per_client in scores.items():
                per_client[client] = metrics(reply, kind)
            if client in members:
                run.record.clients[client]["personal"] = self._personal(client, reply, folders)
        folders.publish()
        first = {client: facts["metrics"].get("before", {}) for client, facts in run.record.clients.items()}
        bookkeeping.add_metrics(run.record, "global", {c: m for c, m in first.items() if m}, "before")
        for kind, per_client in scores.items():
            bookkeeping.add_metrics(run.record, kind, {c: m for c, m in per_client.items() if m})
        run.personalised = folders.read(members)
        output.write_run(self.args.output_dir, run.state, self.store.config, run.record)
        if self.args.push_to_hub:
            self.publisher.push("End of training", token=None, revision=None, with_clients=False)

    def _personal(self, client: str, reply: Reply, folders: output.ClientFolders) -> dict[str, object]:
        """Write the personal adapter that a client sent; what the record says of it."""
        if reply.content is None:
            return {"failed": f"node {reply.node}: {reply.failure}"}
        said = config(reply)
        choice = one_line(said.get("choice", "none"), 80)
        facts: dict[str, object] = {"choice": choice, "validation_loss": metrics(reply, "losses")}
        if not holds(reply.content, "personal"):
            return {**facts, "kept_by_node": True}
        try:
            factors = tuple(factor for factor in FACTORS if factor in str(said.get("factors", "AB")))
            state = take(reply.content, "personal", factors, None if factors == FACTORS else self.run.state)
            check(ClientUpdate(client, state), self.shapes)
            folders.write(client, state)
        except (FedLoraError, ValueError, OverflowError) as error:
            return {"failed": one_line(error, 300)}
        part_bytes = self.slot.message_bytes(personal_stage(self.args).parts)
        return facts | self.federation.personal_facts(self.run, choice, state, part_bytes)

    def _ask(self, clients: Sequence[str], members: Sequence[str]) -> Iterator[tuple[str, Reply]]:
        """Send the global adapter to score, to the members also what they may choose from; the replies, sorted."""
        run, seconds = self.run, self.settings.round_seconds
        cohort = run.record.rounds[-1]["cohort"] if members and run.round else []
        trained = self.federation.has_updates(run.round, cohort)
        refined = self.federation.combined(run.record, run.round, cohort).personalised if trained else {}

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


def received(
    client: str, reply: Reply, factors: Sequence[str], start: AdapterState
) -> tuple[ClientUpdate, dict[str, float]]:
    """(a client's update, the metrics of its start) in a reply; UpdateError, one line, for one that cannot be used.

    factors: those that the client sends; the others are those of `start`, where it began.
    """
    if reply.content is None:
        raise UpdateError(f"node {reply.node}: {reply.failure}")
    facts = metrics(reply, "facts")
    examples = facts.pop("num_examples", 0)
    state = take(reply.content, "update", factors, None if set(factors) == set(FACTORS) else start)
    return ClientUpdate(client, state, int(examples), facts), metrics(reply, "before")


def check(update: ClientUpdate, shapes: Shapes) -> None:
    """Raise UpdateError for an update that cannot be used, or is not of these shapes."""
    found = examine(update)
    if reason := found if isinstance(found, str) else mismatch(found, shapes, "quarantine"):
        raise UpdateError(reason)


def config(reply: Reply) -> Mapping[str, object]:
    """What a reply says in words and flags; {} where it says nothing."""
    found = reply.content.get("config") if reply.content is not None else None
    return found if isinstance(found, ConfigRecord) else {}


def metrics(reply: Reply, name: str) -> dict[str, float]:
    """The plain numbers of that name in a reply; {} where there are none."""
    found = reply.content.get(name) if reply.content is not None else None
    if not isinstance(found, MetricRecord):
        return {}
    plain = {one_line(key, 80): value for key, value in found.items() if isinstance(value, int | float)}
    return dict(list(plain.items())[:MAX_METRICS])


def _check(args: FederatedConfig) -> None:
    if not args.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: the server needs the base model's config; set it in the app")
    if args.task != "causal_lm" and args.labels is None:
        raise ConfigError(f"task={args.task!r} without labels: the server has no data; pass labels='first,second,...'")
    if args.functional_judges:
        raise ConfigError(f"functional_judges={args.functional_judges}: clients' data are not here; leave it out")
    if (args.resume_from or "").startswith("hub:"):
        raise ConfigError(f"resume_from={args.resume_from!r}: a Flower run resumes from its output folder; use 'last'")
