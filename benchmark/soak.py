"""Whether long runs keep their memory, open files, threads and speed: many small iterations of mg2l_mappo.py.

    python benchmark/soak.py                                        # all six environments, about 10 minutes each
    python benchmark/soak.py --env-id hunting_target --iterations 1000

Small networks and few copies make iterations short, so that what each of them left behind would add up; there are 50
evaluations and 50 checkpoints besides. A sample is taken in every iteration, in the process itself, after glibc has
given back what is freed: what it keeps for later comes and goes. The first tenth warms up (the
context buffer fills); compared are the medians of the second tenth and of the last. Exits with 1 if memory grows by
more than 2 %, or if files or threads are not as many as before. Needs Linux with glibc.
"""

import argparse
import contextlib
import ctypes
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

import envs
import mg2l_mappo

ROOT = Path(__file__).parents[1]
# as many as take two hours with default settings on one core; with those below, about 10 minutes each
ITERATIONS = dict(zip(envs.ENV_IDS, (7_000, 7_000, 400, 220, 3_000, 300), strict=True))
SETTINGS = dict(num_envs=2, update_epochs=1, hidden_dim=32, warmup_episodes=1, warmup_updates=1, context_copies=1)
SETTINGS |= dict(context_interval=1, encoder_updates=1, context_size=16, context_sets=2, rollout_contexts=2)
SETTINGS |= dict(context_episodes=2, rollout_context_episodes=2, context_episode_steps=20, critic_context_size=16)
SETTINGS |= dict(inference_size=64, rollout_context_size=64, explore_episodes=1, test_episodes=2, num_threads=1)
SETTINGS |= dict(checkpoint_minutes=1e9)
GROWTH = 0.02
TRIM = ctypes.CDLL(None).malloc_trim


def sample() -> tuple[float, float, int, int]:
    """CPU seconds (other programs do not count), resident memory in MiB, open files and threads of this process."""
    TRIM(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return time.process_time(), memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def soak(env_id: str, iterations: int) -> bool:
    """One run in this process; prints a row of the table and returns whether nothing has grown."""
    env = envs.make(env_id)
    num_tasks, copies = len(env.tasks.train), len(env.tasks.test)
    buffer_size = 2 * num_tasks * env.num_agents * SETTINGS["context_episode_steps"]  # two episodes: full at once
    args = mg2l_mappo.Args(env_id=env_id, eval_copies=copies, buffer_size=buffer_size, **SETTINGS)
    total = mg2l_mappo.iteration_steps(args, env, iterations)
    flags = dict(SETTINGS, env_id=env_id, eval_copies=copies, buffer_size=buffer_size, total_timesteps=total)
    flags |= dict(eval_interval=total // 50, checkpoint_interval=total // 50)
    samples, add_scalar = [], SummaryWriter.add_scalar

    def watched(writer, name, *given):
        if name == "charts/SPS":  # once in an iteration
            samples.append(sample())
        add_scalar(writer, name, *given)

    SummaryWriter.add_scalar = watched
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
        sys.argv = ["mg2l_mappo.py", *(word for pair in pairs for word in pair), "--no-cuda", "--run-dir", folder]
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            runpy.run_path(str(ROOT / "mg2l_mappo.py"), run_name="__main__")

    tenth = max(1, len(samples) // 10)
    parts = samples[tenth : 2 * tenth], samples[-tenth:]
    before, after = (statistics.median(memory for _, memory, _, _ in part) for part in parts)
    # the fewest: TensorBoard opens its file whenever it writes
    files, threads = ([min(each[k] for each in part) for part in parts] for k in (2, 3))
    length = [samples[k][0] - samples[j][0] for j, k in ((0, tenth), (-1 - tenth, -1))]  # CPU seconds of a tenth
    first, last = (total / len(samples) * tenth / seconds for seconds in length)
    print(
        f"{env_id:16} {len(samples):10,} {before:8.1f} {after:8.1f} {100 * (after / before - 1):+7.2f} "
        f"{files[0]:5} {files[1]:5} {threads[0]:7} {threads[1]:7} {first:11,.0f} {last:9,.0f}",
        flush=True,
    )
    return after <= (1 + GROWTH) * before and files[0] == files[1] and threads[0] == threads[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env-id", choices=envs.ENV_IDS, help="only this one")
    parser.add_argument("--iterations", type=int, help="at least 20 (default: two hours' worth)")
    args = parser.parse_args()
    if args.iterations is not None and args.iterations < 20:
        parser.error(f"--iterations: got {args.iterations}, expected at least 20")
    if args.env_id:
        sys.exit(not soak(args.env_id, args.iterations or ITERATIONS[args.env_id]))
    print(
        f"{'environment':16} {'iterations':>10} {'MiB':>8} {'MiB end':>8} {'growth%':>7} {'files':>5} {'end':>5} "
        f"{'threads':>7} {'end':>7} {'steps/CPU-s':>11} {'end':>9}",
        flush=True,
    )
    more = ["--iterations", str(args.iterations)] if args.iterations else []
    each = [[sys.executable, __file__, "--env-id", env_id, *more] for env_id in envs.ENV_IDS]  # memory of its own
    sys.exit(any([subprocess.run(command).returncode for command in each]))


if __name__ == "__main__":
    main()
