"""What mg2l_mappo.py does with an environment: experience, GAE, PPO and encoder updates, Fig. 3, and the meta-test."""

import copy
import dataclasses
import inspect
import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import envs
import mg2l_mappo as mg2l
from envs import MetaVectorEnv, TaskSet
from mg2l_mappo import ContextBuffer, draw_z, episodic_return, first_episode, gae, infer, inference_accuracy, rollout

torch.set_num_threads(1)
CPU = torch.device("cpu")
own_or_shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
every_form = pytest.mark.parametrize("form", ["infonce", "cmi", "kl"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def close(got, expected, tol=1e-5):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


class Toy(MetaVectorEnv):
    """Two agents see (steps so far, the episode's lot, who I am). Rewards are each agent's own, alike in all tasks.

    A copy terminates when the actions (0, 1 or 2 each) sum to 3 or more.
    """

    env_id = "toy"
    num_agents = 2
    max_episode_steps = 4
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    single_action_space = gym.spaces.Discrete(3)
    state_dim = 6
    tasks = TaskSet(np.arange(2), np.arange(2), np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), ("a", "b"))

    def __init__(self, num_envs=1, seed=0):
        super().__init__(num_envs, seed)
        self.count, self.lot = np.zeros(num_envs), np.zeros(num_envs)

    def _start(self, copies):
        self.count[copies] = 0
        for k in copies:
            self.lot[k] = self.rngs[k].uniform()

    def _advance(self, actions):
        self.count += 1
        return (actions * [1, 10] + self.lot[:, None]).astype(np.float32), actions.sum(1) >= 3

    def _observe(self):
        obs = np.stack([np.stack([self.count, self.lot, np.full_like(self.lot, i)], -1) for i in range(2)], 1)
        return obs.astype(np.float32)


def make_env(name, num_envs):
    if name == "toy":
        return Toy(num_envs)
    env = envs.make(name, num_envs, 0)
    env.max_episode_steps = 5
    return env


def small(env, **changes):
    """Arguments, networks, optimizers and a full context buffer, all small, as the script makes them."""
    wanted = dict(num_envs=env.num_envs, hidden_dim=16, latent_dim=4, encoder_dim=8, encoder_heads=2, context_size=6)
    wanted |= dict(
        latent_scale=0.5, explore_scale=3.0, update_epochs=3, rollout_contexts=3, eval_copies=6, inference_size=7
    )
    wanted |= dict(context_episodes=2, temperature=16.0, rollout_context_episodes=2, critic_context_size=6)
    wanted |= dict(context_sets=3)
    known = {field.name for field in dataclasses.fields(mg2l.Args)}
    args = mg2l.Args(**{name: value for name, value in (wanted | changes).items() if name in known})
    nets = types.SimpleNamespace(**mg2l.build(args, env, CPU))
    parameters = dict(
        actor=nets.actor.parameters(),
        critic=nets.critic.parameters(),
        phi_g=nets.encoder.phi_g(),
        phi_l=nets.encoder.phi_l(),
    )
    optimizers = {name: torch.optim.Adam(p, lr=1e-3, eps=args.adam_eps, fused=True) for name, p in parameters.items()}
    buffer = ContextBuffer(4)
    episodes = torch.randn(len(env.tasks.train), 4, env.max_episode_steps, env.num_agents, len(nets.encoder.mean))
    buffer.add(episodes)
    return args, nets, optimizers, buffer


def experience(env, args, nets, num_steps, seed=7):
    """A rollout on random z with random tasks: data, z_local, z_global, task."""
    z_local = torch.randn(env.num_agents, num_steps, env.num_envs, args.latent_dim)
    z_global = torch.randn(num_steps, env.num_envs, args.latent_dim)
    task = torch.randint(len(env.tasks.train), (env.num_envs,))
    data = rollout(env, nets.actor, env.tasks.train[task.numpy()], z_local, seed)
    return data, z_local, z_global, task


def update(args, nets, optimizers, buffer, data, z_local, z_global, task):
    return mg2l.update_mappo(
        args, data, z_local, z_global, task, nets.actor, nets.critic, nets.encoder, nets.value_norm, buffer, optimizers
    )


# ----------------------------------------------------------------------------------------------------------------------
# Fig. 3: which loss trains what

FIG_3 = {  # loss: what it trains
    "L_Q": {"E_tran", "E_agg", "E_G", "critic"},
    "L_G": {"E_tran", "E_agg", "E_G"},
    "L_L": {"E_L"},
    "L_pi": {"actors"},
}
PARTS = ("E_tran", "E_agg", "E_G", "E_L", "critic", "actors")


def parts_of(nets):
    encoder = nets.encoder
    return {
        "E_tran": list(encoder.e_tran.parameters()),
        "E_agg": list(encoder.e_agg.parameters()),
        "E_G": [*encoder.e_global.parameters(), *encoder.global_head.parameters()],
        "E_L": list(encoder.e_local.parameters()),
        "critic": list(nets.critic.parameters()),
        "actors": list(nets.actor.parameters()),
    }


def trained_by(loss, nets):
    """Parts whose every parameter gets a gradient other than zero; the others must be out of reach."""
    reached = set()
    for part, parameters in parts_of(nets).items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            continue
        assert all(g is not None and g.abs().sum() > 0 for g in gradients), f"{part} is reached in part or by zeros"
        reached.add(part)
    return reached


class Step:
    """One forward pass by hand, from a context of joint experience to each of the four losses."""

    def __init__(self, shared=False, num_queries=6, num_tasks=3):
        env = make_env("hunting_target", 4)
        args, nets, _, buffer = small(env, share_policy=shared)
        self.nets, self.n = nets, env.num_agents
        self.label = torch.arange(num_queries) % num_tasks
        context = buffer.data[torch.cat([self.label, torch.arange(num_tasks)]), 0].transpose(1, 2)  # [Q + N, n, T, dim]
        x = nets.encoder.embed(context)
        self.posterior_global, self.posterior_local = nets.encoder.global_posterior(x), nets.encoder.local_posterior(x)
        self.scores, self.z = [], []
        for mean, std in (self.posterior_global, self.posterior_local):
            z = mean + std * torch.randn_like(mean)
            query, keys = z[..., :num_queries, :], z[..., None, num_queries:, :]  # one set of keys
            self.scores.append(mg2l.similarity_scores(query, keys, args.similarity, args.temperature))
            self.z.append(z)
        self.state = torch.randn(9, env.state_dim)
        self.obs = torch.randn(self.n, 9, *env.single_observation_space.shape)

    def local_loss(self, form, agents=slice(None)):
        of_z, of_each = self.scores
        posterior = tuple(p[agents] for p in self.posterior_local)
        return mg2l.local_loss(form, of_z, of_each[agents], self.label, self.posterior_global, posterior, 0.1)

    def policy_loss(self, agents=slice(None)):
        policy = self.nets.actor(self.obs, self.z[1].detach())
        action = policy.sample()
        log_prob, entropy = policy.log_prob(action), policy.entropy()
        old, advantage = log_prob.detach() + 0.01, torch.linspace(-1, 1, log_prob.numel()).view_as(log_prob)
        return mg2l.policy_loss(log_prob[agents], old[agents], advantage[agents], entropy[agents], 0.2, 0.01)

    def loss(self, name, form=None):
        if name == "L_G":
            return mg2l.global_loss(self.scores[0], self.label, *self.posterior_global, 0.1)
        if name == "L_Q":
            value = self.nets.critic(self.state, self.z[0])
            return mg2l.value_loss(value, value.detach() + 0.01, torch.randn_like(value), 0.2, 10.0)
        return self.policy_loss() if name == "L_pi" else self.local_loss(form)


LOSSES = [("L_Q", None), ("L_G", None), ("L_L", "infonce"), ("L_L", "cmi"), ("L_L", "kl"), ("L_pi", None)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(filter(None, loss)))
def test_fig_3_cell(loss, part):
    step = Step()
    assert (part in trained_by(step.loss(*loss), step.nets)) == (part in FIG_3[loss[0]])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(filter(None, loss)))
def test_fig_3_holds_with_a_shared_policy(loss):
    step = Step(shared=True)
    assert trained_by(step.loss(*loss), step.nets) == FIG_3[loss[0]]


@own_or_shared
@every_form
def test_fig_3_holds_in_the_updates_themselves(form, shared, monkeypatch):
    """The losses as the updates compute them, even on representations that carry a gradient."""
    env = make_env("hunting_target", 4)
    args, nets, optimizers, buffer = small(env, local_loss=form, share_policy=shared)
    found = {}

    def watch(function, name):
        original = getattr(mg2l, function)

        def spy(*given, **named):
            loss = original(*given, **named)
            found.setdefault(name, []).append(trained_by(loss, nets))
            return loss

        monkeypatch.setattr(mg2l, function, spy)

    for function, name in dict(value_loss="L_Q", policy_loss="L_pi", global_loss="L_G", local_loss="L_L").items():
        watch(function, name)
    task = torch.tensor([0, 1, 2, 1])
    x = nets.encoder.embed(buffer.sample(task, 6, 2))
    z_local = draw_z(*(p[None] for p in nets.encoder.local_posterior(x)), 5)  # [n, T, E, d], attached to E_L
    z_global = draw_z(*(p[None, None] for p in nets.encoder.global_posterior(x)), 5)[0]
    assert z_local.requires_grad and z_global.requires_grad
    data = rollout(env, nets.actor, task.numpy(), z_local, 3)
    before = {part: [p.detach().clone() for p in parameters] for part, parameters in parts_of(nets).items()}
    moved = lambda: {  # noqa: E731
        part
        for part, parameters in parts_of(nets).items()
        if not all(torch.equal(p, old) for p, old in zip(parameters, before[part], strict=True))
    }
    update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert moved() == FIG_3["L_Q"] | FIG_3["L_pi"]
    before = {part: [p.detach().clone() for p in parameters] for part, parameters in parts_of(nets).items()}
    mg2l.update_encoder(args, nets.encoder, buffer, 3, optimizers, args.temperature)
    assert moved() == FIG_3["L_G"] | FIG_3["L_L"]
    assert {name: len(seen) for name, seen in found.items()} == {"L_Q": 3, "L_pi": 3, "L_G": 1, "L_L": 1}
    assert all(reached == FIG_3[name] for name, seen in found.items() for reached in seen)


def slices(gradients):
    """Which agents' slices of stacked parameters have a gradient."""
    return {i for gradient in gradients for i in range(len(gradient)) if gradient[i].abs().sum() > 0}


@every_form
def test_local_loss_of_an_agent_reaches_its_own_encoder(form):
    step = Step()
    parameters = parts_of(step.nets)["E_L"]
    together = torch.autograd.grad(step.local_loss(form), parameters, retain_graph=True)
    assert slices(together) == set(range(step.n))
    for i in range(step.n):
        own = torch.autograd.grad(step.local_loss(form, slice(i, i + 1)), parameters, retain_graph=True)
        assert slices(own) == {i} and all(gradient[i].abs().sum() > 0 for gradient in own)
        for mine, mean in zip(own, together, strict=True):
            close(mean[i], mine[i] / step.n, 1e-6)  # L_L is the mean over agents


def test_policy_loss_of_an_agent_reaches_its_own_actor():
    step = Step()
    parameters = parts_of(step.nets)["actors"]
    torch.manual_seed(1)
    together = torch.autograd.grad(step.policy_loss(), parameters)
    for i in range(step.n):
        torch.manual_seed(1)
        own = torch.autograd.grad(step.policy_loss(slice(i, i + 1)), parameters)
        assert slices(own) == {i} and all(gradient[i].abs().sum() > 0 for gradient in own)
        for mine, total in zip(own, together, strict=True):
            close(total[i], mine[i], 1e-6)  # a sum over agents: each learns as if it were alone


# ----------------------------------------------------------------------------------------------------------------------
# Experience


def tagged_episodes(num_tasks, num_episodes, num_steps, num_agents, first=0):
    """Transitions that say where they are from: (task, episode, step, agent)."""
    axes = [torch.arange(k) for k in (num_tasks, num_episodes, num_steps, num_agents)]
    tags = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).float()
    tags[..., 1] += first
    return tags


def test_buffer_keeps_the_latest_episodes():
    buffer = ContextBuffer(5)
    assert buffer.data is None
    kept = []
    for count in (2, 2, 2, 1, 7):
        first = kept[-1] + 1 if kept else 0
        buffer.add(tagged_episodes(3, count, 4, 2, first))
        kept = (kept + list(range(first, first + count)))[-5:]
        assert buffer.data.shape == (3, len(kept), 4, 2, 4)
        assert buffer.data[:, :, 0, 0, 1].tolist() == [kept] * 3
        assert torch.equal(buffer.data[:, :, :, :, [0, 2, 3]], tagged_episodes(3, len(kept), 4, 2)[..., [0, 2, 3]])


def test_contexts_are_steps_of_a_few_episodes_of_the_right_task():
    buffer = ContextBuffer(10)
    buffer.add(tagged_episodes(3, 6, 4, 2))
    task = torch.arange(3).repeat(400)
    context = buffer.sample(task, 9, 2)
    assert context.shape == (1200, 2, 9, 4)
    assert (context[..., 0] == task[:, None, None]).all()
    assert (context[..., 3] == torch.arange(2)[:, None]).all()
    assert torch.equal(context[:, 0, :, 1:3], context[:, 1, :, 1:3])  # the same steps for all agents
    numbers = [len(set(episodes)) for episodes in context[:, 0, :, 1].tolist()]
    assert set(numbers) == {1, 2}
    for column, values in ((1, 6), (2, 4)):  # all episodes and steps alike
        count = torch.bincount(context[:, 0, :, column].flatten().long())
        assert len(count) == values and (count / count.sum() - 1 / values).abs().max() < 0.02
    steps = context[:, 0, :, 2]
    assert (steps[:, 1:] < steps[:, :-1]).float().mean() > 0.3  # decorrelated: in no order
    assert not torch.equal(context[0], context[3])  # the same task again, another context
    assert len(set(buffer.sample(task, 9, 1)[0, 0, :, 1].tolist())) == 1


def test_draw_z_is_a_sample_of_each_posterior():
    n, num_envs, d = 2, 3, 4
    mean, std = 3 * torch.randn(1, n, num_envs, d), torch.rand(1, n, num_envs, d) + 0.1
    z = draw_z(mean, std, 20_000)
    assert z.shape == (n, 20_000, num_envs, d)
    error = std[0] / math.sqrt(20_000)
    assert ((z.mean(1) - mean[0]).abs() < 4 * error).all()
    assert ((z.std(1) / std[0] - 1).abs() < 4 / math.sqrt(40_000)).all()
    noise = ((z - mean[0][:, None]) / std[0][:, None]).permute(0, 2, 3, 1).flatten(0, 2)  # [n * E * d, steps]
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.04  # of its own everywhere
    assert (noise[:, 1:] * noise[:, :-1]).mean(1).abs().max() < 0.04  # and at every step


def test_draw_z_picks_one_of_the_posteriors_at_every_step():
    contexts, n, num_envs = 3, 2, 4
    tag = torch.arange(contexts * n * num_envs).view(contexts, n, num_envs, 1).float()
    z = draw_z(tag.expand(-1, -1, -1, 5), torch.full((contexts, n, num_envs, 5), 1e-4), 3000)
    assert (z - z.round()).abs().max() < 0.01
    assert torch.equal(z.round(), z[..., :1].round().expand_as(z))  # all dimensions from the same posterior
    pick = (z[..., 0].round() - tag[0, :, None, :, 0]) / (n * num_envs)  # [n, steps, E]
    assert set(pick.flatten().tolist()) == {0.0, 1.0, 2.0}
    for k in range(contexts):
        assert ((pick == k).float().mean(1) - 1 / 3).abs().max() < 0.04
    columns = pick.permute(0, 2, 1).flatten(0, 1)
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 0.1  # agents and copies pick by themselves


def test_rollout_keeps_what_actions_led_to_across_episodes():
    env = make_env("hunting_target", 3)
    args, nets, _, _ = small(env)
    data, z, _, task = experience(env, args, nets, num_steps=12)
    ended = torch.tensor([t % 5 == 4 for t in range(12)])
    assert torch.equal(data.ended, ended[:, None].expand(-1, 3)) and not data.terminated.any()
    # an episode of the same start and actions that is not cut off; after it, what the environment says
    longer = envs.make("hunting_target", 3, 0)
    obs, _ = longer.reset(seed=7, options={"task": env.tasks.train[task.numpy()]})
    state = longer.state()
    for t in range(5):
        assert np.array_equal(data.obs[:, t].transpose(0, 1), obs) and np.array_equal(data.state[t], state)
        obs, reward, *_ = longer.step(data.action[:, t].transpose(0, 1).numpy())
        state = longer.state()
        assert np.array_equal(data.next_obs[:, t].transpose(0, 1), obs) and np.array_equal(data.next_state[t], state)
        assert np.array_equal(data.reward[t], reward)
    assert torch.equal(data.obs[:, 1:][:, ~ended[:-1]], data.next_obs[:, :-1][:, ~ended[:-1]])
    assert torch.equal(data.state[1:][~ended[:-1]], data.next_state[:-1][~ended[:-1]])
    assert (data.obs[:, 1:][:, ended[:-1]] - data.next_obs[:, :-1][:, ended[:-1]]).abs().amax(-1).min() > 0.01
    for seen, state in ((data.obs, data.state), (data.next_obs, data.next_state)):  # this state is all that is seen
        assert torch.equal(seen.permute(1, 2, 0, 3).flatten(2), state)
    assert np.array_equal(env.task, env.tasks.train[task.numpy()])


def test_rollout_acts_on_the_z_of_each_step_and_copy():
    env = make_env("hunting_target", 4)
    args, nets, _, _ = small(env)
    data, z, _, _ = experience(env, args, nets, num_steps=7)
    (k,), s = env.single_observation_space.shape, env.state_dim
    sizes = dict(obs=(3, 7, 4, k), next_obs=(3, 7, 4, k), action=(3, 7, 4, 2), log_prob=(3, 7, 4), reward=(7, 4, 3))
    sizes |= dict(state=(7, 4, s), next_state=(7, 4, s), terminated=(7, 4), ended=(7, 4))
    assert {name: tuple(value.shape) for name, value in vars(data).items()} == sizes
    for t in range(7):
        policy = nets.actor(data.obs[:, t], z[:, t])
        close(data.log_prob[:, t], policy.log_prob(data.action[:, t]))
    greedy = rollout(env, nets.actor, np.zeros(4, int), z, 5, greedy=True)
    for t in range(7):
        close(greedy.action[:, t], nets.actor(greedy.obs[:, t], z[:, t]).mode)
    assert (data.action - nets.actor(data.obs.flatten(1, 2), z.flatten(1, 2)).mode.view_as(data.action)).std() > 0.3
    assert not data.obs.requires_grad and not data.log_prob.requires_grad


@pytest.mark.parametrize("name", ["hunting_target", "toy"])
def test_transitions_are_what_an_agent_saw_did_got_and_saw_next(name):
    env = make_env(name, 3)
    args, nets, _, _ = small(env)
    data, *_ = experience(env, args, nets, num_steps=8)
    lived = mg2l.transitions(data, nets.actor)
    for t in range(8):
        for e in range(3):
            for i in range(env.num_agents):
                action = data.action[i, t, e]
                if name == "toy":
                    action = torch.eye(3)[action]
                parts = [data.obs[i, t, e], action, data.reward[t, e, i].view(1), data.next_obs[i, t, e]]
                assert torch.equal(lived[t, e, i], torch.cat(parts))
    assert lived.shape == (8, 3, env.num_agents, len(nets.encoder.mean))


def test_rollout_with_discrete_actions_that_end_episodes():
    env = make_env("toy", 8)
    args, nets, _, _ = small(env)
    data, z, _, _ = experience(env, args, nets, num_steps=12)
    assert data.action.shape == (2, 12, 8) and data.action.dtype == torch.int64
    assert torch.equal(data.terminated, data.action.sum(0) >= 3)
    assert data.terminated.any() and (data.ended & ~data.terminated).any()
    lot = data.obs[0, :, :, 1]
    close(data.reward, torch.stack([data.action[0] + lot, 10 * data.action[1] + lot], -1))
    # steps so far: one more after a step, from 0 after an end
    count, after = data.obs[0, :, :, 0], data.next_obs[0, :, :, 0]
    assert torch.equal(after, count + 1)
    assert torch.equal(count[1:], after[:-1] * ~data.ended[:-1])
    assert torch.equal(data.next_state[..., 0], after) and torch.equal(data.next_obs[0, :, :, 1], lot)
    assert torch.equal(data.ended, data.terminated | (after == 4))
    policy = nets.actor(data.obs.flatten(1, 2), z.flatten(1, 2))
    close(data.log_prob.flatten(1, 2), policy.log_prob(data.action.flatten(1, 2)))


def test_rollout_films_copy_0_at_every_step():
    env, frames = make_env("hunting_target", 2), []
    args, nets, _, _ = small(env)
    rollout(env, nets.actor, np.zeros(2, int), torch.randn(3, 2, 2, 4), 0, frames=frames)
    assert len(frames) == 2 and all(frame.ndim == 3 and frame.dtype == np.uint8 for frame in frames)
    env.reset(seed=0, options={"task": np.zeros(2, int)})
    assert np.array_equal(frames[0], env.render())


def test_first_episode_and_its_return_by_hand():
    # copies: cut at the end; ends at once; ends twice; never ends
    ended = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    expected = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]).bool()
    assert torch.equal(first_episode(ended), expected)
    reward = torch.arange(4 * 4 * 2).view(4, 4, 2).float()
    by_hand = [sum(reward[t, e].sum().item() / 2 for t in range(4) if expected[t, e]) for e in range(4)]
    got = episodic_return(types.SimpleNamespace(reward=reward, ended=ended))
    assert got.tolist() == by_hand


def test_every_purpose_has_a_seed_of_its_own():
    purposes = ("initialise", "context", "rollout", "update", "meta-test", "curve", "video")
    seen = {}
    for seed in (0, 1, 2):
        for iteration in (0, 1, 2):
            for purpose in purposes:
                env_seed = mg2l.seed_everything(seed, iteration, purpose)
                seen[seed, iteration, purpose] = (env_seed, torch.rand(()).item())
                env_again = mg2l.seed_everything(seed, iteration, purpose)
                assert seen[seed, iteration, purpose] == (env_again, torch.rand(()).item())
    env_seeds, numbers = zip(*seen.values(), strict=True)
    assert len(set(env_seeds)) == len(set(numbers)) == len(seen)


def equal_namespaces(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_same_seed_same_rollout():
    def run(seed):
        env = make_env("hunting_target", 4)
        torch.manual_seed(0)
        args, nets, _, _ = small(env)
        env_seed = mg2l.seed_everything(seed, 3, "rollout")
        z = torch.randn(3, 7, 4, 4)
        first = rollout(env, nets.actor, np.array([0, 1, 2, 1]), z, env_seed)
        torch.rand(5)
        env_seed = mg2l.seed_everything(seed, 3, "rollout")
        again = rollout(env, nets.actor, np.array([0, 1, 2, 1]), torch.randn(3, 7, 4, 4), env_seed)
        assert equal_namespaces(first, again)  # environments hold no state from one rollout to the next
        return first

    first = run(1)
    assert equal_namespaces(first, run(1))
    assert not torch.equal(first.obs[:, 0], run(2).obs[:, 0])


def train_two_iterations(evaluate):
    torch.manual_seed(0)
    env, eval_env = make_env("hunting_target", 4), make_env("hunting_target", 6)
    args, nets, optimizers, buffer = small(env)
    for iteration in range(2):
        env_seed = mg2l.seed_everything(1, iteration, "rollout")
        data, z_local, z_global, task = experience(env, args, nets, 5, env_seed)
        mg2l.seed_everything(1, iteration, "update")
        update(args, nets, optimizers, buffer, data, z_local, z_global, task)
        mg2l.update_encoder(args, nets.encoder, buffer, 3, optimizers, args.temperature)
        if evaluate:
            before = [copy.deepcopy(net.state_dict()) for net in vars(nets).values()]
            mg2l.meta_test(args, eval_env, nets.actor, nets.encoder, iteration, CPU, curve=iteration == 0)
            for net, old in zip(vars(nets).values(), before, strict=True):
                assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())
    return [p for net in vars(nets).values() for p in net.state_dict().values()]


def test_evaluation_changes_nothing_in_training():
    plain, evaluated = train_two_iterations(evaluate=False), train_two_iterations(evaluate=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, evaluated, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Generalised advantage estimate


def plain_gae(reward, value, next_value, terminated, ended, gamma, gae_lambda):
    """Sum over l of (gamma lambda)^l delta_{t+l} to the episode's end, for every t, copy and agent by itself."""
    steps, copies, agents = reward.shape
    advantage = torch.zeros_like(reward)
    for t in range(steps):
        for e in range(copies):
            for i in range(agents):
                total = 0.0
                for later in range(t, steps):
                    follows = 0.0 if terminated[later, e] else next_value[later, e, i].item()
                    delta = reward[later, e, i].item() + gamma * follows - value[later, e, i].item()
                    total += (gamma * gae_lambda) ** (later - t) * delta
                    if ended[later, e]:
                        break
                advantage[t, e, i] = total
    return advantage


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.0), (0.8, 1.0), (1.0, 1.0)])
def test_gae_against_its_definition(gamma, gae_lambda):
    shape = (13, 5, 3)
    reward, value, next_value = (torch.randn(*shape, dtype=torch.float64) for _ in range(3))
    terminated, truncated = torch.rand(13, 5) < 0.15, torch.rand(13, 5) < 0.15
    truncated[-1, :2], terminated[-1, 2] = True, True
    ended = terminated | truncated
    assert (terminated[:-1] & ~truncated[:-1]).any() and (truncated[:-1] & ~terminated[:-1]).any()
    args = (reward, value, next_value, terminated, ended, gamma, gae_lambda)
    close(gae(*args), plain_gae(*args))


def test_gae_of_one_step_by_hand():
    column = lambda *values: torch.tensor(values)[:, None, None]  # noqa: E731
    got = gae(
        column(1.0, 2.0, 4.0, 8.0),
        column(0.5, 0.5, 0.5, 0.5),
        column(10.0, 20.0, 30.0, 40.0),
        torch.tensor([[False], [True], [False], [False]]),
        torch.tensor([[False], [True], [True], [False]]),
        0.5,
        0.5,
    )
    # terminated: nothing follows; truncated: 30 follows, but not the next episode's advantage; open: 40 follows
    last, cut, over = 8 + 20 - 0.5, 4 + 15 - 0.5, 2 - 0.5
    assert got.flatten().tolist() == [1 + 5 - 0.5 + 0.25 * over, over, cut, last]


# ----------------------------------------------------------------------------------------------------------------------
# PPO


@own_or_shared
@pytest.mark.parametrize("name", ["hunting_target", "spread_target", "toy"])
def test_ratio_is_one_in_the_first_epoch(name, shared):
    env = make_env(name, 4)
    args, nets, optimizers, buffer = small(env, share_policy=shared)
    data, z_local, z_global, task = experience(env, args, nets, num_steps=9)
    for i in range(env.num_agents):  # by hand and for each copy alone
        for e in range(4):
            obs, z = torch.zeros(env.num_agents, 9, data.obs.shape[-1]), torch.zeros(env.num_agents, 9, args.latent_dim)
            obs[i], z[i] = data.obs[i, :, e], z_local[i, :, e]
            with torch.no_grad():
                policy, action = nets.actor(obs, z), data.action[i, :, e]
                if name == "toy":
                    log_prob = policy.logits.log_softmax(-1)[i].gather(1, action[:, None])[:, 0]
                else:
                    std = nets.actor.log_std.exp()[0 if shared else i, 0]
                    log_prob = Normal(policy.mode[i], std).log_prob(action).sum(-1)
            assert ((log_prob - data.log_prob[i, :, e]).exp() - 1).abs().max() < 1e-5
    metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert metrics["losses/first_epoch_ratio_error"] < 1e-5
    assert metrics["losses/approx_kl"] > 0  # later epochs did move the policy
    assert all(torch.isfinite(value).all() for value in metrics.values())


def test_ratio_error_would_be_seen():
    env = make_env("hunting_target", 4)
    args, nets, optimizers, buffer = small(env)
    data, z_local, z_global, task = experience(env, args, nets, num_steps=5)
    data.log_prob[1, 2, 3] += 0.1
    metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert metrics["losses/first_epoch_ratio_error"].item() == pytest.approx(1 - math.exp(-0.1), abs=1e-4)


def spy_on(monkeypatch, owner, name):
    """Record the arguments of every call of owner.name, by their names."""
    calls, original = [], getattr(owner, name)
    signature = inspect.signature(original)

    def spy(*given, **named):
        out = original(*given, **named)
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        calls.append(types.SimpleNamespace(**bound.arguments, out=out))
        return out

    monkeypatch.setattr(owner, name, spy)
    return calls


def test_what_ppo_is_told(monkeypatch):
    env = make_env("toy", 6)
    args, nets, optimizers, buffer = small(
        env, gamma=0.9, gae_lambda=0.8, huber_delta=3.0, clip_coef=0.1, ent_coef=0.02
    )
    data, z_local, z_global, task = experience(env, args, nets, num_steps=11)
    assert data.terminated[:-1].any() and (data.ended & ~data.terminated)[:-1].any()
    nets.value_norm.update(4 * torch.randn(30, 2, 2) + 6)
    norm = copy.deepcopy(nets.value_norm)
    with torch.no_grad():
        value = nets.critic(data.state, z_global)
        after = nets.critic(data.next_state, z_global)
    policy_calls, value_calls = spy_on(monkeypatch, mg2l, "policy_loss"), spy_on(monkeypatch, mg2l, "value_loss")
    update(args, nets, optimizers, buffer, data, z_local, z_global, task)

    mean, std = norm.mean_std()
    advantage = plain_gae(
        data.reward, value * std + mean, after * std + mean, data.terminated, data.ended, args.gamma, args.gae_lambda
    )
    returns = advantage + value * std + mean
    norm.update(returns)
    mean, std = norm.mean_std()
    assert len(value_calls) == len(policy_calls) == args.update_epochs
    for call in value_calls:
        close(call.old_value, value)
        close(call.target, (returns - mean) / std, 1e-4)
        assert (call.clip_coef, call.huber_delta) == (0.1, 3.0) and call.value.shape == (11, 6, 2)
    assert torch.equal(nets.value_norm.sums, norm.sums) or torch.allclose(nets.value_norm.sums, norm.sums, rtol=1e-5)
    for call in policy_calls:
        assert (call.clip_coef, call.ent_coef) == (0.1, 0.02)
        for i in range(2):
            own = advantage[..., i].flatten()  # normalised for each agent by itself
            close(call.advantage[i], (own - own.mean()) / own.std(), 1e-3)
            assert torch.equal(call.old_log_prob[i], data.log_prob[i].flatten())
    with torch.no_grad():
        policy = nets.actor(data.obs.flatten(1, 2), z_local.flatten(1, 2))
        assert (policy.log_prob(data.action.flatten(1, 2)) - policy_calls[0].log_prob).abs().max() > 1e-4  # it learnt


def test_every_epoch_has_fresh_contexts_of_each_copys_task(monkeypatch):
    env = make_env("hunting_target", 5)
    args, nets, optimizers, buffer = small(env, critic_context_size=8, rollout_context_episodes=1)
    data, z_local, z_global, task = experience(env, args, nets, num_steps=5)
    buffer.data[..., 0] = torch.arange(3.0)[:, None, None, None]  # each task's mark
    contexts, states = spy_on(monkeypatch, nets.encoder, "embed"), spy_on(monkeypatch, nets.critic, "forward")
    with torch.no_grad():
        posterior = nets.encoder.global_posterior(nets.encoder.embed(buffer.sample(task, 6, 2)))
    assert posterior[0].shape == (5, 4)
    contexts.clear()
    drawn = spy_on(monkeypatch, buffer, "sample")
    steps = {name: 0 for name in optimizers}
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.__setitem__(name, steps[name] + 1))
    update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert steps == dict(actor=3, critic=3, phi_g=3, phi_l=0)  # one of the encoder per epoch, none per agent
    assert len(contexts) == 3 and [(call.context_size, call.num_episodes) for call in drawn] == [(8, 1)] * 3
    for call in contexts:
        present = task.unique()  # one context does for all copies on a task
        assert call.context.shape[:2] == (len(present), 3) and (call.context[..., 0] == present[:, None, None]).all()
    assert not torch.equal(contexts[0].context, contexts[1].context)
    of_old, of_epochs = [c.z for c in states if not c.z.requires_grad], [c.z for c in states if c.z.requires_grad]
    assert torch.equal(of_old[0], z_global) and torch.equal(of_old[1], z_global) and len(of_epochs) == 3
    for z in of_epochs:
        assert z.shape == (5, 5, 4) and torch.equal(z[0], z[-1])
        same_task, same_z = task[:, None] == task, (z[0][:, None] == z[0]).all(-1)
        assert torch.equal(same_task, same_z) and not same_task.all()
    assert not torch.equal(of_epochs[0], of_epochs[1])


def test_the_critic_reads_the_mean_of_the_posterior_and_passes_a_share_of_its_gradient(monkeypatch):
    env = make_env("hunting_target", 2)
    args, nets, optimizers, buffer = small(env, update_epochs=1, critic_context_size=50)
    data, z_local, z_global, task = experience(env, args, nets, num_steps=5)
    buffer.data[:] = buffer.data[:, :1, :1]  # every context of a task is the same
    with torch.no_grad():
        mean, _ = nets.encoder.global_posterior(nets.encoder.embed(buffer.sample(task, 50, 2)))
    gradients = {}
    for share in (1.0, 0.25):
        args.critic_coef = share
        own_nets = copy.deepcopy(nets)
        own_optimizers = {
            name: torch.optim.SGD(parameters, lr=0.0)
            for name, parameters in dict(
                actor=own_nets.actor.parameters(),
                critic=own_nets.critic.parameters(),
                phi_g=own_nets.encoder.phi_g(),
                phi_l=own_nets.encoder.phi_l(),
            ).items()
        }
        calls = spy_on(monkeypatch, own_nets.critic, "forward")
        update(args, own_nets, own_optimizers, buffer, data, z_local, z_global, task)
        close(calls[-1].z[0].detach(), mean)
        gradients[share] = own_nets.encoder.global_head.weight.grad.clone()
    assert gradients[1.0].abs().max() > 0
    close(gradients[0.25] * 4, gradients[1.0], 1e-4)


def test_gradient_of_each_actor_is_clipped_by_itself():
    env = make_env("hunting_target", 4)
    args, nets, optimizers, buffer = small(env, update_epochs=1, max_grad_norm=0.02)
    data, z_local, z_global, task = experience(env, args, nets, num_steps=5)
    metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    norms = torch.stack([torch.cat([p.grad[i].flatten() for p in nets.actor.parameters()]).norm() for i in range(3)])
    assert metrics["losses/actor_grad_norm"] > 0.02 and metrics["losses/critic_grad_norm"] > 0.02
    close(norms, torch.full((3,), 0.02), 1e-4)
    for parameters in (list(nets.critic.parameters()), nets.encoder.phi_g()):
        assert torch.cat([p.grad.flatten() for p in parameters]).norm() < 0.0201


def test_ppo_learns_the_action_that_pays():
    env = make_env("toy", 32)
    args, nets, optimizers, buffer = small(env, update_epochs=5, gae_lambda=0.0, gamma=0.5)
    optimizers["actor"].param_groups[0]["lr"] = 5e-3
    for iteration in range(6):
        data, z_local, z_global, task = experience(env, args, nets, 4, seed=iteration)
        metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert (data.action[1] == 2).float().mean() > 0.8  # 10 times the action, ten times as loud as ending the episode
    assert metrics["losses/entropy"] < math.log(3) - 0.1


def test_equal_returns_leave_the_explained_variance_finite():
    env = make_env("toy", 4)
    args, nets, optimizers, buffer = small(env)
    data, z_local, z_global, task = experience(env, args, nets, 4)
    data.reward.zero_()
    torch.nn.init.zeros_(nets.critic.layers[-1].weight)
    metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert torch.isfinite(metrics["losses/explained_variance"])


# ----------------------------------------------------------------------------------------------------------------------
# Encoder update


@every_form
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_encoder_update_contrasts_contexts_of_the_right_tasks(form, similarity, monkeypatch):
    env = make_env("hunting_target", 2)
    args, nets, optimizers, buffer = small(env, local_loss=form, similarity=similarity, temperature=2.0)
    buffer.data[..., 0] = torch.arange(3.0)[:, None, None, None]
    contexts = spy_on(monkeypatch, nets.encoder, "embed")
    of_z, of_each = spy_on(monkeypatch, mg2l, "global_loss"), spy_on(monkeypatch, mg2l, "local_loss")
    similarities = spy_on(monkeypatch, mg2l, "similarity_scores")
    metrics = mg2l.update_encoder(args, nets.encoder, buffer, 3, optimizers, args.temperature)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert all((call.kind, call.temperature) == (similarity, 2.0) for call in similarities)
    assert len(contexts) == 1
    (call,), (local,) = of_z, of_each
    num_queries, num_sets, num_keys = call.scores.shape
    assert num_keys == 3 and len(call.label) == num_queries and set(call.label.tolist()) <= {0, 1, 2}
    assert local.scores_local.shape == (3, *call.scores.shape) and local.form == form
    assert local.scores_global.shape == call.scores.shape and torch.equal(local.label, call.label)
    assert call.kl_coef == local.kl_coef == args.kl_coef
    tasks = torch.cat([c.context[:, 0, 0, 0] for c in contexts])
    assert all((c.context[..., 0] == c.context[:, :1, :1, 0]).all() for c in contexts)
    assert set(tasks.tolist()) == {0.0, 1.0, 2.0} and tasks[:num_queries].tolist() == call.label.tolist()


@every_form
def test_latent_scale_is_that_of_the_posteriors_and_leaves_what_is_learnt_alone(form):
    env = make_env("hunting_target", 2)
    found = []
    for scale in (1.0, 0.25):
        torch.manual_seed(3)
        args, nets, optimizers, buffer = small(env, latent_scale=scale, local_loss=form, kl_coef=0.5)
        x = nets.encoder.embed(buffer.sample(torch.arange(6) % 3, 5, 2))
        posteriors = [*nets.encoder.global_posterior(x), *nets.encoder.local_posterior(x)]
        metrics = mg2l.update_encoder(args, nets.encoder, buffer, 3, optimizers, args.temperature)
        found.append([*(moment / scale for moment in posteriors), *metrics.values(), *nets.encoder.parameters()])
    assert found[0][0].abs().max() > 0.1
    for whole, quarter in zip(*found, strict=True):
        assert torch.equal(whole, quarter)  # a power of two: to the last bit


def test_local_loss_has_a_temperature_of_its_own(monkeypatch):
    env = make_env("hunting_target", 2)
    args, nets, optimizers, buffer = small(env, temperature=2.0)
    of_each, before = spy_on(monkeypatch, mg2l, "local_loss"), copy.deepcopy(nets.encoder.state_dict())
    for temperature in (2.0, 10.0):
        nets.encoder.load_state_dict(before)
        torch.manual_seed(0)
        mg2l.update_encoder(args, nets.encoder, buffer, 3, optimizers, temperature)
    sharp, soft = of_each
    close(soft.scores_local, sharp.scores_local / 5)
    assert torch.equal(soft.scores_global, sharp.scores_global)


@every_form
def test_encoder_learns_to_tell_tasks_apart(form):
    """Tasks differ in the reward alone, which each agent sees; no context is compared with itself."""
    env = make_env("hunting_target", 2)
    settings = dict(latent_dim=8, latent_scale=1.0, temperature=1.0, encoder_dim=16, context_size=8)
    args, nets, optimizers, buffer = small(env, local_loss=form, **settings)
    for name in ("phi_g", "phi_l"):
        optimizers[name].param_groups[0]["lr"] = 3e-3
    told = []
    for step in range(210):
        buffer.data = torch.randn_like(buffer.data)  # never the same experience again
        if step >= 60:  # nothing to be told before
            buffer.data[..., -1] += 4 * torch.arange(3.0)[:, None, None, None] - 4
        told.append(mg2l.update_encoder(args, nets.encoder, buffer, 3, optimizers, args.temperature))
    at_first, at_last = (
        {name: torch.stack([metrics[name].float().mean() for metrics in part]).mean().item() for name in told[0]}
        for part in (told[20:60], told[-20:])
    )
    assert at_first["losses/info_nce_global"] < 0.1 and at_first["losses/info_nce_local"] < 0.1
    assert at_last["losses/info_nce_global"] > 0.5
    if form == "infonce":
        assert at_last["losses/info_nce_local"] > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Inference


def make_memory(lengths, n=3, dim=7):
    return [torch.randn(length, n, dim) for length in lengths]


def make_encoder(n=3, dim=7, blocks=1, shared=False):
    given = dict(
        num_agents=n, transition_dim=dim, encoder_dim=16, latent_dim=5, blocks=blocks, heads=4, latent_scale=0.5
    )
    return mg2l.TaskEncoder(**given, shared=shared)


def test_without_experience_the_posterior_is_the_prior():
    mean, std = infer(make_encoder(), make_memory([0, 0]), 6, 4, 5)
    assert torch.equal(mean, torch.zeros(4, 3, 2, 5)) and torch.equal(std, torch.ones(4, 3, 2, 5))
    mean, std = infer(make_encoder(), make_memory([9, 0, 2]), 6, 4, 5)
    assert torch.equal(mean[:, :, 1], torch.zeros(4, 3, 5)) and torch.equal(std[:, :, 1], torch.ones(4, 3, 5))
    assert mean[:, :, [0, 2]].abs().min() > 0 and (std[:, :, [0, 2]] != 1).all()


def test_contexts_are_of_the_agents_own_copy_and_repeat_nothing(monkeypatch):
    encoder, lengths = make_encoder(), [1, 4, 6, 30, 0, 700]
    memory = make_memory(lengths)
    for e, transitions in enumerate(memory):
        transitions[..., 0] = torch.arange(len(transitions))[:, None]
        transitions[..., 1] = torch.arange(3.0)
        transitions[..., 2] = e
    calls = spy_on(monkeypatch, encoder, "embed")
    with torch.no_grad():
        mean, std = infer(encoder, memory, 6, 4, 5)
        assert mean.shape == std.shape == (4, 3, 6, 5)
        assert len(calls) == 5
        for call, e in zip(calls, (0, 1, 2, 3, 5), strict=True):
            size = min(6, lengths[e])
            contexts = 4 if lengths[e] > size else 1  # all that is stored makes one context
            assert call.context.shape == (contexts, 3, size, 7)
            assert (call.context[..., 1] == torch.arange(3.0)[:, None]).all() and (call.context[..., 2] == e).all()
            for c in range(contexts):
                for i in range(3):
                    steps = call.context[c, i, :, 0].long()
                    assert len(set(steps.tolist())) == size
                    assert torch.equal(call.context[c, i], memory[e][steps, i])
                own = mg2l.to_gaussian(encoder.e_local(encoder.e_agg(encoder.e_tran(call.context[c]))[0][:, None]), 0.5)
                close(mean[c, :, e], own[0][:, 0])
                close(std[c, :, e], own[1][:, 0])
    assert torch.equal(mean[0, :, 1], mean[3, :, 1])  # one context for all
    longest = calls[-1].context[..., 0]  # contexts differ, and agents choose by themselves
    assert len({tuple(sorted(steps)) for steps in longest.flatten(0, 1).tolist()}) == 12


def test_contexts_are_drawn_by_priority(monkeypatch):
    encoder, memory = make_encoder(), make_memory([3])
    omega = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
    monkeypatch.setattr(encoder, "priorities", lambda *_: omega)
    memory[0][..., 0] = torch.arange(3.0)[:, None]
    calls = spy_on(monkeypatch, encoder, "embed")
    with torch.no_grad():
        infer(encoder, memory, 1, 4000, 5)
    share = torch.stack([(calls[0].context[:, :, 0, 0] == step).float().mean(0) for step in range(3)], 1)
    assert (share - omega).abs().max() < 4 * 0.5 / math.sqrt(4000)
    with torch.no_grad():  # a priority of zero is drawn where nothing else is left
        infer(encoder, memory, 2, 50, 5)
    chosen = calls[1].context[:, 2, :, 0].sort(-1).values
    assert (chosen[:, 0] == 0).all() and set(chosen[:, 1].tolist()) == {1.0, 2.0}


def test_inference_takes_the_priorities_of_everything_stored(monkeypatch):
    encoder, memory = make_encoder(), make_memory([20, 8])
    calls = spy_on(monkeypatch, encoder, "priorities")
    infer(encoder, memory, 6, 4, 5)
    assert len(calls) == 2  # once per copy
    for call, own in zip(calls, memory, strict=True):
        assert torch.equal(call.transitions, own.transpose(0, 1))


@own_or_shared
@pytest.mark.parametrize("blocks", [0, 1])
def test_posterior_of_an_agent_is_its_own_affair(shared, blocks):
    encoder, memory = make_encoder(blocks=blocks, shared=shared), make_memory([20, 3, 40])
    torch.manual_seed(1)
    mean, std = infer(encoder, memory, 6, 4, 5)
    for i in range(3):
        others = [j for j in range(3) if j != i]
        rewards, everything = [m.clone() for m in memory], [m.clone() for m in memory]
        for changed, permuted in zip(everything, rewards, strict=True):
            changed[:, others] = 10 * torch.randn_like(changed[:, others])
            permuted[:, others, 3] = permuted[:, others, 3].flip(0) - 5  # as if this were the reward
        for changed in (everything, rewards):
            torch.manual_seed(1)
            new_mean, new_std = infer(encoder, changed, 6, 4, 5)
            assert torch.equal(new_mean[:, i], mean[:, i]) and torch.equal(new_std[:, i], std[:, i])
            assert not torch.equal(new_mean[:, others], mean[:, others])
    for part in (encoder.e_global, encoder.global_head):  # nor what only training has
        for parameter in part.parameters():
            parameter.data.fill_(torch.nan)
    torch.manual_seed(1)
    assert torch.equal(infer(encoder, memory, 6, 4, 5)[0], mean)
    inputs = list(inspect.signature(infer).parameters)
    assert inputs == ["encoder", "memory", "context_size", "num_contexts", "latent_dim"]


@own_or_shared
@pytest.mark.parametrize("name", ["hunting_target", "toy"])
def test_action_of_an_agent_depends_on_what_it_sees_and_its_own_z(name, shared):
    env = make_env(name, 3)
    args, nets, _, _ = small(env, share_policy=shared)
    n = env.num_agents
    obs, z = torch.randn(n, 6, env.single_observation_space.shape[0]), torch.randn(n, 6, args.latent_dim)

    def distribution(policy):
        return policy.logits if name == "toy" else torch.cat([policy.mean, policy.stddev], -1)

    with torch.no_grad():
        expected = distribution(nets.actor(obs, z))
        for i in range(n):
            other_obs, other_z = torch.randn_like(obs), torch.randn_like(z)
            other_obs[i], other_z[i] = obs[i], z[i]
            assert torch.equal(distribution(nets.actor(other_obs, other_z))[i], expected[i])
            assert not torch.equal(distribution(nets.actor(other_obs, z))[i - 1], expected[i - 1])
            assert not torch.equal(distribution(nets.actor(obs, other_z))[i - 1], expected[i - 1])
    assert list(inspect.signature(nets.actor.forward).parameters) == ["obs", "z"]


def test_z_of_another_agent_does_not_change_an_action():
    env = make_env("hunting_target", 4)
    args, nets, _, _ = small(env)
    z, task = torch.randn(3, 1, 4, args.latent_dim), np.array([0, 1, 2, 0])
    torch.manual_seed(2)
    data = rollout(env, nets.actor, task, z, 5)
    for i in range(3):
        changed = torch.randn_like(z)
        changed[i] = z[i]
        torch.manual_seed(2)
        other = rollout(env, nets.actor, task, changed, 5)
        assert torch.equal(other.action[i], data.action[i])
        assert not torch.equal(other.action[i - 1], data.action[i - 1])


def accuracy_of(mean, std, task, kind="dot"):
    return inference_accuracy(mean, std, torch.tensor(task), kind)


def test_accuracy_of_posteriors_that_lie_apart():
    task = [0, 0, 1, 1, 5, 5]  # ids need not be in a row
    mean = 10 * torch.eye(3).repeat_interleave(2, 0).expand(4, 2, 6, 3)
    for kind in ("dot", "cosine"):
        accuracy, probe = accuracy_of(mean, torch.full_like(mean, 0.01), task, kind)
        assert accuracy.tolist() == probe.tolist() == [1.0] * 6
    # one agent of two calls everything by another name in copies 0 and 1
    confused = mean.clone()
    confused[:, 1, :2] = mean[:, 1, 2:4]
    confused[:, 1, 2:4] = mean[:, 1, :2]
    assert accuracy_of(confused, torch.full_like(mean, 0.01), task)[0].tolist() == [1.0] * 6  # names do not matter
    confused = mean.clone()
    confused[:, 1, 0] = mean[:, 1, 4]  # this agent of copy 0 says task 5
    accuracy, probe = accuracy_of(confused, torch.full_like(mean, 0.01), task)
    assert accuracy[0] == probe[0] == 0.5 and accuracy[2:4].tolist() == probe[2:4].tolist() == [1.0, 1.0]


def test_accuracy_with_one_task_is_none():
    """Whatever is said would be right."""
    mean = torch.randn(4, 2, 6, 3)
    for values in accuracy_of(mean, torch.ones_like(mean), [3] * 6):
        assert values.isnan().all()


def test_accuracy_of_posteriors_that_are_all_the_same_is_chance():
    task = [0, 1, 2] * 60
    mean = torch.ones(5, 2, 180, 16)
    accuracy, probe = accuracy_of(mean, torch.ones_like(mean), task)
    assert accuracy.shape == probe.shape == (180,)
    assert abs(accuracy.mean() - 1 / 3) < 0.08
    means_differ_by_noise = mean + torch.randn_like(mean)
    assert abs(accuracy_of(means_differ_by_noise, torch.ones_like(mean), task)[1].mean() - 1 / 3) < 0.15


def test_a_copy_is_never_compared_with_itself():
    x, y = torch.tensor([10.0, 0.0]), torch.tensor([0.0, 10.0])
    mean = torch.stack([x, y, x / 5, x / 5]).expand(3, 1, 4, 2)  # copies 0 and 1 of one task have nothing in common
    accuracy, probe = accuracy_of(mean, torch.full_like(mean, 1e-4), [0, 0, 1, 1])
    assert accuracy[0] == 0 and probe[0] == 0


def test_accuracy_is_not_a_number_where_a_task_has_one_copy():
    mean = 10 * torch.tensor([[1.0, 0], [1, 0], [0, 1]]).expand(2, 2, 3, 2)
    accuracy, probe = accuracy_of(mean, torch.full_like(mean, 0.01), [3, 3, 7])
    for got in (accuracy, probe):
        assert got[:2].tolist() == [1.0, 1.0] and math.isnan(got[2])
    single = torch.randn(2, 2, 3, 2)
    assert all(torch.isnan(got).all() for got in accuracy_of(single, torch.ones_like(single), [0, 1, 2]))


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_accuracy_against_loops(kind):
    contexts, n, num_envs, d = 3, 2, 9, 4
    task = [2, 0, 1, 2, 0, 1, 0, 1, 2]
    mean = torch.randn(contexts, n, num_envs, d)
    accuracy, probe = accuracy_of(mean, torch.zeros_like(mean), task, kind)  # no noise: z is the mean
    for e in range(num_envs):
        others = {k: [f for f in range(num_envs) if task[f] == k and f != e] for k in range(3)}
        hits = near = 0
        for i in range(n):
            for c in range(contexts):
                score = [similarity(mean[c, i, e], mean[0, i, others[k][0]], kind) for k in range(3)]
                hits += score.index(max(score)) == task[e]
            own = mean[:, i, e].mean(0)
            distance = [(own - mean[:, i, others[k]].mean((0, 1))).norm().item() for k in range(3)]
            near += distance.index(min(distance)) == task[e]
        assert accuracy[e].item() == pytest.approx(hits / (contexts * n)) and probe[e].item() == pytest.approx(near / n)


def similarity(a, b, kind):
    return (torch.dot(a, b) / (a.norm() * b.norm() if kind == "cosine" else 1)).item()


# ----------------------------------------------------------------------------------------------------------------------
# Meta-test


@pytest.mark.parametrize("name", ["hunting_target", "toy"])
@pytest.mark.parametrize("eval_sample", [False, True])
def test_meta_test_explores_then_infers_then_acts(name, eval_sample, monkeypatch):
    env = make_env(name, 6)
    args, nets, _, _ = small(env, explore_episodes=2, test_episodes=5, eval_sample=eval_sample)
    rollouts, inferences = spy_on(monkeypatch, mg2l, "rollout"), spy_on(monkeypatch, mg2l, "infer")
    draws = spy_on(monkeypatch, mg2l, "draw_z")
    rows = mg2l.meta_test(args, env, nets.actor, nets.encoder, 4, CPU, curve=False)
    assert len(rollouts) == 5 and len({call.seed for call in rollouts}) == 5
    assert [bool(call.greedy) for call in rollouts] == [False] * 2 + [not eval_sample] * 3
    tasks = np.asarray(rollouts[0].task)
    counts = np.bincount(tasks)
    assert set(tasks) == set(env.tasks.test) and counts.max() - counts[env.tasks.test].min() <= 1
    assert all(np.array_equal(call.task, tasks) for call in rollouts)
    for call in rollouts[:2]:
        assert abs(call.z.mean()) < 0.6 and abs(call.z.std() - 3) < 0.6  # the prior, times explore_scale
    (inference,) = inferences  # once, after exploration
    for e in range(6):
        lived = [
            mg2l.transitions(call.out, nets.actor)[: int(first_episode(call.out.ended)[:, e].sum()), e]
            for call in rollouts[:2]
        ]
        assert torch.equal(inference.memory[e], torch.cat(lived))
    assert len(draws) == 3
    for draw, call in zip(draws, rollouts[2:], strict=True):
        assert torch.equal(draw.mean, inference.out[0]) and torch.equal(draw.std, inference.out[1])
        assert torch.equal(draw.out, call.z)
    assert len(rows) == 30
    for row in rows:
        call = rollouts[row["episode"]]
        assert row["phase"] == ("prior" if row["episode"] < 2 else "posterior")
        assert row["return"] == pytest.approx(episodic_return(call.out)[row["run"]].item(), abs=1e-4)
        assert row["task"] == tasks[row["run"]]
        assert row["context_steps"] == (0 if row["episode"] < 2 else len(inference.memory[row["run"]]))
        assert (row["accuracy"] == "") == (row["probe"] == "") == (row["episode"] < 2)
        assert row["episode"] < 2 or 0 <= row["accuracy"] <= 1
    summary = mg2l.summarise(rows)
    returns = [row["return"] for row in rows if row["phase"] == "posterior"]
    assert summary["meta_test/return"] == pytest.approx(sum(returns) / len(returns))
    assert summary["meta_test/return_prior"] == pytest.approx(sum(row["return"] for row in rows[:12]) / 12)


def test_meta_test_curve_infers_from_the_first_transitions(monkeypatch):
    env = make_env("hunting_target", 6)
    env.max_episode_steps = 13
    args, nets, _, _ = small(env)
    inferences, rollouts = spy_on(monkeypatch, mg2l, "infer"), spy_on(monkeypatch, mg2l, "rollout")
    rows = mg2l.meta_test(args, env, nets.actor, nets.encoder, 0, CPU, curve=True)
    rows = [row for row in rows if row["phase"] == "curve"]
    whole, *begun = inferences
    assert [row["context_steps"] for row in rows] == [0] * 6 + [10] * 6 + [20] * 6
    for call, steps in zip(begun, (0, 10, 20), strict=True):
        for e in range(6):
            assert torch.equal(call.memory[e], whole.memory[e][:steps])
    assert len({call.seed for call in rollouts[-3:]}) == 1  # the same episodes, so that only the context differs
    assert torch.equal(rollouts[-1].out.obs[:, 0], rollouts[-2].out.obs[:, 0])


def test_meta_test_is_executed_without_what_only_training_has(monkeypatch):
    env = make_env("hunting_target", 6)
    args, nets, _, _ = small(env)
    expected = mg2l.meta_test(args, env, nets.actor, nets.encoder, 0, CPU, curve=True)
    monkeypatch.setattr(nets.encoder, "global_posterior", None)
    for part in (nets.encoder.e_global, nets.encoder.global_head):
        for parameter in part.parameters():
            parameter.data.fill_(torch.nan)
    assert mg2l.meta_test(args, env, nets.actor, nets.encoder, 0, CPU, curve=True) == expected


def test_meta_test_does_not_tell_anybody_the_task():
    """In the toy tasks differ by name alone: with names exchanged everything is the same."""
    returns = []
    for test_tasks in ([0, 1], [1, 0], [1, 1]):
        torch.manual_seed(0)
        env = make_env("toy", 6)
        env.tasks = dataclasses.replace(env.tasks, test=np.array(test_tasks))
        args, nets, _, _ = small(env)
        rows = mg2l.meta_test(args, env, nets.actor, nets.encoder, 0, CPU, curve=True)
        returns.append([row["return"] for row in rows])
    assert returns[0] == returns[1] == returns[2]
