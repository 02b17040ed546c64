"""SCAFFOLD's control variates: what clients' gradients have in common is kept, what is each one's own is taken away.

Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1, on the trained factors: a local gradient g becomes
g - c_k + c. The client's next c_k is the mean of its own gradients g over the round's steps. With plain SGD at a
constant rate that is the paper's option II, c_k - c + (x - y) / (K eta), exactly; with AdamW that would be no gradient
at all, and the mean still is one. Variates are named after the model's parameters; a missing one is 0.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Variate = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Controls:
    """What a client starts a round with. server: c; own: c_k; both {} before its first round."""

    server: Variate = field(default_factory=dict)
    own: Variate = field(default_factory=dict)


class Correction:
    """Corrects the gradients of one client's local steps and adds up the uncorrected ones."""

    def __init__(self, controls: Controls, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.parameters = dict(parameters)
        self.total = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.shift: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            c, own = (
                variate[name].to(parameter) if name in variate else torch.zeros_like(parameter)
                for variate in (controls.server, controls.own)
            )
            self.shift[name] = c - own

    def apply(self) -> None:
        """Between the backward pass and the optimizer's step. A parameter without a gradient has gradient 0."""
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.total[name] += gradient
            parameter.grad = gradient + self.shift[name]

    def variate(self, steps: int) -> dict[str, Tensor]:
        """The client's next c_k, float32 on the CPU."""
        return {name: (total / steps).float().cpu() for name, total in self.total.items()}


def next_server(server: Variate, changes: Iterable[tuple[Variate, Variate]], clients: int) -> dict[str, Tensor]:
    """c + sum over the round's clients (c_k after - c_k before) / clients, summed in float64 in the order given.

    changes: (before, after) of each; clients: how many the federation has, those of other rounds too.
    """
    total = {name: tensor.double() for name, tensor in server.items()}
    for before, after in changes:
        for name, tensor in after.items():
            change = tensor.double() - (before[name].double() if name in before else 0)
            total[name] = total.get(name, torch.zeros_like(change)) + change / clients
    return {name: tensor.float() for name, tensor in sorted(total.items())}
