"""Figures 11 to 13 of the paper, from finished runs of mg2l_ablations.py and mg2l_mappo.py.

    python benchmark/ablation_figures.py runs/* --out benchmark/results

Runs are told apart by the flags that differ from the defaults, with --base by the flags beside those that all runs have
in common; those of no figure are left out. Writes for each figure PNG and SVG: return and CL accuracy of z^i after
inference against steps, and for Fig. 12 also the losses of its parts c and d; and ablations.csv, which is
meta_test.csv of figures.py with the flags. Prints a Markdown table of the last evaluation: mean over seeds, and the
difference of each figure's first variant to the others, with 95 % bootstrap intervals. Variants without a run are
named, in the table and in the picture.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from figures import by_seed, draw, interval, read, resample, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from variants import changed_flags

SETTING = "hunting_target"
# Okabe and Ito's colours; MG2L has the one it has in all figures
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9"]
STYLES = ["-", "--", "-", "-.", ":"]  # for lines on top of each other
SAME_LENGTH = "--context-size 64 --context-sets 12 --inference-size 64 --rollout-context-size 64"
FIGURES = {  # the flags of each variant; differences are to the first
    "fig11_global_losses": {
        "": "MG2L (contrast)",
        "--global-loss none": "L_Q alone",
        "--global-loss dynamics": "dynamics prediction",
        "--global-loss task": "task prediction",
    },
    "fig12_schemes": {  # and the three forms of L_L
        "": "MG2L (infonce)",
        "--scheme global_only": "Global-Only",
        "--scheme local_only": "Local-Only",
        "--local-loss kl": "CSTL (kl)",
        "--local-loss cmi": "MG2L with eq. 24 (cmi)",
    },
    "fig13_aggregators": {  # each at the better of two rates, and PIA at both
        f"{SAME_LENGTH} --warmup-learning-rate 0.0005": "PIA, warm-up at 5e-4",
        SAME_LENGTH: "PIA",
        f"{SAME_LENGTH} --aggregator transformer": "transformer",
        f"{SAME_LENGTH} --aggregator gaussian_product": "Gaussian product",
        f"{SAME_LENGTH} --aggregator rnn": "RNN",
    },
}


def flags_of(args: dict) -> frozenset[str]:
    """{"--flag value", ...} of a run that differ from the defaults, as in the keys of FIGURES."""
    return split(changed_flags(args))


def split(flags: str) -> frozenset[str]:
    return frozenset(f"--{flag.strip()}" for flag in flags.split("--") if flag.strip())


def losses(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Fig. 12c and d of one run: steps and values of what cmi minimises, I_L1O - I_NCE, and of the consistency KL."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    upper, joint, kl = (
        np.array([event.value for event in events.Scalars(f"losses/{name}")])
        for name in ("leave_one_out_global", "info_nce_joint", "consistency_kl")
    )
    steps = [event.step for event in events.Scalars("losses/consistency_kl")]
    return {"I_L1O(z) - I_NCE(z, z^i), nats": (steps, upper - joint), "KL(q^i || q), nats per dimension": (steps, kl)}


def difference(ours: list[float], theirs: list[float]) -> str:
    """Difference of means over seeds, and its 95 % bootstrap interval where both have several."""
    mean, rng = f"{np.mean(ours) - np.mean(theirs):.1f}", np.random.default_rng(0)
    if min(len(ours), len(theirs)) == 1:
        return f"{mean} (a single seed among them)"
    low, high = np.percentile(resample(ours, rng) - resample(theirs, rng), [2.5, 97.5])
    return f"{mean} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--base", default="", help="flags of all runs, values as in args.json")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the scripts
    base, variants = split(args.base), defaultdict(list)  # flags -> runs, each its folder and rows
    for run in args.runs:
        rows = read(run)
        if not rows:
            print(f"not finished, left out: {run}")
            continue
        given = json.loads((run / "args.json").read_text())
        if given["script"] in ("mg2l_mappo", "mg2l_ablations") and rows[0]["setting"] == SETTING:
            flags = flags_of(given)
            if base <= flags:
                variants[flags - base].append((run, rows))
    if not variants:
        parser.error(f"got no finished run of {' '.join([SETTING, *sorted(base)])}, expected at least one")

    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "ablations.csv", "w", newline="") as file:
        tidy = [
            {"flags": " ".join(sorted(flags))} | row
            for flags in variants
            for _, rows in variants[flags]
            for row in rows
        ]
        writer = csv.DictWriter(file, tidy[0])
        writer.writeheader()
        writer.writerows(tidy)
    print("| figure | variant | flags | seeds | exploration | after inference | first one less this |", end="")
    print(" CL accuracy of z^i | seconds |\n" + "|---" * 9 + "|")
    for name, wanted in FIGURES.items():
        rows_of_panels = 2 if name == "fig12_schemes" else 1
        figure, axes = plt.subplots(rows_of_panels, 2, figsize=(9, 3.3 * rows_of_panels + 0.6), layout="constrained")
        axes, returns = axes.flatten(), {}
        axes[0].set(ylabel="meta-test return (posterior)")
        axes[1].set(ylabel="CL accuracy of z^i at meta-test")
        for (flags, label), colour, style in zip(wanted.items(), COLOURS, STYLES, strict=False):
            found = variants[split(flags) - base]
            cells = [name, label, f"`{flags}`" if flags else "defaults", str(len(found))]
            if not found:
                print("| " + " | ".join([*cells, "no run", "no run", "", "", ""]) + " |")
                axes[0].plot([], [], color=colour, label=f"{label} (no run)")
                continue
            rows = [row for _, rows in found for row in rows]
            steps = sorted({row["step"] for row in rows})
            end = dict(step=steps[-1])
            cells += [interval(by_seed(rows, "return", phase=phase, **end)) for phase in ("prior", "posterior")]
            returns[label] = by_seed(rows, "return", phase="posterior", **end)
            cells.append(difference(next(iter(returns.values())), returns[label]) if len(returns) > 1 else "")
            accuracy = by_seed(rows, "accuracy", phase="posterior", **end)
            cells.append(f"{np.mean(accuracy):.2f}" if accuracy else "")
            print("| " + " | ".join([*cells, f"{np.median(by_seed(rows, 'wall_seconds')):.0f}"]) + " |")
            for axis, key in zip(axes, ("return", "accuracy"), strict=False):
                curve = [by_seed(rows, key, step=step, phase="posterior") for step in steps]
                if all(curve):
                    draw(axis, [step / 1000 for step in steps], curve, label, colour, style)
            if len(axes) == 4:
                for axis, what in zip(axes[2:], losses(found[0][0]), strict=True):
                    each = [losses(run)[what] for run, _ in found]
                    values = np.array([series for _, series in each])  # [seeds, iterations]
                    smooth = np.array([np.convolve(one, np.ones(5) / 5, "valid") for one in values])
                    steps = [step / 1000 for step in each[0][0][4:]]
                    draw(axis, steps, list(map(list, smooth.T)), label, colour, style)
                    axis.set(ylabel=what)
                axes[3].set_yscale("symlog", linthresh=1)
        for axis in axes:
            axis.set(xlabel="environment steps (thousands)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        save(figure, args.out / f"{name}.png")
        plt.close(figure)


if __name__ == "__main__":
    main()
