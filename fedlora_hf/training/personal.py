"""A client's personal adapter: the best on its own validation split among what the federation can offer it."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterable, Iterator

from fedlora_hf.update import AdapterState, LoraFactors

# Shares of the client's own update in the mixes that are tried [our choice: three points between global and own].
MIXES = (0.25, 0.5, 0.75)


def candidates(
    global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None, rank: int
) -> Iterator[tuple[str, AdapterState]]:
    """(name, adapter) of everything a client may choose from, computed one after the other.

    "refined" is the method's (CLAIR), "own" the client's last update, "mix-x" = (1 - x) global + x own, exact up to
    the truncation to `rank`.
    """
    if refined is not None:
        yield "refined", refined
    yield "global", global_state
    if own is not None:
        yield "own", own
        for share in MIXES:
            yield f"mix-{share}", mix(global_state, own, share, rank)


def given(
    global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None
) -> tuple[str, AdapterState]:
    """What a client gets without choosing: the method's refinement, else its own last update, else the global one."""
    if refined is not None:
        return "refined", refined
    return ("global", global_state) if own is None else ("own", own)


def mix(first: AdapterState, second: AdapterState, share: float, rank: int) -> AdapterState:
    """(1 - share) first + share second as an adapter of at most `rank`; extras (a head) are mixed entry by entry."""
    factors = {}
    for module in first:
        both = first[module] * (1 - share) + second[module] * share
        factors[module] = both.truncated(rank, first[module].scale)[0]
    extras = {name: (1 - share) * first.extras[name] + share * second.extras[name] for name in first.extras}
    return AdapterState(factors, extras)


def best(
    offered: Iterator[tuple[str, AdapterState]], loss: Callable[[AdapterState], float]
) -> tuple[str, AdapterState, dict[str, float]]:
    """(name, adapter, {name: loss}) of the smallest validation loss; the first offered wins a tie, NaN never wins."""
    losses: dict[str, float] = {}
    chosen: tuple[str, AdapterState] | None = None
    for name, state in offered:
        losses[name] = loss(state)
        if chosen is None or losses[name] < losses[chosen[0]] or losses[chosen[0]] != losses[chosen[0]]:
            chosen = name, state
    if chosen is None:
        raise ValueError("nothing was offered")
    return *chosen, losses


def with_kept(start: AdapterState, own: AdapterState, keeps: Iterable[str]) -> AdapterState:
    """`start` with the factors ("A", "B") that a client keeps for itself put back."""
    factors = {}
    for module in start:
        mine = own[module].rescaled(start[module].scale)
        factors[module] = LoraFactors(
            mine.A if "A" in keeps else start[module].A, mine.B if "B" in keeps else start[module].B, mine.scale
        )
    return AdapterState(factors, start.extras)
