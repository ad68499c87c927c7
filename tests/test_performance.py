"""benchmark/throughput.py and growth.py: the arithmetic they count and the exponents they fit."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import task_given

ROOT = Path(__file__).parents[1]
ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmark")])}
SCRIPTS = ["mg2l_mappo", "ma_pearl", "mix_mate", "task_given"]
SCRIPTS += ["mg2l_mappo_cudagraphs", "mg2l_mappo_multigpu", "mg2l_ablations"]


def test_arithmetic_of_a_phase_by_hand(tmp_path):
    flags = "--num-envs 2 --update-epochs 3 --hidden-dim 8 --eval-copies 10 --explore-episodes 1 --test-episodes 2"
    flags = [*flags.split(), "--total-timesteps", "400", "--run-dir", str(tmp_path)]
    code = "import sys, throughput; throughput.count('task_given.py', sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, env=ENVIRON)
    assert done.returncode == 0, done.stderr
    flop = json.loads(done.stdout.splitlines()[-1])

    args = task_given.Args(hidden_dim=8)
    task_given.check_args(args)
    env = task_given.make_env(args, 2)
    networks = task_given.build(args, env, torch.device("cpu"))
    layers = {}  # multiplications of each layer for one sample, all agents
    for name in ("actor", "critic"):
        layers[name] = [p.numel() for key, p in networks[name].named_parameters() if "weight" in key]
    forward = {name: 2 * sum(sizes) for name, sizes in layers.items()}
    # forward, gradient of the weights, and of the inputs but for the first layer's
    step = {name: 3 * forward[name] - 2 * layers[name][0] for name in layers}
    samples, iterations, epochs = 2 * 100, 2, 3
    ppo = samples * iterations * (2 * forward["critic"] + epochs * (step["actor"] + step["critic"]))
    assert flop["ppo"] == ppo
    assert flop["rollout"] == samples * iterations * forward["actor"]
    # two evaluations of two episodes, and one more episode for the curve at the end
    assert flop["eval"] == 10 * 100 * (2 * 2 + 1) * forward["actor"]


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's OpenMP is GNU's on Linux only")
@pytest.mark.parametrize("script", SCRIPTS)
def test_waiting_threads_give_way(script):
    """PyTorch's OpenMP reads GOMP_SPINCOUNT as it is loaded and shows what it read; one set by hand wins."""
    for spin, expected in ({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"):
        environ = {name: value for name, value in ENVIRON.items() if name != "GOMP_SPINCOUNT"} | spin
        environ["OMP_DISPLAY_ENV"] = "verbose"
        done = subprocess.run([sys.executable, "-c", f"import {script}"], capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {expected}


def test_exponents():
    exponent = runpy.run_path(str(ROOT / "benchmark" / "growth.py"))["exponent"]
    sizes = [2, 4, 8, 16, 32, 64]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    level = [5 + 0.01 * size for size in sizes]  # nearly flat
    assert 0 < exponent(sizes, level) < np.log(level[-1] / level[2]) / np.log(sizes[-1] / sizes[2]) + 0.1
