"""(b) Multi-response linear regression: error against noise and against samples per client, with 30 % contaminated."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_hf.numerics.clair import Clair
from fedlora_hf.numerics.lowrank import subspace_distance
from scripts.experiments.cohorts import IN, OUT, RANK, generator, normal, unit
from scripts.experiments.drawing import COLOURS, MARKS, figure, log_axis, save
from scripts.experiments.tables import arguments, write

K, BAD = 20, 6


def regressions(sigma: float, samples: int, g: torch.Generator) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(least-squares estimates of K clients, their true coefficients, U); the last BAD answer another question."""
    U = torch.linalg.qr(normal(g, OUT, RANK))[0]
    V0 = unit(normal(g, RANK, IN))
    true = [U @ (V0 + unit(normal(g, RANK, IN))) for _ in range(K)]
    estimates = []
    for k, W in enumerate(true):
        X = normal(g, samples, IN)
        if k >= K - BAD:
            W = unit(normal(g, OUT, RANK) @ normal(g, RANK, IN)) * W.norm()
        Y = X @ W.T + sigma * normal(g, samples, OUT)
        estimates.append(torch.linalg.lstsq(X, Y).solution.T)
    return estimates, true, U


def cell(sigma: float, samples: int, seed: int) -> dict[str, float]:
    estimates, true, U = regressions(sigma, samples, generator("noise", str(sigma), samples, seed))
    found = Clair(rank=RANK, influence="flags").fit(estimates)
    benign = range(K - BAD)

    def risk(updates: list[Tensor]) -> float:
        return math.sqrt(sum(float((updates[k] - true[k]).square().sum()) for k in benign) / len(benign))

    kept = [found.matrix(str(k)) if str(k) in found.collaborative else estimates[k] for k in benign]
    mean = torch.stack(estimates).mean(0)
    flagged = {int(k) for k in found.flagged}
    return {
        "subspace error": subspace_distance(U, found.subspace["W"]),
        "exact set": float(flagged == set(range(K - BAD, K))),
        "local": risk(estimates),
        "fedavg": risk([mean] * K),
        "clair": risk(kept),
    }


def slope(xs: list[float], ys: list[float]) -> float:
    """Least-squares slope on logarithmic axes."""
    x, y = torch.tensor(xs).log(), torch.tensor(ys).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def main() -> None:
    args = arguments("noise", __doc__)
    noises = (0.01, 0.1) if args.quick else (0.003, 0.01, 0.03, 0.1, 0.3)
    sizes = (100, 400) if args.quick else (60, 100, 200, 400, 800)
    cells = [("noise", s, 200) for s in noises] + [("samples", 0.1, n) for n in sizes]
    rows = []
    for sweep, sigma, samples in cells:
        runs = [cell(sigma, samples, seed) for seed in range(args.seed, args.seed + args.seeds)]
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        rows.append({"sweep": sweep, "sigma": sigma, "samples": samples, **mean})
    by_noise = [row for row in rows if row["sweep"] == "noise"]
    by_size = [row for row in rows if row["sweep"] == "samples"]
    in_noise = slope([row["sigma"] for row in by_noise], [row["subspace error"] for row in by_noise])
    in_size = slope([row["samples"] for row in by_size], [row["subspace error"] for row in by_size])
    write(
        args.output_dir,
        "noise",
        rows,
        "Error against noise and samples",
        f"python -m scripts.experiments.noise --seed {args.seed} --seeds {args.seeds}",
        f"{K} regressions with {OUT} responses and {IN} predictors, {BAD} of them with responses to other "
        f"coefficients; {args.seeds} seeds. Slope of the subspace error on logarithmic axes: "
        f"{in_noise:.2f} in the noise (1 expected), {in_size:.2f} in the samples "
        f"(-0.5 expected, steeper near n = {IN} where least squares itself is unstable). "
        "`local`, `fedavg` (over all clients), `clair`: root mean square error of the benign clients' coefficients.",
    )
    draw(rows, args.output_dir / "noise.png")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Error against noise, and against samples, on logarithmic axes."""
    canvas = figure(9, 3.6)
    panels = canvas.subplots(1, 2, sharey=True)
    names = {"subspace error": "subspace (sine of the angle)", "clair": "CLAIR", "local": "alone", "fedavg": "FedAvg"}
    titles = {"noise": ("sigma", "noise of the responses"), "samples": ("samples", "samples per client")}
    for axes, (sweep, (column, label)) in zip(panels, titles.items(), strict=True):
        part = [row for row in rows if row["sweep"] == sweep]
        xs = [float(row[column]) for row in part]
        for number, (series, name) in enumerate(names.items()):
            ys = [float(row[series]) for row in part]
            axes.plot(xs, ys, color=COLOURS[number], marker=MARKS[number], label=name)
        log_axis(axes.xaxis)
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        fitted = slope(xs, [float(row["subspace error"]) for row in part])
        axes.set_title(f"subspace error: slope {fitted:.2f}", fontsize=10)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    log_axis(panels[0].yaxis, (1.0,))
    panels[0].set_ylabel("error of the honest clients")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save(canvas, path)


if __name__ == "__main__":
    main()
