"""On a GPU: the numbers are those of a CPU, and what is captured replays the same."""

import csv
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode

import mg2l_mappo as mg2l

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OF_CONTEXT = "--warmup-episodes 100"
OWN = {"mg2l_mappo": f"{OF_CONTEXT} --warmup-updates 20", "ma_pearl": OF_CONTEXT, "mix_mate": "", "task_given": ""}
OWN["mg2l_mappo_cudagraphs"] = OWN["mg2l_mappo"]
CLOSE = ["losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/global_loss", "losses/local_loss"]


class DrawOnCPU(TorchFunctionMode):
    """Random numbers come from the CPU's generator, wherever they are needed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.randint, torch.randperm):
            device = kwargs.pop("device", "cpu")
            return func(*args, **kwargs).to(device)
        if func in (torch.randn_like, torch.normal, torch.multinomial):
            device = args[0].device
            args = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def run(script, folder, iterations, *flags):
    """A few iterations: scalars by name, the weights at the end, meta_test.csv, and what the script has defined."""
    argv = f"{OWN[script]} --eval-interval 10000000 --eval-copies 10 --num-threads 1 --run-name run".split()
    collected = 6000 if "warmup" in OWN[script] else 0  # at least what is collected as context
    argv += ["--total-timesteps", 3200 * iterations + collected, "--run-dir", folder, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
        module = runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    events = EventAccumulator(str(folder / "run"))
    events.Reload()
    scalars = {
        name: torch.tensor([event.value for event in events.Scalars(name)])
        for name in events.Tags()["scalars"]
        if name.split("/")[0] in ("losses", "charts") and name != "charts/SPS"
    }
    assert scalars
    weights = {
        f"{name}.{key}": value.cpu()
        for name, network in module["networks"].items()
        for key, value in network.state_dict().items()
    }
    with open(folder / "run" / "meta_test.csv") as file:
        return scalars, weights, list(csv.DictReader(file)), module


@pytest.mark.parametrize("script", ["mg2l_mappo", "ma_pearl", "mix_mate", "task_given"])
def test_begins_as_on_a_cpu(script, tmp_path):
    """Until rounding has been through an optimiser and the physics, a run is the same."""
    first = {script: ()} | {"mg2l_mappo": ("--warmup-updates", 0)}
    with DrawOnCPU():
        (gpu, *_), (cpu, *_) = (
            run(script, tmp_path / flag, 1, flag, *first[script]) for flag in ("--cuda", "--no-cuda")
        )
    assert gpu.keys() == cpu.keys()
    for name in ("losses/value_loss", "losses/entropy", "charts/episodic_return"):
        torch.testing.assert_close(gpu[name][0], cpu[name][0], rtol=1e-3, atol=1e-4)


def test_ten_iterations_as_on_a_cpu():
    """MG2L's networks, Adam and losses, over ten iterations of the same experience."""
    args = mg2l.Args(context_sets=8)
    mg2l.check_args(args)
    env, context_env = mg2l.make_env(args, 32), mg2l.make_env(args, 60)
    num_tasks, n, d = len(env.tasks.train), env.num_agents, args.latent_dim
    sides = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        networks = mg2l.build(args, env, device)
        actor, critic, encoder, _ = networks.values()
        parts = dict(actor=actor.parameters(), critic=critic.parameters(), phi_g=encoder.phi_g(), phi_l=encoder.phi_l())
        adam = {name: torch.optim.Adam(list(part), lr=5e-4, eps=1e-5, fused=True) for name, part in parts.items()}
        sides.append(SimpleNamespace(device=device, networks=networks, adam=adam, buffer=mg2l.ContextBuffer(200)))
    cpu = sides[0]
    for iteration in range(10):
        z = torch.randn(n, 12, 60, d)
        actor = cpu.networks["actor"]
        lived = mg2l.rollout(context_env, actor, np.repeat(env.tasks.train, 60 // num_tasks), z, seed=iteration)
        lived = mg2l.transitions(lived, actor).transpose(0, 1).unflatten(0, (num_tasks, -1))
        task = torch.randint(num_tasks, (32,))
        z, z_global = torch.randn(n, 100, 32, d), torch.randn(32, d).expand(100, -1, -1)
        data = mg2l.rollout(env, actor, env.tasks.train[task.numpy()], z, seed=iteration)
        found = []
        for side in sides:
            torch.manual_seed(iteration)
            side.buffer.add(lived.to(side.device))
            encoder = side.networks["encoder"]
            encoder.fit_input(side.buffer.data)
            there = SimpleNamespace(**{name: value.to(side.device) for name, value in vars(data).items()})
            given = (there, *(x.to(side.device) for x in (z, z_global, task)))
            with DrawOnCPU():
                metrics = mg2l.update_mappo(args, *given, *side.networks.values(), side.buffer, side.adam)
                metrics |= mg2l.update_encoder(args, encoder, side.buffer, num_tasks, side.adam, 16.0)
            found.append({name: value.detach().float().mean().cpu() for name, value in metrics.items()})
        for name in CLOSE:
            torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("env_id", ["hunting_target", "rware_layout"])  # continuous actions, and discrete ones
def test_replays_what_was_captured(env_id, tmp_path):
    flags = ("--env-id", env_id, "--cuda", "--warmup-episodes", 10)
    runs = [
        run("mg2l_mappo_cudagraphs", tmp_path / flag, 8, *flags, flag) for flag in ("--cudagraphs", "--no-cudagraphs")
    ]
    (_, replayed, rows, module), (_, launched, expected, plain) = runs
    assert rows == expected and all(torch.equal(weight, launched[name]) for name, weight in replayed.items())
    graphs = [module["learn"], module["encode"], *module["actor"].graphs.values()]
    assert all(graph.captured for graph in graphs) and not plain["learn"].captured
