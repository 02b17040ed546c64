"""(c) Exact recovery of the collaborative set over fraction and separation: CLAIR (both solvers), Krum, median."""
# SPDX-License-Identifier: Apache-2.0

import warnings

import matplotlib.pyplot as plt

from fedlora_hf.errors import ConvergenceWarning
from fedlora_hf.numerics.clair import Clair
from scripts.experiments.cohorts import generator, krum_set, median_set, shared
from scripts.experiments.tables import arguments, write

K, LEVEL = 20, 0.5
RULES = ("clair", "clair convex", "krum", "median")


def recovered(kind: str, bad: int, share: float, seed: int, common: float) -> dict[str, bool]:
    truth = shared(K, bad, kind, generator("phase", kind, bad, str(share), seed), LEVEL, common, share)
    sets = {
        "clair": frozenset(int(k) for k in Clair(refine="none", influence="flags").fit(truth.updates).flagged),
        "clair convex": frozenset(
            int(k) for k in Clair(refine="none", solver="convex", influence="flags").fit(truth.updates).flagged
        ),
        "krum": krum_set(truth.updates, bad),
        "median": median_set(truth.updates, bad),
    }
    return {rule: found == truth.bad for rule, found in sets.items()}


def main() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)
    args = arguments("phase", __doc__)
    fractions = (0.1, 0.45) if args.quick else (0.1, 0.2, 0.3, 0.4, 0.45, 0.55)
    shares = (0.5, 1.0) if args.quick else (0.4, 0.6, 0.8, 0.9, 0.95, 1.0)
    rows = []
    for kind, common in (("own subspace", 0.0), ("colluding", 0.0), ("coherent", 1.0)):
        for fraction in fractions:
            for share in shares:
                runs = [
                    recovered(kind, round(fraction * K), share, seed, common)
                    for seed in range(args.seed, args.seed + args.seeds)
                ]
                rates = {rule: sum(run[rule] for run in runs) / len(runs) for rule in RULES}
                rows.append({"kind": kind, "fraction": fraction, "share": share, **rates})
    write(
        args.output_dir,
        "phase",
        rows,
        "Exact recovery of the contaminated set",
        f"python -m scripts.experiments.phase --seed {args.seed} --seeds {args.seeds}",
        f"{K} clients, noise half of the signal's norm, {args.seeds} seeds a cell. `share`: root of the share of "
        "a contaminated client's energy that is wrong (1: nothing in common with the honest). "
        "Coherent: one common wrong direction, honest "
        "clients with a common direction too; the others have V_k of mean zero. Krum and median are told how many "
        "clients are contaminated; CLAIR is not.",
    )
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = {(row["kind"], row["fraction"], row["share"]): row for row in rows}
    figure, axes = plt.subplots(
        len(kinds), len(RULES), figsize=(9, 6.2), layout="constrained", sharex=True, sharey=True
    )
    for line, kind in zip(axes, kinds, strict=True):
        for axis, rule in zip(line, RULES, strict=True):
            grid = [[found[kind, fraction, share][rule] for share in shares] for fraction in fractions]
            image = axis.imshow(grid, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto")
            axis.set_xticks(range(len(shares)), shares, fontsize=7)
            axis.set_yticks(range(len(fractions)), fractions, fontsize=7)
            axis.set_title(f"{kind}: {rule}", fontsize=8)
    figure.colorbar(image, ax=axes, label="exact recovery rate")
    figure.supxlabel("share of the update that is wrong")
    figure.supylabel("contaminated fraction")
    figure.savefig(args.output_dir / "phase.png", dpi=130)


if __name__ == "__main__":
    main()
