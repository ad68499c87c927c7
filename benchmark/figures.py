"""Tables and figures of finished runs, from their folders alone.

    python benchmark/figures.py runs/* --out benchmark/results
    python benchmark/figures.py benchmark/results/meta_test.csv --out elsewhere    # again, from the table it wrote
    python benchmark/figures.py benchmark/results/meta_test.csv runs/*             # the same and more runs

A run replaces what was given before it of the same script, setting and seed, and says so. Writes into --out
meta_test.csv (one tidy row per run, step, task and phase), curves.png and .svg (Fig. 6) and adaptation.png and .svg
(Fig. 7), and prints a Markdown table: the last evaluation of every script and environment, mean and 95 % bootstrap
interval over seeds, and the gap closed, (R - R_floor) / (R_oracle - R_floor), where runs of task_given.py give both;
then the means of adaptation.png. A single seed has no interval. A folder without a finished run is named and left out.
The columns commit and hardware are those of where a run was first read, not of the run.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ORACLE, FLOOR, CODE = "task_given", "task_given none", "task_given code"
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = {"mg2l_mappo": "#D55E00", "ma_pearl": "#009E73", "mix_mate": "#CC79A7", ORACLE: "#0072B2", FLOOR: "#777777"}
COLOURS[CODE] = "#56B4E9"  # told as many numbers as z has
COLOURS |= {f"{CODE} x0.5": "#000000", f"{ORACLE} one-hot x8": "#A0522D"}  # with --label-scale
AS_PRINTED = "mg2l_mappo tables"  # with the flags of Tables I to III
COLOURS[AS_PRINTED] = "#E69F00"


def read(run: Path) -> list[dict]:
    """Tidy rows of one run: means over episodes and copies for each step, task and phase; none if it is unfinished."""
    if not all((run / name).is_file() for name in ("args.json", "meta_test.csv")):  # just begun, or a folder of runs
        return []
    args = json.loads((run / "args.json").read_text())
    script = args["script"]
    oracle_label = "parameters" if args["env_id"] == "hopper_param" else "one-hot"
    scale = args.get("label_scale", 1)
    if args.get("task_label", oracle_label) != oracle_label or scale != 1:
        script += f" {args['task_label']}" + (f" x{scale:g}" if scale != 1 else "")
    if script == "mg2l_mappo" and (args["local_loss"], args["encoder_blocks"], args["kl_coef"]) == ("cmi", 2, 0.1):
        script = AS_PRINTED
    setting = " ".join([args["env_id"], *args["env_kwargs"]])
    with open(run / "meta_test.csv") as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]["step"] if rows else None
    rows = [row for row in rows if row["phase"] != "curve" or row["step"] == last]  # resumed for longer: it has two
    if not any(row["phase"] == "curve" for row in rows):  # the last evaluation alone has it
        return []
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    speed = events.Scalars("charts/SPS")[-1]
    if speed.step > int(last):  # resumed for longer, and stopped before its next evaluation
        return []
    told = {(row["context_steps"], row["run"]) for row in rows if row["phase"] == "curve"}
    groups, left = defaultdict(list), Counter(begun for begun, _ in told)  # copies that got so far
    for row in rows:
        if row["phase"] == "curve" and left[row["context_steps"]] < max(left.values()):
            continue  # some episodes have ended before: the rest would be those that went well
        begun = int(row["context_steps"]) if row["phase"] == "curve" else ""
        groups[int(row["step"]), int(row["task"]), row["phase"], begun].append(row)
    tidy = []
    for (step, task, phase, begun), members in groups.items():
        new = dict(script=script, setting=setting, seed=args["seed"], step=step, task=task, phase=phase)
        new["context_steps"] = begun
        for key in ("return", "accuracy", "probe"):
            values = [float(row[key]) for row in members if row[key]]
            new[key] = round(float(np.mean(values)), 4) if values else ""
        tidy.append(new | dict(wall_seconds=round(speed.step / speed.value), threads=args["num_threads"]))
    return tidy


def read_table(path: Path) -> dict[tuple, list[dict]]:
    """Tidy rows that this command has written before, by script, setting and seed."""
    by_run = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            row |= {key: int(row[key]) for key in ("seed", "step", "task", "wall_seconds", "threads")}
            row |= {key: float(row[key]) for key in ("return", "accuracy", "probe") if row[key]}
            row["context_steps"] = int(row["context_steps"]) if row["context_steps"] else ""
            by_run[row["script"], row["setting"], row["seed"]].append(row)
    return by_run


def resample(values: list[float], rng) -> np.ndarray:
    """Means of 10,000 bootstrap samples of the seeds."""
    return rng.choice(values, (10_000, len(values))).mean(1)


def interval(values: list[float], digits: int = 1) -> str:
    """Mean and 95 % bootstrap interval of the mean, as text."""
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f} (one seed)"
    low, high = np.percentile(resample(values, np.random.default_rng(0)), [2.5, 97.5])
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def clearly_above(oracle: list[float], floor: list[float]) -> bool:
    """Whether the 95 % bootstrap interval of the difference of their means lies above 0."""
    rng = np.random.default_rng(0)
    return bool(np.percentile(resample(oracle, rng) - resample(floor, rng), 2.5) > 0)


def gap_closed(method: list[float], oracle: list[float], floor: list[float]) -> str:
    """(R - R_floor) / (R_oracle - R_floor) with its 95 % interval, all three means resampled together."""
    if not clearly_above(oracle, floor):
        return "none: the oracle is not clearly above the floor"
    gap = (np.mean(method) - np.mean(floor)) / (np.mean(oracle) - np.mean(floor))
    if min(len(method), len(oracle), len(floor)) < 2:
        return f"{gap:.2f} (a single seed among them)"
    rng = np.random.default_rng(0)
    m, o, f = (resample(values, rng) for values in (method, oracle, floor))
    low, high = np.percentile((m - f) / (o - f), [2.5, 97.5])
    return f"{gap:.2f} [{low:.2f}, {high:.2f}]"


def by_seed(rows: list[dict], key: str, **where) -> list[float]:
    """One number per seed: the mean over tasks of the rows that match."""
    values = defaultdict(list)
    for row in rows:
        if row[key] != "" and all(row[name] == value for name, value in where.items()):
            values[row["seed"]].append(row[key])
    return [float(np.mean(v)) for v in values.values()]


def draw(axis, x: list, curve: list[list[float]], name: str, colour: str, style: str = "-") -> None:
    """Mean and 95 % bootstrap interval over seeds; a single seed is drawn without one."""
    count = f"{len(curve[0])} seeds" if len(curve[0]) > 1 else "one seed"
    axis.plot(x, [np.mean(values) for values in curve], color=colour, linestyle=style, label=f"{name} ({count})")
    if len(curve[0]) > 1:
        rng = np.random.default_rng(0)
        band = [np.percentile(resample(values, rng), [2.5, 97.5]) for values in curve]
        axis.fill_between(x, *np.transpose(band), color=colour, alpha=0.2, linewidth=0)


def save(figure, path: Path) -> None:
    figure.suptitle("mean over seeds, 95 % bootstrap interval", fontsize=9)
    if figure.get_layout_engine() is None:
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))  # below the title
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=110, metadata={"Date": None} if suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, and tables written by this command")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
    args = parser.parse_args()
    if missing := [str(run) for run in args.runs if not run.exists()]:
        parser.error(f"runs: got {', '.join(missing)}, expected run folders or tables that exist")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = dict(commit=commit, hardware=f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}")
    by_run = {}
    for run in args.runs:
        if run.suffix == ".csv":
            new = read_table(run)
        elif not (of_run := read(run)):
            print(f"not finished, left out: {run}")
            continue
        elif of_run[0]["script"] not in COLOURS:
            print(f"a run of {of_run[0]['script']}, which these figures do not show, left out: {run}")
            continue
        else:
            name = tuple(of_run[0][key] for key in ("script", "setting", "seed"))
            new = {name: [row | where for row in of_run]}
        for name in by_run.keys() & new.keys():
            print(f"{run}: in place of what was given before of {', '.join(map(str, name))}")
        by_run |= new
    rows = [row for of_run in by_run.values() for row in of_run]
    if not rows:
        parser.error("got no finished run, expected at least one")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "meta_test.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    settings, adaptation = sorted({row["setting"] for row in rows}), []
    head = ("setting", "script", "seeds", "exploration (prior)", "after inference (posterior)", "gap closed")
    print("| " + " | ".join([*head, "CL accuracy of z^i", "probe", "seconds"]) + " |")
    print("|---" * 9 + "|")
    columns, lines = min(2, len(settings)), -(-len(settings) // 2)  # two settings side by side
    learning, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 4.2 * lines), squeeze=False)
    adapting, more_axes = plt.subplots(2 * lines, columns, figsize=(4.5 * columns, 6.6 * lines), squeeze=False)
    for k, setting in enumerate(settings):
        line, column = divmod(k, columns)
        axis, return_axis, accuracy_axis = axes[line, column], *more_axes[2 * line : 2 * line + 2, column]
        here = [row for row in rows if row["setting"] == setting]
        last = {script: max([row["step"] for row in here if row["script"] == script], default=0) for script in COLOURS}
        final = {s: by_seed(here, "return", script=s, step=last[s], phase="posterior") for s in COLOURS}
        oracle_tasks, floor_tasks = ({row["task"] for row in here if row["script"] == s} for s in (ORACLE, FLOOR))
        comparable = oracle_tasks and oracle_tasks == floor_tasks  # a one-hot has no name for a held-out task
        for script in [script for script in COLOURS if final[script]]:
            own = [row for row in here if row["script"] == script]
            at_end = dict(step=last[script], phase="posterior")
            gap = gap_closed(final[script], final[ORACLE], final[FLOOR]) if comparable else ""
            cells = [setting, script, str(len(final[script]))]
            cells += [interval(by_seed(own, "return", step=last[script], phase="prior")), interval(final[script]), gap]
            for key in ("accuracy", "probe"):
                values = by_seed(own, key, **at_end)
                cells.append(f"{np.mean(values):.2f}" if values else "")
            cells.append(f"{np.median(by_seed(own, 'wall_seconds')):.0f}")
            print("| " + " | ".join(cells) + " |")

            steps = sorted({row["step"] for row in own})
            curve = [by_seed(own, "return", step=step, phase="posterior") for step in steps]
            draw(axis, [step / 1000 for step in steps], curve, script, COLOURS[script])
            begun = {row["context_steps"] for row in own if row["phase"] == "curve"}
            begun = sorted(begun)
            for each, key in ((return_axis, "return"), (accuracy_axis, "accuracy")):
                curve = [by_seed(own, key, phase="curve", context_steps=steps) for steps in begun]
                # a point that only some seeds have is of those that went well
                seeds = max(map(len, curve), default=0)
                known = [point for point in zip(begun, curve, strict=True) if 0 < len(point[1]) == seeds]
                if known:
                    draw(each, *map(list, zip(*known, strict=True)), script, COLOURS[script])
                if key == "return":
                    points = [f"{steps}: {np.mean(values):.1f}" for steps, values in known]
                    adaptation.append(f"| {setting} | {script} | {', '.join(points)} |")
        axis.set_title(setting, fontsize=9)
        axis.set(xlabel="environment steps (thousands)", ylabel="meta-test return (posterior)")
        return_axis.set_title(setting, fontsize=9)
        return_axis.set(xlabel="context (steps of exploration)", ylabel="return of an episode")
        accuracy_axis.set(xlabel="context (steps of exploration)", ylabel="CL accuracy of z^i")
        for each in (axis, return_axis):
            below = dict(loc="upper left", bbox_to_anchor=(-0.2, -0.2), ncols=2, frameon=False)
            each.legend(fontsize=7.5, columnspacing=1, **below)
    for axis in [*axes.flat, *more_axes.flat]:
        axis.set_visible(axis.has_data())
    save(learning, args.out / "curves.png")
    save(adapting, args.out / "adaptation.png")
    print("\n| setting | script | return of an episode after so many transitions of exploration |\n" + "|---" * 3 + "|")
    print("\n".join(adaptation))


if __name__ == "__main__":
    main()
