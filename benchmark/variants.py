"""What a flag does: a table of finished runs, one row for each set of flags that differ from the script's defaults.

    python benchmark/variants.py runs/*

For each setting and script, the runs with the defaults come first. Return, accuracy and seconds are those of the last
evaluation, as in benchmark/figures.py, whose intervals these are; "training" is the mean return of the last ten
iterations, which is steadier, since it averages over hundreds of episodes. "read right in training" is of the contexts
that these acted on, by z, by z^i, and by the z^i of the agent that is worst at it. `--meta-test-only` takes the returns
and the first accuracy from the evaluation that `--meta-test RUN` wrote beside the run, which may be of more meta-test
runs (`--eval-copies`) than the one in training.
"""

import argparse
import csv
import importlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from figures import interval, read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the scripts
import envs  # noqa: E402

IN_TRAINING = ("cl_accuracy_global", "cl_accuracy_local", "cl_accuracy_local_worst")
NOT_OF_THE_METHOD = {"env_id", "env_kwargs", "seed", "run_dir", "run_name", "num_threads", "cuda", "total_timesteps"}
NOT_OF_THE_METHOD |= {"resume", "meta_test", "capture_video", "eval_interval", "checkpoint_interval"}
NOT_OF_THE_METHOD |= {"track", "wandb_project_name", "wandb_entity", "checkpoint_minutes"}


def changed_flags(args: dict) -> str:
    """The flags of a run's args.json that are not the script's defaults for its environment, as one would type them."""
    script = importlib.import_module(args["script"])
    column = envs.ENV_IDS.index(args["env_id"])
    flags = []
    for name, value in args.items():
        if name == "script" or name in NOT_OF_THE_METHOD:
            continue
        default = getattr(script.Args(), name, None)
        if default is None and name in script.ENV_DEFAULTS:
            default = script.ENV_DEFAULTS[name][column]
        if value != default:
            flags.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(flags)


def last_in_training(run: Path) -> list[float | None]:
    """Means over the last ten iterations, None if not logged: of the return, and of the accuracies IN_TRAINING."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    logged = [f"charts/{name}" for name in ("episodic_return", *IN_TRAINING)]
    logged = [events.Scalars(name)[-10:] if name in events.Tags()["scalars"] else [] for name in logged]
    return [float(np.mean([event.value for event in last])) if last else None for last in logged]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--meta-test-only", action="store_true", help="evaluation of --meta-test, meta_test_only.csv")
    args = parser.parse_args()
    groups = defaultdict(lambda: defaultdict(list))
    for run in args.runs:
        rows = read(run)
        if not rows:
            print(f"not finished, left out: {run}")
            continue
        if args.meta_test_only and not (run / "meta_test_only.csv").is_file():
            print(f"no meta_test_only.csv, left out: {run}")
            continue
        flags = changed_flags(json.loads((run / "args.json").read_text()))
        group = groups[rows[0]["setting"], rows[0]["script"], flags]
        group["seconds"].append(rows[0]["wall_seconds"])
        last = [row for row in rows if row["step"] == max(row["step"] for row in rows)]
        if args.meta_test_only:
            with open(run / "meta_test_only.csv") as file:
                last = list(csv.DictReader(file))
        for phase in ("prior", "posterior"):
            group[phase].append(float(np.mean([float(row["return"]) for row in last if row["phase"] == phase])))
        told = [float(row["accuracy"]) for row in last if row["phase"] == "posterior" and row["accuracy"] != ""]
        group["accuracy"] += [float(np.mean(told))] if told else []
        returned, *told = last_in_training(run)
        group["training"].append(returned)
        for key, value in zip(IN_TRAINING, told, strict=True):
            group[key] += [] if value is None else [value]
    print("| setting | script | flags | seeds | exploration | after inference | training | accuracy of z^i |", end="")
    print(" read right in training by z, z^i, worst z^i | seconds |\n" + "|---" * 10 + "|")
    for (setting, script, flags), group in sorted(groups.items()):
        cells = [setting, script, f"`{flags}`" if flags else "defaults", str(len(group["posterior"]))]
        cells += [interval(group[key]) for key in ("prior", "posterior", "training")]
        for keys in (("accuracy",), IN_TRAINING):
            cells.append(", ".join(f"{np.mean(group[key]):.2f}" for key in keys if group[key]))
        print("| " + " | ".join([*cells, f"{np.median(group['seconds']):.0f}"]) + " |")


if __name__ == "__main__":
    main()
