"""A run on Flower, seen from the server: the loop of rounds of `fedlora train`, with nodes for clients."""
# SPDX-License-Identifier: Apache-2.0

import logging
from dataclasses import replace
from typing import Any

from flwr.serverapp import Grid

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.adapter.slot import AdapterSlot, peft_config, slot_rank, with_adapter, write_initial
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.flower.settings import Settings
from fedlora_hf.flower.transport import FlowerTransport
from fedlora_hf.flower.weightless import weightless_base
from fedlora_hf.hub.publishing import Publisher
from fedlora_hf.methods import method_named
from fedlora_hf.record.lines import claims_line, round_line
from fedlora_hf.rounds.federation import Federation, Run
from fedlora_hf.rounds.loop import RoundLoop
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.rounds.watching import scored_after
from fedlora_hf.update import AdapterState
from fedlora_hf.util.progress import Progress

logger = logging.getLogger("flwr")


class FlowerRun:
    """One run; the record says which node spoke for each client."""

    stopped = False  # nothing here ends a run early

    def __init__(self, grid: Grid, args: FederatedConfig, settings: Settings) -> None:
        _check(args)
        self.args, self.settings = args, settings
        slot = AdapterSlot(with_adapter(weightless_base(args), peft_config(args), args.seed))
        rank, head = slot_rank(slot), {}
        if args.initial_adapter is not None:
            given = read_adapter(args.initial_adapter)[0].in_memory()
            write_initial(slot, AdapterState(given, {}), args.initial_adapter)
            head = dict(given.extras)
        # A head comes with the base's weights, which are not here: before the first round only the nodes have it.
        initial = AdapterState(slot.read(), head)
        method, self.store = method_named(args.aggregation), RoundStore(f"{args.output_dir}/rounds", slot.config())
        # What clients keep for themselves is on their nodes: here they start from the global adapter.
        federation = Federation(args, replace(method, keeps=()), self.store, initial, rank)
        transport, progress = FlowerTransport(grid, settings, slot, federation, method), Progress(not args.disable_tqdm)
        self.roster, self.publisher = transport.roster, Publisher(args, progress)
        self.loop = RoundLoop(federation, transport, self, self.publisher, progress)

    def train(self) -> Run:
        """Run the rounds and write `output_dir`."""
        with self.loop.writing():
            run = self.loop.train(self.args.resume_from)
            self.loop.evaluate()
            self.loop.write(str(self.args.output_dir))
        if self.args.push_to_hub:
            self.publisher.push("End of training")
        return run

    # ---- what the loop tells -----------------------------------------------------------------------------------------

    def ready(self, run: Run) -> None:
        """Wait for the nodes; those that were clients before are so again."""
        known = {client: str(facts.get("node")) for client, facts in run.record.clients.items()}
        self.roster.remember({client: int(node) for client, node in known.items() if node.isdecimal()})
        self.roster.wait(self.settings.min_nodes, self.settings.wait_seconds)

    def round_begins(self, number: int) -> None:
        """Nobody here waits for it."""

    def wants_scores(self, number: int) -> bool:
        return scored_after(self.args, number)

    def best_round(self) -> int | None:
        return None

    def round_ended(self, entry: dict[str, Any]) -> None:
        logger.info("%s", round_line(entry, self.loop.num_rounds))
        if warning := claims_line(self.loop.run.record.rounds):
            logger.warning("%s", warning)


def _check(args: FederatedConfig) -> None:
    if not args.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: the server needs the base model's config; set it in the app")
    if args.task != "causal_lm" and args.labels is None:
        raise ConfigError(f"task={args.task!r} without labels: the server has no data; pass labels='first,second,...'")
    for name in ("keep_optimizer", "load_best_model_at_end"):
        if getattr(args, name):
            raise ConfigError(f"{name} is set: not there on Flower, whose clients are elsewhere; leave it out")
    if args.functional_judges not in (0, "auto"):
        raise ConfigError(f"functional_judges={args.functional_judges}: clients' data are not here; leave it out")
    if args.clusters != "1":
        raise ConfigError(f"clusters={args.clusters}: a Flower run has one global adapter for all; leave it out")
    if (args.resume_from or "").startswith("hub:"):
        raise ConfigError(f"resume_from={args.resume_from!r}: a Flower run resumes from its output folder; use 'last'")
