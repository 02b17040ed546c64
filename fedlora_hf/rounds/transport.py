"""What the loop of rounds asks of whatever reaches the clients: in this process and its like, or over a network."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlora_hf.launch.processes import Processes
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds.federation import Run
from fedlora_hf.rounds.judges import Functional
from fedlora_hf.rounds.output import ClientFolders
from fedlora_hf.training.stages import Stage
from fedlora_hf.update import AdapterState, ClientUpdate

Scores = Mapping[str, Mapping[str, float]]  # {client: {metric: value}}, of clients that have a test split


@dataclass(frozen=True, eq=False)
class Ask:
    """A round to be done: its number and stage, the clients that are asked (sorted), where the run stands before."""

    number: int
    stage: Stage
    cohort: Sequence[str]
    run: Run


@dataclass(frozen=True, eq=False)
class Sent:
    """What a round's messages came to. facts: for the round's entry in the record. message_bytes: what each client
    sends and is sent, where no message was counted. complete: False when the run was stopped before all had trained."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    message_bytes: int | None = None
    complete: bool = True


class Transport(Protocol):
    """The way to the clients. Where several processes run, each calls every method, and `processes` speaks for them."""

    processes: Processes

    def opening(self) -> RunRecord:
        """The record of a run that is about to begin."""

    def present(self, run: Run, number: int) -> Iterable[str]:
        """The clients that can take part in round `number`; the record knows them afterwards."""

    def train(self, ask: Ask) -> Sent:
        """Have the cohort train; afterwards the open round in the store has an update or a failure of each."""

    def train_on_server(self, ask: Ask) -> tuple[ClientUpdate, Mapping[str, Any]]:
        """(the update from the server's own data, facts for the round's entry in the record)."""

    def judge(self, ask: Ask) -> Functional | None:
        """Evidence from what each update does to other clients' validation losses; None where nobody is asked."""

    def message_bytes(self, parts: Iterable[str]) -> int:
        """Bytes of these parts of the adapter, in float32."""

    def score_start(self, run: Run) -> Scores | None:
        """Metrics of the adapter before the first round; None where clients tell them with their first update."""

    def score(self, run: Run) -> Scores:
        """Metrics of the global adapter on the test splits of the clients that are present."""

    def personalise(
        self, run: Run, members: Sequence[str], refined: Mapping[str, AdapterState], folders: ClientFolders
    ) -> Mapping[str, Mapping[str, Any]]:
        """Have each member choose its personal adapter, and write it; {member: what the record says of it}.

        refined: what the method made for them.
        """

    def final_scores(self, run: Run) -> Mapping[str, Scores]:
        """{"global", "personalised": metrics} after the personal adapters were chosen."""

    def scorings(self) -> Mapping[str, int]:
        """{"taken", "reused"}: how often an adapter was scored on a split, and how often that was known already, since
        the run was last started; {} where that happens elsewhere."""


class Watcher(Protocol):
    """Who is told how the run goes, and may end it after a round."""

    @property
    def stopped(self) -> bool: ...

    def ready(self, run: Run) -> None:
        """The run stands at its start, or after the round it is resumed from."""

    def round_begins(self, number: int) -> None: ...

    def wants_scores(self, number: int) -> bool:
        """Whether the global adapter is to be scored after this round."""

    def best_round(self) -> int | None:
        """The round whose adapter is to be the result; None: the last."""

    def round_ended(self, entry: dict[str, Any]) -> None:
        """entry: the round's in the record."""
