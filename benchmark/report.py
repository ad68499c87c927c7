"""The table and the learning curves of finished runs, from their folders alone.

    python benchmark/report.py runs/* --out benchmark/results

Writes meta_test.csv (one tidy row per run folder, step, task and phase) and curves.png into --out, and prints a
Markdown table: the last evaluation of every script and environment, mean and 95 % bootstrap interval over seeds. A
single seed has no interval. Runs that are not finished are named and left out.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = {"mg2l_mappo": "#D55E00", "task_given": "#0072B2", "task_given none": "#777777"}


def read(run: Path) -> list[dict]:
    """Tidy rows of one run: means over episodes and copies for each step, task and phase; none if it is unfinished."""
    args = json.loads((run / "args.json").read_text())
    script = run.name.split("__")[1] if "__" in run.name else ("mg2l_mappo" if "kl_coef" in args else "task_given")
    if args.get("task_label") == "none":
        script += " none"
    setting = " ".join([args["env_id"], *args["env_kwargs"]])
    with open(run / "meta_test.csv") as file:
        rows = list(csv.DictReader(file))
    if not any(row["phase"] == "curve" for row in rows):  # the last evaluation alone has it
        return []
    groups = defaultdict(list)
    for row in rows:
        if row["phase"] != "curve":
            groups[int(row["step"]), int(row["task"]), row["phase"]].append(row)
    tidy = []
    for (step, task, phase), members in sorted(groups.items()):
        new = dict(script=script, setting=setting, seed=args["seed"], step=step, task=task, phase=phase)
        for key in ("return", "accuracy", "probe"):
            values = [float(row[key]) for row in members if row[key]]
            new[key] = round(float(np.mean(values)), 4) if values else ""
        tidy.append(new)
    return tidy


def interval(values: list[float]) -> str:
    """Mean and 95 % bootstrap interval of the mean, as text."""
    values = np.array(values)
    if len(values) < 2:
        return f"{values.mean():.1f} (one seed)"
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        new = read(run)
        if not new:
            print(f"not finished, left out: {run}")
        rows += new
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "meta_test.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    settings = sorted({row["setting"] for row in rows})
    print("| setting | script | seeds | exploration (prior) | after inference (posterior) | CL accuracy of z^i |")
    print("|---|---|---|---|---|---|")
    figure, axes = plt.subplots(1, len(settings), figsize=(4.5 * len(settings), 3.4), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=True):
        for script, colour in COLOURS.items():
            own = [row for row in rows if row["setting"] == setting and row["script"] == script]
            if not own:
                continue

            def by_seed(step, phase, key, own=own):
                values = defaultdict(list)
                for row in own:
                    if row["step"] == step and row["phase"] == phase and row[key] != "":
                        values[row["seed"]].append(row[key])
                return [float(np.mean(v)) for v in values.values()]  # tasks weigh alike

            steps = sorted({row["step"] for row in own})
            seeds = len({row["seed"] for row in own})
            accuracy = by_seed(steps[-1], "posterior", "accuracy")
            prior, posterior = (interval(by_seed(steps[-1], phase, "return")) for phase in ("prior", "posterior"))
            shown = f"{np.mean(accuracy):.2f}" if accuracy else "none"
            print(f"| {setting} | {script} | {seeds} | {prior} | {posterior} | {shown} |")
            curve = np.array([by_seed(step, "posterior", "return") for step in steps])  # [step, seed]
            thousands = np.array(steps) / 1000
            count = f"{seeds} seeds" if seeds > 1 else "one seed"
            axis.plot(thousands, curve.mean(1), color=colour, label=f"{script} ({count})")
            if seeds > 1:
                axis.fill_between(thousands, curve.min(1), curve.max(1), color=colour, alpha=0.2, linewidth=0)
        axis.set(title=setting, xlabel="environment steps (thousands)", ylabel="meta-test return (posterior)")
        axis.legend(fontsize=8)
    figure.suptitle("mean over seeds; the band is their range", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
