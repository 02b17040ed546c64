"""(d) Oracle gain: measured risk of local, mean and refined estimates against the predicted one; where they cross."""
# SPDX-License-Identifier: Apache-2.0

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from fedlora_hf.numerics.clair import Clair, ClairResult
from scripts.experiments.cohorts import IN, OUT, RANK, generator, noise, normal, unit
from scripts.experiments.tables import COLOURS, arguments, write

K = 20
METHODS = ("local", "mean", "hard", "soft")


def predicted(sigma: float, off: float) -> dict[str, float]:
    """Mean squared error per client with U known, from W~ - W* = P E_k + (I - P) mean(E) + (I - P)(mean(H) - H_k).

    ||E_k||^2 = sigma^2 on average, ||H_k|| = off in (I - P), ||U V_k|| = 1, all of mean zero."""
    inside = RANK / OUT
    spread = 1 - 1 / K
    return {
        "local": sigma**2,
        "mean": sigma**2 / K + spread * (1 + off**2),
        "hard": sigma**2 * (inside + (1 - inside) / K) + spread * off**2,
    }


def refined(found: ClairResult, local: Tensor) -> Tensor:
    """Refined updates (K, out, in); a client left out keeps its own."""
    rows = zip(found.ids, local, strict=True)
    return torch.stack([found.matrix(k) if k in found.collaborative else W for k, W in rows])


def measured(sigma: float, off: float, seed: int) -> dict[str, float]:
    g = generator("oracle", str(sigma), str(off), seed)
    U = torch.linalg.qr(normal(g, OUT, RANK))[0]
    outside = [(lambda H: H - U @ (U.T @ H))(normal(g, OUT, IN)) for _ in range(K)]
    true = torch.stack([U @ unit(normal(g, RANK, IN)) + off * unit(H) for H in outside])
    local = torch.stack([W + noise(g, sigma) for W in true])
    ids = [f"{k:02d}" for k in range(K)]
    hard, soft = (Clair(rank=RANK, refine=r, influence="flags").fit(list(local), ids=ids) for r in ("hard", "soft"))
    estimates = {
        "local": local,
        "mean": local.mean(0).expand_as(local),
        "hard": refined(hard, local),
        "soft": refined(soft, local),
    }
    return {name: float((W - true).square().sum((1, 2)).mean()) for name, W in estimates.items()}


def main() -> None:
    args = arguments("oracle_gain", __doc__)
    sigmas = (0.2, 1.0) if args.quick else (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
    rows = []
    for off in (0.0, 0.3):
        for sigma in sigmas:
            runs = [measured(sigma, off, seed) for seed in range(args.seed, args.seed + args.seeds)]
            found = {name: sum(run[name] for run in runs) / len(runs) for name in METHODS}
            expected = {f"{name} predicted": value for name, value in predicted(sigma, off).items()}
            rows.append({"off": off, "sigma": sigma, **found, **expected})
    write(
        args.output_dir,
        "oracle_gain",
        rows,
        "Oracle gain",
        f"python -m scripts.experiments.oracle_gain --seed {args.seed} --seeds {args.seeds}",
        f"{K} clients, {OUT} x {IN}, rank {RANK} given, ||U V_k|| = 1, ||H_k|| = `off`, ||E_k|| = `sigma`; "
        f"{args.seeds} seeds. Squared error per client. "
        "Predicted with U known: the distance to `hard` is the cost of estimating U. "
        "Refinement beats local where sigma^2 (1 - r/out) > off^2, and the mean where sigma^2 r/out < 1.",
    )
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axis, off in zip(axes, (0.0, 0.3), strict=True):
        part = [row for row in rows if row["off"] == off]
        for name, colour, mark in zip(METHODS, COLOURS, "osv^", strict=False):
            axis.loglog([r["sigma"] for r in part], [r[name] for r in part], mark, color=colour, label=name)
            if name != "soft":
                axis.loglog(
                    [r["sigma"] for r in part], [r[f"{name} predicted"] for r in part], color=colour, linewidth=1
                )
        axis.set(xlabel="estimation error of a client", title=f"off-subspace part {off}")
    axes[0].set(ylabel="squared error per client (lines: predicted)")
    axes[0].legend(fontsize=8)
    figure.savefig(args.output_dir / "oracle_gain.png", dpi=130)


if __name__ == "__main__":
    main()
