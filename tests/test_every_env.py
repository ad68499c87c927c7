"""Every script on every environment: two iterations from the command line, an evaluation, the agents loaded again."""

import csv
import json
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import envs

ROOT = Path(__file__).parents[1]
SCRIPTS = ["mg2l_mappo", "task_given", "ma_pearl", "mix_mate"]
TINY = "--num-envs 2 --update-epochs 1 --hidden-dim 16 --num-threads 1 --no-cuda --explore-episodes 1 --test-episodes 2"
CONTEXT = "--context-size 16 --context-sets 2 --rollout-contexts 2 --warmup-episodes 1 --warmup-updates 1"
CONTEXT += " --context-episode-steps 20 --context-copies 1 --context-interval 1 --encoder-updates 1"
OF_PEARL = (
    CONTEXT.replace(" --context-sets 2", "").replace(" --warmup-updates 1", "").replace(" --encoder-updates 1", "")
)
OWN = {"mg2l_mappo": CONTEXT, "task_given": "", "ma_pearl": OF_PEARL, "mix_mate": "--encoder-updates 1"}
COLLECT = {"mg2l_mappo", "ma_pearl"}  # those that gather context besides
# as few tasks as the environment allows, and agents, so that the test is short
FEWER = {"hopper_param": "num_train=2 num_test=1", "rware_layout": "orders=(4,)", "magent_gather": "num_agents=8"}


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_iterations(script, env_id, tmp_path, monkeypatch):
    settings = FEWER.get(env_id, "").split()
    env = envs.make(env_id, 1, **{name: eval(value) for name, _, value in (text.partition("=") for text in settings)})
    num_tasks, steps = len(env.tasks.train), env.max_episode_steps
    total = 2 * (2 * steps + (20 * num_tasks if script in COLLECT else 0))
    copies = len(env.tasks.test) + 1
    argv = [
        *TINY.split(),
        *OWN[script].split(),
        "--env-id",
        env_id,
        "--eval-copies",
        copies,
        "--total-timesteps",
        total,
    ]
    argv += ["--eval-interval", total, "--run-dir", tmp_path, "--run-name", "run"]
    argv += ["--env-kwargs", *settings] if settings else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
    module = runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")

    assert json.loads((tmp_path / "run" / "args.json").read_text())["script"] == script
    with open(tmp_path / "run" / "meta_test.csv") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["step"]) for row in rows} == {0, total}
    assert {row["phase"] for row in rows} == {"prior", "posterior", "curve"}
    returns = np.array([float(row["return"]) for row in rows])
    assert np.isfinite(returns).all()
    agents = module["load_agents"](tmp_path / "run")
    assert agents.env.env_id == env_id and agents.env.num_agents == env.num_agents


def test_evaluations_of_all_scripts_meet_the_same_episodes(tmp_path, monkeypatch):
    """However many iterations a script's steps make: else returns of two methods would not pair."""
    begun, reset = {}, envs.MetaVectorEnv.reset

    def spy(env, seed=None, options=None):
        if env.num_envs == 5:  # the evaluation's; training has 2 copies, and context 2 or 6
            begun[script].append((seed, tuple(options["task"])))
        return reset(env, seed, options)

    monkeypatch.setattr(envs.MetaVectorEnv, "reset", spy)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    iterations = set()
    for script in SCRIPTS:
        begun[script] = []
        argv = [f"{script}.py", *TINY.split(), *OWN[script].split(), "--eval-copies", "5", "--eval-interval", "500"]
        argv += ["--total-timesteps", "1000", "--run-dir", str(tmp_path), "--run-name", script]
        monkeypatch.setattr(sys, "argv", argv)
        module = runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        iterations.add(module["load_checkpoint"](tmp_path / script)["iteration"])
    assert len(iterations) > 1  # else the test would show nothing
    episodes = [set(begun[script]) for script in SCRIPTS]
    assert len(episodes[0]) == 7 and all(other == episodes[0] for other in episodes)
