"""A client's personal adapter: the best on its own validation split among what the federation can offer it."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, LoraFactors

# Shares of the client's own update in the mixes that are tried [our choice: three points between global and own].
MIXES = (0.25, 0.5, 0.75)
_TUNED = ", tuned"


class Source(StrEnum):
    """What a personal adapter is made of. The values are those of run.json."""

    REFINED = "refined"  # the method's own (clair)
    GLOBAL = "global"
    OWN = "own"  # the client's last update
    MIX = "mix"  # (1 - share) global + share own


@dataclass(frozen=True)
class Choice:
    """One personal adapter that a client may have. share: of its own update, in a mix; 0 otherwise. tuned: whether the
    client took further steps from there. As text, in the record and on the wire: "own", "mix-0.25", "global, tuned"."""

    source: Source
    share: float = 0.0
    tuned: bool = False

    def __str__(self) -> str:
        name = f"{self.source}-{self.share}" if self.source is Source.MIX else str(self.source)
        return name + _TUNED * self.tuned

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """The choice that `str` wrote; UpdateError for any other text."""
        offered = [Choice(source) for source in Source if source is not Source.MIX]
        offered += [Choice(Source.MIX, share) for share in MIXES]
        known = {str(choice): choice for one in offered for choice in (one, replace(one, tuned=True))}
        if text not in known:
            raise UpdateError(
                f"personal choice {text[:40]!r}: must be one of {', '.join(map(str, offered))}, or one of these and "
                f"{_TUNED!r}; use this package's client"
            )
        return known[text]

    def bytes_stored(self, part_bytes: int, whole_bytes: int) -> int:
        """Bytes a client has to keep beside the global adapter for this one.

        part_bytes: those of what the personal stage trains; whole_bytes: those of a whole adapter. (The folder on disk
        holds a whole adapter in any case, because stock PEFT loads it.)
        """
        if self.source is Source.GLOBAL:
            return part_bytes if self.tuned else 0
        return whole_bytes


Offer = tuple[Choice, AdapterState]


@dataclass(frozen=True, eq=False)
class Personal:
    """A client's personal adapter, and the validation loss of each that it could have had; {} where none was asked."""

    choice: Choice
    state: AdapterState
    losses: Mapping[Choice, float] = field(default_factory=dict)

    def losses_by_name(self) -> dict[str, float]:
        return {str(choice): loss for choice, loss in self.losses.items()}


def candidates(
    global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None, rank: int
) -> Iterator[Offer]:
    """Everything a client may choose from, computed one after the other; mixes are exact up to the truncation to
    `rank`."""
    if refined is not None:
        yield Choice(Source.REFINED), refined
    yield Choice(Source.GLOBAL), global_state
    if own is not None:
        yield Choice(Source.OWN), own
        for share in MIXES:
            yield Choice(Source.MIX, share), mix(global_state, own, share, rank)


def given(global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None) -> Personal:
    """What a client gets without choosing: the method's refinement, else its own last update, else the global one."""
    if refined is not None:
        return Personal(Choice(Source.REFINED), refined)
    return Personal(Choice(Source.GLOBAL), global_state) if own is None else Personal(Choice(Source.OWN), own)


def mix(first: AdapterState, second: AdapterState, share: float, rank: int) -> AdapterState:
    """(1 - share) first + share second as an adapter of at most `rank`; extras (a head) are mixed entry by entry."""
    factors = {}
    for module in first:
        both = first[module] * (1 - share) + second[module] * share
        factors[module] = both.truncated(rank, first[module].scale)[0]
    extras = {name: (1 - share) * first.extras[name] + share * second.extras[name] for name in first.extras}
    return AdapterState(factors, extras)


def best(offered: Iterable[Offer], loss: Callable[[AdapterState], float]) -> Personal:
    """The one of the smallest validation loss; the first offered wins a tie, NaN never wins."""
    losses: dict[Choice, float] = {}
    chosen: Offer | None = None
    for choice, state in offered:
        losses[choice] = loss(state)
        if chosen is None or losses[choice] < losses[chosen[0]] or losses[chosen[0]] != losses[chosen[0]]:
            chosen = choice, state
    if chosen is None:
        raise ValueError("nothing was offered")
    return Personal(*chosen, losses)


def with_tuned(
    found: Personal, base: Personal, tune: Callable[[AdapterState], AdapterState], loss: Callable[[AdapterState], float]
) -> Personal:
    """`base` after the client's further steps; where losses decide, only if that has a lower loss than `found`."""
    tuned = Personal(replace(base.choice, tuned=True), tune(base.state), found.losses)
    if not found.losses:
        return tuned
    losses = {**found.losses, tuned.choice: loss(tuned.state)}
    return replace(tuned if losses[tuned.choice] < losses[found.choice] else found, losses=losses)


def with_kept(start: AdapterState, own: AdapterState, keeps: Iterable[str]) -> AdapterState:
    """`start` with the factors ("A", "B") that a client keeps for itself put back."""
    factors = {}
    for module in start:
        kept = own[module].rescaled(start[module].scale)
        factors[module] = LoraFactors(
            kept.A if "A" in keeps else start[module].A, kept.B if "B" in keeps else start[module].B, kept.scale
        )
    return AdapterState(factors, start.extras)
