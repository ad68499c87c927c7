"""All settings together, with rliable (Agarwal et al. 2021): interquartile mean and probability of improvement.

    python benchmark/aggregate.py                          # of benchmark/results/meta_test.csv
    python benchmark/aggregate.py --settings hunting_target "hunting_target num_preys=2"

Reads the table that benchmark/figures.py writes. A score is the return after inference at the end of a run, 0 at the
mean of the floor's runs and 1 at the oracle's on the same setting. Settings without both, whose oracle is not clearly
above its floor, or with fewer than three seeds of MG2L are left out, and so are methods that lack one of the rest: all
are named. Each method counts with as many seeds on every setting as it has on the one where it has fewest. Intervals
are 95 %, stratified bootstrap.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from figures import COLOURS, FLOOR, ORACLE, by_seed, clearly_above
from rliable import library, metrics


def final_returns(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Setting -> script -> return after inference at its last step, one per seed."""
    out = {}
    for setting in sorted({row["setting"] for row in rows}):
        here = [row for row in rows if row["setting"] == setting]
        out[setting] = {}
        for script in sorted({row["script"] for row in here}):
            last = max(row["step"] for row in here if row["script"] == script)
            out[setting][script] = by_seed(here, "return", script=script, step=last, phase="posterior")
    return out


def normalised(returns: dict) -> tuple[dict[str, np.ndarray], list[str]]:
    """Scores [seeds, settings] of every script that has all settings, and lines that name what was left out."""
    scores, left_out, settings = {}, [], []
    for setting, by_script in returns.items():
        if not {ORACLE, FLOOR} <= set(by_script):
            left_out.append(f"{setting}: no runs of oracle and floor")
        elif not clearly_above(by_script[ORACLE], by_script[FLOOR]):
            left_out.append(f"{setting}: the oracle is not clearly above the floor")
        elif len(by_script.get("mg2l_mappo", [])) < 3:
            left_out.append(f"{setting}: fewer than three seeds of mg2l_mappo")
        else:
            settings.append(setting)
    for script in COLOURS:
        lacking = [setting for setting in settings if script not in returns[setting]]
        if lacking or not settings:
            left_out.append(f"{script}: no run on {', '.join(lacking)}")
            continue
        seeds = min(len(returns[setting][script]) for setting in settings)
        columns = []
        for setting in settings:
            low, high = (np.mean(returns[setting][of]) for of in (FLOOR, ORACLE))
            columns.append((np.array(returns[setting][script][:seeds]) - low) / (high - low))
        scores[script] = np.stack(columns, 1)
    return scores, left_out


def mark(axis, line: int, colour: str, mean, interval, seeds: int) -> str:
    """Draw a mean and its interval; returns them as text. A single seed has no interval."""
    mean, (low, high) = float(np.ravel(mean)[0]), np.ravel(interval)
    axis.plot([mean], [line], "o", color=colour)
    if seeds < 2:
        return f"{mean:.2f} (one seed)"
    axis.plot([low, high], [line, line], color=colour, linewidth=6, alpha=0.4, solid_capstyle="butt")
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, default=Path("benchmark/results/meta_test.csv"), help="of figures.py")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
    parser.add_argument("--settings", nargs="+", help="the settings to take (default: all of the table)")
    args = parser.parse_args()
    if not args.table.is_file():
        parser.error(f"--table: got {args.table}, expected a table written by figures.py")
    with open(args.table) as file:
        rows = [row | dict(step=int(row["step"])) for row in csv.DictReader(file)]
    known = sorted({row["setting"] for row in rows})
    if unknown := set(args.settings or []) - set(known):
        parser.error(f"--settings: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    rows = [row for row in rows if row["setting"] in (args.settings or known)]
    for row in rows:
        row["return"] = float(row["return"])
    scores, left_out = normalised(final_returns(rows))
    for line in left_out:
        print(f"left out: {line}")
    if "mg2l_mappo" not in scores:
        parser.error(f"{args.table}: got no setting on which MG2L, oracle and floor have runs, expected at least one")
    np.random.seed(0)  # rliable draws from the global generator
    means, intervals = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2000)
    pairs = {f"mg2l_mappo,{other}": (scores["mg2l_mappo"], scores[other]) for other in scores if other != "mg2l_mappo"}
    better, better_interval = library.get_interval_estimates(pairs, metrics.probability_of_improvement, reps=2000)

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    head = ("script", "seeds x settings", "interquartile mean of scores", "probability that MG2L is better")
    print("| " + " | ".join([*head, "standard deviation over seeds"]) + " |")
    print("|---" * 5 + "|")
    for k, script in enumerate(scores):
        cells = [script, "{} x {}".format(*scores[script].shape)]
        cells.append(mark(axes[0], k, COLOURS[script], means[script], intervals[script], len(scores[script])))
        cells.append("")
        if script != "mg2l_mappo":
            pair = f"mg2l_mappo,{script}"
            seeds = min(len(scores["mg2l_mappo"]), len(scores[script]))
            cells[-1] = mark(axes[1], k, COLOURS[script], better[pair], better_interval[pair], seeds)
        several = len(scores[script]) > 1
        cells.append(f"{np.std(scores[script], axis=0, ddof=1).mean():.2f}" if several else "")
        print("| " + " | ".join(cells) + " |")
    axes[0].set_yticks(range(len(scores)), list(scores))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="interquartile mean, 0 = floor, 1 = oracle")
    axes[1].set(xlabel="probability that MG2L is better", xlim=(-0.03, 1.03))
    axes[1].axvline(0.5, color="#777777", linewidth=1, linestyle=":")
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(args.out / f"aggregate{suffix}", dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()
