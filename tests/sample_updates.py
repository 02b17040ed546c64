"""Clients' updates made on the spot, and the dense matrices that factor-space results are held against."""
# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor

from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

SHAPES = {"model.layers.0.q_proj": (24, 20), "model.layers.0.v_proj": (12, 20)}


def factors(generator: torch.Generator, shape: tuple[int, int], rank: int, scale: float) -> LoraFactors:
    """Random factors of one module."""
    A = torch.randn(rank, shape[1], generator=generator)
    return LoraFactors(A, torch.randn(shape[0], rank, generator=generator), scale)


def cohort(
    count: int = 5, ranks: tuple[int, ...] = (4,), scales: tuple[float, ...] = (2.0,), seed: int = 0, heads: bool = True
) -> list[ClientUpdate]:
    """`count` clients with unequal numbers of examples; ranks and scales are dealt out in turn."""
    generator = torch.Generator().manual_seed(seed)
    clients = []
    for k in range(count):
        rank, scale = ranks[k % len(ranks)], scales[k % len(scales)]
        state = {module: factors(generator, shape, rank, scale) for module, shape in SHAPES.items()}
        head = torch.randn(3, 6, generator=generator)
        extras = {"score.weight": head} if heads else {}
        clients.append(ClientUpdate(f"client{k}", AdapterState(state, extras), 10 * (k + 1)))
    return clients


def with_common_factor(clients: list[ClientUpdate]) -> list[ClientUpdate]:
    """The same clients, all with the first one's A."""
    common = clients[0].state
    return [
        ClientUpdate(
            client.client_id,
            AdapterState(
                {m: LoraFactors(common[m].A, f.B, f.scale) for m, f in client.state.items()}, client.state.extras
            ),
            client.num_examples,
        )
        for client in clients
    ]


def turned(client: ClientUpdate, seed: int = 7) -> ClientUpdate:
    """The same products from other factors: A -> R A, B -> B R^-1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, f in client.state.items():
        R = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64))[0] * 3.0
        A, B = R @ f.A.double(), f.B.double() @ torch.linalg.inv(R)
        state[module] = LoraFactors(A.float(), B.float(), f.scale)
    return ClientUpdate(client.client_id, AdapterState(state, client.state.extras), client.num_examples)


def dense(state: AdapterState) -> Tensor:
    """The whole update as one float64 vector, modules in order."""
    return torch.cat([f.dense(torch.float64).flatten() for f in state.values()])


def shares(clients: list[ClientUpdate]) -> Tensor:
    """The clients' shares by number of examples, float64."""
    counts = torch.tensor([float(client.num_examples or 0) for client in clients], dtype=torch.float64)
    return counts / counts.sum()


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same_bits(one: AdapterState, two: AdapterState) -> bool:
    """Whether two states are equal to the last bit."""
    return (
        list(one) == list(two)
        and all(torch.equal(one[m].A, two[m].A) and torch.equal(one[m].B, two[m].B) for m in one)
        and all(one[m].scale == two[m].scale for m in one)
        and sorted(one.extras) == sorted(two.extras)
        and all(torch.equal(one.extras[name], two.extras[name]) for name in one.extras)
    )
