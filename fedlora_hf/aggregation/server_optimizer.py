"""A server optimizer around any averaging method: on the factors where these last, on the products where they do not.

A method that averages factors, or freezes one, leaves A and B in one coordinate system from round to round, so that
entries have a history: they are stepped themselves. A method that averages products re-factors the mean by an SVD
every round: A and B turn and change sign although W hardly moves, so their changes mean nothing and W is stepped.
There avgm stays low-rank and exact; adam, yogi and adagrad need the entries of W, one whole float32 matrix a module for
each moment, and what they make is of full rank, so that the cut to the target rank loses part of it (recorded).
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedlora_hf.aggregation.shared import ModuleInfo, described, fitted
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import Method
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.server_step import KINDS, Rule, step
from fedlora_hf.update import AdapterState, LoraFactors

Space = Literal["factors", "product"]
# Learning rates where none is given: the mean itself; and steps of the size that LoRA's entries move in a round.
DEFAULT_RATES = {"avgm": 1.0, "adam": 1e-3, "yogi": 1e-3, "adagrad": 1e-3}
# Singular values of the momentum below this share of its largest are rounding.
ROUNDING = 1e-7


class Stepped(NamedTuple):
    """Where the server goes; its next state, named tensors to keep with the round; the modules' entries for the record,
    where they changed."""

    state: AdapterState
    memory: dict[str, Tensor]
    modules: ModuleInfo


def server_rule(
    name: str, learning_rate: float | None = None, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Rule | None:
    """The rule of that name with checked options; None for "none"."""
    if name == "none":
        return None
    if name not in KINDS:
        raise ConfigError(f"server_optimizer={name!r}: must be none or one of {', '.join(KINDS)}; choose one of these")
    rate = DEFAULT_RATES[name] if learning_rate is None else learning_rate
    for option, value in (("server_learning_rate", rate), ("server_tau", tau)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{option}={value}: must be above 0; leave it out for the default")
    for option, value in (("server_momentum", momentum), ("server_beta2", beta2)):
        if not 0 <= value < 1:
            raise ConfigError(f"{option}={value}: must be at least 0 and below 1; leave it out for the default")
    return Rule(name, float(rate), float(momentum), float(beta2), float(tau))


def space_of(method: Method) -> Space:
    """Where a method's results are stepped; ConfigError where clients do not go on from the global adapter."""
    if method.restarts or method.residual or set(method.keeps) == {"A", "B"}:
        raise ConfigError(
            f"server_optimizer with aggregation {method.name!r}: its clients do not go on from a mean; leave out "
            "--server_optimizer or choose product_mean"
        )
    frozen = any(set(method.trained(number)) != {"A", "B"} for number in (1, 2))
    return "factors" if frozen or method.averages == "factors" else "product"


def stepped(
    rule: Rule,
    space: Space,
    start: AdapterState,
    new: AdapterState,
    memory: Mapping[str, Tensor],
    trained: Sequence[str] = ("A", "B"),
) -> Stepped:
    """One step of the server from the round's start towards, and past, the method's result `new`.

    memory: the last step's ({} before the first). trained: the factors that the round trained; another is left alone,
    with its momentum. With momentum 0 and rate 1, avgm gives `new` itself.
    """
    if rule.nothing:
        return Stepped(new, {}, {})
    state, kept, info = {}, dict(memory), {}
    for module in new:
        of_module = {name: memory[f"{module}:{name}"] for name in _names(memory, module)}
        if space == "factors":
            state[module], after = _on_factors(rule, start[module], new[module], of_module, trained)
            info[module] = fitted(state[module], None)[1]
        else:
            on = _low_rank if rule.kind == "avgm" else _on_entries
            state[module], after, info[module] = on(rule, start[module], new[module], of_module)
        kept |= {f"{module}:{name}": tensor for name, tensor in after.items()}
    extras = {}
    for name in new.extras:
        of_tensor = {key: memory[f"{name}:{key}"] for key in _names(memory, name)}
        extras[name], after = step(rule, start.extras[name], new.extras[name], of_tensor)
        kept |= {f"{name}:{key}": tensor for key, tensor in after.items()}
    return Stepped(AdapterState(state, extras), kept, info)


def _names(memory: Mapping[str, Tensor], owner: str) -> list[str]:
    return [name.removeprefix(f"{owner}:") for name in memory if name.startswith(f"{owner}:")]


def _on_factors(
    rule: Rule, start: LoraFactors, new: LoraFactors, memory: Mapping[str, Tensor], trained: Sequence[str]
) -> tuple[LoraFactors, dict[str, Tensor]]:
    begin = start.rescaled(new.scale).padded(max(start.rank, new.rank))
    end = new.padded(begin.rank)
    found = {"A": end.A, "B": end.B}
    after: dict[str, Tensor] = {}
    for factor in trained:
        of_factor = {name[2:]: tensor for name, tensor in memory.items() if name.startswith(f"{factor}.")}
        found[factor], moments = step(rule, getattr(begin, factor), found[factor], of_factor)
        after |= {f"{factor}.{name}": tensor for name, tensor in moments.items()}
    return LoraFactors(found["A"], found["B"], new.scale), after


def _low_rank(
    rule: Rule, start: LoraFactors, new: LoraFactors, memory: Mapping[str, Tensor]
) -> tuple[LoraFactors, dict[str, Tensor], dict[str, Any]]:
    """avgm of a product: M = beta M + (W - W_0), kept as exact factors; W_0 + eta M, cut to the rank of `new`."""
    pairs = [(new.B, new.A), (start.B, start.A)]
    weights = [new.scale, -start.scale]
    if "B" in memory:
        pairs.append((memory["B"], memory["A"]))
        weights.append(rule.momentum)
    most = min(*new.shape, sum(A.shape[0] for _, A in pairs))
    low = lowrank.mean_truncated(pairs, weights, most)
    rank = max(1, int((low.spectrum[:most] > ROUNDING * low.spectrum[0]).sum()))
    M = LoraFactors.from_low_rank(lowrank.LowRank(low.B[:, :rank], low.A[:rank], low.spectrum, 0.0), rank)
    whole = [(start.B, start.A), (M.B, M.A)]
    moved = lowrank.mean_truncated(whole, [start.scale, rule.learning_rate], new.rank)
    return LoraFactors.from_low_rank(moved, new.rank, new.scale), {"B": M.B, "A": M.A}, described(moved, new.rank)


def _on_entries(
    rule: Rule, start: LoraFactors, new: LoraFactors, memory: Mapping[str, Tensor]
) -> tuple[LoraFactors, dict[str, Tensor], dict[str, Any]]:
    W, after = step(rule, start.dense(torch.float64), new.dense(torch.float64), memory)
    low = lowrank.truncate_dense(W.double(), new.rank)
    return LoraFactors.from_low_rank(low, new.rank, new.scale), after, described(low, new.rank)
