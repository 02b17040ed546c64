"""How often CLAIR flags clean clients, and how much contamination it finds, family by family of synthetic cohorts.

    python -m scripts.experiments.calibrate_flags --set held-out --clients 8 12 20 50 100 --honest 300

Three sets (scripts/experiments/families.py): the families that the rule was tuned on, and two written before their
results were looked at, with seeds of their own; the first of these has a federation of three rounds besides.
Writes one row for each family, contamination and K, a summary by family, and a figure, to docs/results/flags/. Also
prints the robust z that `flagging.critical_z` is fitted to. `--seed` moves all seeds: a set looked at is spent.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.numerics.clair import Clair
from fedlora_hf.numerics.clair.flagging import critical_z, shorth
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from scripts import PROJECT
from scripts.experiments.cohorts import CONTAMINATIONS, IN, OUT, generator, noise, normal, unit
from scripts.experiments.families import HELD_OUT, TUNING, WEAK, Cohort, Family

Row = dict[str, str | int | float]
RANDOM, SHARES = "own subspace", (0.2, 0.4, 0.45)
GRID = [("none", 0.0)] + [(kind, share) for kind in (RANDOM, "coherent", "sign flip") for share in SHARES]
ROUNDS, FEDERATION = 3, "three rounds"
SETS = {"tuning": [*TUNING], "held-out": [*HELD_OUT, FEDERATION], "weak": [*WEAK]}


def contaminated(cohort: Cohort, kind: str, bad: int, g: torch.Generator) -> Cohort:
    """The cohort with its last `bad` clients contaminated, in every module."""
    if not bad:
        return cohort
    return {m: W[:-bad] + CONTAMINATIONS[kind](W[:-bad], W[-bad:], g) for m, W in cohort.items()}


def judged(family: Family, K: int, kind: str, bad: int, g: torch.Generator) -> tuple[set[int], bool, bool]:
    """(flagged clients, direction usable, subspace usable) of one cohort."""
    found = Clair(refine="none").fit(contaminated(family(K, g), kind, bad, g))
    usable = found.diagnosis
    return {int(k) for k in found.flagged}, bool(usable["direction_usable"]), bool(usable["subspace_usable"])


def federation(K: int, kind: str, bad: int, g: torch.Generator) -> tuple[set[int], bool, bool]:
    """The same after ROUNDS rounds: each client moves half way to its own optimum U (V_0 + 0.7 V_k), evidence is taken
    on the change since the global adapter and combined over rounds."""
    U, V0 = torch.linalg.qr(normal(g, OUT, 3))[0], unit(normal(g, 3, IN))
    optima = [U @ (V0 + 0.7 * unit(normal(g, 3, IN))) for _ in range(K)]
    wrong = int(torch.randint(2**31, (), generator=g))  # an attacker sends the same wrong direction in every round
    W, past = torch.zeros(OUT, IN, dtype=torch.float64), list[PastRound]()
    for _ in range(ROUNDS):
        changes = [0.5 * (T - W) + noise(g, 0.2) for T in optima]
        sent = contaminated({"W": changes}, kind, bad, torch.Generator().manual_seed(wrong))["W"]
        updates = [ClientUpdate(f"{k:03d}", _state(W + change), 1) for k, change in enumerate(sent)]
        found = aggregate(updates, "clair", reference=_state(W), past=past, refine="none")
        past.append(PastRound(found.this_round or found.evidence, frozenset(found.flagged)))
        W = found.state["W"].dense(torch.float64)
    usable = found.diagnosis
    return {int(k) for k in found.flagged}, bool(usable["direction_usable"]), bool(usable["subspace_usable"])


def _state(W: torch.Tensor) -> AdapterState:
    return AdapterState({"W": LoraFactors(torch.eye(W.shape[1], dtype=W.dtype), W)})


def upper_bound(count: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound on a rate, count of n found."""

    def at_most(rate: float) -> float:
        terms = (math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(count + 1))
        return math.fsum(terms)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) > 1 - confidence else (low, middle)
    return high


def interval(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of a rate, count of n found."""
    each = (1 + confidence) / 2
    low = upper_bound(count - 1, n, 1 - each) if count else 0.0
    return low, upper_bound(count, n, each) if count < n else 1.0


def cell(where: str, name: str, kind: str, share: float, K: int, honest: int, seed: int) -> Row:
    """One family, contamination and K: enough cohorts for `honest` clean clients, half of it where some are bad."""
    bad = int(share * K)
    cohorts = max(2, round(honest / (2 if bad else 1) / (K - bad)))
    false, touched, found, usable = 0, 0, 0, [0, 0]
    for i in range(seed, seed + cohorts):
        g = generator(where, name, kind, str(share), K, i)
        if name == FEDERATION:
            flagged, direction, subspace = federation(K, kind, bad, g)
        else:
            flagged, direction, subspace = judged((TUNING | HELD_OUT | WEAK)[name], K, kind, bad, g)
        wrong = sum(k < K - bad for k in flagged)
        false, touched, found = false + wrong, touched + (wrong > 0), found + len(flagged) - wrong
        usable = [usable[0] + direction, usable[1] + subspace]
    clean = cohorts * (K - bad)
    row: Row = {"set": where, "family": name, "contaminated": kind, "share": share, "K": K, "cohorts": cohorts}
    row |= {"clean clients": clean, "flagged clean": false, "false positives %": round(100 * false / clean, 2)}
    low, high = interval(false, clean)
    row |= {"95 % from": round(100 * low, 2), "95 % to": round(100 * high, 2)}
    row |= {"95 % bound": round(100 * upper_bound(false, clean), 2), "cohorts with one": touched}
    row |= {"contaminated clients": cohorts * bad, "found": found}
    row |= {"recall": round(found / (cohorts * bad), 3) if bad else ""}
    return row | {
        "direction usable": round(usable[0] / cohorts, 2),
        "subspace usable": round(usable[1] / cohorts, 2),
    }


def total(rows: Sequence[Row], column: str) -> int:
    return sum(int(row[column]) for row in rows)


def summary(rows: Sequence[Row]) -> str:
    """Markdown, a line for each family: the worst cell of its false positives, all of its cells together with their
    bound, and recall by contamination: all cells at 20 to 45 %, and the worst of them."""
    heads = ["family", "worst false positives", "where", "all cells", "95 % bound", "cohorts touched"]
    heads += [f"recall {kind} (worst)" for kind in (RANDOM, "coherent", "sign flip")]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == name]
        worst = max(mine, key=lambda row: float(row["false positives %"]))
        flagged, clean = total(mine, "flagged clean"), total(mine, "clean clients")
        where = f"{worst['contaminated']} {worst['share']}, K = {worst['K']} ({worst['cohorts']} cohorts)"
        cells = [str(name), f"{worst['false positives %']} %", where if flagged else "", f"{flagged} of {clean}"]
        cells += [f"{100 * upper_bound(flagged, clean):.2f} %"]
        cells += [f"{total(mine, 'cohorts with one')} of {total(mine, 'cohorts')}"]
        for kind in (RANDOM, "coherent", "sign flip"):
            part = [row for row in mine if row["contaminated"] == kind]
            least = min((float(row["recall"]) for row in part), default=math.nan)
            count = max(total(part, "contaminated clients"), 1)
            cells.append(f"{total(part, 'found') / count:.2f} ({least:.2f})" if part else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def named(rows: Sequence[Row], limit: float = 1.0) -> str:
    """Markdown, a line for each cell with more than `limit` per cent of its clean clients flagged; "" for none."""
    heads = ["family", "contaminated", "share", "K", "flagged", "rate", "95 % interval", "cohorts touched"]
    lines = []
    for row in sorted(rows, key=lambda row: -float(row["false positives %"])):
        if float(row["false positives %"]) > limit:
            cells = [str(row[name]) for name in ("family", "contaminated", "share", "K")]
            cells += [f"{row['flagged clean']} of {row['clean clients']}", f"{row['false positives %']} %"]
            cells += [f"{row['95 % from']} to {row['95 % to']} %", f"{row['cohorts with one']} of {row['cohorts']}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *lines, ""]) if lines else ""


def figure(rows: Sequence[Row], path: Path) -> None:
    """Worst false-positive rate, and recall at 40 % of each contamination, over family and K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(str(row["family"]) for row in rows))
    sizes = sorted({int(row["K"]) for row in rows})
    panels: list[tuple[str, Callable[[Row], bool], Callable[[list[float]], float], str]] = [
        ("worst false positives, %", lambda row: True, max, "false positives %")
    ]
    panels += [
        (
            f"recall, {kind} 40 %",
            lambda row, kind=kind: (row["contaminated"], row["share"]) == (kind, 0.4),
            min,
            "recall",
        )
        for kind in (RANDOM, "coherent", "sign flip")
    ]
    canvas, axes = plt.subplots(
        1, len(panels), figsize=(11, 1.5 + 0.28 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (title, chosen, pick, column) in zip(axes, panels, strict=True):
        values = [
            [pick([float(r[column]) for r in rows if r["family"] == n and r["K"] == K and chosen(r)]) for K in sizes]
            for n in names
        ]
        rate = column == "recall"
        axis.imshow(values, aspect="auto", cmap="viridis" if rate else "magma_r", vmin=0, vmax=1 if rate else 10)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                dark = value < 0.5 if rate else value > 5
                axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
        axis.set(title=title, xlabel="K", xticks=range(len(sizes)), xticklabels=sizes)
        axis.title.set_fontsize(9)
    axes[0].set(yticks=range(len(names)), yticklabels=names)
    canvas.savefig(path, dpi=130)


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
    parser.add_argument("--set", choices=[*SETS], default="held-out")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 12, 20, 50, 100])
    parser.add_argument("--honest", type=int, default=300, help="clean clients in a cell without contamination")
    parser.add_argument("--families", nargs="+", help="some families only")
    parser.add_argument("--seed", type=int, default=0, help="first seed of every cell")
    parser.add_argument("--name", help="of the files, default that of the set")
    default = PROJECT / "docs" / "results" / "flags"
    parser.add_argument("--output_dir", type=Path, default=default)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for n in args.clients:
        print(f"K={n}: 99.9 % point of the shorth z {shorth_quantile(n):.1f}, rule {critical_z(n):.1f}")
    started, rows = time.process_time(), list[Row]()
    for name in args.families or SETS[args.set]:
        for kind, share in GRID:
            rows += [cell(args.set, name, kind, share, K, args.honest, args.seed) for K in args.clients]
        print(f"{name}: {time.process_time() - started:.0f} s", flush=True)
    stem = args.name or args.set.replace("-", "_")
    with open(args.output_dir / f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    above = named(rows)
    told = f"\n{len(rows)} cells; above 1 %:\n\n{above}" if above else f"\n{len(rows)} cells; none above 1 %.\n"
    (args.output_dir / f"{stem}.md").write_text(summary(rows) + told, encoding="utf-8")
    figure(rows, args.output_dir / f"{stem}.png")
    print(f"{args.output_dir / stem}.md written; {time.process_time() - started:.0f} s")


if __name__ == "__main__":
    main()
