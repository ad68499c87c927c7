"""How fast the environments and the scripts are, as ratios within one run.

    python benchmark/throughput.py            # environments against the libraries' own classes, about a minute
    python benchmark/throughput.py --scripts  # and whole runs of mg2l_mappo.py and task_given.py, minutes more
    python benchmark/throughput.py --scripts --env-id magent_gather --total-timesteps 20000
    python benchmark/throughput.py --phases   # where the time of all four scripts goes, and what it is worth

Environments are measured in steps (all agents act once) per second of CPU time: a batch of 32 copies, with all that
`step` does, against one environment as the library makes it, with as many agents, on the same task where the library
has tasks; random actions, resets included. "physics" is the engine alone: no observations, rewards or resets. The three
are measured in turn, three times; medians count, and the ratio is the median of three ratios. Scripts are measured in
wall time from start to end, evaluation included, in turn, three times, on the threads PyTorch takes by default.

A phase is what a script logs as time/...: rollout (context collection and the posteriors to act on included), PPO,
encoder (its warm-up included), evaluation; start and checkpoints are the rest. A phase's arithmetic is that of the
matrix products, which PyTorch's FlopCounterMode counts in a second run of the same length. Its rate is given as a share
of what one large matrix product reaches on as many threads, the best of ten before the run and ten after it. The last
column is the same share for PPO's own product by itself, a rollout's rows by the square weights of each agent, the
best of 200 after the run.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch, as the scripts that run in this process do it

import gymnasium as gym
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import envs

ROOT = Path(__file__).parents[1]
COPIES, STEPS, LIBRARY_STEPS, ROUNDS = 32, 1000, 4000, 3
SETTINGS = {"hopper_param": {"factors": [(1, 1, 1, 1)] * 2}}  # the library's hopper; elsewhere the defaults
SCRIPTS = ("mg2l_mappo.py", "ma_pearl.py", "mix_mate.py", "task_given.py")
SCRIPT_ENVS = ("hunting_target", "spread_target")


def per_second(act, actions) -> float:
    """Calls of `act` per second of CPU time, one call for each of the actions."""
    begun = time.process_time()
    for action in actions:
        act(action)
    return len(actions) / (time.process_time() - begun)


def random_actions(space: gym.Space, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=shape)
    return rng.uniform(space.low, space.high, (*shape, *space.shape)).astype(np.float32)


def ours(env_id: str) -> tuple[float, float | None]:
    """Steps per CPU-second of the whole environment: observations, rewards and resets; and of its physics alone."""
    env = envs.make(env_id, COPIES, seed=0, **SETTINGS.get(env_id, {}))
    begin = {"seed": 0, "options": {"task": np.zeros(COPIES, int)}}
    env.reset(**begin)
    actions = random_actions(env.single_action_space, STEPS, COPIES, env.num_agents)
    ended = []
    rate = per_second(lambda joint: ended.append(env.step(joint)[2:4]), actions)
    if (physics := physics_of(env)) is None:
        return COPIES * rate, None
    env.reset(**begin)  # the same episodes once more
    if env_id in ("hunting_target", "spread_target"):  # here others move as well
        actions = random_actions(env.single_action_space, STEPS, COPIES, env.num_movers)
    seconds = 0.0
    for joint, ends in zip(actions, ended, strict=True):
        begun = time.process_time()
        physics(joint)
        seconds += time.process_time() - begun
        env._start(np.flatnonzero(ends[0] | ends[1]))
    return COPIES * rate, COPIES * STEPS / seconds


def physics_of(env):
    """What moves all copies of an environment by one step and does nothing else; None for rware, which has no such."""
    if env.env_id in ("hunting_target", "spread_target"):
        return lambda joint: env._integrate(joint.transpose(2, 1, 0) * env.accel)
    if env.env_id in ("halfcheetah_dir", "hopper_param"):
        from envs.locomotion import mujoco

        def physics(joint):
            for data, torque in zip(env.data, joint.reshape(COPIES, -1), strict=True):
                data.ctrl[:] = torque
                mujoco.mj_step(env.models[0], data, nstep=env.frame_skip)

        return physics
    if env.env_id == "magent_gather":

        def physics(joint):
            for world, own in zip(env._worlds, joint.astype(np.int32), strict=True):
                world.set_action(world.get_handles()[1], own)
                world.step()
                world.clear_dead()

        return physics
    return None


def play(env) -> float:
    """Steps per CPU-second of a PettingZoo ParallelEnv, resets included."""
    env.reset(seed=0)
    agents = env.possible_agents
    actions = random_actions(env.action_space(agents[0]), LIBRARY_STEPS, len(agents))

    def step(joint):
        *_, terminations, truncations, _ = env.step(dict(zip(agents, joint, strict=True)))
        if all(terminations.values()) or all(truncations.values()):
            env.reset()

    return per_second(step, actions)


def mpe2(module: str, **settings) -> float:
    module = importlib.import_module(f"mpe2.{module}")
    return play(module.parallel_env(max_cycles=100, continuous_actions=True, **settings))


def mamujoco(scenario: str, parts: str) -> float:
    from envs.locomotion import mujoco  # first, so that MuJoCo draws without a display

    with contextlib.redirect_stderr(io.StringIO()):  # an announcement about other environments
        from gymnasium_robotics import mamujoco_v1
    heard = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda _: None)  # the cheetah's file is old, and MuJoCo 4 would write a log of that
    try:
        env = mamujoco_v1.parallel_env(scenario, parts, agent_obsk=0)
    finally:
        mujoco.set_mju_user_warning(heard)
    return play(env)


def rware() -> float:
    """Plain rware on the first layout with 4 orders; it is no ParallelEnv."""
    from rware.warehouse import RewardType, Warehouse

    from envs.warehouse import LAYOUTS, draw_layout

    layout = draw_layout(*LAYOUTS[0])
    env = Warehouse(0, 0, 0, 4, 0, 2, 4, None, 100, RewardType.INDIVIDUAL, layout=layout)
    env.reset(seed=0)

    def step(joint):
        if env.step(joint)[2]:
            env.reset()

    return per_second(step, random_actions(gym.spaces.Discrete(5), LIBRARY_STEPS, 4).tolist())


def magent2() -> float:
    """The class that magent2's own environments are made of, around the same engine, agents and food."""
    from envs import gather  # before magent2, which would set OMP_NUM_THREADS

    base = importlib.import_module("magent2.environments.magent_env").magent_parallel_env
    agents, food = gather.ring(16, 28), gather.letter("A", False, 28)

    class Gather(base):
        def __init__(self):
            world = gather.new_world(28, 4)
            super().__init__(world, world.get_handles()[1:], ["agent"], 28, 200, [-1, 5], False, False)

        def generate_map(self):
            gather.place(self.env, self._all_handles[1], agents, "agents")
            gather.place(self.env, self._all_handles[0], food, "food")

    return play(Gather())


# what each is measured against: its name, how, and with what
LIBRARY = {
    "hunting_target": ("mpe2 simple_tag_v3, 3 preys", mpe2, ("simple_tag_v3",), dict(num_good=3, num_adversaries=3)),
    "spread_target": ("mpe2 simple_spread_v3", mpe2, ("simple_spread_v3",), dict(N=3)),
    "halfcheetah_dir": ("gymnasium-robotics mamujoco_v1", mamujoco, ("HalfCheetah", "2x3"), {}),
    "hopper_param": ("gymnasium-robotics mamujoco_v1", mamujoco, ("Hopper", "3x1"), {}),
    "rware_layout": ("rware Warehouse", rware, (), {}),
    "magent_gather": ("magent2 magent_parallel_env", magent2, (), {}),
}


def compare(env_id: str) -> str:
    """A line of the table."""
    name, library, args, settings = LIBRARY[env_id]
    try:
        rounds = [(*ours(env_id), library(*args, **settings)) for _ in range(ROUNDS)]
    except ImportError as error:
        return f"{env_id:16} not measured: {error.name} is missing, pip install -e '.[benchmark]' brings it"
    fast, alone, slow = ([one for one in column if one] for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, _, b in rounds)
    physics = f"{statistics.median(alone):,.0f}" if alone else "-"
    rates = f"{statistics.median(fast):11,.0f} {physics:>11}  {name:30} {statistics.median(slow):11,.0f}"
    return f"{env_id:16} {rates} {ratio:6.2f}"


def run_script(script: str, env_id: str, total_timesteps: int) -> tuple[float, float]:
    """Wall seconds and peak memory (MiB) of one run as a user starts it."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        command = [sys.executable, str(ROOT / script), "--env-id", env_id, "--run-dir", folder]
        command += ["--total-timesteps", str(total_timesteps)]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # usage of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command[1:])} failed: {log.read().splitlines()[-1:]}")
    return seconds, usage.ru_maxrss / 1024


def product_rate(threads: int, batch: int = 1, rows: int = 2048, width: int = 2048, tries: int = 10) -> float:
    """GFLOP/s of the product [batch, rows, width] by [batch, width, width] in float32, the best of `tries`."""
    torch.set_num_threads(threads)
    a, b = torch.randn(batch, rows, width), torch.randn(batch, width, width)
    seconds = []
    for _ in range(tries):
        begun = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begun)
    return 2 * batch * rows * width**2 / min(seconds) / 1e9


PHASES = ("rollout", "ppo", "encoder", "eval")
PHASE_OF = {"update_mappo": "ppo", "update_encoder": "encoder", "meta_test": "eval"}  # all else is rollout


def count(script: str, flags: list[str]) -> None:
    """Run a script in this process and print as JSON the FLOP of each phase."""
    flop, inside = collections.Counter(), []  # the phases that are being run, the outermost first

    def watch(frame, event, _):
        name = frame.f_code.co_name
        if event in ("call", "return") and name in PHASE_OF and frame.f_code.co_filename.endswith(script):
            total = counter.get_total_flops()
            flop[inside[0] if inside else "rollout"] += total - sum(flop.values())
            inside.append(PHASE_OF[name]) if event == "call" else inside.pop()

    sys.argv = [script, *flags]
    plain = sdpa_kernel(SDPBackend.MATH)  # attention as products that are counted
    with plain, FlopCounterMode(display=False) as counter, contextlib.redirect_stdout(io.StringIO()):
        sys.setprofile(watch)
        runpy.run_path(str(ROOT / script), run_name="__main__")
        sys.setprofile(None)
    flop["rollout"] += counter.get_total_flops() - sum(flop.values())
    print(json.dumps(flop))


def phases(script: str, env_id: str, total_timesteps: int, threads: int) -> str:
    """A row of the table: of each phase seconds, share, GFLOP, and its rate over that of a large matrix product."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", env_id, "--total-timesteps", str(total_timesteps), "--num-threads", str(threads)]
        before = product_rate(threads)
        run = [sys.executable, str(ROOT / script), *flags, "--run-dir", f"{folder}/timed"]
        begun = time.perf_counter()
        done = subprocess.run(run, capture_output=True, text=True)
        whole = time.perf_counter() - begun
        if done.returncode:
            sys.exit(f"{' '.join(run[1:])} failed: {done.stderr.splitlines()[-1:]}")
        rate = max(before, product_rate(threads))
        env, defaults = envs.make(env_id), importlib.import_module(Path(script).stem).Args()
        rows = defaults.num_envs * env.max_episode_steps
        small = product_rate(threads, env.num_agents, rows, defaults.hidden_dim, tries=200)
        code = "import sys, throughput; throughput.count(sys.argv[1], sys.argv[2:])"
        run = [sys.executable, "-c", code, script, *flags, "--run-dir", f"{folder}/counted"]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmark"), str(ROOT)])}
        counted = subprocess.run(run, check=True, capture_output=True, text=True, env=environ).stdout
        flop = json.loads(counted.splitlines()[-1])
        (timed,) = Path(folder, "timed").iterdir()
        events = EventAccumulator(str(timed))
        events.Reload()
        steps = events.Scalars("charts/SPS")[-1].step
        logged = [name for name in PHASES if f"time/{name}" in events.Tags()["scalars"]]
        seconds = {name: events.Scalars(f"time/{name}")[-1].value for name in logged}
    rest = whole - sum(seconds.values())
    cells = [script, env_id, f"{ours(env_id)[0]:,.0f}", f"{steps / whole:,.0f}", f"{whole:.0f}"]
    for name in PHASES:
        value, gflop = seconds.get(name, 0), flop.get(name, 0) / 1e9
        share = f"{value:.1f} s, {value / whole:.0%}"
        cells.append(f"{share}, {gflop:,.0f} GFLOP, {gflop / value / rate:.2f}" if value else "-")
    cells += [f"{rest:.1f} s, {rest / whole:.0%}", f"{rate:.0f}", f"{small / rate:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", action="store_true", help="time whole runs of the scripts as well")
    parser.add_argument("--total-timesteps", type=int, default=100_000, help="length of these runs")
    parser.add_argument("--env-id", nargs="+", default=SCRIPT_ENVS, choices=envs.ENV_IDS, help="what they run on")
    parser.add_argument("--phases", action="store_true", help="where the time goes, instead of all else")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for --phases")
    args = parser.parse_args()

    if args.phases:
        columns = ["script", "environment", "environment alone, steps/CPU-s", "steps/s", "s"]
        columns += ["rollout", "PPO", "encoder", "evaluation", "rest", "matrix product, GFLOP/s", "PPO's product"]
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for env_id in args.env_id:
            for script in SCRIPTS:
                print(phases(script, env_id, args.total_timesteps, args.threads), flush=True)
        return

    rate = "steps/CPU-s"
    print(f"{'environment':16} {rate} {'physics':>11}  {'against':30} {rate} {'ratio':>6}")
    for env_id in envs.ENV_IDS:
        print(compare(env_id), flush=True)

    if args.scripts:
        print(
            f"\n{'script, ' + format(args.total_timesteps, ',') + ' steps':32} {'steps/s':>8} {'seconds':>8} {'MiB':>6}"
        )
        for env_id in args.env_id:
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
