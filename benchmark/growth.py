"""How time per step and memory grow with agents, tasks, copies and context size.

    python benchmark/growth.py --out benchmark/results    # about ten minutes

Short runs of mg2l_mappo.py on hunting_target on one thread, one size changed at a time: time per step is that of the
second and third iteration of three (collection of context and encoder updates in each, evaluation left out), memory
the peak of the process; context size with 4 sets. Prints a Markdown table with the exponent k of the fit size**k to
the upper half of the sizes, where what does not grow weighs least (of four sizes, a line through two points), and
writes growth.png and growth.svg.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SMALL = dict(warmup_episodes=40, warmup_updates=1, context_interval=1, context_copies=8, update_epochs=15, seed=1)
SIZES = {  # what is changed: its sizes, and the flags of a size
    "agents": ([3, 6, 12, 24, 48], lambda n: {"env-kwargs": [f"num_predators={n}"], "buffer-size": 6_000 * n}),
    "tasks": ([2, 4, 8, 16, 32, 64], lambda n: {"env-kwargs": [f"num_preys={n}"], "buffer-size": 18_000 * n}),
    "copies": ([8, 32, 128, 512, 1024], lambda n: {"num-envs": n}),
    "context size": ([16, 64, 256, 1024], lambda n: {"context-size": n, "context-sets": 4}),
}


def measure(flags: dict) -> tuple[float, float]:
    """Milliseconds per step of training, and peak memory in MiB, of one short run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {key.replace("_", "-"): value for key, value in SMALL.items()} | flags
        command = [sys.executable, str(ROOT / "mg2l_mappo.py"), "--env-id", "hunting_target", "--num-threads", "1"]
        for name, value in flags.items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        tasks = int(flags.get("env-kwargs", ["num_preys=3"])[0].split("=")[1]) if "preys" in str(flags) else 3
        per_iteration = 100 * flags.get("num-envs", 32)
        context = tasks * 12 * (SMALL["warmup_episodes"] + 2 * SMALL["context_copies"])
        command += ["--total-timesteps", str(3 * per_iteration + context), "--eval-copies", str(max(32, tasks))]
        command += ["--eval-interval", "1000000000", "--run-dir", f"{folder}/runs"]
        with open(Path(folder, "log"), "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)  # usage of this process alone
            log.seek(0)
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"{' '.join(command[1:])} failed: {log.read().splitlines()[-1:]}")
        (run,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run))
        events.Reload()
        phases = [[one.value for one in events.Scalars(f"time/{name}")] for name in ("rollout", "ppo", "encoder")]
        seconds = sum(phase[2] - phase[0] for phase in phases)
        steps = events.Scalars("time/ppo")[2].step - events.Scalars("time/ppo")[0].step
    return 1000 * seconds / steps, usage.ru_maxrss / 1024


def exponent(sizes: list[int], values: list[float]) -> float:
    half = len(sizes) // 2
    return np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, len(SIZES), figsize=(10, 5.4), layout="constrained", sharey="row")
    print("| what grows | sizes | ms per step | exponent | peak MiB | exponent |\n|" + "---|" * 6)
    for column, (what, (sizes, flags_of)) in zip(axes.T, SIZES.items(), strict=True):
        time, memory = zip(*(measure(flags_of(size)) for size in sizes), strict=True)
        cells = [what, ", ".join(map(str, sizes)), ", ".join(f"{one:.2f}" for one in time)]
        cells += [f"{exponent(sizes, time):.2f}", ", ".join(f"{one:.0f}" for one in memory)]
        print("| " + " | ".join([*cells, f"{exponent(sizes, memory):.2f}"]) + " |", flush=True)
        for axis, values, unit in zip(column, (time, memory), ("ms per step", "peak memory, MiB"), strict=True):
            axis.loglog(sizes, values, "o-", color="#D55E00")
            axis.set(xlabel=what, title=f"upper half: size$^{{{exponent(sizes, values):.2f}}}$")
            axis.set_xticks(sizes, sizes, fontsize=8)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.set_ylabel(unit if what == "agents" else "")
    for suffix in ("png", "svg"):
        figure.savefig(args.out / f"growth.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else None)


if __name__ == "__main__":
    main()
