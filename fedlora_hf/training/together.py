"""A round's part of several clients at once: what `ClientTrainer.train_round` does of one, in lockstep."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedlora_hf.adapter.slot import set_frozen
from fedlora_hf.training.client_trainer import learning_rate, update_of
from fedlora_hf.training.control import Controls
from fedlora_hf.training.lockstep import Lockstep, Outcome, Task
from fedlora_hf.training.stages import round_stage
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer

Told = Callable[[str, ClientUpdate | Exception, bytes], None]


class Entry(NamedTuple):
    """What a client enters a round with; see `ClientTrainer.train_round`."""

    client_id: str
    start: AdapterState
    frozen: AdapterState | None
    controls: Controls | None = None
    moments: bytes = b""


def train_round_together(trainer: "ClientTrainer", entries: Sequence[Entry], number: int, told: Told) -> None:
    """The parts of several clients in round `number`, side by side.

    told: called with a client, its update or the exception that ended it alone, and the state of its optimizer (b""
    where that is not kept), as soon as it is known. Raises PassError and StoppedError: see `Lockstep`.
    """
    args, stage = trainer.args, round_stage(trainer.args, trainer.method.trained(number), number)
    seeds = [derive_seed(args.seed, "client", number, entry.client_id) for entry in entries]
    set_frozen(trainer.model, entries[0].frozen)  # made of the round's start alone, so it is everybody's

    def done(place: int, found: Outcome | Exception) -> None:
        entry = entries[place]
        if not isinstance(found, Outcome):
            told(entry.client_id, found, b"")
            return
        data = trainer.clients[entry.client_id]
        update = update_of(entry.client_id, data, entry.start, stage, found.state, found.result)
        sent: ClientUpdate | Exception
        try:
            sent = trainer.leaving(update, entry.start, stage, seeds[place])
        except Exception as error:  # as if its training had failed
            sent = error
        told(entry.client_id, sent, found.moments)

    tasks = [_task(trainer, entry, number) for entry in entries]
    with learning_rate(args, stage.learning_rate):
        Lockstep(trainer, tasks, stage.parts, seeds[0], done, trainer.pull(stage)).run()


def _task(trainer: "ClientTrainer", entry: Entry, number: int) -> Task:
    data = trainer.clients[entry.client_id]
    batches = trainer.batches_of(data, trainer.order_seed("client", number, entry.client_id))
    steps = trainer.num_local_steps(data)
    return Task(entry.client_id, entry.start, batches, steps, entry.controls, entry.moments)
