"""mg2l_mappo_multigpu.py: what it changes, that it computes what one process would, and that its runs resume."""

import difflib
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PLAIN, TWIN = ROOT / "mg2l_mappo.py", ROOT / "mg2l_mappo_multigpu.py"
ALONE = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
    "PYTHONPATH": str(ROOT)
}
SHORT = "--num-envs 4 --update-epochs 2 --warmup-episodes 2 --warmup-updates 2 --context-copies 2 --eval-copies 10"
SHORT += " --context-sets 4 --env-id hunting_target --buffer-size 3000"
SHORT += " --context-interval 1 --inference-size 20 --rollout-context-size 20 --num-threads 1 --seed 3"


def launch(*command, processes=2):
    """Run a script on several processes, as torchrun does, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    given = [str(part) for part in command]
    return subprocess.run([*launcher, *given], capture_output=True, text=True, env=ALONE)


def test_differs_by_distribution_alone():
    plain, twin = PLAIN.read_text().splitlines(), TWIN.read_text().splitlines()
    changes = [
        change for change in difflib.SequenceMatcher(None, plain, twin, False).get_opcodes() if change[0] != "equal"
    ]
    assert sum(max(b - a, d - c) for _, a, b, c, d in changes) < 130
    about = re.compile(
        r"(RANK|WORLD_SIZE)|\b(dist|average|average_gradients|gather|ranks?|process\w*|torchrun|SCRIPT|datetime)\b"
    )
    for _, _, _, c, d in changes:
        assert about.search("\n".join(twin[c:d])), f"not about several processes: {twin[c:d]}"


FIXED_BATCH = """
import importlib, os, sys
from types import SimpleNamespace
import torch

module = importlib.import_module(sys.argv[1])
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if size > 1:
    module.dist.init_process_group("gloo")
args = module.Args(num_envs=8, max_grad_norm=float(sys.argv[3]), context_size=5)
args.context_sets = 2 * size
module.check_args(args)
args.update_epochs = 1
torch.set_num_threads(1)  # so that all begin with the same bits
torch.manual_seed(0)
env = module.make_env(args, 8)
networks = module.build(args, env, "cpu")
actor, critic, encoder, value_norm = networks.values()
parameters = dict(actor=actor.parameters(), critic=critic.parameters(), phi_g=encoder.phi_g(), phi_l=encoder.phi_l())
optimizers = {name: torch.optim.Adam(list(params), 1e-15) for name, params in parameters.items()}
num_tasks, n, d = len(env.tasks.train), env.num_agents, args.latent_dim
z = torch.randn(n, 6, 8, d)  # six steps of eight copies
task = torch.arange(8) % num_tasks
data = module.rollout(env, actor, env.tasks.train[task.numpy()], z, seed=0)
buffer = module.ContextBuffer(4)
context_env = module.make_env(args, 4 * num_tasks)
each_task = env.tasks.train.repeat(4)
lived = module.rollout(context_env, actor, each_task, torch.randn(n, 6, len(each_task), d), seed=1)
buffer.add(module.transitions(lived, actor).transpose(0, 1).unflatten(0, (num_tasks, 4)))
mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
agents_first = ("obs", "action", "log_prob", "next_obs")
data = {k: v[:, :, mine] if k in agents_first else v[:, mine] for k, v in vars(data).items()}
# in float64, so that what differs is the computation and not its rounding
data = SimpleNamespace(**{k: v.double() if v.is_floating_point() else v for k, v in data.items()})
buffer.data, z, networks = buffer.data.double(), z.double(), {k: v.double() for k, v in networks.items()}
# contexts that are the same on all ranks: of each task the first five steps
buffer.sample = lambda task, *_: buffer.data[task, 0, :5].transpose(1, 2)
given = (data, z[:, :, mine], torch.ones(6, 8 // size, d).double(), task[mine])
module.update_mappo(args, *given, actor, critic, encoder, value_norm, buffer, optimizers)
gradients = lambda network: {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
found = {f"{name}.{key}": grad for name in networks for key, grad in gradients(networks[name]).items()}
found["value_norm"] = value_norm.sums
torch.randn_like = torch.zeros_like  # no noise in the contrast
args.max_grad_norm, contrasted = 1e9, []  # clipped halves would not add up to the clipped whole
for half in [rank] if size > 1 else [0, 1]:  # each rank compares two sets of its own
    buffer.sample = lambda task, *_: buffer.data[task, half, :5].transpose(1, 2)
    module.update_encoder(args, encoder, buffer, num_tasks, optimizers, args.temperature)
    contrasted.append(gradients(encoder))
found |= {f"contrast.{key}": sum(one[key] for one in contrasted) / len(contrasted) for key in contrasted[0]}
torch.save(found, f"{sys.argv[2]}.{rank}")
"""


@pytest.fixture(scope="module", params=["1e9", "0.01"])  # not clipped, and clipped
def gradients(tmp_path_factory, request):
    """Of one fixed batch: by mg2l_mappo.py on all of it, and by the twin on half of it in each of two processes."""
    folder = tmp_path_factory.mktemp("gradients")
    script = folder / "fixed_batch.py"
    script.write_text(FIXED_BATCH)
    done = subprocess.run(
        [sys.executable, script, "mg2l_mappo", folder / "one", request.param],
        capture_output=True, text=True, env=ALONE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = launch(script, "mg2l_mappo_multigpu", folder / "two", request.param)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / name) for name in ("one.0", "two.0", "two.1")]


def test_ranks_agree(gradients):
    _, first, second = gradients
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_gradients_are_those_of_one_process(gradients):
    one, two, _ = gradients
    assert {key.split(".")[0] for key in one} == {"actor", "critic", "encoder", "value_norm", "contrast"}
    for key in one:
        assert (one[key] - two[key]).abs().max() < 1e-6 * one[key].abs().max(), key


def train(folder, *given):
    done = launch(TWIN, *SHORT.split(), *given, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    (run,) = folder.iterdir()
    return run


def contents(run, name="checkpoint.pt"):
    return torch.load(io.BytesIO((run / name).read_bytes()[:-32]), weights_only=True)


def flat(nested):
    """Every tensor and number within a checkpoint."""
    if isinstance(nested, dict):
        return [leaf for key in sorted(nested, key=str) for leaf in flat(nested[key])]
    return [leaf for one in nested for leaf in flat(one)] if isinstance(nested, list | tuple) else [nested]


def test_a_run_of_two_processes_resumes_exactly(tmp_path):
    run = train(tmp_path, "--total-timesteps", 1500, "--checkpoint-interval", 1)
    whole, table = contents(run), (run / "meta_test.csv").read_bytes()
    assert contents(run, "checkpoint_previous.pt")["iteration"] == whole["iteration"] - 1 > 0
    os.replace(run / "checkpoint_previous.pt", run / "checkpoint.pt")
    done = launch(TWIN, "--resume", run)
    assert done.returncode == 0, done.stderr
    assert (run / "meta_test.csv").read_bytes() == table
    for a, b in zip(flat(whole), flat(contents(run)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "given, expected",
    [
        (["--num-envs", 5], "num-envs: got 5, expected copies that 2 processes share evenly"),
        (["--context-sets", 3], "context-sets: got 3, expected at least 2 for each of 2 processes, as many for each"),
        (["--gamma", 2], "gamma: got 2.0, expected at most 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, expected):
    done = launch(TWIN, *SHORT.split(), *given, "--run-dir", tmp_path / "runs")
    message = f"mg2l_mappo_multigpu.py: {expected}"
    assert done.returncode and message in done.stderr
    # the processes say it at once, the end of one's line now and then behind the other's
    assert "mg2l_mappo_multigpu.py: " not in done.stderr.replace(message, "")
    assert not (tmp_path / "runs").exists()


def test_one_process_needs_no_torchrun(tmp_path):
    """Then it is mg2l_mappo.py, but for the last bit of the advantages."""
    runs = []
    for script in (PLAIN, TWIN):
        command = [
            sys.executable,
            script,
            *SHORT.split(),
            "--total-timesteps",
            "500",
            "--run-dir",
            tmp_path / script.stem,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=ALONE)
        assert done.returncode == 0, done.stderr
        (run,) = (tmp_path / script.stem).iterdir()
        runs.append(contents(run))
    assert torch.equal(runs[0]["context"], runs[1]["context"])
    for a, b in zip(flat(runs[0]["networks"]), flat(runs[1]["networks"]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
