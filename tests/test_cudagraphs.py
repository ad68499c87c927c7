"""mg2l_mappo_cudagraphs.py without a GPU: what it changes, and that it computes what mg2l_mappo.py does.

What it captures is tested in test_cuda.py, on a GPU.
"""

import difflib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mg2l_mappo as plain
import mg2l_mappo_cudagraphs as twin

ROOT = Path(__file__).parents[1]
SHORT = "--num-envs 4 --update-epochs 2 --warmup-episodes 2 --warmup-updates 2 --context-copies 2 --eval-copies 3"
SHORT += " --context-sets 4 --buffer-size 3000 --context-interval 1 --inference-size 20 --rollout-context-size 20"
SHORT += " --num-threads 1 --no-cuda --checkpoint-interval 1"


def test_differs_by_capture_alone():
    ours, theirs = ((ROOT / f"{module.SCRIPT}.py").read_text().splitlines() for module in (plain, twin))
    changes = [
        change for change in difflib.SequenceMatcher(None, ours, theirs, False).get_opcodes() if change[0] != "equal"
    ]
    assert sum(max(b - a, d - c) for _, a, b, c, d in changes) < 150
    about = re.compile(
        r"\b(Graph|graphs?|cudagraphs|captured?|deciding|log_prob|contexts?|draw_contexts|learn|replays|fill_|values)\b"
        r"|SCRIPT|functools|collections|tree_map|\[task\]|\.item\(\)"
    )
    for _, _, _, c, d in changes:
        assert about.search("\n".join(theirs[c:d])), f"not about CUDA graphs: {theirs[c:d]}"


@pytest.fixture
def experience():
    """Arguments, an environment, what its agents went through, and a buffer of contexts."""
    args = plain.Args(num_envs=8, update_epochs=2, context_sets=4, num_threads=1)
    plain.check_args(args)
    torch.manual_seed(0)
    env = plain.make_env(args, 8)
    num_tasks, n, d = len(env.tasks.train), env.num_agents, args.latent_dim
    actor = plain.build(args, env, "cpu")["actor"]
    z, z_global = torch.randn(n, 6, 8, d), torch.randn(8, d).expand(6, -1, -1)
    task = torch.arange(8) % num_tasks  # all are present
    data = plain.rollout(env, actor, env.tasks.train[task.numpy()], z, seed=0)
    buffer = plain.ContextBuffer(4)
    lived = plain.rollout(
        plain.make_env(args, num_tasks), actor, env.tasks.train, torch.randn(n, 6, num_tasks, d), seed=1
    )
    buffer.add(plain.transitions(lived, actor).transpose(0, 1).unflatten(0, (num_tasks, 1)))
    return SimpleNamespace(args=args, env=env, given=(data, z, z_global, task), buffer=buffer, num_tasks=num_tasks)


def parts(module, of):
    """Networks and optimisers of a script; the twin's learning rates are tensors, as replays need them."""
    torch.manual_seed(1)
    networks = module.build(of.args, of.env, torch.device("cpu"))
    encoder = networks["encoder"]
    groups = {name: list(networks[name].parameters()) for name in ("actor", "critic")}
    groups |= dict(phi_g=encoder.phi_g(), phi_l=encoder.phi_l())
    rate = 2.0**-11 if module is plain else torch.tensor(2.0**-11)  # the same number in float32 and float64
    return networks, {name: torch.optim.Adam(group, lr=rate, fused=True) for name, group in groups.items()}


def equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_same_bits_as_the_plain_script(experience):
    args, num_tasks, buffer = experience.args, experience.num_tasks, experience.buffer
    (ours, our_adam), (theirs, their_adam) = (parts(module, experience) for module in (plain, twin))
    every, size = torch.arange(num_tasks), (args.critic_context_size, args.rollout_context_episodes)
    torch.manual_seed(2)
    contexts = [buffer.sample(every, *size) for _ in range(args.update_epochs)]
    torch.manual_seed(2)  # the plain script draws them on the way
    found = plain.update_mappo(args, *experience.given, *ours.values(), buffer, our_adam)
    equal(found, twin.update_mappo(args, *experience.given, *theirs.values(), torch.stack(contexts), their_adam))
    label = every.repeat(args.context_sets)
    torch.manual_seed(3)
    found = plain.update_encoder(args, ours["encoder"], buffer, num_tasks, our_adam, 2.0)
    torch.manual_seed(3)
    context = buffer.sample(label, args.context_size, args.context_episodes)
    equal(found, twin.update_encoder(args, theirs["encoder"], num_tasks, their_adam, 2.0, label, context))
    for name in ours:
        equal(ours[name].state_dict(), theirs[name].state_dict())


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("env_id", ["hunting_target", "rware_layout"])  # continuous actions, and discrete ones
def test_same_rollout_as_the_plain_script(env_id, greedy):
    args = plain.Args(env_id=env_id, num_threads=1)
    plain.check_args(args)
    env = plain.make_env(args, 2)
    torch.manual_seed(0)
    actor = plain.build(args, env, "cpu")["actor"]
    z, task, found = torch.randn(env.num_agents, 5, 2, args.latent_dim), np.resize(env.tasks.train, 2), []
    for module in (plain, twin):
        torch.manual_seed(1)
        found.append(vars(module.rollout(env, actor, task, z, seed=0, greedy=greedy)))
    equal(*found)


def test_what_is_captured_gets_its_own_contexts(tmp_path, monkeypatch):
    argv = [*SHORT.split(), "--critic-context-size", 24, "--context-size", 12, "--local-temperature", 100]
    argv += ["--total-timesteps", 500, "--run-dir", tmp_path, "--run-name", "run"]
    monkeypatch.setattr(sys, "argv", ["mg2l_mappo_cudagraphs.py", *map(str, argv)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
    module = runpy.run_path(str(ROOT / "mg2l_mappo_cudagraphs.py"), run_name="__main__")
    num_tasks, n, dim = module["num_tasks"], module["n"], len(module["encoder"].mean)
    ((contexts, *_),) = module["learn"].calls
    assert contexts == (2, num_tasks, n, 24, dim)
    for graph, temperature in ((module["encode_warmup"], 16.0), (module["encode"], 100.0)):
        ((label, context),) = graph.calls
        assert (label, context) == ((4 * num_tasks,), (4 * num_tasks, n, 12, dim))
        assert graph.function.args[-1] == temperature


def train(*given):
    command = [sys.executable, ROOT / "mg2l_mappo_cudagraphs.py", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def contents(path):
    return torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)


def test_resumes_exactly(tmp_path):
    """With learning rates that are tensors, which a checkpoint holds too."""
    run = tmp_path / "run"
    train(*SHORT.split(), "--total-timesteps", 1500, "--run-dir", tmp_path, "--run-name", "run")
    whole, table = contents(run / "checkpoint.pt"), (run / "meta_test.csv").read_bytes()
    rate = whole["optimizers"]["actor"]["param_groups"][0]["lr"]
    last = whole["iteration"]
    assert last > 1 and rate.item() == pytest.approx(5e-4 * (1 - (last - 1) / last))
    os.replace(run / "checkpoint_previous.pt", run / "checkpoint.pt")
    train("--resume", run)
    assert (run / "meta_test.csv").read_bytes() == table
    again = contents(run / "checkpoint.pt")
    for name, network in whole["networks"].items():
        equal(network, again["networks"][name])
