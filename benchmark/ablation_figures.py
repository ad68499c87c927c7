"""Figures 11 to 13 of the paper, from finished runs of mg2l_ablations.py and mg2l_mappo.py.

    python benchmark/ablation_figures.py runs/* --out benchmark/results

Runs are told apart by the flags that differ from the defaults; those of no figure are left out. Writes for each figure
PNG and SVG: return and CL accuracy of z^i after inference against steps, and for Fig. 12 also the losses of its parts c
and d. Prints a Markdown table of the last evaluation: mean and 95 % bootstrap interval over seeds. Variants without a
run are named, in the table and in the picture.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from figures import by_seed, draw, interval, read, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from variants import changed_flags

SETTING = "hunting_target"
# Okabe and Ito's colours; MG2L has the one it has in all figures
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"]
SAME_LENGTH = "--context-size 64 --context-sets 12 --inference-size 64 --rollout-context-size 64"
FIGURES = {  # the flags of each variant; MG2L itself comes first
    "fig11_global_losses": {
        "": "MG2L (contrast)",
        "--global-loss none": "L_Q alone",
        "--global-loss dynamics": "dynamics prediction",
        "--global-loss task": "task prediction",
    },
    "fig12_schemes": {
        "": "MG2L",
        "--scheme global_only": "Global-Only",
        "--scheme local_only": "Local-Only",
        "--local-loss kl": "CSTL (consistency)",
    },
    "fig13_aggregators": {
        SAME_LENGTH: "PIA",
        f"{SAME_LENGTH} --aggregator transformer": "transformer",
        f"{SAME_LENGTH} --aggregator gaussian_product": "Gaussian product",
        f"{SAME_LENGTH} --aggregator rnn": "RNN",
    },
    "local_losses": {"": "infonce (default)", "--local-loss cmi": "cmi (eq. 24)", "--local-loss kl": "kl"},
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
    return {"I_L1O(z; c) - I_NCE(z, z^i; c)": (steps, upper - joint), "KL(q^i || q), mean over dimensions": (steps, kl)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the scripts
    variants = defaultdict(list)  # flags -> runs, each its folder and rows
    for run in args.runs:
        given = json.loads((run / "args.json").read_text())
        if given["script"] not in ("mg2l_mappo", "mg2l_ablations"):
            continue
        rows = read(run)
        if not rows:
            print(f"not finished, left out: {run}")
        elif rows[0]["setting"] == SETTING:
            variants[flags_of(given)].append((run, rows))
    if not variants:
        parser.error(f"got no finished run of {SETTING}, expected at least one")

    args.out.mkdir(parents=True, exist_ok=True)
    print("| figure | variant | flags | seeds | exploration | after inference | CL accuracy of z^i | seconds |")
    print("|---" * 8 + "|")
    for name, wanted in FIGURES.items():
        panels = 4 if name.startswith("fig12") else 2
        figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.6))
        axes[0].set(ylabel="meta-test return (posterior)")
        axes[1].set(ylabel="CL accuracy of z^i at meta-test")
        for (flags, label), colour in zip(wanted.items(), COLOURS, strict=False):
            found = variants[split(flags)]
            cells = [name, label, f"`{flags}`" if flags else "defaults", str(len(found))]
            if not found:
                print("| " + " | ".join([*cells, "no run", "no run", "", ""]) + " |")
                axes[0].plot([], [], color=colour, label=f"{label} (no run)")
                continue
            rows = [row for _, rows in found for row in rows]
            steps = sorted({row["step"] for row in rows})
            end = dict(step=steps[-1])
            cells += [interval(by_seed(rows, "return", phase=phase, **end)) for phase in ("prior", "posterior")]
            accuracy = by_seed(rows, "accuracy", phase="posterior", **end)
            cells.append(f"{np.mean(accuracy):.2f}" if accuracy else "")
            print("| " + " | ".join([*cells, f"{np.median(by_seed(rows, 'wall_seconds')):.0f}"]) + " |")
            for axis, key in zip(axes, ("return", "accuracy"), strict=False):
                curve = [by_seed(rows, key, step=step, phase="posterior") for step in steps]
                if all(curve):
                    draw(axis, [step / 1000 for step in steps], curve, label, colour)
            if panels == 4:
                for axis, what in zip(axes[2:], losses(found[0][0]), strict=True):
                    each = [losses(run)[what] for run, _ in found]
                    values = np.array([series for _, series in each])  # [seeds, iterations]
                    smooth = np.array([np.convolve(one, np.ones(5) / 5, "valid") for one in values])
                    draw(axis, [step / 1000 for step in each[0][0][4:]], list(map(list, smooth.T)), label, colour)
                    axis.set(ylabel=what)
        for axis in axes:
            axis.set(xlabel="environment steps (thousands)")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
        save(figure, args.out / f"{name}.png")
        plt.close(figure)


if __name__ == "__main__":
    main()
