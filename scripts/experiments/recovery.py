"""(a) Noiseless recovery: subspace error and the exact contaminated set, for every contamination kind and fraction."""
# SPDX-License-Identifier: Apache-2.0

import matplotlib.pyplot as plt

from fedlora_hf.numerics.clair import Clair
from fedlora_hf.numerics.lowrank import subspace_distance
from scripts.experiments.cohorts import CONTAMINATIONS, generator, shared
from scripts.experiments.tables import COLOURS, arguments, write


def main() -> None:
    args = arguments("recovery", __doc__)
    K, rows = 20, []
    fractions = (0.1, 0.45) if args.quick else (0.1, 0.2, 0.3, 0.4, 0.45)
    for kind in CONTAMINATIONS:
        for fraction in fractions:
            exact, error = 0, 0.0
            bad = int(fraction * K)
            for seed in range(args.seed, args.seed + args.seeds):
                truth = shared(K, bad, kind, generator("recovery", kind, bad, seed), common=1.0)
                found = Clair(refine="none", influence="flags").fit(truth.updates)
                exact += frozenset(int(k) for k in found.flagged) == truth.bad
                U = found.subspace["W"]
                error = max(error, subspace_distance(truth.subspace, U) if U.shape == truth.subspace.shape else 1.0)
            rows.append({"kind": kind, "fraction": fraction, "exact set": exact / args.seeds, "worst error": error})
    write(
        args.output_dir,
        "recovery",
        rows,
        "Noiseless recovery",
        f"python -m scripts.experiments.recovery --seed {args.seed} --seeds {args.seeds}",
        f"K = {K} clients, W_k = U (V_0 + V_k), 48 x 40, rank 3, found without being told; {args.seeds} seeds. "
        "`exact set`: share of seeds with exactly the contaminated clients flagged. `worst error`: sine of the "
        "largest principal angle, 1 where the rank differs.",
    )
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for kind, colour, mark in zip(CONTAMINATIONS, (*COLOURS, "#999999"), "osv^D<>p", strict=True):
        part = [row for row in rows if row["kind"] == kind]
        errors = [max(row["worst error"], 1e-17) for row in part]
        axis.semilogy([row["fraction"] for row in part], errors, marker=mark, color=colour, label=kind)
    axis.axhline(1e-6, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="contaminated fraction", ylabel="worst subspace error", title="Noiseless recovery")
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(args.output_dir / "recovery.png", dpi=130)


if __name__ == "__main__":
    main()
