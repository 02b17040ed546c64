"""Several clients at once: what `ClientTrainer.train_round` and `personal_adapter` do of one, in lockstep."""
# SPDX-License-Identifier: Apache-2.0

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedlora_hf.adapter.slot import set_frozen, slot_ranks
from fedlora_hf.training.client_trainer import learning_rate, update_of
from fedlora_hf.training.control import Controls
from fedlora_hf.training.local import free_memory
from fedlora_hf.training.lockstep import Lockstep, Outcome, PassError, Task
from fedlora_hf.training.personal import Personal, with_tuned
from fedlora_hf.training.stages import personal_stage, round_stage
from fedlora_hf.update import AdapterState, ClientUpdate, fitted
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer

logger = logging.getLogger(__name__)
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


class Offered(NamedTuple):
    """What a client may choose its personal adapter from; see `ClientTrainer.personal_adapter`."""

    global_state: AdapterState
    own: AdapterState | None
    refined: AdapterState | None


def personal_together(trainer: "ClientTrainer", offered: Mapping[str, Offered]) -> dict[str, Personal | Exception]:
    """Each client's personal adapter, or what it failed with; their further local steps are taken side by side."""
    found: dict[str, Personal | Exception] = {}
    chosen: dict[str, tuple[Personal, Personal]] = {}
    for client, offer in offered.items():
        try:
            chosen[client] = trainer.chosen(client, *offer)
        except Exception as error:  # its own failure: the others have one
            found[client] = error
    tuned = _tuned_together(trainer, {client: base.state for client, (_, base) in chosen.items()})
    for client, pair in chosen.items():
        state = tuned[client]
        if isinstance(state, Exception):
            found[client] = state
            continue
        try:
            found[client] = with_tuned(*pair, lambda _, state=state: state, trainer.validation_loss(client))  # type: ignore[misc]
        except Exception as error:
            found[client] = error
    return found


def _tuned_together(
    trainer: "ClientTrainer", states: Mapping[str, AdapterState]
) -> dict[str, AdapterState | Exception]:
    """What `ClientTrainer.tuned` makes of each client's state; one by one where it fails as a whole."""
    args, stage, clients = trainer.args, personal_stage(trainer.args), list(states)
    found: dict[str, AdapterState | Exception] = {}
    tasks = []
    for client in clients:
        batches = trainer.batches_of(trainer.clients[client], trainer.order_seed("personal", client))
        start = fitted(states[client], slot_ranks(trainer.slot))
        tasks.append(Task(client, start, batches, args.personal_steps or 0))

    def done(place: int, outcome: Outcome | Exception) -> None:
        client = clients[place]
        if isinstance(outcome, Outcome):
            data, start = trainer.clients[client], tasks[place].start
            found[client] = update_of(client, data, start, stage, outcome.state, outcome.result).state
        else:
            found[client] = outcome

    set_frozen(trainer.model, None)
    seed = derive_seed(args.seed, "personal", *clients)
    try:
        with learning_rate(args, stage.learning_rate):
            Lockstep(trainer, tasks, stage.parts, seed, done, trainer.pull(stage)).run()
        return found
    except PassError as error:
        reason = str(error)
    free_memory()
    logger.warning("clients_at_once: a pass over %s clients failed (%s); one by one now", len(clients), reason)
    for client in clients:
        if client not in found:
            try:
                found[client] = trainer.tuned(client, states[client])
            except Exception as error:
                found[client] = error
    return found
