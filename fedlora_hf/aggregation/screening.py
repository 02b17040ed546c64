"""Screening: an update is checked before it can enter a mean; one that cannot be used is quarantined, with a reason."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from statistics import median
from typing import Literal, NamedTuple

from fedlora_hf.aggregation.soundness import far_within, unsound, unsound_factors, unsound_shape
from fedlora_hf.errors import UpdateError, one_line
from fedlora_hf.update import AdapterState, ClientUpdate, Outline, sorted_updates
from fedlora_hf.util.names import unfit_reason
from fedlora_hf.util.side_by_side import side_by_side

LONGEST_NAME = 300
# All clients' factors are padded to the largest rank, so one client's costs everybody: a rank above so many times the
# median of the cohort's is no client's to choose, unless it is small as such [our choice].
RANK_FACTOR, SMALL_RANK = 8, 128

# Clients from which several are read at once, and how many: each holds one module while it is looked at.
MANY, READERS = 8, 4

# {module: (out, in), name of a modules_to_save tensor: its shape}
Shapes = Mapping[str, tuple[int, ...]]
PartialModules = Literal["quarantine", "common", "zero", "refuse"]


class Screened(NamedTuple):
    """Usable updates sorted by id, all with the same modules and whole tensors; {client id: reason} of the others; the
    modules' names; the names of what was taken from some usable update because not all have it. All sorted."""

    usable: tuple[ClientUpdate, ...]
    quarantined: dict[str, str]
    modules: tuple[str, ...]
    left_out: tuple[str, ...]


def screen(
    updates: Iterable[ClientUpdate],
    reference: AdapterState | None = None,
    partial_modules: PartialModules = "quarantine",
) -> Screened:
    """Sort the cohort into usable and quarantined. Reads every tensor once, one module of one client at a time, and of
    a client on disk only when its file's header promises the modules and shapes that are wanted.

    Modules and shapes must be the reference's where there is one, else those that most sound clients have (a tie goes
    to the larger set, then to the later in the alphabet). With partial_modules="common" every client needs only the
    modules that all sound clients (and the reference) have, and the rest is left out for all.

    A repeated id is an UpdateError: nobody can say which of the two is the client.
    """
    updates = sorted_updates(updates)
    counts = Counter(str(update.client_id) for update in updates)
    repeated = [client_id for client_id in counts if counts[client_id] > 1]
    if repeated:
        raise UpdateError(f"client id {repeated[0][:40]!r} comes twice: ids must differ; rename one of the two")
    quarantined: dict[str, str] = {}
    found: dict[str, Outline] = {}
    looked_at = iter(_all_read([update for update in updates if not update.state.outline], reference))
    for update in updates:
        result = _outlined(update) if update.state.outline else next(looked_at)
        if isinstance(result, str):
            quarantined[str(update.client_id)] = result
        else:
            found[update.client_id] = result
    unread = [update for update in updates if update.state.outline and update.client_id in found]
    while True:  # whoever's values turn out unsound has no vote on what modules and shapes are wanted
        expected = expected_shapes([outline.shapes for outline in found.values()], reference, partial_modules)
        ranks = largest_ranks(list(found.values()), expected, reference)
        misfits = {
            client_id: reason
            for client_id, outline in found.items()
            if (reason := mismatch(outline.shapes, expected, partial_modules) or _too_high(outline, ranks))
        }
        fitting = [update for update in unread if update.client_id not in misfits]
        results = dict(zip((u.client_id for u in fitting), _all_read(fitting, reference), strict=True))
        unread = [update for update in unread if update.client_id in misfits]
        unsound_ones = {client_id: result for client_id, result in results.items() if isinstance(result, str)}
        if not unsound_ones:
            break
        quarantined |= unsound_ones
        found = {client_id: outline for client_id, outline in found.items() if client_id not in unsound_ones}
    quarantined = {client_id: one_line(reason, 400) for client_id, reason in sorted((quarantined | misfits).items())}
    usable = tuple(update for update in updates if str(update.client_id) not in quarantined)
    left_out = set().union(*(found[update.client_id].shapes for update in usable)) - set(expected)
    if left_out:
        usable = tuple(replace(update, state=update.state.restricted(expected)) for update in usable)
    modules = tuple(usable[0].state) if usable else ()
    return Screened(usable, quarantined, modules, tuple(sorted(left_out)))


def examine(update: ClientUpdate, reference: AdapterState | None = None) -> Shapes | str:
    """The shapes of everything in the update, or why it cannot be used, in one line; its values are read."""
    result = _outlined(update) if update.state.outline else None
    if not isinstance(result, str):
        result = _read(update, reference)
    return result if isinstance(result, str) else result.shapes


def _outlined(update: ClientUpdate) -> Outline | str:
    """What the header of a client's file promises, or why the update cannot be used whatever its values are."""
    outline = update.state.outline
    if reason := _unfit(update):
        return reason
    if outline is None or not outline.ranks:
        return "no LoRA modules in the update"
    for module, rank in outline.ranks.items():
        if reason := unsound_shape(outline.shapes[module], rank):
            return f"{module}: {reason}"
    return outline


def _unfit(update: ClientUpdate) -> str | None:
    """What speaks against an update's names and number of examples, or None."""
    if reason := unfit_reason(update.client_id):
        return reason
    count = update.num_examples
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or not 0 < count < 2**53):
        return f"num_examples={count!r}: must be a positive whole number, or None for not known"
    for name in (*update.state, *update.state.extras):
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
            return f"{str(name)[:80]!r} is no name of a module: must be printable, at most {LONGEST_NAME} characters"
    return None


def _all_read(updates: Sequence[ClientUpdate], reference: AdapterState | None) -> list[Outline | str]:
    """What `_read` says of each, several clients at once where there are many."""
    return list(side_by_side(lambda update: _read(update, reference), updates, len(updates) >= MANY, READERS))


def _read(update: ClientUpdate, reference: AdapterState | None) -> Outline | str:
    """Shapes and ranks of everything in the update, every value looked at, or why it cannot be used, in one line."""
    if reason := _unfit(update):
        return reason
    shapes: dict[str, tuple[int, ...]] = {}
    ranks: dict[str, int] = {}
    try:
        # What is on disk is read one module at a time; what is in memory can be looked at in one go.
        values = not (update.state.resident and far_within(update.state, reference))
        for module, factors in update.state.items():
            start = reference[module] if reference is not None and module in reference else None
            if reason := unsound_factors(factors, start, values):
                return f"{module}: {reason}"
            shapes[module], ranks[module] = factors.shape, factors.rank
        for name, tensor in update.state.extras.items():
            if reason := unsound(tensor):
                return f"{name}: {reason}"
            shapes[name] = tuple(tensor.shape)
    except Exception as error:  # whatever reading a client's file raises, it is that client who cannot be used
        return f"cannot be read: {str(error) or type(error).__name__}"
    if not ranks:
        return "no LoRA modules in the update"
    promised = update.state.outline
    if promised is not None and (dict(promised.shapes), dict(promised.ranks)) != (shapes, ranks):
        return "its file has changed while it was read"
    return Outline(shapes, ranks)


def checked_server(server: AdapterState, client: ClientUpdate, modules: Container[str]) -> AdapterState:
    """The server's own update, of the modules that the clients have; UpdateError when it cannot be compared."""
    kept = server.restricted({*(module for module in server if module in modules), *client.state.extras})
    found = examine(ClientUpdate("server", kept))
    expected: dict[str, tuple[int, ...]] = {module: client.state[module].shape for module in client.state}
    expected |= {name: tuple(tensor.shape) for name, tensor in client.state.extras.items()}
    reason = found if isinstance(found, str) else mismatch(found, expected, "quarantine")
    if reason:
        raise UpdateError(f"the server's own update: {one_line(reason, 400)}; train it from the clients' start")
    return kept


def largest_ranks(found: Sequence[Outline], expected: Shapes, reference: AdapterState | None) -> dict[str, float]:
    """{module: the largest rank an update may have}: RANK_FACTOR times the median of those found, and no less than
    SMALL_RANK or the rank that the round began with."""
    limits = {}
    for module in expected:
        ranks = [outline.ranks[module] for outline in found if module in outline.ranks]
        if ranks:
            own = reference[module].rank if reference is not None and module in reference else 0
            limits[module] = max(RANK_FACTOR * median(ranks), SMALL_RANK, own)
    return limits


def _too_high(outline: Outline, limits: Mapping[str, float]) -> str | None:
    """Why an update's ranks are not those of this cohort, or None."""
    for module, limit in limits.items():
        if outline.ranks.get(module, 0) > limit:
            return (
                f"{module}: rank {outline.ranks[module]} is above {limit:g}, {RANK_FACTOR} times the cohort's median "
                f"or {SMALL_RANK}; train a lower rank, or write the adapter with less"
            )
    return None


def expected_shapes(found: Sequence[Shapes], reference: AdapterState | None, partial_modules: PartialModules) -> Shapes:
    """The shapes that an update must have: the reference's, else the clients' majority (see `screen`)."""
    majority: Shapes = {}
    if partial_modules == "common" and found:
        votes = Counter(item for shapes in found for item in shapes.items())
        common = set.intersection(*(set(shapes) for shapes in found))
        majority = {name: max((votes[item], item[1]) for item in votes if item[0] == name)[1] for name in common}
    elif found:
        whole = Counter(tuple(sorted(shapes.items())) for shapes in found)
        majority = dict(max((count, len(shapes), shapes) for shapes, count in whole.items())[2])
    if reference is None:
        return majority
    fixed: dict[str, tuple[int, ...]] = {module: reference[module].shape for module in reference}
    fixed |= {name: tuple(tensor.shape) for name, tensor in reference.extras.items()}
    if partial_modules == "common":
        return {name: shape for name, shape in fixed.items() if name in majority}
    return fixed


def mismatch(found: Shapes, expected: Shapes, partial_modules: PartialModules) -> str | None:
    """Why an update's modules or shapes are not the expected ones, or None."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        return f"wrong modules: {len(missing)} missing, {missing[0]} for one"
    if extra and partial_modules != "common":
        return f"wrong modules: {len(extra)} too many, {extra[0]} for one"
    for name, shape in expected.items():
        if found[name] != shape:
            return f"wrong shape: {name} is {found[name]}, must be {shape}"
    return None
