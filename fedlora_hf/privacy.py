"""What of a client's update leaves it, under differential privacy: its change clipped, Gaussian noise added.

Local randomisation, client by client: the server (and whoever reads its disk) sees every client's noisy update, so each
client adds all of its noise itself, and epsilon is that client's against the server. Neighbours are two training splits
of one client of the same size, otherwise arbitrary: any change within the clipping ball may become any other, so the
sensitivity is 2 * clip. No amplification by sampling is claimed (the server draws the cohort), and none by summing.
See docs/privacy.md for what this covers and what not.
"""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import importlib.util
import math
import secrets
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.options import PrivacyOptions
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

DELTA = 1e-5
RELATION = "one client's training examples replaced by any others, as many"
ADVERSARY = "whoever sees that client's updates, the server included"


@dataclass(frozen=True)
class Privacy:
    """clip: L2 bound of a client's change, over all trained tensors together. noise_multiplier: standard deviation of
    the noise in units of clip. delta: see `epsilon`. secret: 32 bytes that the noise is drawn from."""

    clip: float
    noise_multiplier: float
    delta: float
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @classmethod
    def of(cls, args: PrivacyOptions) -> "Privacy | None":
        """The privacy that a run's options ask for (their bounds are checked by then), None when they ask for none.

        The secret is fresh from the operating system, so that two runs differ; a `dp_seed` makes them the same, for
        tests and experiments, and voids the guarantee. ConfigError when dp-accounting is not installed.
        """
        if args.dp_clip is None:
            return None
        multiplier, delta = args.dp_noise_multiplier or 0.0, DELTA if args.dp_delta is None else args.dp_delta
        if importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError("dp_clip: epsilon is counted by dp-accounting; pip install 'fedlora_hf[privacy]'")
        given = {} if args.dp_seed is None else {"secret": hashlib.blake2b(str(args.dp_seed).encode()).digest()[:32]}
        return cls(args.dp_clip, multiplier, delta, **given)

    def applied(
        self, update: ClientUpdate, start: AdapterState, untrained: Container[str], path: str | int
    ) -> ClientUpdate:
        """The update as it may leave the client: start + clipped change + noise, in the space of the factors.

        The change of every trained factor A, B (as stored, without the scale) and of every tensor trained whole, since
        the round's start, is one vector, scaled down to L2 norm `clip` if it is longer, and gets independent noise of
        standard deviation noise_multiplier * clip in every entry. Factors in `untrained` did not change and get none.
        Metrics of the training (its loss) are dropped: they too are drawn from the examples. path: names the noise;
        the same update under the same path and secret gets the same noise.

        Raises UpdateError for a change that is not finite: it has no norm, so it cannot be clipped: nothing is sent.
        """
        before = _tensors(start, update.state, untrained)
        changes = {name: after.double() - before[name].double() for name, after in _tensors_of(update.state, untrained)}
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        if not math.isfinite(norm):
            raise UpdateError(f"the change has norm {norm}: only a finite one can be clipped; nothing is sent of it")
        share = min(1.0, self.clip / norm) if norm else 1.0
        scale = self.noise_multiplier * self.clip
        sent = {
            name: (
                before[name].double() + share * change + scale * self.noise(change.shape, f"{path}\x1f{name}")
            ).float()
            for name, change in changes.items()
        }
        return replace(update, state=_rebuilt(update.state, sent), metrics=_public(update.metrics))

    def noise(self, shape: torch.Size, path: str) -> Tensor:
        """Standard normal float64 numbers, from the secret and `path` alone.

        Drawn with SHAKE-256 and the inverse of the normal distribution: a generator for simulations (Mersenne Twister,
        PCG) could be run backwards from what it gave. No defence is made against attacks on floating-point noise.
        """
        count = math.prod(shape)
        stream = hashlib.shake_256(self.secret + path.encode()).digest(8 * count)
        bits = torch.frombuffer(bytearray(stream), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
        uniform = ((bits >> 11) + 2**52).double().add_(0.5).mul_(2.0**-53)  # the upper 53 bits, never 0
        uniform.clamp_(max=1 - 2.0**-53)  # the largest draw of all rounds to 1, whose noise would be infinite
        return torch.special.ndtri(uniform).reshape(shape)


def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """The smallest epsilon for which a client that sent `rounds` updates has (epsilon, delta)-differential privacy.

    Sensitivity 2 * clip (see the module). `rounds` adaptive Gaussian mechanisms are one of sqrt(rounds) times the
    sensitivity (Dong, Roth, Su 2022, arXiv 1905.02383, corollary 3.3), whose epsilon is exact (Balle, Wang 2018,
    arXiv 1805.06530; computed by Google's dp-accounting). inf without noise, 0 before the first round.
    """
    if not rounds:
        return 0.0
    if not noise_multiplier:
        return math.inf
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(noise_multiplier / (2 * math.sqrt(rounds)), delta))


def account(options: Mapping[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the record says of privacy after these rounds; {} for a run without it. options: those of the record.

    "epsilon" is that of the client that took part most often; None when nothing is guaranteed, and "note" says why.
    A round counts for everyone who was called to it, whatever became of the update.
    """
    if options.get("dp_clip") is None:
        return {}
    counts: dict[str, int] = {}
    for entry in rounds:
        for client in entry["cohort"]:
            counts[client] = counts.get(client, 0) + 1
    multiplier, delta = options.get("dp_noise_multiplier", 0.0), options.get("dp_delta", DELTA)
    most = max(counts.values(), default=0)
    found = epsilon(multiplier, most, delta)
    note = "no noise was added" if math.isinf(found) else ""
    if options.get("dp_seed") is not None:
        note = "the noise was drawn from dp_seed, which this record tells"
    return {
        "clip": options["dp_clip"],
        "noise_multiplier": multiplier,
        "delta": delta,
        "rounds": most,
        "epsilon": None if note else found,
        "note": note,
        "neighbours": RELATION,
        "adversary": ADVERSARY,
    }


def _tensors_of(state: AdapterState, untrained: Container[str]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of everything trained, in one order."""
    factors = [
        (f"{module}.{name}", getattr(state[module], name)) for module in state for name in "AB" if name not in untrained
    ]
    return [*factors, *sorted(state.extras.items())]


def _tensors(start: AdapterState, like: AdapterState, untrained: Container[str]) -> dict[str, Tensor]:
    """The start's trained tensors, written with the scales and ranks of the update that came of it."""
    same = {module: start[module].rescaled(f.scale).padded(f.rank) for module, f in like.items()}
    return dict(_tensors_of(AdapterState(same, start.extras), untrained))


def _rebuilt(state: AdapterState, sent: Mapping[str, Tensor]) -> AdapterState:
    factors = {
        module: LoraFactors(sent.get(f"{module}.A", f.A), sent.get(f"{module}.B", f.B), f.scale)
        for module, f in state.items()
    }
    return AdapterState(factors, {name: sent[name] for name in state.extras})


def _public(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that tell of no example: how many steps were taken follows from how many examples there are."""
    return {name: value for name, value in metrics.items() if name == "steps"}
