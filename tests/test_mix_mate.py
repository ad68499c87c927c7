"""mix_mate.py: what an agent remembers, what its encoder learns from, and the meta-test without gradient steps."""

import copy
import csv
import runpy
import signal
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import mix_mate as mate
from envs import MetaVectorEnv, TaskSet

torch.set_num_threads(1)
CPU = torch.device("cpu")
SCRIPT = Path(mate.__file__)
own_or_shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def close(got, expected, tol=1e-5):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


class Toy(MetaVectorEnv):
    """Three agents see noise and who they are, are paid their action times the task, and end at once if all pick 2."""

    env_id = "toy"
    num_agents = 3
    max_episode_steps = 12
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    single_action_space = gym.spaces.Discrete(3)
    state_dim = 6
    tasks = TaskSet(np.arange(2), np.arange(2), np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), ("a", "b"))

    def __init__(self, num_envs=4, seed=0):
        super().__init__(num_envs, seed)
        self.noise = np.zeros(num_envs)

    def _start(self, copies):
        for k in copies:
            self.noise[k] = self.rngs[k].uniform()

    def _advance(self, actions):
        self._start(range(self.num_envs))
        return (actions * (1 + self.task[:, None])).astype(np.float32), actions.sum(1) == 6

    def _observe(self):
        obs = np.stack([np.stack([self.noise, np.full_like(self.noise, i)], -1) for i in range(3)], 1)
        return obs.astype(np.float32)


def small(env=None, **changes):
    """Environment, arguments and networks, all small, as the script makes them."""
    env = env or Toy()
    wanted = dict(hidden_dim=16, latent_dim=4, encoder_dim=8, update_epochs=2, eval_copies=4, share_policy=False)
    wanted |= dict(bptt_steps=50, decoded_steps=1000)
    args = mate.Args(num_envs=env.num_envs, **(wanted | changes))
    return env, args, types.SimpleNamespace(**mate.build(args, env, CPU))


def experience(env, args, nets, **more):
    """A rollout, and what the encoders read of it."""
    task = np.resize(env.tasks.train, env.num_envs)
    data = mate.rollout_recurrent(env, nets.actor, nets.encoder, task, 7, **more)
    return data, mate.own_past(nets.actor, data.obs, data.action, data.reward)


def optimizers_of(nets):
    names = ("actor", "critic", "encoder", "decoder")
    return {name: torch.optim.Adam(getattr(nets, name).parameters(), lr=1e-3, fused=True) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# What an agent remembers


@own_or_shared
def test_gru_is_torchs(shared):
    gru = mate.AgentGRU(3, 5, 100, shared)
    cells = [torch.nn.GRUCell(5, 5) for _ in range(3)]
    for i, cell in enumerate(cells):
        k = 0 if shared else i
        for name, ours in (("ih", "in"), ("hh", "hidden")):
            getattr(cell, f"weight_{name}").data = getattr(gru, f"weight_{ours}")[k].T
            getattr(cell, f"bias_{name}").data = getattr(gru, f"bias_{ours}")[k, 0]
    x, hidden = torch.randn(3, 7, 4, 5), torch.randn(3, 4, 5)
    begins = torch.zeros(7, 4, dtype=torch.bool)
    begins[4, 2] = True
    got = gru(x, begins, hidden)
    for i, cell in enumerate(cells):
        h = hidden[i]
        for t in range(7):
            h = cell(x[i, t], h * ~begins[t, :, None])
            close(got[i, t], h)


@own_or_shared
def test_representation_is_of_the_past(shared):
    """What is read at step t comes from this agent, this copy, this episode, and the steps before t: all of them."""
    env, args, nets = small(share_policy=shared)
    past, ended = torch.randn(3, 8, 4, 6), torch.zeros(8, 4, dtype=torch.bool)
    ended[4] = True  # the next episode begins at step 5
    plain = mate.representations(nets.encoder, past, ended)
    for t in range(8):
        other = past.clone()
        other[1, t, 2] += 1
        changed = (mate.representations(nets.encoder, other, ended) - plain).abs().amax(-1) > 1e-7  # [n, T, E]
        expected = torch.zeros_like(changed)
        expected[1, t + 1 : 5 if t < 4 else 8, 2] = True
        expected[:, :] &= t != 4  # the last step of an episode is not read
        assert torch.equal(changed, expected), t
    close(plain[:, 5], plain[:, 0])


@own_or_shared
def test_rollout_stores_what_the_sequence_gives(shared):
    env, args, nets = small(share_policy=shared)
    nets.encoder.fit_input(torch.randn(3, 5, 4, 6) * 3 + 1)
    data, past = experience(env, args, nets)
    assert data.ended[:-1].any()
    close(data.representation, mate.representations(nets.encoder, past, data.ended))
    inside = ~data.ended[:-1]
    close(data.next_representation[:, :-1][:, inside], data.representation[:, 1:][:, inside])
    at_end = data.ended.clone()
    at_end[-1] = False
    first = mate.representations(nets.encoder, torch.cat([past, past[:, :1]], 1), torch.zeros(13, 4, dtype=torch.bool))
    own = mate.first_episode(data.ended)  # where an episode ends, next_representation is what would have been read
    close(data.next_representation[:, own], first[:, 1:][:, own])


def test_critic_reads_each_agents_own():
    env, args, nets = small()
    state, representation = torch.randn(5, 4, 6), torch.randn(3, 5, 4, 8)
    plain = mate.agent_values(nets.critic, state, representation)
    representation[1] += 1
    changed = (mate.agent_values(nets.critic, state, representation) != plain).flatten(0, 1).any(0)
    assert changed.tolist() == [False, True, False]


def test_recall_goes_on_where_exploration_ended():
    """Memories of several lengths, also none, and the state they leave is that of the rollout."""
    env, args, nets = small()
    past = torch.randn(3, 9, 4, 6)
    lengths = [0, 3, 9, 5]
    memory = [past[:, :s, e].transpose(0, 1) for e, s in enumerate(lengths)]
    representation, hidden = mate.recall(nets.encoder, memory)
    for e, s in enumerate(lengths):
        want = nets.encoder.begin(1)
        for t in range(s):
            want = nets.encoder.advance(past[:, t, [e]], want[1])
        close(representation[:, e], want[0][:, 0])
        close(hidden[:, e], want[1][:, 0])
    data, _ = experience(env, args, nets, recalled=(representation, hidden))
    assert torch.equal(data.representation[:, 0], representation)


# ----------------------------------------------------------------------------------------------------------------------
# What is learnt from what


def reached(loss, nets):
    parts = dict(actor=nets.actor, critic=nets.critic, encoder=nets.encoder, mixture=nets.decoder.mixture)
    parts["decoder"] = torch.nn.ModuleList([nets.decoder.of_z, nets.decoder.of_joint, nets.decoder.layers])
    out = set()
    for name, part in parts.items():
        gradients = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
        if any(g is not None for g in gradients):
            assert all(g is not None and g.abs().sum() > 0 for g in gradients), name
            out.add(name)
    return out


@own_or_shared
@pytest.mark.parametrize("mixture, learns", [("expected", {"encoder", "decoder", "mixture"}), ("sampled", None)])
def test_reconstruction_reaches(mixture, learns, shared):
    env, args, nets = small(mixture=mixture, share_policy=shared, kl_coef=0)
    data, past = experience(env, args, nets)
    loss, _ = mate.encoder_loss(args, data, past, nets.encoder, nets.decoder)
    assert reached(loss, nets) == (learns or {"encoder", "decoder"})


def test_updates_move_their_own_networks():
    env, args, nets = small()
    data, past = experience(env, args, nets)
    optimizers = optimizers_of(nets)
    modules = {name: getattr(nets, name) for name in optimizers}

    def moved(update):
        before = copy.deepcopy(modules)
        assert all(value.isfinite().all() for value in update().values())
        pairs = {name: zip(modules[name].parameters(), before[name].parameters(), strict=True) for name in modules}
        return {name for name, pair in pairs.items() if not all(torch.equal(a, b) for a, b in pair)}

    assert moved(lambda: mate.update_mappo(args, data, nets.actor, nets.critic, nets.value_norm, optimizers)) == {
        "actor",
        "critic",
    }
    assert moved(lambda: mate.update_encoder(args, data, past, nets.encoder, nets.decoder, optimizers)) == {
        "encoder",
        "decoder",
    }
    assert all(p.grad is not None for p in nets.decoder.mixture.parameters())


def test_rollout_carries_no_gradient():
    env, args, nets = small()
    data, _ = experience(env, args, nets)
    assert not data.representation.requires_grad and not data.next_representation.requires_grad
    args.update_epochs = 1
    metrics = mate.update_mappo(args, data, nets.actor, nets.critic, nets.value_norm, optimizers_of(nets))
    assert metrics["losses/first_epoch_ratio_error"] < 1e-5


def test_expected_is_the_mean_of_sampled():
    error, log_weight = torch.rand(3, 50), torch.randn(3, 50).log_softmax(0)
    sampled = torch.stack([mate.mixture_loss("sampled", error, log_weight) for _ in range(4000)])
    expected = mate.mixture_loss("expected", error, log_weight)
    assert abs(sampled.mean() - expected) < 4 * sampled.std() / 4000**0.5 and sampled.std() > 0.01
    close(expected, sum(log_weight[k].exp() * error[k] for k in range(3)).mean())


def test_terminal_observation_is_not_predicted():
    env, args, nets = small()
    data, past = experience(env, args, nets)
    assert data.terminated.any() and not data.terminated.all()

    def loss(where):
        other = copy.copy(data)
        other.next_obs = data.next_obs + 5 * where[None, :, :, None]
        torch.manual_seed(1)
        return mate.encoder_loss(args, other, past, nets.encoder, nets.decoder)[0]

    nothing = torch.zeros_like(data.terminated)
    assert loss(data.terminated) == loss(nothing) != loss(~data.terminated)


def test_decoder_predicts_what_it_should():
    """Joint next observation and rewards, agent by agent: with these as output the errors are 0."""
    env, args, nets = small()
    data, past = experience(env, args, nets)
    nets.encoder.fit_input(past)
    mean, std = nets.encoder.mean, nets.encoder.std
    seen = {}

    class Oracle(mate.Decoder):
        def forward(self, z, obs, action):
            seen.update(z=z, obs=obs, action=action)
            batch = lambda x: x.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)[seen["steps"]]  # noqa: E731
            seen["steps"] = torch.arange(48)
            next_obs = batch((data.next_obs - mean[:2]) / std[:2])
            reward = batch(((data.reward.permute(2, 0, 1) - mean[-1]) / std[-1])[..., None])
            assert torch.equal(obs, batch((data.obs - mean[:2]) / std[:2]))
            return next_obs.expand(3, -1, -1), reward.expand(3, -1, -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda k, device: torch.arange(k))
        oracle = Oracle(3, 2, 3, 8, 4)
        loss, metrics = mate.encoder_loss(args, data, past, nets.encoder, oracle)
    assert metrics["losses/reconstruction_obs"] < 1e-8 and metrics["losses/reconstruction_reward"] < 1e-8
    close(loss, args.kl_coef * metrics["losses/local_kl"])
    assert seen["z"].shape == (3, 48, 4) and seen["action"].shape == (48, 9)


@pytest.mark.parametrize("steps", [50, 3])
def test_back_propagation_stops(steps):
    env, args, nets = small(bptt_steps=steps)
    past = torch.randn(3, 70, 1, 6, requires_grad=True)
    out = mate.representations(nets.encoder, past, torch.zeros(70, 1, dtype=torch.bool))
    for t in (1, steps - 1, steps, steps + 1, 69):
        [gradient] = torch.autograd.grad(out[:, t].sum(), past, retain_graph=True)
        lived = gradient.abs().sum((0, 2, 3)).nonzero().flatten()  # past[s] is read at step s + 1
        first = t // steps * steps - 1
        assert lived.tolist() == list(range(max(first, 0), t)), t
    assert max(mate.ENV_DEFAULTS["bptt_steps"]) == 50


def test_input_statistics_are_those_of_all_rollouts():
    env, args, nets = small()
    rollouts = [torch.randn(3, 9, 4, 6) * k + k for k in (1, 2, 3)]
    for past in rollouts:
        nets.encoder.fit_input(past)
    flat = torch.cat(rollouts).flatten(0, -2)
    close(nets.encoder.mean, flat.mean(0))
    close(nets.encoder.std, flat.std(0, correction=0))


# ----------------------------------------------------------------------------------------------------------------------
# Meta-test


def test_meta_test_is_decentralised(monkeypatch):
    """Agent 0 acts the same whatever the others lived through, and whatever the id of its task is."""
    env, args, nets = small()
    memory = [torch.randn(6, 3, 6) for _ in range(4)]
    obs = torch.randn(3, 4, 2)
    plain = mate.recall(nets.encoder, memory)[0]
    for own in memory:
        own[:, 1:] = torch.randn(6, 2, 6)
    other = mate.recall(nets.encoder, memory)[0]
    assert torch.equal(plain[0], other[0]) and not torch.equal(plain[1:], other[1:])
    logits = nets.actor(obs, plain).logits
    obs[1:] += 1
    assert torch.equal(nets.actor(obs, other).logits[0], logits[0])

    # the same tasks under other ids: same rewards, same actions
    rollouts, original = [], mate.rollout_recurrent

    def keep(*given, **named):
        data = original(*given, **named)
        rollouts[-1].append(data.action)
        return data

    class Renamed(Toy):
        def _advance(self, actions):
            reward, terminated = super()._advance(actions)
            return reward * ((2 - self.task) / (1 + self.task))[:, None].astype(np.float32), terminated

        tasks = TaskSet(np.array([1, 0]), np.array([1, 0]), *(np.eye(2, dtype=np.float32),) * 2, ("a", "b"))

    monkeypatch.setattr(mate, "rollout_recurrent", keep)
    for env in (Toy(), Renamed()):
        rollouts.append([])
        mate.meta_test(args, env, nets.actor, nets.encoder, 0, CPU, curve=True)
    assert len(rollouts[0]) > 4 and all(map(torch.equal, *rollouts))


@pytest.mark.parametrize("strict", [False, True])
def test_meta_test_carries_or_forgets(strict, monkeypatch):
    env, args, nets = small(reset_per_episode=strict)
    given, original = [], mate.rollout_recurrent

    def keep(*positional, recalled=None, **named):
        given.append((*positional[5:], recalled)[0])
        return original(*positional[:5], given[-1], **named)

    monkeypatch.setattr(mate, "rollout_recurrent", keep)
    rows = mate.meta_test(args, env, nets.actor, nets.encoder, 0, CPU, curve=True)
    assert [r["phase"] for r in rows][:16:4] == ["prior", "prior", "posterior", "posterior"]
    assert {r["phase"] for r in rows[16:]} == {"curve"} and all(r["accuracy"] == "" for r in rows)
    if strict:
        assert all(state is None for state in given)
        assert len({r["return"] for r in rows if r["phase"] == "curve" and r["run"] == 0}) == 1
    else:
        assert given[0] is None and all(state is not None for state in given[1:])
        assert given[2] is given[3]  # every test episode begins with what exploration taught
        start = nets.encoder.begin(4)[0]
        close(given[4][0], start)  # the curve begins with nothing
        assert not any(torch.allclose(state[0], start) for state in (given[1], given[2]))


# ----------------------------------------------------------------------------------------------------------------------
# From the command line

SMALL = "--num-envs 2 --update-epochs 1 --encoder-updates 2 --explore-episodes 1 --test-episodes 2 --num-threads 1"


def call(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
        runpy.run_path(str(SCRIPT), run_name="__main__")


def train(*argv):
    call(*SMALL.split(), *argv)


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("env_id, copies", [("hunting_target", 6), ("rware_layout", 20)])
def test_command_line_and_resume(env_id, copies, tmp_path, monkeypatch):
    folder = ("--no-cuda", "--run-dir", tmp_path, "--checkpoint-interval", 1, "--eval-copies", copies)
    saved, replace = [], mate.os.replace

    def stop_after_one(source, target):
        replace(source, target)
        saved.append(target)
        if len(saved) == 1:
            raise KeyboardInterrupt

    train("--env-id", env_id, "--total-timesteps", 400, "--run-name", "whole", *folder)
    monkeypatch.setattr(mate.os, "replace", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        train("--env-id", env_id, "--total-timesteps", 400, "--run-name", "cut", *folder)
    monkeypatch.undo()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call("--resume", cut)
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, cut))
    assert a["iteration"] == 2
    assert all(identical(a[key], b[key]) for key in ("networks", "optimizers", "iteration", "csv_bytes"))
    assert (whole / "meta_test.csv").read_bytes() == (cut / "meta_test.csv").read_bytes()
    rows = list(csv.DictReader(open(whole / "meta_test.csv")))
    assert sorted({int(row["step"]) for row in rows}) == [0, 400]
    curve = sorted({int(r["context_steps"]) for r in rows if r["phase"] == "curve"})
    assert curve == [0, 10, 20, 50, 100] and len({r["run"] for r in rows}) == copies

    # both ways to be tested, from one run
    for flag, steps in (("--no-reset-per-episode", None), ("--reset-per-episode", 1)):
        with pytest.raises(SystemExit):
            call("--meta-test", whole, flag)
        tested = list(csv.DictReader(open(whole / "meta_test_only.csv")))
        returns = {r["return"] for r in tested if r["phase"] == "curve" and r["run"] == "0"}
        assert steps is None or len(returns) == steps

    # what was saved can be used
    agents = mate.load_agents(whole)
    obs, _ = agents.env.reset(seed=0, options={"task": [1]})
    state = agents.begin(1)
    for _ in range(5):
        action = agents.act(obs, state, greedy=False)
        before, (obs, reward, *_) = obs, agents.env.step(action)
        state, old = agents.remember(state, before, action, reward), state
        assert state[0].shape == (agents.env.num_agents, 1, 2 * agents.args.latent_dim)
        assert not torch.equal(state[0], old[0]) and not state[0].requires_grad


def test_load_agents_acts_as_in_a_rollout(tmp_path):
    train("--no-cuda", "--total-timesteps", 200, "--run-name", "run", "--run-dir", tmp_path, "--eval-copies", 3)
    agents = mate.load_agents(tmp_path / "run")
    data = mate.rollout_recurrent(agents.env, agents.actor, agents.encoder, np.array([1]), 3, greedy=True)
    env = envs.make("hunting_target")
    obs, _ = env.reset(seed=3, options={"task": [1]})
    state = agents.begin(1)
    for t in range(20):
        action = agents.act(obs, state)
        close(torch.from_numpy(action), data.action[:, t].transpose(0, 1))
        before, (obs, reward, *_) = obs, env.step(action)
        state = agents.remember(state, before, action, reward)
