"""Attacks on a round's updates, to rehearse with: what contaminated clients send who know all others and the rules.

All act on the change W_k - W_start in product space, module by module, and send adapters of the client's own rank. An
attack is a pure function of what the attackers know; published ones name their source, the rest are our choice. Each is
as strong as we know how to make it: they are for finding out what a federation would stand.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType

import torch

from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import lowrank
from fedlora_hf.update import AdapterState, LoraFactors
from fedlora_hf.util.seeding import derive_seed

Change = Mapping[str, LoraFactors]
Rule = Callable[[Mapping[str, AdapterState]], AdapterState]

LITTLE = 1.5  # standard deviations off the mean
NOISE = 0.2  # of an update's norm: what makes every copy of it another one
LINE = 0.8  # of the way to an unrelated client, where the line of a flag is at 0.85
LARGE = 4.9  # times the typical norm, where the line of a flag is at 5
MIXED = 0.4  # share of the wrong update in an honest one
BACKDOOR = 2.0  # times the typical norm, of rank 1
AWAKE = 3  # the first round in which sleepers attack
LASTS = 8  # rounds over which a slow drift becomes the wrong update


@dataclass(frozen=True, eq=False)
class Known:
    """What the attackers know.

    honest: {client: adapter} of the others. own: {attacker: adapter} as each would have sent it in good faith.
    wrong: an adapter trained on what they want learned; None: the opposite of what the honest learned.
    start: what all started from; None: nothing. seed: of what they draw. round: counted from 1.
    rule: the server's aggregation, {client: adapter} -> global adapter, for the attack that optimises against it.
    """

    honest: Mapping[str, AdapterState]
    own: Mapping[str, AdapterState]
    wrong: AdapterState | None = None
    start: AdapterState | None = None
    seed: int = 0
    round: int = 1
    rule: Rule | None = field(default=None, repr=False)

    @cached_property
    def others(self) -> list[Change]:
        """The honest clients' changes."""
        return [self.change(state) for _, state in sorted(self.honest.items())]

    @cached_property
    def mean(self) -> Change:
        return combination([(1 / len(self.others), change) for change in self.others])

    @cached_property
    def size(self) -> float:
        """The typical norm of an honest change."""
        return float(torch.tensor([norm(change) for change in self.others], dtype=torch.float64).median())

    @cached_property
    def aim(self) -> Change:
        """The wrong change."""
        return combination([(-1.0, self.mean)]) if self.wrong is None else self.change(self.wrong)

    @cached_property
    def heads(self) -> list[Change]:
        """The honest changes at unit norm, every module first in units of its typical norm, as clair compares them."""
        return [unit(self.scaled(change)) for change in self.others]

    @cached_property
    def agreement(self) -> float:
        """The honest clients' typical mean cosine to the others."""
        others = [sum(inner(a, b) for b in self.heads if b is not a) for a in self.heads]
        return float(torch.tensor(others, dtype=torch.float64).median()) / max(len(self.heads) - 1, 1)

    def scaled(self, change: Change) -> dict[str, LoraFactors]:
        return {name: part * (1 / self.typical[name]) for name, part in change.items()}

    @cached_property
    def typical(self) -> Mapping[str, float]:
        """{module: the typical norm of an honest change}."""
        norms = {name: [change[name].norm() for change in self.others] for name in self.others[0]}
        return {name: max(float(torch.tensor(found).median()), 1e-12) for name, found in norms.items()}

    def score(self, change: Change) -> float:
        """How far a change is from the honest: 0 as their core, 1 unrelated (clair's direction)."""
        head = unit(self.scaled(change))
        return 1 - sum(inner(head, other) for other in self.heads) / len(self.heads) / max(self.agreement, 1e-9)

    def change(self, state: AdapterState) -> Change:
        return dict(state) if self.start is None else {name: state[name] - self.start[name] for name in state}

    def sent(self, client: str, change: Change) -> AdapterState:
        """An adapter of the client's own rank and scale with this change, as near as that rank allows."""
        own, factors = self.own[client], {}
        for name, part in change.items():
            whole = part if self.start is None else part + self.start[name]
            factors[name] = whole.truncated(own[name].rank, own[name].scale)[0]
        return AdapterState(factors, own.extras)

    def noisy(self, client: str, change: Change, share: float = NOISE) -> Change:
        """The change with noise of the client's own, of rank 1 in every module and `share` of its norm together."""
        drawn = torch.Generator().manual_seed(derive_seed(self.seed, "noise", self.round, client))
        noise = {}
        for name, part in change.items():
            out, width = part.shape
            noise[name] = LoraFactors(torch.randn(1, width, generator=drawn), torch.randn(out, 1, generator=drawn))
        return combination([(1.0, change), (share * norm(change) / norm(noise), noise)])


def combination(terms: Sequence[tuple[float, Change]]) -> dict[str, LoraFactors]:
    """The exact weighted sum: ranks add up."""
    total = {}
    for name in terms[0][1]:
        pairs = [(weight, change[name].pair(torch.float64)) for weight, change in terms]
        total[name] = LoraFactors(torch.cat([A for _, (_, A) in pairs]), torch.cat([w * B for w, (B, _) in pairs], 1))
    return total


def inner(one: Change, other: Change) -> float:
    """Inner product of two changes, all modules together."""
    pairs = ((one[name].pair(torch.float64), other[name].pair(torch.float64)) for name in one)
    return sum(float(lowrank.inner(*first, *second)) for first, second in pairs)


def norm(change: Change) -> float:
    return max(inner(change, change), 0.0) ** 0.5


def unit(change: Change) -> dict[str, LoraFactors]:
    length = norm(change)
    return combination([(1 / length if length else 0.0, change)])


def spread(known: Known) -> dict[str, LoraFactors]:
    """Entry-wise standard deviation of the honest changes, its best part of the clients' rank. Forms one module at a
    time as a matrix."""
    own, found = next(iter(known.own.values())), {}
    for name in known.others[0]:
        W = torch.stack([change[name].dense(torch.float64) for change in known.others]).std(0)
        low = lowrank.truncate(W, torch.eye(W.shape[1], dtype=W.dtype), own[name].rank)
        found[name] = LoraFactors(low.A, low.B)
    return found


def _furthest(known: Known, inside: Callable[[list[float], list[list[float]]], bool]) -> Change:
    """mean - t spread with the largest t for which `inside` (squared distances to the honest, theirs to each other)."""
    step = combination([(-1.0, unit(spread(known)))])
    among = [[norm(combination([(1.0, a), (-1.0, b)])) ** 2 for b in known.others] for a in known.others]
    off = [combination([(1.0, known.mean), (-1.0, change)]) for change in known.others]
    base, slope = [inner(d, d) for d in off], [inner(d, step) for d in off]
    low, high = 0.0, 100 * known.size
    for _ in range(60):
        t = (low + high) / 2
        within = inside([b + 2 * t * s + t * t for b, s in zip(base, slope, strict=True)], among)
        low, high = (t, high) if within else (low, t)
    return combination([(1.0, known.mean), (low, step)])


def min_max(known: Known) -> dict[str, AdapterState]:
    """As far off the mean as the two honest clients furthest apart (Shejwalkar & Houmansadr 2021, NDSS)."""
    change = _furthest(known, lambda off, among: max(off) <= max(map(max, among)))
    return {client: known.sent(client, known.noisy(client, change, 0.05)) for client in known.own}


def min_sum(known: Known) -> dict[str, AdapterState]:
    """As far off the mean as keeps the sum of squared distances within an honest client's (the same)."""
    change = _furthest(known, lambda off, among: sum(off) <= max(map(sum, among)))
    return {client: known.sent(client, known.noisy(client, change, 0.05)) for client in known.own}


def little(known: Known) -> dict[str, AdapterState]:
    """A little is enough (Baruch et al. 2019, arXiv 1902.06156): LITTLE standard deviations off the mean, entry by
    entry, with noise of each client's own so that they are no copies."""
    change = combination([(1.0, known.mean), (-LITTLE, spread(known))])
    return {client: known.sent(client, known.noisy(client, change)) for client in known.own}


def turned(known: Known, cosine: float, size: float) -> Change:
    """The wrong direction (what of it is not the honest mean's) turned towards that mean to this cosine, as the rank of
    the clients allows, at `size` times the honest clients' typical norm."""
    towards, client = unit(known.mean), min(known.own)
    wrong = unit(combination([(1.0, known.aim), (-inner(known.aim, towards), towards)]))
    whole = combination([(cosine, towards), ((1 - cosine**2) ** 0.5, wrong)])
    return combination([(size * known.size, unit(known.change(known.sent(client, whole))))])


def near_line(known: Known, size: float = 1.0) -> dict[str, AdapterState]:
    """The wrong direction, turned towards the core until LINE of the way to an unrelated client."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        too_far = known.score(turned(known, middle, size)) > LINE
        low, high = (middle, high) if too_far else (low, middle)
    change = turned(known, high, size)
    return {client: known.sent(client, known.noisy(client, change, 0.05)) for client in known.own}


def mixed(known: Known, share: float = MIXED) -> dict[str, AdapterState]:
    """One's own honest change with a share of the wrong one."""
    change = known.change
    return {
        client: known.sent(client, combination([(1 - share, change(own)), (share, known.aim)]))
        for client, own in known.own.items()
    }


def trigger(known: Known) -> dict[str, LoraFactors]:
    """The backdoor: one direction of rank 1 in every module, of norm 1 together."""
    drawn = torch.Generator().manual_seed(derive_seed(known.seed, "trigger"))
    parts = {}
    for name, part in known.others[0].items():
        out, width = part.shape
        parts[name] = LoraFactors(torch.randn(1, width, generator=drawn), torch.randn(out, 1, generator=drawn))
        parts[name] = parts[name] * (1 / parts[name].norm())
    return unit(parts)


def backdoor(known: Known, size: float = BACKDOOR) -> dict[str, AdapterState]:
    """One's own honest change with a shared one of rank 1, `size` typical norms large."""
    hidden = (size * known.size, trigger(known))
    return {
        client: known.sent(client, combination([(1.0, known.change(own)), hidden])) for client, own in known.own.items()
    }


def split(known: Known) -> dict[str, AdapterState]:
    """The wrong change dealt out by module: each attacker holds it in its share of the modules, as many times over as
    there are attackers, and is honest in the rest."""
    found, clients = {}, sorted(known.own)
    aim = combination([(len(clients), known.aim)])
    for place, client in enumerate(clients):
        own = known.change(known.own[client])
        wrong = sorted(own)[place :: len(clients)]
        found[client] = known.sent(client, {name: aim[name] if name in wrong else own[name] for name in own})
    return found


def sybils(known: Known) -> dict[str, AdapterState]:
    """One wrong update under many names, with a little noise on each."""
    return {client: known.sent(client, known.noisy(client, known.aim, 0.05)) for client in known.own}


def sleepers(known: Known) -> dict[str, AdapterState]:
    """Honest until round AWAKE, then the wrong change at LARGE typical norms."""
    if known.round < AWAKE:
        return dict(known.own)
    change = combination([(LARGE * known.size, unit(known.aim))])
    return {client: known.sent(client, known.noisy(client, change, 0.05)) for client in known.own}


def slow_drift(known: Known) -> dict[str, AdapterState]:
    """A share of the wrong change that grows from 1 / LASTS in the first round to all of it."""
    return mixed(known, min(known.round / LASTS, 1.0))


def one_module(known: Known) -> dict[str, AdapterState]:
    """Wrong in the module in which the wrong change is largest, at LARGE times the typical norm there; else honest."""
    lengths = {name: part.norm() for name, part in known.aim.items()}
    place = max(sorted(lengths), key=lengths.__getitem__)
    typical = float(torch.tensor([change[place].norm() for change in known.others]).median())
    part = known.aim[place] * (LARGE * typical / max(lengths[place], 1e-12))
    return {client: known.sent(client, {**known.change(own), place: part}) for client, own in known.own.items()}


def white_box(known: Known) -> dict[str, AdapterState]:
    """The point between the core and the wrong direction, and the norm, that move the server's own rule furthest in
    the wrong direction: found by narrowing the angle, at each of a few norms. Raises ConfigError without a rule."""
    if known.rule is None:
        raise ConfigError("attack 'white-box' without a rule: it optimises against one; give Known a rule")
    rule, towards = known.rule, unit(known.mean)
    wrong = unit(combination([(1.0, known.aim), (-inner(known.aim, towards), towards)]))

    def tried(cosine: float, size: float) -> tuple[float, dict[str, AdapterState]]:
        change = turned(known, cosine, size)
        sent = {client: known.sent(client, known.noisy(client, change)) for client in known.own}
        return inner(known.change(rule({**known.honest, **sent})), wrong), sent

    best = tried(0.5, 1.0)
    for size in (1.0, 1.5, LARGE):
        low, high = 0.0, 1.0
        for _ in range(6):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            first, second = tried(left, size), tried(right, size)
            best = max(best, first, second, key=lambda found: found[0])
            low, high = (low, right) if first[0] >= second[0] else (left, high)
    return best[1]


Attack = Callable[[Known], dict[str, AdapterState]]
ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "min-max": min_max,
        "min-sum": min_sum,
        "little": little,
        "near-line": near_line,
        "near-line-large": partial(near_line, size=LARGE),
        "mixed": mixed,
        "backdoor": backdoor,
        "split": split,
        "sybils": sybils,
        "sleepers": sleepers,
        "slow-drift": slow_drift,
        "one-module": one_module,
        "white-box": white_box,
    }
)


def attacked(name: str, known: Known) -> dict[str, AdapterState]:
    """{attacker: what it sends} under the attack of that name. Raises ConfigError for a name that is not in ATTACKS, or
    where nobody is honest."""
    if name not in ATTACKS:
        raise ConfigError(f"attack {name!r}: must be one of {', '.join(ATTACKS)}; choose one of these")
    if not known.honest or not known.own:
        counts = f"{len(known.honest)} honest clients and {len(known.own)} attackers"
        raise ConfigError(f"attack {name!r} with {counts}: needs one of each at least; add clients")
    return ATTACKS[name](known)
