"""Random search over what is a baseline's own: its KL weight, encoder and context; MAPPO stays that of all scripts.

    python benchmark/tuning.py ma_pearl --draws 40 --jobs 2
    python benchmark/tuning.py ma_pearl --draws 40 --jobs 2 --finalists 4 --seeds 1 2 3 4 5    # the best of them again
    python benchmark/tuning.py ma_pearl --env-id spread_target --draws 20

Draw 0 is STARTS, by hand; every other takes a value of SPACES at random for each argument, the same ones whenever it is
asked for. hunting_target with two preys or spread_target with two agents and three landmarks, 200,000 steps, one
thread; return is that of the last evaluation, 128 meta-test runs. Run folders are RUN_DIR/ENV_ID__SCRIPT__DRAW__SEED;
one that is finished is not run again. Prints a Markdown table, best first, of the means over seeds, and writes every
run into --out.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from figures import interval, read

ROOT = Path(__file__).resolve().parents[1]
FIXED = "--total-timesteps 200000 --eval-interval 200000 --eval-copies 128 --num-threads 1 --env-kwargs"
EASIER = {"hunting_target": "num_preys=2", "spread_target": "num_agents=2 num_landmarks=3"}
STARTS = {
    "ma_pearl": {
        "kl_coef": 1e-2,
        "encoder_learning_rate": 5e-4,
        "latent_dim": 64,
        "encoder_dim": 64,
        "context_size": 64,
        "context_episodes": 8,
        "warmup_episodes": 1500,
    },
    "mix_mate": {
        "kl_coef": 1e-2,
        "encoder_learning_rate": 5e-4,
        "latent_dim": 64,
        "encoder_dim": 64,
        "mixture": "expected",
        "encoder_updates": 20,
        "decoded_steps": 3200,
        "bptt_steps": 50,
    },
}
SPACES = {
    "ma_pearl": {
        "kl_coef": (0.0, 1e-4, 1e-3, 1e-2, 1e-1),
        "encoder_learning_rate": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "latent_dim": (4, 8, 16, 32, 64),
        "encoder_dim": (32, 64, 128),
        "context_size": (16, 64, 200),
        "context_episodes": (2, 8, 64),
        "warmup_episodes": (100, 400, 1500),
    },
    "mix_mate": {
        "kl_coef": (0.0, 1e-4, 1e-3, 1e-2, 1e-1),
        "encoder_learning_rate": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "latent_dim": (4, 8, 16, 32, 64),
        "encoder_dim": (32, 64, 128),
        "mixture": ("expected", "sampled"),
        "encoder_updates": (5, 10, 20, 40),
        "decoded_steps": (800, 1600, 3200),
        "bptt_steps": (10, 25, 50, 100),
    },
}


def flags_of(script: str, draw: int) -> list[str]:
    """The flags of a draw."""
    rng = np.random.default_rng(draw)
    drawn = {name: values[rng.integers(len(values))] for name, values in SPACES[script].items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in (drawn if draw else STARTS[script]).items()]


def train(script: str, env_id: str, draw: int, seed: int, run_dir: Path) -> dict:
    """One run to its end, if it is not there yet, and what its last evaluation measured; {} where it failed."""
    run = run_dir / f"{env_id}__{script}__{draw}__{seed}"
    flags = flags_of(script, draw)
    done = (run / "args.json").is_file() and (run / "meta_test.csv").is_file() and read(run)
    if not done:
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", env_id, *FIXED.split()]
        command += [*EASIER[env_id].split(), *flags]
        command += [f"--seed={seed}", f"--run-dir={run_dir}", f"--run-name={run.name}"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            print(f"failed: {' '.join(command)}: {''.join(ended.stderr.splitlines()[-1:])}", file=sys.stderr)
            return {}
    rows = read(run)
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    result = dict(script=script, setting=rows[0]["setting"], draw=draw, seed=seed, flags=" ".join(flags))
    for phase in ("posterior", "prior"):
        result[phase] = float(np.mean([row["return"] for row in last if row["phase"] == phase]))
    result["probe"] = float(np.mean([row["probe"] for row in last if row["phase"] == "posterior"]))
    print(f"{run.name}: {result['posterior']:.1f} after inference  {result['flags']}", file=sys.stderr)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", choices=SPACES)
    parser.add_argument("--env-id", choices=EASIER, default="hunting_target")
    parser.add_argument("--draws", type=int, default=40, help="draws, STARTS among them")
    parser.add_argument("--finalists", type=int, default=0, help="how many of the best, and STARTS, get --seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of the finalists")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--out", type=Path, help="CSV of all runs")
    args = parser.parse_args()
    run_dir = args.run_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = [*pool.map(lambda draw: train(args.script, args.env_id, draw, 1, run_dir), range(args.draws))]
        ranked = sorted((result for result in results if result), key=lambda result: -result["posterior"])
        best = [result["draw"] for result in ranked if result["draw"]][: args.finalists]
        again = [(draw, seed) for draw in [0, *best] for seed in args.seeds if seed != 1] if args.finalists else []
        results += pool.map(lambda pair: train(args.script, args.env_id, *pair, run_dir), again)
    results = [result for result in results if result]
    if not results:
        sys.exit("tuning.py: no run came to its end")
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]))
            writer.writeheader()
            writer.writerows(results)
    print("| draw | flags | seeds | after inference | exploration | probe |")
    print("|---" * 6 + "|")
    by_draw = {}
    for result in results:
        by_draw.setdefault(result["draw"], []).append(result)
    for draw, runs in sorted(by_draw.items(), key=lambda item: -np.mean([run["posterior"] for run in item[1]])):
        flags = runs[0]["flags"].replace("=", " ")
        means = [interval([run[key] for run in runs]) for key in ("posterior", "prior")]
        probe = np.mean([run["probe"] for run in runs])
        print(f"| {draw} | `{flags}` | {len(runs)} | {means[0]} | {means[1]} | {probe:.2f} |")


if __name__ == "__main__":
    main()
