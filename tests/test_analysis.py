"""benchmark/analysis.py: every figure from tiny runs, and its numbers where they are known."""

import importlib
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmark"))  # as when the file is run
analysis = importlib.import_module("analysis")

TINY = "--num-envs 2 --update-epochs 1 --hidden-dim 8 --latent-dim 4 --encoder-dim 8 --num-threads 1 --no-cuda"
TINY += " --explore-episodes 2 --test-episodes 3 --eval-copies 4"
CONTEXT = " --context-size 8 --inference-size 50 --rollout-contexts 2 --warmup-episodes 1 --context-copies 1"
CONTEXT += " --context-interval 1 --context-episode-steps 20"
MG2L = TINY + CONTEXT + " --context-sets 2 --warmup-updates 1 --encoder-updates 1"
HUNT = " --env-id hunting_target --env-kwargs num_preys=2 radius=9.0"  # everybody sees everybody
STEPS = 20  # of an episode
RUNS = {
    "hunting": ("mg2l_mappo.py", MG2L + HUNT),
    "spread": ("mg2l_mappo.py", MG2L + " --env-id spread_target --env-kwargs num_agents=2 num_landmarks=3"),
    "cheetah": ("mg2l_mappo.py", MG2L + " --env-id halfcheetah_dir"),
    "hopper": ("mg2l_mappo.py", MG2L + " --env-id hopper_param --env-kwargs num_train=2 num_test=0"),
    "ablation": ("benchmark/mg2l_ablations.py", MG2L + HUNT + " --scheme local_only --aggregator rnn"),
    "pearl": ("ma_pearl.py", TINY + CONTEXT + HUNT),
    "mate": ("mix_mate.py", TINY + HUNT + " --encoder-updates 1"),
    "told": ("task_given.py", TINY.replace("--latent-dim 4 --encoder-dim 8", "") + HUNT),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two iterations of every script; episodes are short here, and stay so in this file."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("locomotion.LocomotionEnv", "particle.ParticleEnv"):
            patch.setattr(f"envs.{name}.max_episode_steps", STEPS)
        for name, (script, flags) in RUNS.items():
            tasks = 3 if name == "spread" else 2
            total = 2 * STEPS * (2 + (0 if name in ("mate", "told") else tasks))
            flags = f"{flags} --total-timesteps {total} --eval-interval {total} --run-dir {folder} --run-name {name}"
            patch.setattr(sys, "argv", [script, *flags.split()])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        yield folder


def command(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["analysis.py", *map(str, argv)])
    capsys.readouterr()
    analysis.main()
    return capsys.readouterr().out


def check_figure(path):
    pixels = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # lines in colours, not an empty frame
    assert path.with_suffix(".svg").read_text().startswith("<?xml")


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


# ----------------------------------------------------------------------------------------------------------------------
# Exploration and t-SNE


@pytest.mark.parametrize("name", ["hunting", "pearl", "mate"])
def test_exploration_is_of_the_tasks_asked_for(name, runs):
    module, agents = analysis.load(runs / name)
    task = np.array([1, 0, 1])
    memory = analysis.explore(module, agents, module.make_env(agents.args, 3), task, 5)
    assert [own.shape for own in memory] == [(2 * STEPS, 3, len(agents.encoder.mean))] * 3
    obs, _ = module.make_env(agents.args, 3).reset(seed=5, options={"task": task})
    obs_dim = obs.shape[-1]
    for k, own in enumerate(memory):
        assert torch.equal(own[0, :, :obs_dim], torch.from_numpy(obs[k]))
        _, _, preys = analysis.positions(agents.env, own[1:STEPS, :, :obs_dim].numpy())
        place = own[1:STEPS, :, 2:4].numpy()
        reward = -np.square(place - preys[:, None, task[k]]).sum(-1).mean(1)  # of the step that led there
        assert own[: STEPS - 1, 0, obs_dim + 2].numpy() == pytest.approx(reward, rel=1e-3)
    again = analysis.explore(module, agents, module.make_env(agents.args, 3), task, 5)
    assert all(torch.equal(a, b) for a, b in zip(memory, again, strict=True))


def test_exploration_of_mate_goes_on_from_what_it_recalls(runs):
    module, agents = analysis.load(runs / "mate")
    env, task = module.make_env(agents.args, 2), np.array([0, 1])
    memory = analysis.explore(module, agents, env, task, 5)
    torch.manual_seed(5)
    module.rollout_recurrent(env, agents.actor, agents.encoder, task, 5)
    recalled = module.recall(agents.encoder, [own[:STEPS] for own in memory])
    data = module.rollout_recurrent(env, agents.actor, agents.encoder, task, 6, recalled)
    action = memory[0].tensor_split((-3, -1), -1)[1]  # [S, n, 2]
    assert torch.equal(action[STEPS:], data.action[:, :, 0].transpose(0, 1))


def test_exploration_is_over_when_an_episode_is(runs, monkeypatch):
    module, agents = analysis.load(runs / "hopper")
    monkeypatch.setattr(module, "first_episode", lambda ended: torch.arange(len(ended))[:, None] < torch.tensor([7, 3]))
    memory = analysis.explore(module, agents, module.make_env(agents.args, 2), np.array([0, 1]), 5)
    assert [len(own) for own in memory] == [14, 6]


def by_hand(name, agents, memory):
    """Means of z^i [n, E, d] and z [E, ...] of memories of one length."""
    encoder, context = agents.encoder, torch.stack(memory).transpose(1, 2)  # [E, n, S, dim]
    if name == "mate":
        state = agents.begin(len(memory))
        for now in torch.stack(memory).unbind(1):  # [E, n, (o, a, r)]
            obs, action, reward = now.tensor_split((-3, -1), -1)
            state = agents.remember(state, obs, action, reward[..., 0])
        return state[0].chunk(2, -1)[0], None
    if name == "pearl":
        local = encoder.local_posterior(context)
        return local[0], encoder.global_posterior(*local)[0]
    x = encoder.embed(context)
    return encoder.local_posterior(x)[0], encoder.global_posterior(x)[0]


@pytest.mark.parametrize("name", ["hunting", "ablation", "pearl", "mate"])
@torch.no_grad()
def test_representations_by_hand(name, runs):
    """From all transitions that there are, and of which the order does not matter: nothing is left to chance."""
    torch.manual_seed(0)
    module, agents = analysis.load(runs / name)
    memory = [torch.randn(40, 3, len(agents.encoder.mean)) for _ in range(2)]
    if name == "ablation":  # its order does matter
        memory = [own[:1].expand(40, -1, -1) for own in memory]
    found = analysis.representations(module, agents, memory)
    assert list(found) == ["$z^1$", "$z^2$", "$z^3$"] + ["global $z$"] * (name != "mate")
    local, whole = by_hand(name, agents, memory)
    for i in range(3):
        assert found[f"$z^{i + 1}$"] == pytest.approx(local[i].numpy(), abs=1e-4)
    if name != "mate":
        assert found["global $z$"] == pytest.approx(whole.numpy(), abs=1e-4)
        assert whole.shape == (2, 12 if name == "ablation" else 4)


def test_separation_by_hand():
    label = np.repeat(np.arange(3), 10)
    rng = np.random.default_rng(0)
    apart = np.eye(3)[label] * 100 + rng.normal(size=(30, 3)) * 1e-3
    assert analysis.separation(apart, label) == (pytest.approx(1, abs=1e-3), 1.0)
    silhouette, probe = analysis.separation(rng.normal(size=(30, 3)), label)
    assert abs(silhouette) < 0.1 and probe < 0.7
    swapped = np.where(np.arange(30)[:, None] % 2, np.roll(apart, 10, 0), apart)  # held-out rows at another's centroid
    assert analysis.separation(swapped, label)[1] == 0


def test_tsne(runs, tmp_path, monkeypatch, capsys):
    names = ["hunting", "ablation", "pearl", "mate"]
    printed = command(monkeypatch, capsys, "tsne", *(runs / n for n in names), "--contexts", 6, "--out", tmp_path)
    lines = [line for line in printed.splitlines() if "silhouette" in line]
    of = [Path(line.split(":")[0]).name for line in lines]
    assert of == ["hunting"] * 4 + ["ablation"] * 4 + ["pearl"] * 4 + ["mate"] * 3
    assert all(-1 <= numbers(line)[0] <= 1 and 0 <= numbers(line)[1] <= 1 for line in lines)
    check_figure(tmp_path / "tsne_hunting_target")


def test_tsne_of_tasks_that_are_apart(runs, tmp_path, monkeypatch, capsys):
    apart = np.repeat(np.eye(2), 6, axis=0) * 100 + np.random.default_rng(0).normal(size=(12, 2)) * 1e-3
    monkeypatch.setattr(analysis, "representations", lambda *_: {"global $z$": apart})
    printed = command(monkeypatch, capsys, "tsne", runs / "hunting", "--contexts", 6, "--out", tmp_path)
    assert "global z silhouette 1.00, probe 1.00" in printed


# ----------------------------------------------------------------------------------------------------------------------
# Mismatch


def test_advantage_by_hand():
    by_source, by_target = np.array([[5.0], [-3], [70], [1]]), np.array([2.0, 40, 0, 9])
    assert analysis.advantage(by_source + by_target) == pytest.approx([0] * 4)
    assert analysis.advantage(by_source + by_target + 10 * np.eye(4)) == pytest.approx([10] * 4)
    matrix = np.random.default_rng(0).normal(size=(4, 4))
    others = (matrix.sum(0) - np.diag(matrix)) / 3
    assert np.mean(analysis.advantage(matrix)) == pytest.approx((np.diag(matrix) - others).mean())


def test_mismatch_is_source_by_target(monkeypatch):
    """z says the source, the return is ten times that and the target: entry [i, j] must be 10 i + j."""
    monkeypatch.setattr(analysis, "explore", lambda module, agents, env, task, seed: list(task))
    module = SimpleNamespace(
        infer=lambda encoder, memory, *_: (torch.tensor(memory, dtype=torch.float32), None),
        draw_z=lambda mean, std, num_steps: mean,
        rollout=lambda env, actor, task, z, seed, greedy: SimpleNamespace(z=z, task=torch.from_numpy(task)),
        episodic_return=lambda data: 10 * data.z + data.task,
    )
    args = SimpleNamespace(inference_size=4, rollout_contexts=1, latent_dim=1, explore_episodes=2, eval_sample=False)
    agents = SimpleNamespace(args=args, encoder=None, actor=None)
    env = SimpleNamespace(tasks=range(3), max_episode_steps=4, num_envs=6)
    matrix = analysis.mismatch_returns(module, agents, env, 2, 0)
    assert matrix.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]


def test_mismatch(runs, tmp_path, monkeypatch, capsys):
    made, make = [], analysis.envs.make
    monkeypatch.setattr(analysis.envs, "make", lambda *a, **kw: (made.append(kw), make(*a, **kw))[1])
    flags = ("--tasks", 3, "--copies", 2, "--out", tmp_path)
    printed = command(monkeypatch, capsys, "mismatch", runs / "hopper", *flags)
    factors = [kw["factors"] for kw in made if "factors" in kw]
    grid = [0.5, 1.0, 1.5]
    assert factors == [[tuple(f if k == p else 1.0 for k in range(4)) for f in grid] for p in range(4)]
    lines = [line for line in printed.splitlines() if "advantage" in line]
    assert [line.split(":")[0] for line in lines] == ["mass", "inertia", "damping", "friction"]
    for line in lines:
        low, high, diagonal, gain, *limits = numbers(line)
        assert 0 < low <= diagonal <= high and limits[0] <= gain <= limits[1]
    check_figure(tmp_path / "mismatch")


# ----------------------------------------------------------------------------------------------------------------------
# Trajectories


@pytest.mark.parametrize("name", ["hunting", "spread"])
def test_positions_from_observations(name, runs):
    module, agents = analysis.load(runs / name)
    env, n = agents.env, agents.env.num_agents
    obs = [env.reset(seed=3)[0][0]]
    where = [env.pos[:, :, 0].T.copy()]
    for _ in range(5):
        obs.append(env.step(np.random.default_rng(0).uniform(-1, 1, (1, n, 2)))[0][0])
        where.append(env.pos[:, :, 0].T.copy())
    own, fixed, preys = analysis.positions(env, np.stack(obs))
    where = np.stack(where)  # [T, entity, 2]
    assert own == pytest.approx(where[:, :n], abs=1e-5)
    assert fixed == pytest.approx(where[:, env.num_movers :], abs=1e-5)
    assert preys.shape == (6, env.num_movers - n, 2) and preys == pytest.approx(where[:, n : env.num_movers], abs=1e-5)


def test_prey_that_nobody_sees_has_no_position(runs):
    _, agents = analysis.load(runs / "hunting")
    agents.env.radius = 1e-6
    obs, _ = agents.env.reset(seed=3)
    assert np.isnan(analysis.positions(agents.env, obs)[2]).all()


@pytest.mark.parametrize("name", ["hunting", "spread", "cheetah"])
def test_three_phases(name, runs, monkeypatch):
    module, agents = analysis.load(runs / name)
    obs_dim, infer, seen = agents.env.single_observation_space.shape[0], agents.infer, []
    agents.infer = lambda memory: (seen.append(len(memory[0])), infer(memory))[1]
    phases = analysis.three_phases(module, agents, 1, 0)
    assert seen == list(range(STEPS))  # while exploring agents infer from what they have seen so far
    for lived in phases:
        assert lived.shape == (STEPS, agents.env.num_agents, len(agents.encoder.mean))
        assert np.array_equal(lived[0, :, :obs_dim], phases[0][0, :, :obs_dim])  # one start
        assert np.array_equal(lived[1:, :, :obs_dim], lived[:-1, :, -obs_dim:])  # o' is the next o
        if name != "cheetah":  # and the last o' is of this episode
            assert np.abs(lived[-1, :, -obs_dim:] - lived[-1, :, :obs_dim])[:, 2:4].max() < 0.3
    agents.infer = infer
    other = analysis.three_phases(module, agents, 0, 0)
    assert np.array_equal(other[0][..., :obs_dim], phases[0][..., :obs_dim])  # the prior knows no task

    inferred, real, acted, act = [], analysis.infer, [], agents.act
    monkeypatch.setattr(analysis, "infer", lambda *a: (inferred.append((a[-1], real(*a))), inferred[-1][1])[1])
    agents.act = lambda obs, z: (acted.append(z), act(obs, z))[1]
    analysis.three_phases(module, agents, 0, 0)
    ((memory, (mean, std)),) = inferred
    assert [len(own) for own in memory] == [2 * STEPS]  # both episodes of exploration
    z = torch.stack(acted).unflatten(0, (3, STEPS))[..., 0, :]  # [3, T, n, d]
    assert (z[2] - mean[:, :, 0].mean(0)).std() < 2 * std.mean() and z[0].std() > 0.7  # on the posterior, on the prior


@pytest.mark.parametrize("name, env_id, rows", [("hunting", "hunting_target", 2), ("spread", "spread_target", 3),
                                                ("cheetah", "halfcheetah_dir", 1)])  # fmt: skip
def test_trajectories(name, env_id, rows, runs, tmp_path, monkeypatch, capsys):
    figures, save = [], analysis.save
    monkeypatch.setattr(analysis, "save", lambda figure, *rest: (figures.append(figure), save(figure, *rest)))
    printed = command(monkeypatch, capsys, "trajectories", runs / name, "--out", tmp_path)
    lines = [line for line in printed.splitlines() if "return" in line]
    assert len(lines) == 3 * (2 if name == "cheetah" else rows)
    module, agents = analysis.load(runs / name)
    obs_dim = agents.env.single_observation_space.shape[0]
    for line, lived in zip(lines, analysis.three_phases(module, agents, 0, 0), strict=False):
        assert numbers(line.split("return")[1])[0] == pytest.approx(lived[:, 0, -obs_dim - 1].sum(), abs=0.06)  # shared
    check_figure(tmp_path / f"trajectories_{env_id}")
    assert len(figures[0].axes) == 3 * rows
    if name == "cheetah":
        forward, backward = (line.get_ydata() for line in figures[0].axes[0].lines)
        assert np.array_equal(forward, backward)  # on the prior
        gains = [numbers(lines[k].split("return")[1])[0] for k in (0, 3)]
        assert -0.02 * 6 * STEPS <= sum(gains) <= 0  # g v - 0.01 |a|^2 for g = 1 and -1, |a|^2 <= 6 but for clipping
        speed = analysis.three_phases(module, agents, 0, 0)[0][:, 0, obs_dim - 3]
        assert forward == pytest.approx(np.convolve(speed, np.ones(20) / 20, "valid"))
        obs, *_ = agents.env.step(np.ones((1, 2, 3), np.float32))
        assert obs[0, 0, -3] == np.float32(agents.env.vel[0, 0])  # the body's forward velocity


# ----------------------------------------------------------------------------------------------------------------------
# Priorities


class Teller:
    """An encoder that knows the task of a context if the one transition that tells it, weighed highest, is in it."""

    def __init__(self, agents):
        self.mean = agents.encoder.mean

    def priorities(self, own):  # [n, S, dim]
        return own[..., 0] * 0.999 + 1e-6

    def embed(self, context):  # [Q, n, B, dim]
        return context.sum(2)

    def local_posterior(self, x):  # [Q, n, dim]
        mean = x[..., 1:5].transpose(0, 1)
        return mean, torch.full_like(mean, 1e-6)


def told(env, task):
    """40 transitions per copy; only the last says the task, in entries 1 to 4, and that it does, in entry 0."""
    memory = [torch.zeros(40, env.num_agents, 30) for _ in task]
    for own, which in zip(memory, task, strict=True):
        own[-1, :, 0], own[-1, :, 1 + which] = 1, 1
    return memory


def test_priority_finds_the_transition_that_tells(runs):
    module, agents = analysis.load(runs / "hunting")
    agents.encoder = Teller(agents)
    env, task = module.make_env(agents.args, 40), np.resize([0, 1], 40)
    memory = told(env, task)
    found = analysis.measure(module, agents, env, task, memory, [1, 4, 40], 0)
    assert (found["priority", 1][1] > 0.9).mean() > 0.9 and found["priority", 4][1].mean() > 0.95
    # by chance in one of ten contexts; a context that says nothing is, to within its noise, a guess
    assert found["uniform", 4][1].mean() == pytest.approx(0.5, abs=0.15)
    assert found["uniform", 40][1].mean() == found["priority", 40][1].mean() == 1
    assert found["uniform", 40][0] == pytest.approx(found["priority", 40][0], rel=1e-3)


def test_accuracies_are_those_of_each_copy(runs):
    module, agents = analysis.load(runs / "hunting")
    agents.encoder = Teller(agents)
    env, task = module.make_env(agents.args, 12), np.resize([0, 1], 12)
    memory = told(env, np.where(np.arange(12) == 7, 0, task))  # copy 7 is on task 1, and told that it is on task 0
    _, accuracy = analysis.measure(module, agents, env, task, memory, [4], 0)["priority", 4]
    assert accuracy[7] < 0.1 and np.delete(accuracy, 7).min() > 0.5


@pytest.mark.parametrize("sample", [False, True])
def test_acts_as_in_meta_test(sample, runs, monkeypatch):
    """On the mode, or where a run samples its actions on samples."""
    module, agents = analysis.load(runs / "hunting")
    agents.args.eval_sample, rollout, greedy = sample, module.rollout, []
    monkeypatch.setattr(module, "rollout", lambda *given, **named: (greedy.append(named), rollout(*given, **named))[1])
    env, task = module.make_env(agents.args, 4), np.resize([0, 1], 4)
    analysis.measure(module, agents, env, task, analysis.explore(module, agents, env, task, 0), [4], 0)
    analysis.mismatch_returns(module, agents, env, 2, 0)
    assert [named["greedy"] for named in greedy if named] == 4 * [not sample]


def test_what_drawing_by_priority_gains(runs, tmp_path, monkeypatch, capsys):
    module, agents = analysis.load(runs / "hunting")
    agents.encoder = Teller(agents)
    monkeypatch.setattr(analysis, "load", lambda *_: (module, agents))
    monkeypatch.setattr(analysis, "explore", lambda module, agents, env, task, seed: told(env, task))
    flags = ("--copies", 40, "--sizes", 4, "--out", tmp_path)
    printed = command(monkeypatch, capsys, "priorities", runs / "hunting", *flags)
    priority, _, _, uniform, _, _, gain, low, high = numbers(printed.split("CL accuracy")[1].splitlines()[0])
    assert priority > 0.95 and uniform < 0.65 and gain == pytest.approx(priority - uniform, abs=0.011)
    assert 0.3 < low <= gain <= high


def test_uniform_leaves_the_encoder_as_it_was(runs):
    module, agents = analysis.load(runs / "hunting")
    own = torch.randn(3, 10, len(agents.encoder.mean))
    before = agents.encoder.priorities(own)
    env, task = module.make_env(agents.args, 4), np.resize([0, 1], 4)
    analysis.measure(module, agents, env, task, [torch.randn(10, 3, own.shape[-1])] * 4, [4], 0)
    assert torch.equal(agents.encoder.priorities(own), before)


@pytest.mark.parametrize("name", ["hunting", "ablation"])
def test_priorities(name, runs, tmp_path, monkeypatch, capsys):
    flags = ("--copies", 6, "--sizes", 4, 200, "--out", tmp_path)
    printed = command(monkeypatch, capsys, "priorities", runs / name, *flags)
    lines = [line for line in printed.splitlines() if "transitions: by priority" in line]
    assert [line.split(" transitions")[0] for line in lines] == [
        "return from 4", "return from 200", "CL accuracy from 4", "CL accuracy from 200",
    ]  # fmt: skip
    for line in lines:
        priority, *_, gain, low, high = numbers(line)
        uniform = numbers(line)[3]
        assert gain == pytest.approx(priority - uniform, abs=0.11) and low <= gain <= high
    if name == "hunting":  # from all there is, both draw the same
        assert numbers(lines[1])[-3:] == pytest.approx([0, 0, 0], abs=0.05)
    else:
        assert "as if 100% of the transitions" in printed  # a recurrent unit weighs nothing
    check_figure(tmp_path / "priorities")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "no run": (["priorities", "nowhere"], "no args.json there"),
    "script": (["tsne", "told"], "a run of task_given"),
    "no priorities": (["priorities", "pearl"], "a run of ma_pearl"),
    "no posterior": (["trajectories", "mate"], "a run of mix_mate"),
    "env": (["mismatch", "hunting"], "a run on hunting_target"),
    "no paths": (["trajectories", "hopper"], "a run on hopper_param"),
    "contexts": (["tsne", "hunting", "--contexts", "3"], "contexts: got 3"),
    "tasks": (["mismatch", "hopper", "--tasks", "1"], "tasks: got 1"),
    "copies": (["mismatch", "hopper", "--copies", "0"], "copies: got 0"),
    "copies per task": (["priorities", "hunting", "--copies", "3"], "copies: got 3"),
    "sizes": (["priorities", "hunting", "--sizes", "0"], "sizes: got [0]"),
}


@pytest.mark.parametrize("argv, words", BAD.values(), ids=BAD)
def test_bad_input(argv, words, runs, tmp_path, monkeypatch, capsys):
    argv = [argv[0], runs / argv[1], *argv[2:], "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, *argv)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last and "expected" in last
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Codes


def test_codes_by_hand():
    """Three copies on each of two tasks: medians heed neither a wrong sign nor a copy read as the other task."""
    code, label = torch.tensor([[1.0, 1, 1], [-1, -1, 1]]), torch.arange(6) % 2
    mean = code[label].repeat(2, 1, 1)  # [2, 6, 3]
    mean[0, 2] = torch.tensor([1.0, 1, -1])
    mean[1, 3] = code[0]
    codes, right, wrong_signs = analysis.read_codes(mean, label)
    assert torch.equal(codes, code.repeat(2, 1, 1))
    assert right.tolist() == [True, True, True, False, True, True]
    assert wrong_signs.tolist() == [0, 0, 1, 2, 0, 0]


@pytest.mark.parametrize("misread", [False, True])
def test_codes(misread, runs, monkeypatch, capsys):
    """Agents that infer the code lose nothing; one that infers the other task's acts otherwise than on the code."""
    module, agents = analysis.load(runs / "hunting")
    agents.encoder = Teller(agents)
    agents.actor.mlp.weights[-1].data.mul_(1e3)  # so that z moves actions

    def explore(module, agents, env, task, seed):
        memory = told(env, task)
        if misread:
            memory[3] = told(env, 1 - task)[3]
        return memory

    monkeypatch.setattr(analysis, "load", lambda *_: (module, agents))
    monkeypatch.setattr(analysis, "explore", explore)
    lines = command(monkeypatch, capsys, "codes", runs / "hunting", "--copies", 8).splitlines()
    names, texts = zip(*(line.split(": ") for line in lines), strict=True)
    groups = [("read right, every sign", 88 if misread else 100)] + [("read as another task", 12)] * misread
    assert [(name, int(text.split("%")[0])) for name, text in zip(names, texts, strict=True)] == [
        ("all", 100), *groups, ("task 0 (prey_0=1, prey_1=0)", 50), ("task 1 (prey_0=0, prey_1=1)", 50)
    ]  # fmt: skip
    for name, text in zip(names, texts, strict=True):
        values = numbers(text)
        inferred, on_code, lost = values[:: len(values) // 3]  # between them are intervals
        assert lost == pytest.approx(on_code - inferred, abs=0.11)
        if not misread or name in ("read right, every sign", names[-2]):
            assert inferred == on_code
        if name == "read as another task":
            assert inferred != on_code and "one run" in text


@pytest.mark.parametrize("name, tasks", [("spread", 3), ("ablation", 2)])
def test_codes_of_a_trained_run(name, tasks, runs, monkeypatch, capsys):
    printed = command(monkeypatch, capsys, "codes", runs / name, "--copies", 2 * tasks)
    assert printed.startswith("all: 100% of meta-test runs, return -") and printed.count("\ntask ") == tasks
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, capsys, "codes", runs / name, "--copies", 2 * tasks - 1)
    assert error.value.code == 2
    expected = f"copies: got {2 * tasks - 1}, expected at least two for each of {tasks} tasks"
    assert expected in capsys.readouterr().err


def test_codes_of_several_runs(monkeypatch, capsys):
    """Shares are of all meta-test runs, returns means of the runs' means, of those that have the group."""
    tables = {
        "a": {"all": [[-4, -8], [-2, -4]], "read as another task": [[-8], [-4]], "task 0 (x)": [[-4, -8], [-2, -4]]},
        "b": {"all": [[-1, -1], [-1, -1]], "task 0 (x)": [[-1, -1], [-1, -1]]},
        "c": {"all": [[-1, -1], [-1, -1]], "task 0 (y)": [[-1, -1], [-1, -1]]},
    }
    of_run = lambda run, *_: {name: np.array(values, float) for name, values in tables[str(run)].items()}  # noqa: E731
    monkeypatch.setattr(analysis, "returns_on_codes", of_run)
    everything, misread, _ = command(monkeypatch, capsys, "codes", "a", "b", "--copies", 2).splitlines()
    assert everything.startswith("all: 100% of meta-test runs") and misread.startswith("read as another task: 25% of")
    assert numbers(everything) == [-3.5, -6, -1, -2, -3, -1, 1.5, 0, 3]  # each with its interval
    assert numbers(misread) == [-8, -4, 4] and misread.count("(one run)") == 3
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, "codes", "a", "c", "--copies", 2)
    assert "runs: got 2 sets of tasks, expected runs of one setting" in capsys.readouterr().err
