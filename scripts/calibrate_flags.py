"""How often CLAIR flags clean clients, and how much contamination it finds, over families of synthetic cohorts.

    python scripts/calibrate_flags.py --clients 8 12 20 50 100 --cohorts 20

Families: the paper's model without and with a common direction, clusters that share a subspace or only a direction,
mixtures of tasks (Dirichlet), one task each, clients with unequal noise and unequal norm. Also prints the robust z that
`flagging.critical_z` is fitted to. The table goes to docs/results/flags/.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from experiments.cohorts import CONTAMINATIONS, IN, OUT, generator, noise, normal, unit
from torch import Tensor

from fedlora_hf.numerics.clair import KINDS, Clair
from fedlora_hf.numerics.clair.flagging import critical_z, shorth

Family = Callable[[int, torch.Generator], list[Tensor]]


def model(common: float, level: float, spread: float = 0.0, sizes: float = 0.0) -> Family:
    """U (common V_0 + V_k) + E_k; log noise level and log norm vary by `spread` and `sizes` (standard deviations)."""

    def make(K: int, g: torch.Generator) -> list[Tensor]:
        U = torch.linalg.qr(normal(g, OUT, 3))[0]
        V0 = unit(normal(g, 3, IN))
        levels = level * (spread * normal(g, K)).exp()
        updates = [U @ (common * V0 + unit(normal(g, 3, IN))) + noise(g, float(s)) for s in levels]
        return [W * float(size) for W, size in zip(updates, (sizes * normal(g, K)).exp(), strict=True)]

    return make


def clusters(common: float, same_subspace: bool) -> Family:
    """Three clusters of 60, 25 and 15 %, a common part of norm `common` beside the cluster's own of norm 1."""

    def make(K: int, g: torch.Generator) -> list[Tensor]:
        U = torch.linalg.qr(normal(g, OUT, 3))[0]
        V0 = U @ unit(normal(g, 3, IN))
        own = [
            U @ unit(normal(g, 3, IN)) if same_subspace else unit(normal(g, OUT, 2) @ normal(g, 2, IN))
            for _ in range(3)
        ]
        which = torch.multinomial(torch.tensor([0.6, 0.25, 0.15]), K, True, generator=g).tolist()
        return [common * V0 + own[c] + noise(g, 0.3) for c in which]

    return make


def mixtures(alpha: float | None, common: float) -> Family:
    """Dirichlet mixtures of 8 tasks (None: a task of its own for every client), a common part beside them."""

    def make(K: int, g: torch.Generator) -> list[Tensor]:
        tasks = torch.stack([unit(normal(g, OUT, 2) @ normal(g, 2, IN)) for _ in range(8 if alpha else K)])
        V0 = unit(normal(g, OUT, 1) @ normal(g, 1, IN))
        if alpha is None:
            return [common * V0 + task + noise(g, 0.2) for task in tasks]
        gamma = torch._standard_gamma(torch.full((K, 8), alpha, dtype=torch.float64), generator=g) + 1e-9
        parts = gamma / gamma.sum(1, keepdim=True)
        return [common * V0 + torch.einsum("t,tij->ij", p, tasks) + noise(g, 0.2) for p in parts]

    return make


FAMILIES: dict[str, Family] = {
    "paper, noise 0": model(0, 0),
    "paper, noise 0.5": model(0, 0.5),
    "common 1, noise 1": model(1, 1),
    "common 2, noise 0.5": model(2, 0.5),
    "unequal noise": model(1, 0.5, spread=0.5),
    "unequal norms 0.3": model(1, 0.5, sizes=0.3),
    "unequal norms 0.6": model(1, 0.5, sizes=0.6),
    "clusters, one subspace": clusters(0.5, True),
    "clusters, common 1": clusters(1.0, False),
    "clusters, common 0.5": clusters(0.5, False),
    "Dirichlet 5": mixtures(5.0, 0.0),
    "Dirichlet 0.5": mixtures(0.5, 0.0),
    "Dirichlet 0.5, common 0.3": mixtures(0.5, 0.3),
    "Dirichlet 0.1": mixtures(0.1, 0.0),
    "Dirichlet 0.1, common 0.3": mixtures(0.1, 0.3),
    "one task each": mixtures(None, 0.0),
}
CONTAMINATED = {"none": 0.0, "own subspace": 0.45, "coherent": 0.4, "sign flip": 0.4}


def cell(name: str, kind: str, K: int, cohorts: int) -> dict[str, str | int | float]:
    """False-positive rate, recall and the share of cohorts with each kind usable."""
    bad = int(CONTAMINATED[kind] * K)
    false = found = direction = subspace = 0
    by_kind = dict.fromkeys(KINDS, 0)
    for seed in range(cohorts):
        g = generator("flags", name, kind, K, seed)
        updates = FAMILIES[name](K, g)
        if bad:
            updates[K - bad :] = CONTAMINATIONS[kind](updates[: K - bad], updates[K - bad :], g)
        result = Clair(refine="none").fit(updates)
        wrong = {k for k in result.flagged if int(k) < K - bad}
        false, found = false + len(wrong), found + len(result.flagged) - len(wrong)
        for k in wrong:
            for evidence, score in result.evidence[k].items():
                by_kind[evidence] += score.flagged
        direction += bool(result.diagnosis["direction_usable"])
        subspace += bool(result.diagnosis["subspace_usable"])
    row: dict[str, str | int | float] = {
        "family": name,
        "contaminated": kind,
        "K": K,
        "clean clients": cohorts * (K - bad),
    }
    row |= {"false positives %": round(100 * false / (cohorts * (K - bad)), 2)}
    row |= {"recall": round(found / (cohorts * bad), 2) if bad else ""}
    row |= {f"by {evidence}": count for evidence, count in by_kind.items()}
    return row | {"direction usable": round(direction / cohorts, 2), "subspace usable": round(subspace / cohorts, 2)}


def shorth_quantile(n: int, draws: int = 4000) -> float:
    """The 99.9 % point of the largest absolute robust z's share: of one client's |z| in a clean normal sample of n."""
    g = generator("shorth", n)
    values = []
    for _ in range(max(draws // n, 100)):
        x = normal(g, n)
        centre, spread = shorth(x)
        values.append((x - centre).abs() / spread)
    return float(torch.cat(values).quantile(0.999))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 12, 20, 50, 100])
    parser.add_argument("--cohorts", type=int, default=20, help="cohorts of 20 clients in a cell; fewer where larger")
    parser.add_argument("--kinds", nargs="+", default=list(CONTAMINATED), choices=list(CONTAMINATED))
    default = Path(__file__).resolve().parents[1] / "docs" / "results" / "flags"
    parser.add_argument("--output_dir", type=Path, default=default)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for n in args.clients:
        print(f"K={n}: 99.9 % point of the shorth z {shorth_quantile(n):.1f}, rule {critical_z(n):.1f}")
    rows = []
    for kind in args.kinds:
        for name in FAMILIES:
            for K in args.clients:
                rows.append(cell(name, kind, K, max(2, args.cohorts * 20 // K)))
                print(rows[-1], flush=True)
    with open(args.output_dir / "flags.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for kind in args.kinds:
        for K in args.clients:
            part = [row for row in rows if row["K"] == K and row["contaminated"] == kind]
            clean = sum(int(row["clean clients"]) for row in part)
            false = sum(float(row["false positives %"]) * int(row["clean clients"]) for row in part) / clean
            print(f"{kind}, K={K}: {false:.2f} % of {clean} clean clients flagged")


if __name__ == "__main__":
    main()
