"""The scripts are read one at a time, so they repeat each other: what has the same name must then be the same text."""

import ast
import dataclasses
import importlib
from itertools import combinations
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ["mg2l_mappo.py", "task_given.py", "ma_pearl.py", "mix_mate.py"]
# what differs because the methods do; everything else that two scripts both define must be one text
MEANT_TO_DIFFER = {
    "Args",  # each script has flags of its own
    "update_mappo",  # reads z and trains the encoder, or reads the label
    "meta_test",  # infers the task, or is told it
    "summarise",  # accuracies, where something is inferred
    "write_videos",  # exploration beside what was learnt, or one episode
    "iteration_steps",  # counts the collection of context
    "check_args",  # checks the flags of this script
    "load_agents",  # gives infer, or told
    "build",  # networks of the method
    "TaskEncoder",  # attention, or a product of Gaussians
    "infer",  # by priority, or uniformly
    "update_encoder",  # contrast between tasks, or reconstruction
    "parse_args",  # what may change in an evaluation
}


def definitions(script):
    """Top-level functions and classes of a script, name -> source with decorators and the comments within."""
    source = (ROOT / script).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.name not in found, f"{script} defines {node.name} twice"
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


TEXTS = {script: definitions(script) for script in SCRIPTS}
SHARED = [(a, b, name) for a, b in combinations(SCRIPTS, 2) for name in TEXTS[a] if name in TEXTS[b]]


@pytest.mark.parametrize("a, b, name", [row for row in SHARED if row[2] not in MEANT_TO_DIFFER])
def test_same_text(a, b, name):
    assert TEXTS[a][name] == TEXTS[b][name]


OF_THE_METHOD = {"latent_dim", "kl_coef", "encoder_updates", "encoder_dim", "encoder_learning_rate"}
OF_THE_METHOD |= {"context_size", "context_episodes", "rollout_context_episodes", "warmup_episodes"}
OF_THE_METHOD |= {"explore_scale", "context_interval", "context_episode_steps", "context_copies"}


def defaults(script):
    """Name -> default, or the defaults of all environments, of a script's arguments."""
    module = importlib.import_module(Path(script).stem)
    return {field.name: field.default for field in dataclasses.fields(module.Args)} | module.ENV_DEFAULTS


@pytest.mark.parametrize("a, b", list(combinations(SCRIPTS, 2)))
def test_same_defaults(a, b):
    """What is MAPPO's, the meta-test's or the environment's is the same for all methods."""
    ours, theirs = defaults(a), defaults(b)
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} <= OF_THE_METHOD


def test_list_of_differences_is_needed():
    differ = {name for a, b, name in SHARED if TEXTS[a][name] != TEXTS[b][name]}
    assert differ >= MEANT_TO_DIFFER  # a name that has become the same leaves the list


def test_scripts_share_the_frame():
    """A renamed function would slip through the comparison above."""
    frame = {"AgentMLP", "Actor", "Critic", "ValueNorm", "gae", "episodic_return", "seed_everything"}
    frame |= {"policy_loss", "value_loss", "clip_gradient_per_agent", "make_env", "save_checkpoint", "load_checkpoint"}
    frame |= {"restore", "parse_args", "append_rows", "expect", "fail"}
    for script in SCRIPTS:
        assert frame <= TEXTS[script].keys(), script


def outputs(module):
    """What the shared functions make of equal inputs."""
    torch.manual_seed(0)
    reward, value, later = torch.randn(3, 6, 4, 2)  # [T, E, n]
    terminated = torch.rand(6, 4) < 0.2
    ended = terminated | (torch.rand(6, 4) < 0.2)
    advantage = module.gae(reward, value, later, terminated, ended, 0.99, 0.95)
    log_prob, old_log_prob, entropy, gain = torch.randn(4, 2, 24)  # [n, batch]
    found = [advantage, module.policy_loss(log_prob, old_log_prob, gain, entropy, 0.2, 0.01)]
    found.append(module.value_loss(value, later, reward, 0.2, 10.0))
    norm = module.ValueNorm()
    norm.update(reward)
    found += [norm.sums, *norm.mean_std()]
    mlp = module.AgentMLP(2, [5, 8, 3], head_gain=0.01, norm=True, shared=False)
    adam = torch.optim.Adam(mlp.parameters(), lr=1e-2, eps=1e-5, fused=True)
    x = torch.randn(2, 7, 5)
    mlp(x).square().sum().backward()
    found.append(module.clip_gradient_per_agent(list(mlp.parameters()), 0.1))
    adam.step()
    return [*found, mlp(x), *mlp.parameters()]


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_same_bits(script):
    ours, theirs = (outputs(importlib.import_module(Path(name).stem)) for name in (SCRIPTS[0], script))
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
