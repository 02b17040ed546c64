"""Any method of ours as a Flower Strategy, for a ServerApp and ClientApps that know nothing of this package.

Clients send what PEFT's get_peft_model_state_dict gives, as with Flower's FedAvg; nothing else is asked of them.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.errors import ConfigError, FedLoraError, RoundError, UpdateError, one_line
from fedlora_hf.flower.peft_arrays import Scaling, read_arrays, write_arrays
from fedlora_hf.flower.replies import fingerprint
from fedlora_hf.methods import method_named
from fedlora_hf.methods.settings import method_options
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.record import claims
from fedlora_hf.training.stages import FACTORS
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate

logger = logging.getLogger("flwr")
_PREFIX = "node-"


@dataclass(frozen=True)
class Verdict:
    """What a round said of the nodes that answered in it.

    flagged: their updates could be used, but were judged contaminated. quarantined: {node: why its update could not be
    used}. weights: {node: weight in the global adapter}. evidence: {node: {kind: Evidence}} that the flags rest on.
    """

    round: int
    flagged: tuple[int, ...] = ()
    quarantined: Mapping[int, str] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    evidence: Mapping[int, Mapping[str, Evidence]] = field(default_factory=dict)
    diagnosis: Mapping[str, Any] = field(default_factory=dict)


class MethodStrategy(FedAvg):
    """FedAvg's rounds with one of our methods for the mean. `verdicts`: one a round.

    method: a name in `fedlora_hf.methods.METHODS`, but for those whose clients keep or restart something, which needs
    this package's ClientApp (ConfigError). lora_alpha, use_rslora: of the clients' LoraConfig: the scale of an adapter
    does not travel with its arrays. method_options: the method's own. weight_by: "examples" or "uniform". Further
    options are FedAvg's. Evidence is kept over the rounds of one `start`, in memory.

    A round with fewer usable updates than the method needs changes nothing, and says so in the log.
    """

    def __init__(
        self,
        method: str,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        method_options: Mapping[str, Any] | None = None,
        weight_by: str = "examples",
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.method, self.scaling, self.weight_by = _fit(method), Scaling(lora_alpha, use_rslora), weight_by
        self.method_options = dict(method_options or {})
        _checked(self, lora_alpha)
        self.verdicts: list[Verdict] = []
        self._past: list[PastRound] = []
        self._seen: dict[str, set[str]] = {}  # fingerprints of what each node sent
        self._sent: ArrayRecord | None = None
        self._personal: Mapping[str, AdapterState] = {}

    def personal(self, node: int) -> ArrayRecord | None:
        """The adapter that the method refined for a node in the last round, None where it has none."""
        client = f"{_PREFIX}{node}"
        if self._sent is None or client not in self._personal:
            return None
        return write_arrays(self._personal[client], self._sent, read_arrays(self._sent, self.scaling))

    def summary(self) -> None:
        """Log what the strategy does."""
        logger.info("\t├──> Aggregation: %s (%s)", self.method.title, self.method.name)
        super().summary()

    # ---- training ----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's; what is sent is what updates are compared with."""
        if server_round == 1:
            self.verdicts, self._past, self._seen, self._personal = [], [], {}, {}
        if not len(read_arrays(arrays, self.scaling)):
            raise ConfigError(
                "initial_arrays: hold no lora_A.weight; pass ArrayRecord(get_peft_model_state_dict(model))"
            )
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The method's aggregate, the mean metrics of the collaborative nodes; (None, None) for too few updates."""
        if self._sent is None:
            raise ConfigError("aggregate_train before configure_train: nothing was sent yet; call start")
        start = read_arrays(self._sent, self.scaling)
        updates, metrics, refused = self._updates(replies, start)
        try:
            if len(updates) < self.method.least_clients:
                raise RoundError(f"{len(updates)} usable updates: {self.method.name} needs {self.method.least_clients}")
            found = self._aggregate(updates, start)
        except FedLoraError as error:
            logger.warning("round %d: nothing is changed: %s", server_round, error)
            self._judged(server_round, None, refused)
            return None, None
        self._judged(server_round, found, refused)
        left_out = {*found.flagged, *found.quarantined}
        kept = [said for client, said in metrics.items() if client not in left_out]
        return write_arrays(found.state, self._sent, start), self._mean(kept, self.train_metrics_aggr_fn)

    def _updates(
        self, replies: Iterable[Message], start: AdapterState
    ) -> tuple[list[ClientUpdate], dict[str, MetricRecord], dict[str, str]]:
        """(updates that can be read, {client: its metrics}, {client: why its reply cannot be used})."""
        updates, metrics, refused = {}, {}, {}
        for message in self._check_and_log_replies(list(replies), is_train=True, validate=False)[0]:
            client = f"{_PREFIX}{message.metadata.src_node_id}"
            if client in updates or client in refused:
                logger.warning("%s: answered twice; its first answer counts", client)
                continue
            try:
                updates[client], metrics[client] = self._update(client, message.content, start)
            except (FedLoraError, ValueError, TypeError, RuntimeError, OverflowError) as error:
                refused[client] = one_line(error, 300)
        return list(updates.values()), metrics, refused

    def _update(self, client: str, content: RecordDict, start: AdapterState) -> tuple[ClientUpdate, MetricRecord]:
        """A node's update and its metrics; UpdateError for a reply without either, or with an update it sent before."""
        arrays = content.get(self.arrayrecord_key, next(iter(content.array_records.values()), None))
        if not isinstance(arrays, ArrayRecord):
            raise UpdateError(f"no ArrayRecord {self.arrayrecord_key!r} in the reply; send the adapter under that key")
        metrics = next(iter(content.metric_records.values()), MetricRecord())
        told = self.weight_by == "examples" or self.weighted_by_key in metrics
        examples = claims.count(metrics.get(self.weighted_by_key)) if told else None
        state = read_arrays(arrays, self.scaling)
        own, seen = fingerprint(state, FACTORS), self._seen.setdefault(client, set())
        if own in seen and own != fingerprint(start, FACTORS):
            raise UpdateError("the update is one of an earlier round again, to the bit; a client must train every time")
        seen.add(own)
        return ClientUpdate(client, state, examples), metrics

    def _aggregate(self, updates: list[ClientUpdate], start: AdapterState) -> Aggregate:
        found = aggregate(
            updates,
            self.method.name,
            weight_by=self.weight_by,
            target_rank=max(factors.rank for factors in start.values()),
            reference=start,
            past=self._past,
            **self.method_options,
        )
        if len(updates) - len(found.quarantined) < self.method.least_clients:
            usable = len(updates) - len(found.quarantined)
            raise RoundError(f"{usable} usable updates: {self.method.name} needs {self.method.least_clients}")
        return found

    def _judged(self, number: int, found: Aggregate | None, refused: Mapping[str, str]) -> None:
        """Keep a round's verdict, and its evidence for the next."""
        verdict = Verdict(number, quarantined=_by_node(refused))
        if found is not None:
            self._past.append(PastRound(found.this_round or found.evidence, frozenset(found.flagged)))
            self._personal = found.personalised
            verdict = replace(
                verdict,
                flagged=tuple(sorted(_by_node(dict.fromkeys(found.flagged)))),
                quarantined=_by_node({**refused, **found.quarantined}),
                weights=_by_node(found.weights),
                evidence=_by_node(found.evidence),
                diagnosis=dict(found.diagnosis),
            )
        self.verdicts.append(verdict)
        if verdict.flagged:
            logger.warning("round %d: flagged: nodes %s", number, ", ".join(map(str, verdict.flagged)))
        for node, reason in verdict.quarantined.items():
            logger.warning("round %d: quarantined: node %d: %s", number, node, reason)

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means of what the nodes say that the last verdict left in."""
        left_out = {*self.verdicts[-1].flagged, *self.verdicts[-1].quarantined} if self.verdicts else set()
        came = self._check_and_log_replies(list(replies), is_train=False, validate=False)[0]
        contents = [message.content for message in came if message.metadata.src_node_id not in left_out]
        said = [next(iter(content.metric_records.values()), MetricRecord()) for content in contents]
        return self._mean(said, self.evaluate_metrics_aggr_fn)

    def _mean(self, said: Iterable[MetricRecord], mean: Any) -> MetricRecord | None:
        """The mean of the numbers that can be true and that most nodes tell, over the nodes that tell them all."""
        rows = [claims.plausible(record, self.weighted_by_key) for record in said]
        names = {name for row in rows for name in row if 2 * sum(name in other for other in rows) > len(rows)}
        kept = [
            RecordDict({"metrics": MetricRecord({name: row[name] for name in sorted(names)})})
            for row in rows
            if names <= set(row)
        ]
        if not kept or self.weighted_by_key not in names:
            return None
        found: MetricRecord = mean(kept, self.weighted_by_key)
        return found


class ClairStrategy(MethodStrategy):
    """CLAIR (arXiv 2605.21217) as a Strategy: contaminated nodes are flagged and left out; see `MethodStrategy`."""

    def __init__(self, *, lora_alpha: float, **options: Any) -> None:
        super().__init__("clair", lora_alpha=lora_alpha, **options)


def _fit(name: str) -> Any:
    """The method of that name; ConfigError for one that stock ClientApps cannot follow."""
    method = method_named(name)
    if method.keeps or method.restarts:
        what = "keep a factor for themselves" if method.keeps else "restart every round on a frozen aggregate"
        raise ConfigError(f"method={name!r}: its clients {what}; use fedlora_hf.flower.client_app, or another method")
    return method


def _checked(strategy: MethodStrategy, lora_alpha: object) -> None:
    """ConfigError for options that only the first aggregation would complain of."""
    number = isinstance(lora_alpha, int | float) and not isinstance(lora_alpha, bool)
    if not number or not 0 < lora_alpha < 1e6:  # type: ignore[operator]
        raise ConfigError(f"lora_alpha={lora_alpha!r}: must be a number above 0; pass that of the clients' LoraConfig")
    if strategy.weight_by not in ("examples", "uniform"):
        raise ConfigError(f"weight_by={strategy.weight_by!r}: must be 'examples' or 'uniform'; choose one of these")
    method_options(strategy.method, **strategy.method_options)


def _by_node(found: Mapping[str, Any]) -> dict[int, Any]:
    """{node id: what is said of it}, ascending."""
    return dict(sorted((int(client.removeprefix(_PREFIX)), value) for client, value in found.items()))
