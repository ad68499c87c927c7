"""How fast the environments and the scripts are, as ratios within one run.

    python benchmark/throughput.py            # environments against mpe2, about a minute
    python benchmark/throughput.py --scripts  # and whole runs of mg2l_mappo.py and task_given.py, about four minutes

Environments are measured in steps (all agents act once) per second of CPU time, a batch of 32 copies against mpe2's
`parallel_env` with as many agents, in turn, five times; the median ratio counts. Scripts are measured in wall time from
start to end, evaluation included, in turn, three times, on the threads PyTorch takes by default.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mpe2.simple_spread_v3
import mpe2.simple_tag_v3
import numpy as np

import envs

ROOT = Path(__file__).parents[1]
COPIES, STEPS = 32, 500
# ours, and the library's with as many agents of ours: three predators, or three spreading agents
PAIRS = {
    "hunting_target": ("simple_tag_v3, 3 preys", mpe2.simple_tag_v3, dict(num_good=3, num_adversaries=3)),
    "spread_target": ("simple_spread_v3", mpe2.simple_spread_v3, dict(N=3)),
}


def ours(env_id: str) -> float:
    """Steps per CPU-second of the whole environment: observations, rewards and resets."""
    env = envs.make(env_id, COPIES, seed=0)
    env.reset(seed=0)
    shape = (STEPS, COPIES, env.num_agents, *env.single_action_space.shape)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    begun = time.process_time()
    for action in actions:
        env.step(action)
    return STEPS * COPIES / (time.process_time() - begun)


def library(module, settings: dict) -> float:
    """Steps per CPU-second of mpe2's parallel_env, resets included."""
    env = module.parallel_env(max_cycles=100, continuous_actions=True, **settings)
    env.reset(seed=0)
    actions = {agent: env.action_space(agent).sample() for agent in env.agents}
    begun = time.process_time()
    for _ in range(STEPS):
        if not env.agents:
            env.reset()
        env.step(actions)
    return STEPS / (time.process_time() - begun)


def run_script(script: str, env_id: str, total_timesteps: int) -> tuple[float, float]:
    """Wall seconds and peak memory (MiB) of one run as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / script), "--env-id", env_id, "--run-dir", folder]
        begun = time.perf_counter()
        subprocess.run([*command, "--total-timesteps", str(total_timesteps)], check=True, capture_output=True)
        seconds = time.perf_counter() - begun
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", action="store_true", help="time whole runs of the scripts as well")
    parser.add_argument("--total-timesteps", type=int, default=50_000, help="length of these runs")
    args = parser.parse_args()

    print(f"{'environment':16} {'steps/CPU-s':>12}  {'mpe2':>28} {'steps/CPU-s':>12} {'ratio':>8}")
    for env_id, (name, module, settings) in PAIRS.items():
        pairs = [(ours(env_id), library(module, settings)) for _ in range(5)]
        fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{env_id:16} {fast:12,.0f}  {name:>28} {slow:12,.0f} {ratio:8.0f}")

    if args.scripts:
        print(
            f"\n{'script, ' + format(args.total_timesteps, ',') + ' steps':32} {'steps/s':>8} {'seconds':>8} {'MiB':>6}"
        )
        for env_id in PAIRS:
            scripts = ("mg2l_mappo.py", "task_given.py")
            rounds = [[run_script(script, env_id, args.total_timesteps) for script in scripts] for _ in range(3)]
            for k, script in enumerate(scripts):
                seconds = statistics.median(one[k][0] for one in rounds)
                memory = max(one[k][1] for one in rounds)
                rate = args.total_timesteps / seconds
                print(f"{script + ' ' + env_id:32} {rate:8,.0f} {seconds:8.1f} {memory:6.0f}")
            ratio = statistics.median(one[0][0] / one[1][0] for one in rounds)
            print(f"{'ratio of wall times':32} {ratio:8.2f}")


if __name__ == "__main__":
    main()
