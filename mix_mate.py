"""MATE with MAPPO: each agent recalls its episode with a recurrent encoder that learns to predict. A baseline of MG2L.

Schaefer, Christianos, Storkey, Albrecht, "Learning Task Embeddings for Teamwork Adaptation in Multi-Agent Reinforcement
Learning", 2022, its `mix` variant, moved from MAA2C to MAPPO as in section V-B of Zhao et al., "Meta Learning Task
Representation in Multiagent Reinforcement Learning: From Global Inference to Local Inference", IEEE TNNLS 2025.
Equation, algorithm and table numbers below are the latter's.

The encoder of each agent reads what the agent saw, did and got so far and gives (mu^i, log sigma^2_i), which actor and
critic read. One decoder for all agents predicts from z^i ~ N(mu^i, sigma^2_i), the joint observation and the joint
action what comes next; a mixture says whose z the decoder should trust. Encoders learn from that prediction alone.

    python mix_mate.py --env-id hunting_target              # trains, meta-tests, leaves runs/...
    python mix_mate.py --resume runs/RUN                    # goes on where the run was cut off
    python mix_mate.py --meta-test runs/RUN --reset-per-episode
    tensorboard --logdir runs
"""

import ast
import atexit
import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: where cores are busy, threads that wait give way

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# Shapes: E copies of the environment, n agents, T steps, d dimensions of each z^i.
SCRIPT = "mix_mate"
CHECKPOINT_KEYS = {"args", "iteration", "csv_bytes", "networks", "optimizers"}
# What depends on the environment; a flag given by hand wins. The first two rows are Table III, the others are what
# measured best or fits the time, docs/mix_mate.md.
# fmt: off
ENV_DEFAULTS = {  # hunting, spread, halfcheetah, hopper, rware, gather
    "total_timesteps": (500_000, 500_000, 5_000_000, 2_000_000, 500_000, 1_000_000),
    "eval_interval":   (50_000, 50_000, 500_000, 200_000, 50_000, 100_000),
    "encoder_learning_rate": (5e-4, 2e-3, 5e-4, 5e-4, 5e-4, 5e-4),
    "latent_dim":      (64, 4, 64, 64, 64, 64),
    "encoder_dim":     (64, 128, 64, 64, 64, 64),
    "bptt_steps":      (50, 25, 50, 50, 50, 50),
    "decoded_steps":   (3200, 1600, 3200, 3200, 1600, 400),
    "share_policy":    (False, False, False, False, False, True),
    "eval_sample":     (False, False, False, False, True, False),
}
# fmt: on


@dataclass
class Args:
    env_id: str = "hunting_target"
    """hunting_target, spread_target, halfcheetah_dir, hopper_param, rware_layout or magent_gather"""
    env_kwargs: tuple[str, ...] = ()
    """settings of the environment, e.g. num_preys=2 radius=1.0"""
    seed: int = 1
    """seed of everything"""
    cuda: bool = True
    """train on a GPU if there is one"""
    num_threads: int = 0
    """CPU threads, of PyTorch and of MuJoCo (0: one per core, at most 4)"""
    run_dir: str = "runs"
    """folder that run folders are made in"""
    run_name: str | None = None
    """name of the run folder (default: {env_id}__{script}__{seed}__{time})"""
    resume: str | None = None
    """run folder to go on with; only total-timesteps (more stretches the decay of learning rates), track, wandb-*,
    checkpoint-* and capture-video may differ from it"""
    meta_test: str | None = None
    """run folder to evaluate; may differ: explore-episodes, test-episodes, eval-copies, eval-sample,
    reset-per-episode, seed, num-threads, cuda, capture-video"""
    track: bool = False
    """send the run to Weights & Biases as well"""
    wandb_project_name: str = "mg2l"
    """project of the run in Weights & Biases"""
    wandb_entity: str | None = None
    """entity (team) of the project in Weights & Biases"""
    capture_video: bool = False
    """write a video of each test task at the end: exploration beside what was learnt"""
    checkpoint_interval: int = 100_000
    """steps between two checkpoints; one is also written at the end"""
    checkpoint_minutes: float = 10.0
    """minutes after which one is written in any case"""

    # MAPPO (Tables I and II)
    total_timesteps: int | None = None
    """steps of one environment copy, summed over copies (None: Table III)"""
    num_envs: int = 32
    """copies of the environment that gather experience for the policies, E"""
    learning_rate: float = 5e-4
    """of actors and critic; decays linearly to 0"""
    encoder_learning_rate: float | None = None
    """of the encoders, the decoder and the mixture"""
    adam_eps: float = 1e-5
    """epsilon of every Adam"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    update_epochs: int = 15
    """passes over a rollout, each of them one step on all of it"""
    clip_coef: float = 0.2
    """clipping of the probability ratio, and of the value's change"""
    ent_coef: float = 0.01
    """weight of the policy's entropy"""
    huber_delta: float = 10.0
    """where the value loss turns from square to linear, in standard deviations of the return"""
    max_grad_norm: float = 10.0
    """gradient clipping: each actor, the critic, the encoders and the decoder by itself"""
    hidden_dim: int = 128
    """width of the two hidden layers of actors and critic"""
    share_policy: bool | None = None
    """one actor and one encoder for all agents, told the agent's id: True or False (default: on magent_gather)"""

    # task representation
    latent_dim: int | None = None
    """dimensions of each z^i, d (Table I: 64); actors and critic read twice as many, (mu, log sigma^2)"""
    encoder_dim: int | None = None
    """width of encoders, decoder and mixture (Table I: 64)"""
    kl_coef: float = 0.01
    """alpha, the weight of the KL to the prior, mean over dimensions"""
    mixture: Literal["expected", "sampled"] = "expected"
    """the error of each agent's z times its weight, or the error of one agent's z, drawn by weight (as MATE)"""
    bptt_steps: int | None = None
    """back-propagation through at most so many steps"""
    encoder_updates: int = 20
    """steps on the loss of the encoders in an iteration; MG2L takes 15 with the critic and 1 to 10 alone"""
    decoded_steps: int | None = None
    """joint steps of the rollout, drawn at random, that are decoded in each of these steps; all if there are fewer"""

    # meta-test (Algorithm 2)
    eval_interval: int | None = None
    """steps between two evaluations (None: Table III)"""
    eval_copies: int = 32
    """meta-test runs in one evaluation, spread evenly over the test tasks"""
    explore_episodes: int = 2
    """exploration episodes of a meta-test run, K"""
    test_episodes: int = 4
    """all episodes of a meta-test run (the paper's N)"""
    eval_sample: bool | None = None
    """after exploration, sample actions, not the mode: True or False (default: on rware_layout, which gets stuck)"""
    reset_per_episode: bool = False
    """strict MATE: forget at the start of each episode, so that exploration teaches nothing"""


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class AgentMLP(nn.Module):
    """n multilayer perceptrons side by side, one per agent: [n, batch, in] -> [n, batch, out].

    One batched product per layer does for all agents. With `shared` one perceptron serves all, told the agent's id.
    LayerNorm has no scale and offset: a linear layer always follows, which has both.
    """

    def __init__(self, num_agents: int, sizes: list[int], head_gain: float, norm: bool, shared: bool):
        super().__init__()
        self.num_agents, self.norm, self.shared = num_agents, norm, shared
        if shared:
            sizes = [sizes[0] + num_agents, *sizes[1:]]
        nets = 1 if shared else num_agents
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for k, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            gain = head_gain if k == len(sizes) - 2 else math.sqrt(2)
            weight = [nn.init.orthogonal_(torch.empty(fan_out, fan_in), gain).T for _ in range(nets)]
            self.weights.append(torch.stack(weight))  # [nets, in, out]
            self.biases.append(torch.zeros(nets, 1, fan_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[1]
        if self.shared:
            ids = torch.eye(self.num_agents, device=x.device)[:, None].expand(-1, batch, -1)
            x = torch.cat([x, ids], -1).flatten(0, 1)[None]  # [1, n * batch, in + n]
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if k < len(self.weights) - 1:
                x = F.relu(x)
                x = F.layer_norm(x, x.shape[-1:]) if self.norm else x
        return x.view(self.num_agents, batch, -1)


class Actor(nn.Module):
    """pi^i(a | o^i, z^i) of every agent i."""

    def __init__(self, num_agents: int, obs_dim: int, latent_dim: int, action_space, hidden_dim: int, shared: bool):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        sizes = [obs_dim + latent_dim, hidden_dim, hidden_dim, self.action_dim]
        self.mlp = AgentMLP(num_agents, sizes, head_gain=0.01, norm=True, shared=shared)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((1 if shared else num_agents, 1, self.action_dim), -0.5))

    def forward(self, obs: torch.Tensor, z: torch.Tensor) -> Distribution:
        """obs [n, batch, obs_dim], z [n, batch, d] -> distribution of the actions, [n, batch] (of vectors if Box)."""
        out = self.mlp(torch.cat([obs, z], -1))  # [n, batch, action_dim]
        if self.discrete:
            return Categorical(logits=out, validate_args=False)
        return Independent(Normal(out, self.log_std.exp(), validate_args=False), 1, validate_args=False)


class Critic(nn.Module):
    """V(s, z), one output per agent: [..., state_dim], [..., d] -> [..., n], in units of the value normaliser."""

    def __init__(self, num_agents: int, state_dim: int, latent_dim: int, hidden_dim: int):
        super().__init__()
        sizes = [state_dim + latent_dim, hidden_dim, hidden_dim, num_agents]
        self.layers = nn.ModuleList([nn.Linear(*shape) for shape in zip(sizes[:-1], sizes[1:], strict=True)])
        for layer, gain in zip(self.layers, (math.sqrt(2), math.sqrt(2), 1), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, state: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        x = torch.cat([state, z], -1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
            x = F.layer_norm(x, x.shape[-1:])
        return self.layers[-1](x)


class ValueNorm(nn.Module):
    """Running mean and standard deviation of the returns, debiased as in the MAPPO authors' code."""

    def __init__(self, beta: float = 0.99999):
        super().__init__()
        self.beta = beta
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # mean, mean of squares, weight; all biased

    def update(self, returns: torch.Tensor) -> None:
        new = torch.stack([returns.mean(), returns.square().mean(), returns.new_ones(())])
        self.sums.mul_(self.beta).add_(new, alpha=1 - self.beta)

    def mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, square = self.sums[:2] / self.sums[2].clamp(min=1e-12)
        return mean.float(), (square - mean.square()).clamp(min=1e-2).sqrt().float()


# ----------------------------------------------------------------------------------------------------------------------
# Task encoder and decoder


class AgentGRU(nn.Module):
    """n gated recurrent units side by side, one per agent, over sequences: torch.nn.GRUCell's equations and scale.

    With `shared` one unit serves all.
    """

    def __init__(self, num_agents: int, dim: int, bptt_steps: int, shared: bool):
        super().__init__()
        self.bptt_steps, nets, scale = bptt_steps, 1 if shared else num_agents, dim**-0.5
        new = lambda rows: nn.Parameter(torch.empty(nets, rows, 3 * dim).uniform_(-scale, scale))  # noqa: E731
        self.weight_in, self.weight_hidden = new(dim), new(dim)  # [nets, dim, 3 * dim]: reset, update, candidate
        self.bias_in, self.bias_hidden = new(1), new(1)

    def forward(self, x: torch.Tensor, begins: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """x [n, T, E, dim], begins [T, E], hidden [n, E, dim] before the first step -> hidden states [n, T, E, dim].

        The hidden state is zero where an episode begins. The gradient goes back at most `bptt_steps` steps.
        """
        n, num_steps, num_envs, dim = x.shape
        weight_hidden, bias_hidden = (p.expand(n, -1, -1) for p in (self.weight_hidden, self.bias_hidden))
        x = torch.baddbmm(self.bias_in, x.flatten(1, 2), self.weight_in.expand(n, -1, -1))  # [n, T * E, 3 * dim]
        x = x.unflatten(1, (num_steps, num_envs)).unbind(1)
        states = []
        for t in range(num_steps):
            if t % self.bptt_steps == 0:
                hidden = hidden.detach()
            hidden = hidden * ~begins[t, :, None]
            of_input, of_hidden = x[t].chunk(3, -1), torch.baddbmm(bias_hidden, hidden, weight_hidden).chunk(3, -1)
            reset, update = ((of_input[k] + of_hidden[k]).sigmoid() for k in (0, 1))
            hidden = torch.lerp((of_input[2] + reset * of_hidden[2]).tanh(), hidden, update)
            states.append(hidden)
        return torch.stack(states, 1)


class RecurrentEncoder(nn.Module):
    """From what each agent saw, did and got so far to q^i(z^i | past): a recurrent unit between two linear layers."""

    def __init__(self, num_agents, past_dim, encoder_dim, latent_dim, bptt_steps, shared):
        super().__init__()
        # without a standard scale of its input the encoder does not learn
        self.register_buffer("sums", torch.zeros(3, past_dim, dtype=torch.float64))  # mean, mean of squares, rollouts
        self.register_buffer("mean", torch.zeros(past_dim))
        self.register_buffer("std", torch.ones(past_dim))
        self.num_agents, self.encoder_dim = num_agents, encoder_dim
        self.before = AgentMLP(num_agents, [past_dim, encoder_dim], head_gain=math.sqrt(2), norm=False, shared=shared)
        self.gru = AgentGRU(num_agents, encoder_dim, bptt_steps, shared)
        sizes = [encoder_dim, encoder_dim, 2 * latent_dim]
        self.after = AgentMLP(num_agents, sizes, head_gain=1.0, norm=False, shared=shared)

    def fit_input(self, past: torch.Tensor) -> None:
        """Running mean and standard deviation of every entry of past [..., past_dim], all rollouts alike."""
        flat = past.flatten(0, -2).double()
        self.sums += torch.stack([flat.mean(0), flat.square().mean(0), torch.ones_like(self.mean)])
        mean, square = self.sums[:2] / self.sums[2]
        self.mean.copy_(mean)
        self.std.copy_((square - mean.square()).clamp(min=1e-4).sqrt())

    def standardise(self, past: torch.Tensor) -> torch.Tensor:
        """past [..., past_dim] in units of its statistics."""
        return (past - self.mean) / self.std

    def forward(self, past, begins, hidden) -> tuple[torch.Tensor, torch.Tensor]:
        """past [n, T, E, past_dim], (o, a, r) of the step before each; begins [T, E], where there is none.

        hidden [n, E, encoder_dim] is the state before the first step. Returns the representations (mu, log sigma^2)
        [n, T, E, 2 * d] and the hidden states [n, T, E, encoder_dim]. Nothing is remembered where an episode begins.
        """
        by_step = past.shape[1:3]
        x = self.standardise(past) * ~begins[..., None]
        x = F.relu(self.before(x.flatten(1, 2))).unflatten(1, by_step)
        states = self.gru(x, begins, hidden)
        return self.after(states.flatten(1, 2)).unflatten(1, by_step), states

    def begin(self, num_envs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Representation [n, E, 2 * d] and hidden state [n, E, encoder_dim] at the start of an episode."""
        shape, device = (self.num_agents, 1, num_envs), self.mean.device
        past, hidden = torch.zeros(*shape, len(self.mean), device=device), torch.zeros(*shape, self.encoder_dim)
        begins = torch.ones(1, num_envs, dtype=torch.bool, device=device)
        representation, states = self(past, begins, hidden[:, 0].to(device))
        return representation[:, 0], states[:, 0]

    def advance(self, past: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same after one more step of the episode, past [n, E, past_dim]."""
        begins = torch.zeros(1, past.shape[1], dtype=torch.bool, device=past.device)
        representation, states = self(past[:, None], begins, hidden)
        return representation[:, 0], states[:, 0]


class Decoder(nn.Module):
    """From z, joint observation and joint action to joint next observation and rewards; and whose z to trust."""

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, encoder_dim: int, latent_dim: int):
        super().__init__()
        joint_dim = num_agents * (obs_dim + action_dim)
        self.of_z = nn.Linear(latent_dim, encoder_dim)
        self.of_joint = nn.Linear(joint_dim, encoder_dim, bias=False)  # one layer with of_z, but done once for all z
        out_dim = num_agents * (obs_dim + 1)
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Linear(encoder_dim, encoder_dim), nn.ReLU(), nn.Linear(encoder_dim, out_dim)
        )
        self.mixture = nn.Sequential(
            nn.Linear(num_agents * obs_dim, encoder_dim), nn.ReLU(), nn.Linear(encoder_dim, num_agents)
        )
        self.num_agents = num_agents

    def forward(self, z, obs, action) -> tuple[torch.Tensor, torch.Tensor]:
        """z [n, batch, d], joint obs, action [batch, ...] -> next obs [n, batch, n * obs_dim], reward [n, batch, n]."""
        out = self.layers(self.of_z(z) + self.of_joint(torch.cat([obs, action], -1)))
        return out[..., : -self.num_agents], out[..., -self.num_agents :]


def mean_and_std(representation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mu, log sigma^2) side by side -> mu and sigma."""
    mean, log_variance = representation.chunk(2, -1)
    return mean, (0.5 * log_variance).exp()


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def kl_to_prior(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """D_KL(N(mean, std^2) || N(0, I)), the mean over dimensions and batch."""
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).mean()


def reconstruction_error(predicted, target, terminated) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors of next obs and reward, the mean over entries: two tensors [n, batch], one row per agent's z.

    terminated [batch]: these steps have no next observation to predict.
    """
    of_obs, of_reward = ((p - t).square().mean(-1) for p, t in zip(predicted, target, strict=True))
    return of_obs * ~terminated, of_reward


def mixture_loss(kind, error, log_weight) -> torch.Tensor:
    """Error [n, batch] of the agents' z under the mixture, log_weight [n, batch].

    expected: sum_k w_k error_k. sampled: the error of one k ~ w, as MATE takes it, which leaves w without a gradient.
    """
    if kind == "expected":
        return (log_weight.exp() * error).sum(0).mean()
    agent = Categorical(logits=log_weight.T).sample()  # [batch]
    return error.gather(0, agent[None]).mean()


def policy_loss(log_prob, old_log_prob, advantage, entropy, clip_coef, ent_coef) -> torch.Tensor:
    """L_pi (eq. 25) with PPO's clipping: all arguments [n, batch]; mean over the batch, sum over agents."""
    ratio = (log_prob - old_log_prob).exp()  # mu_t^i
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)
    return -(surrogate + ent_coef * entropy).mean(1).sum()


def value_loss(value, old_value, target, clip_coef, huber_delta) -> torch.Tensor:
    """L_Q (eq. 17) as MAPPO takes it: Huber, and the worse of the new value and the clipped one. All [T, E, n]."""
    clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    loss = F.huber_loss(value, target, reduction="none", delta=huber_delta)
    return torch.max(loss, F.huber_loss(clipped, target, reduction="none", delta=huber_delta)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Experience


def seed_everything(seed: int, iteration: int, purpose: str) -> int:
    """Every rollout, update and evaluation starts from a seed of its own; for evaluations, `iteration` is their number.

    So a checkpoint needs no state of generators or environments, evaluating more often does not change training, and
    the episodes of an evaluation are the same whatever the method, if there are iterations enough between two of them.
    Seeds PyTorch and returns a seed for the environment.
    """
    purposes = ["initialise", "context", "rollout", "update", "meta-test", "curve", "video"]
    torch_seed, env_seed = np.random.SeedSequence([seed, iteration, purposes.index(purpose)]).generate_state(2)
    torch.manual_seed(int(torch_seed))
    return int(env_seed)


@torch.no_grad()
def rollout_recurrent(env, actor, encoder, task, seed, recalled=None, greedy=False, frames=None) -> SimpleNamespace:
    """T steps of every copy of `env` from a seeded reset, each agent acting on the representation of its own past.

    recalled: what the agents remember from before (see `recall`); without it they start from nothing
    A copy that ends starts again on the same task, its agents from nothing. `frames`, a list, gets pictures of copy 0's
    first 200 steps. Returns tensors: obs, next_obs [n, T, E, obs_dim], action [n, T, E(, act_dim)], log_prob [n, T, E],
    representation, next_representation [n, T, E, 2 * d], reward [T, E, n], state, next_state [T, E, state_dim],
    terminated, ended [T, E]. next_obs, next_state and next_representation are what an action led to, also where the
    copy then started again.
    """
    steps = []
    obs, _ = env.reset(seed=seed, options={"task": task})
    at_start = encoder.begin(env.num_envs)
    representation, hidden = at_start if recalled is None else recalled
    for t in range(env.max_episode_steps):
        if frames is not None and t < 200:
            frames.append(env.render())
        state = env.state()
        obs_in = torch.from_numpy(obs).to(hidden.device).transpose(0, 1)  # [n, E, obs_dim]
        policy = actor(obs_in, representation)
        action = policy.mode if greedy else policy.sample()  # [n, E] or [n, E, act_dim]
        obs, reward, terminated, truncated, info = env.step(action.transpose(0, 1).cpu().numpy())
        next_obs, next_state, ended = obs, env.state(), terminated | truncated
        past = own_past(actor, obs_in, action, torch.from_numpy(reward).to(hidden.device))
        next_representation, hidden = encoder.advance(past, hidden)
        step = dict(obs=obs_in, action=action, log_prob=policy.log_prob(action))
        step |= dict(representation=representation, next_representation=next_representation)
        representation = next_representation
        if ended.any():
            next_obs = np.where(ended[:, None, None], info["final_obs"], obs)
            next_state = np.where(ended[:, None], info["final_state"], next_state)
        for what, values in dict(observation=next_obs, reward=reward).items():
            if not np.isfinite(values).all():
                fail(f"{what} not finite after {t + 1} steps of {env.env_id}; the last checkpoint is as it was", 1)
        forget = torch.from_numpy(ended).to(hidden.device)[:, None]
        representation = torch.where(forget, at_start[0], representation)
        hidden = torch.where(forget, at_start[1], hidden)
        step |= dict(reward=reward, state=state, next_obs=next_obs.swapaxes(0, 1), next_state=next_state)
        steps.append(step | dict(terminated=terminated, ended=ended))
    agents_first = ("obs", "action", "log_prob", "next_obs", "representation", "next_representation")
    stacked = {
        key: torch.stack([torch.as_tensor(step[key]) for step in steps], dim=int(key in agents_first)).to(hidden.device)
        for key in steps[0]
    }
    return SimpleNamespace(**stacked)


def own_past(actor: Actor, obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """What encoders read of a step: obs [n, ..., obs_dim], action, reward [..., n] -> (o, a, r) [n, ..., past_dim]."""
    action = F.one_hot(action, actor.action_dim).float() if actor.discrete else action
    return torch.cat([obs, action, reward.movedim(-1, 0)[..., None]], -1)


def representations(encoder: RecurrentEncoder, past: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """(mu, log sigma^2) at every step of a rollout: (o, a, r) [n, T, E, past_dim], ended [T, E] -> [n, T, E, 2 * d].

    At step t an agent has read its episode up to t - 1.
    """
    before = torch.cat([torch.zeros_like(past[:, :1]), past[:, :-1]], 1)
    begins = torch.cat([torch.ones_like(ended[:1]), ended[:-1]])
    hidden = torch.zeros(len(past), past.shape[2], encoder.encoder_dim, device=past.device)
    return encoder(before, begins, hidden)[0]


def first_episode(ended: torch.Tensor) -> torch.Tensor:
    """[T, E] -> which steps belong to each copy's first episode, its last step included."""
    return (ended.cumsum(0) - ended.int()) == 0


def episodic_return(data: SimpleNamespace) -> torch.Tensor:
    """Sum of rewards over each copy's first episode, mean over agents: [E]."""
    return (data.reward.mean(-1) * first_episode(data.ended)).sum(0)


def gae(reward, value, next_value, terminated, ended, gamma, gae_lambda) -> torch.Tensor:
    """Generalised advantage estimate: reward, value, next_value [T, E, n], terminated, ended [T, E] -> [T, E, n].

    next_value[t] is the value of what step t led to. Nothing follows a terminated episode; one that was cut off
    (ended, not terminated) goes on in next_value. The sum never crosses into the next episode.
    """
    delta = reward + gamma * next_value * ~terminated[..., None] - value
    advantage, last = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        last = delta[t] + gamma * gae_lambda * ~ended[t, :, None] * last
        advantage[t] = last
    return advantage


# ----------------------------------------------------------------------------------------------------------------------
# Updates


def clip_gradient_per_agent(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip each agent's slice of stacked parameters [nets, ...] by its own norm; returns the norms [nets]."""
    norm = torch.stack([p.grad.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for p in parameters:
        p.grad.mul_(scale.view(-1, *[1] * (p.dim() - 1)))
    return norm


def agent_values(critic: Critic, state: torch.Tensor, representation: torch.Tensor) -> torch.Tensor:
    """V^i(s, z^i), output i of the critic for agent i: [T, E, state_dim], [n, T, E, 2 * d] -> [T, E, n]."""
    return torch.stack([critic(state, own)[..., i] for i, own in enumerate(representation)], -1)


def update_mappo(args, data, actor, critic, value_norm, optimizers) -> dict:
    """Epochs of PPO on one rollout, with the representations that were acted on. Returns metrics, 0-d tensors."""
    with torch.no_grad():
        value = agent_values(critic, data.state, data.representation)  # [T, E, n]
        next_value = agent_values(critic, data.next_state, data.next_representation)
        mean, std = value_norm.mean_std()
        now, later = value * std + mean, next_value * std + mean  # in units of reward
        advantage = gae(data.reward, now, later, data.terminated, data.ended, args.gamma, args.gae_lambda)
        returns = advantage + now
        value_norm.update(returns)
        mean, std = value_norm.mean_std()
        explained_variance = 1 - advantage.var() / returns.var().clamp(min=1e-8)  # equal returns: no NaN
        target = (returns - mean) / std
        advantage = advantage.permute(2, 0, 1).flatten(1)  # [n, T * E]
        advantage = (advantage - advantage.mean(1, keepdim=True)) / (advantage.std(1, keepdim=True) + 1e-8)
        obs, own = data.obs.flatten(1, 2), data.representation.flatten(1, 2)  # [n, T * E, ...]
        action, old_log_prob = data.action.flatten(1, 2), data.log_prob.flatten(1, 2)

    for epoch in range(args.update_epochs):
        # line 17: the critic
        value_now = agent_values(critic, data.state, data.representation)
        loss_q = value_loss(value_now, value, target, args.clip_coef, args.huber_delta)
        optimizers["critic"].zero_grad()
        loss_q.backward()
        critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
        optimizers["critic"].step()

        # line 18: the actors, on the representations they acted on
        policy = actor(obs, own)
        log_prob, entropy = policy.log_prob(action), policy.entropy()  # [n, T * E]
        loss_pi = policy_loss(log_prob, old_log_prob, advantage, entropy, args.clip_coef, args.ent_coef)
        optimizers["actor"].zero_grad()
        loss_pi.backward()
        actor_norm = clip_gradient_per_agent(list(actor.parameters()), args.max_grad_norm)
        optimizers["actor"].step()
        if epoch == 0:
            ratio_error = (log_prob.detach() - old_log_prob).exp().sub(1).abs().max()

    log_ratio = log_prob.detach() - old_log_prob
    return {
        "losses/policy_loss": loss_pi,
        "losses/value_loss": loss_q,
        "losses/entropy": entropy.mean(),
        "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
        "losses/clipfrac": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),
        "losses/first_epoch_ratio_error": ratio_error,
        "losses/explained_variance": explained_variance,
        "losses/actor_grad_norm": actor_norm.max(),
        "losses/critic_grad_norm": critic_norm,
    }


def encoder_loss(args, data, past, encoder, decoder) -> tuple[torch.Tensor, dict]:
    """Reconstruction + alpha KL on one rollout, past [n, T, E, past_dim]; it reaches encoders, decoder and mixture."""
    mean, std = mean_and_std(representations(encoder, past, data.ended))  # [n, T, E, d]
    kl = kl_to_prior(mean, std)
    steps = torch.randperm(data.ended.numel(), device=past.device)[: args.decoded_steps]
    z = (mean + std * torch.randn_like(mean)).flatten(1, 2)[:, steps]  # [n, batch, d]
    joint = lambda x: x.flatten(1, 2)[:, steps].transpose(0, 1).flatten(1)  # noqa: E731  [n, T, E, k] -> [batch, n * k]
    obs_dim, standard = data.obs.shape[-1], encoder.standardise(past)
    obs, action, reward = (joint(part) for part in standard.tensor_split((obs_dim, past.shape[-1] - 1), -1))
    next_obs = joint((data.next_obs - encoder.mean[:obs_dim]) / encoder.std[:obs_dim])
    log_weight = decoder.mixture(obs).log_softmax(-1).T  # [n, batch]
    target, terminated = (next_obs, reward), data.terminated.flatten()[steps]
    errors = reconstruction_error(decoder(z, obs, action), target, terminated)
    loss_obs, loss_reward = (mixture_loss("expected", error, log_weight) for error in errors)
    loss = mixture_loss(args.mixture, sum(errors), log_weight) + args.kl_coef * kl
    return loss, {
        "losses/encoder_loss": loss,
        "losses/reconstruction_obs": loss_obs,
        "losses/reconstruction_reward": loss_reward,
        "losses/local_kl": kl,
        "losses/mixture_entropy": -(log_weight.exp() * log_weight).sum(0).mean(),
    }


def update_encoder(args, data, past, encoder, decoder, optimizers) -> dict:
    """One step of encoders, decoder and mixture on a rollout. Returns metrics, tensors."""
    loss, metrics = encoder_loss(args, data, past, encoder, decoder)
    for name in ("encoder", "decoder"):
        optimizers[name].zero_grad()
    loss.backward()
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        metrics[f"losses/{name}_grad_norm"] = nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizers[name].step()
    return {name: value.detach() for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Meta-test (Algorithm 2)


@torch.no_grad()
def recall(encoder: RecurrentEncoder, memory: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each agent makes of its own steps, in their order: a state to begin the next episode with.

    memory: for each of E copies what its agents went through, [S, n, past_dim]; S may differ, and be 0
    Returns representation [n, E, 2 * d] and hidden state [n, E, encoder_dim].
    """
    past = F.pad(nn.utils.rnn.pad_sequence(memory), (0, 0, 0, 0, 0, 0, 1, 0))  # [1 + longest, E, n, past_dim]
    past = past.permute(2, 0, 1, 3)
    begins = torch.zeros(past.shape[1:3], dtype=torch.bool, device=past.device)
    begins[0] = True
    hidden = torch.zeros(len(past), len(memory), encoder.encoder_dim, device=past.device)
    representation, states = encoder(past, begins, hidden)
    last, env = torch.tensor([len(own) for own in memory]), torch.arange(len(memory))
    return representation[:, last, env], states[:, last, env]


def inference_accuracy(mean, std, task, kind) -> tuple[torch.Tensor, torch.Tensor]:
    """How well each copy's z^i tells its task: mean, std [C, n, E, d], task [E] -> two tensors [E], means over agents.

    The first is the CL accuracy of samples, against one key per task from another copy's exploration of it; the second
    that of the nearest centroid, centroids being mean representations of the other copies of each task. NaN where no
    other copy explored the same task.
    """
    known, label = task.unique(return_inverse=True)  # [N], [E]
    itself = torch.eye(len(task), dtype=torch.bool, device=task.device)
    other = (task == known[:, None]) & ~itself[:, None]  # [E, N, E]: on this task, and not the copy that is asked about
    comparable = other.any(-1).all(-1)  # [E]
    z = mean + std * torch.randn_like(mean)  # [C, n, E, d]
    key_copy = other.int().argmax(-1)  # [E, N], the first other copy on each task
    keys = z[0][:, key_copy]  # [n, E, N, d]
    if kind == "cosine":
        z, keys = F.normalize(z, dim=-1), F.normalize(keys, dim=-1)
    chosen = torch.einsum("cned,nekd->cnek", z, keys).argmax(-1)  # [C, n, E]
    accuracy = (chosen == label).float().mean((0, 1))
    representation = mean.mean(0)  # [n, E, d]
    weight = other.float() / other.float().sum(-1, keepdim=True).clamp(min=1)  # [E, N, E]
    centroid = torch.einsum("ekf,nfd->nekd", weight, representation)  # [n, E, N, d]
    nearest = (representation[:, :, None] - centroid).norm(dim=-1).argmin(-1)  # [n, E]
    probe = (nearest == label).float().mean(0)
    comparable &= len(known) > 1  # with one task there is nothing to tell
    return accuracy.masked_fill(~comparable, torch.nan), probe.masked_fill(~comparable, torch.nan)


def meta_test(args, env, actor, encoder, evaluation: int, device, curve: bool) -> list[dict]:
    """Algorithm 2 on every copy of `env`: explore, then act on what was remembered. No gradient step.

    Returns one row per copy and episode for meta_test.csv. With `curve` also Fig. 7: one more episode on what is
    remembered of the first 0, 10, 20, 50, ... transitions. With --reset-per-episode agents begin every episode from
    nothing; memory, for the probe, is then the last exploration episode.
    """
    env_seed = seed_everything(args.seed, evaluation, "meta-test")
    n, num_envs, strict = env.num_agents, env.num_envs, args.reset_per_episode
    task = np.resize(env.tasks.test, num_envs)  # spread evenly
    task_on_device = torch.from_numpy(task).to(device)
    memory = [torch.zeros(0, n, len(encoder.mean), device=device) for _ in range(num_envs)]  # each [S, n, dim]
    rows = []

    def record(phase, episode, seen, returns, recalled=None):  # seen: for each copy the transitions it recalled
        probe = torch.full((num_envs,), torch.nan)
        if recalled is not None:
            mean, std = mean_and_std(recalled[0][None])
            _, probe = inference_accuracy(mean, std, task_on_device, "dot")  # CL accuracy is for contrastive methods
        table = torch.stack([returns.cpu(), probe.cpu()], 1).tolist()
        for run, (episodic, probe) in enumerate(table):
            probe = "" if math.isnan(probe) else probe
            rows.append(dict(run=run, task=int(task[run]), episode=episode, phase=phase, context_steps=len(seen[run])))
            rows[-1] |= {"return": episodic, "accuracy": "", "probe": probe}

    recalled = None
    for episode in range(args.explore_episodes):
        data = rollout_recurrent(env, actor, encoder, task, env_seed + episode, None if strict else recalled)
        past = own_past(actor, data.obs, data.action, data.reward)  # [n, T, E, past_dim]
        kept = first_episode(data.ended)  # [T, E]
        lived = [past[:, kept[:, e], e].transpose(0, 1) for e in range(num_envs)]
        memory = lived if strict else [torch.cat(both) for both in zip(memory, lived, strict=True)]
        recalled = recall(encoder, memory)
        record("prior", episode, [()] * num_envs, episodic_return(data))
        del data, past, lived  # each as large as all that is remembered
    test = dict(recalled=None if strict else recalled, greedy=not args.eval_sample)
    for episode in range(args.explore_episodes, args.test_episodes):
        returns = episodic_return(rollout_recurrent(env, actor, encoder, task, env_seed + episode, **test))
        record("posterior", episode, memory, returns, recalled)
    if curve:
        env_seed = seed_everything(args.seed, evaluation, "curve")
        longest = max(len(lived) for lived in memory)
        for steps in [0, *(m * 10**k for k in range(1, 6) for m in (1, 2, 5) if m * 10**k <= longest)]:
            begun = [lived[:steps] for lived in memory]
            recalled = recall(encoder, begun)
            test["recalled"] = None if strict else recalled
            returns = episodic_return(rollout_recurrent(env, actor, encoder, task, env_seed, **test))
            record("curve", args.test_episodes, begun, returns, recalled)
    return rows


def summarise(rows: list[dict]) -> dict:
    """Means over runs and episodes, for TensorBoard: return of both phases, and accuracies."""

    def mean(key, phase):
        values = [row[key] for row in rows if row["phase"] == phase and row[key] != ""]
        return sum(values) / len(values) if values else math.nan

    out = {"return": mean("return", "posterior"), "return_prior": mean("return", "prior")}
    out |= {"cl_accuracy_local": mean("accuracy", "posterior"), "probe_accuracy_local": mean("probe", "posterior")}
    return {f"meta_test/{key}": value for key, value in out.items() if not math.isnan(value)}


def write_videos(args, actor, encoder, folder: Path, iteration: int, device) -> None:
    """For each test task a GIF: the last exploration episode on the left, on the right one after exploration."""
    from PIL import Image, ImageDraw

    folder.mkdir(exist_ok=True)
    env = make_env(args, 1)
    for task in env.tasks.test:
        env_seed = seed_everything(args.seed, iteration, "video") + int(task)
        frames = {"prior (exploration)": [], "posterior (after exploration)": []}
        prior_frames, posterior_frames = frames.values()
        memory, recalled = [], None
        for episode in reversed(range(args.explore_episodes)):
            kept = None if episode else prior_frames
            given = (actor, encoder, np.array([task]), env_seed + episode, recalled)
            data = rollout_recurrent(env, *given, frames=kept)
            past = own_past(actor, data.obs, data.action, data.reward)  # [n, T, 1, past_dim]
            memory.append(past[:, first_episode(data.ended)[:, 0], 0].transpose(0, 1))
            recalled = None if args.reset_per_episode else recall(encoder, [torch.cat(memory)])
        given = (actor, encoder, np.array([task]), env_seed, recalled)
        rollout_recurrent(env, *given, greedy=not args.eval_sample, frames=posterior_frames)
        pictures = []
        for pair in list(zip(*frames.values(), strict=True))[::2]:  # every second step
            picture = Image.fromarray(np.concatenate([np.pad(p, ((24, 0), (4, 4), (0, 0))) for p in pair], axis=1))
            for k, title in enumerate(frames):
                ImageDraw.Draw(picture).text((k * picture.width // 2 + 8, 6), title, fill="white")
            pictures.append(picture)
        name = folder / f"task_{task}.gif"
        pictures[0].save(name, save_all=True, append_images=pictures[1:], duration=100, loop=0)
        print(f"video: {name} ({env.tasks.describe(task)})")
    env.close()


# ----------------------------------------------------------------------------------------------------------------------
# Runs: arguments, run folder, checkpoint. Nothing of the algorithm.


def fail(message: str, code: int = 2) -> None:
    """Say in one line what is wrong and stop: 2 for bad input, before anything was written, 1 for what went wrong."""
    print(("\n" if code == 1 else "") + f"{SCRIPT}.py: {message}", file=sys.stderr)  # below the progress bar
    sys.exit(code)


def make_env(args: Args, num_envs: int) -> envs.MetaVectorEnv:
    settings = {}
    for setting in args.env_kwargs:
        name, _, value = setting.partition("=")
        if name in ("env_id", "num_envs", "seed"):
            raise ValueError(
                f"env-kwargs: got {name}, which has a flag of its own, expected a setting of {args.env_id}"
            )
        try:
            settings[name] = ast.literal_eval(value)
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(f"env-kwargs: got {setting!r}, expected NAME=VALUE") from None
    env = envs.make(args.env_id, num_envs, 0, **settings)
    env.num_threads = args.num_threads
    return env


def iteration_steps(args: Args, env, iterations: int) -> int:
    """Steps that this many iterations take."""
    return env.max_episode_steps * iterations * args.num_envs


def check_args(args: Args) -> None:
    """Fill in what depends on the environment. Raises ValueError: what came and what was expected."""
    env = make_env(args, 1)
    for name, by_env in ENV_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, by_env[envs.ENV_IDS.index(args.env_id)])
    if args.num_threads == 0:
        args.num_threads = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    zero_is_fine = {"seed", "num_threads", "kl_coef", "ent_coef", "gae_lambda", "encoder_updates"}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fine = math.isfinite(value) and (value > 0 or value == 0 and field.name in zero_is_fine)
            expect(fine, field.name, value, f"a number {'of at least' if field.name in zero_is_fine else 'above'} 0")
    expect(args.num_threads <= 1024, "num_threads", args.num_threads, "at most 1024")
    expect(args.gamma <= 1, "gamma", args.gamma, "at most 1")
    expect(args.gae_lambda <= 1, "gae_lambda", args.gae_lambda, "at most 1")
    more = args.test_episodes > args.explore_episodes
    expect(more, "test_episodes", args.test_episodes, "more than explore_episodes")
    expect(args.eval_copies >= len(env.tasks.test), "eval_copies", args.eval_copies, "at least one per test task")
    one = iteration_steps(args, env, 1)
    expect(args.total_timesteps >= one, "total_timesteps", args.total_timesteps, f"at least one iteration, {one}")


def expect(fine: bool, name: str, got, expected: str) -> None:
    """Raises ValueError, in one line, unless `fine`."""
    if not fine:
        raise ValueError(f"{name.replace('_', '-')}: got {got}, expected {expected}")


def save_checkpoint(path: Path, content: dict) -> None:
    """Write beside, sync, rename: a reader finds the old checkpoint or the new one, never a half. Keeps the old one.

    Ends in the SHA-256 of all before it. Raises OSError if it can't be written; what was there is left whole.
    """
    new, data = path.with_suffix(".tmp"), io.BytesIO()
    torch.save(content, data)
    try:
        new.unlink(missing_ok=True)  # a write that a signal cut short may still hold it open
        with open(new, "wb") as file:
            file.write(data.getbuffer())
            file.write(hashlib.sha256(data.getbuffer()).digest())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copyfile(path, path.with_name("checkpoint_previous.pt"))
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def load_checkpoint(run: str | Path, device="cpu") -> dict:
    """What `save_checkpoint` wrote in this folder. Raises ValueError if that cannot be read or is another script's."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{path}: got no file there, expected the checkpoint of a run")
    content = path.read_bytes()
    data, digest = content[:-32], content[-32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path}: got a damaged file, expected a whole checkpoint, as checkpoint_previous.pt may be")
    try:
        saved = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: got {type(error).__name__} reading it, expected a whole checkpoint") from None
    if not isinstance(saved, dict) or saved.get("script") != SCRIPT:
        found = saved.get("script") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: got a file of {found!r}, expected a checkpoint of {SCRIPT}.py")
    names = {field.name for field in dataclasses.fields(Args)}
    if not saved.keys() >= CHECKPOINT_KEYS or not isinstance(saved["args"], dict) or saved["args"].keys() != names:
        raise ValueError(f"{path}: got a checkpoint of another version, expected one of this {SCRIPT}.py")
    return saved


def restore(modules: dict, saved: dict, path) -> None:
    """Load state dicts. Raises ValueError if a checkpoint does not fit its own arguments."""
    for name, module in modules.items():
        try:
            module.load_state_dict(saved[name])
            for p, state in getattr(module, "state", {}).items():  # an optimiser's, which does not look at shapes
                if any(v.dim() and v.shape != p.shape for v in state.values()):
                    raise ValueError
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(f"{path}: got {name} that does not fit, expected that of its own arguments") from None


def load_agents(run: str | Path) -> SimpleNamespace:
    """A finished or unfinished run as something to use: its args, env (one copy), actor, critic and encoder.

    Agents are stepped with a state, (representation [n, E, 2 * d], hidden [n, E, encoder_dim]). `begin(E)` gives that
    of agents who remember nothing, `act(obs, state)` the actions, and `remember(state, obs, action, reward)` the state
    after a step: obs float32 [E, n, obs_dim] before it, actions and reward [E, n] as the environment takes and gives
    them. At the end of an episode go on with the state, or begin anew as in training. Raises ValueError if there is no
    readable checkpoint of this script.
    """
    saved = load_checkpoint(run)
    args = Args(**saved["args"])
    env = make_env(args, 1)
    networks = build(args, env, torch.device("cpu"))
    restore(networks, saved["networks"], run)

    actor, encoder = networks["actor"], networks["encoder"]

    @torch.no_grad()
    def act(obs, state, greedy=True):
        policy = actor(torch.as_tensor(obs).transpose(0, 1), state[0])
        return (policy.mode if greedy else policy.sample()).transpose(0, 1).numpy()

    @torch.no_grad()
    def remember(state, obs, action, reward):
        obs, action = (torch.as_tensor(x).transpose(0, 1) for x in (obs, action))
        return encoder.advance(own_past(actor, obs, action, torch.as_tensor(reward)), state[1])

    begin = torch.no_grad()(encoder.begin)
    return SimpleNamespace(args=args, env=env, act=act, begin=begin, remember=remember, **networks)


def parse_args() -> tuple[Args, Path | None, dict | None]:
    """The arguments, and for --resume and --meta-test the run folder and its checkpoint. Raises ValueError."""
    about = __doc__.split("\n\n")[0] + " A default of None depends on the environment: see ENV_DEFAULTS."
    given = tyro.cli(Args, description=about)
    if given.resume is not None and given.meta_test is not None:
        raise ValueError("resume, meta-test: got both, expected one of them")
    if given.resume is None and given.meta_test is None:
        check_args(given)
        return given, None, None
    run = Path(given.meta_test if given.resume is None else given.resume)
    saved = load_checkpoint(run)
    args = Args(**saved["args"])
    given = tyro.cli(Args, default=Args(**saved["args"]))  # so that what is not given is as it was
    free = {"resume", "meta_test", "capture_video"}
    if given.resume:
        free |= {"total_timesteps", "track", "wandb_project_name", "wandb_entity", "checkpoint_interval"}
        free |= {"checkpoint_minutes"}
    else:
        free |= {"explore_episodes", "test_episodes", "eval_copies", "eval_sample", "seed", "num_threads", "cuda"}
        free |= {"reset_per_episode"}
    for name in vars(args):
        new, old = getattr(given, name), getattr(args, name)
        expect(new == old or name in free, name, new, f"{old}, as {run} was trained with")
        setattr(args, name, new)
    check_args(args)
    done = iteration_steps(args, make_env(args, 1), saved["iteration"])
    expect(args.total_timesteps >= done, "total_timesteps", args.total_timesteps, f"at least the {done} of {run}")
    return args, run, saved


def build(args: Args, env: envs.MetaVectorEnv, device: torch.device) -> dict[str, nn.Module]:
    """The networks of a run, freshly initialised."""
    n, obs_dim = env.num_agents, env.single_observation_space.shape[0]
    read = 2 * args.latent_dim  # (mu, log sigma^2)
    actor = Actor(n, obs_dim, read, env.single_action_space, args.hidden_dim, args.share_policy)
    critic = Critic(n, env.state_dim, read, args.hidden_dim)
    past_dim = obs_dim + actor.action_dim + 1  # (o, a, r)
    dims = (past_dim, args.encoder_dim, args.latent_dim, args.bptt_steps)
    encoder = RecurrentEncoder(n, *dims, shared=args.share_policy)
    decoder = Decoder(n, obs_dim, actor.action_dim, args.encoder_dim, args.latent_dim)
    networks = dict(actor=actor, critic=critic, encoder=encoder, decoder=decoder, value_norm=ValueNorm())
    return {name: network.to(device) for name, network in networks.items()}


CSV_COLUMNS = ["step", "run", "task", "episode", "phase", "context_steps", "return", "accuracy", "probe"]


def to_numbers(metrics: dict[str, torch.Tensor], step: int) -> dict[str, float]:
    """Metrics for TensorBoard; of one that has a value per agent, [n], mean and worst. Ends the run if not finite."""
    for name in [name for name, value in metrics.items() if value.dim()]:
        metrics[f"{name}_worst"], metrics[name] = metrics[name].min(), metrics[name].mean()
    values = torch.stack([value.detach().float() for value in metrics.values()]).tolist()
    if broken := [name for name, value in zip(metrics, values, strict=True) if not math.isfinite(value)]:
        fail(f"{', '.join(broken)} not finite at step {step}; the last checkpoint is as it was", 1)
    return dict(zip(metrics, values, strict=True))


def append_rows(path: Path, step: int, rows: list[dict]) -> None:
    """Add the rows of one evaluation to meta_test.csv."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(dict(step=step, **row) for row in rows)


if __name__ == "__main__":
    try:
        args, run, saved = parse_args()
    except ValueError as error:
        fail(str(error))
    evaluate_only, args.meta_test, args.resume = args.meta_test, None, None
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    train_env = make_env(args, args.num_envs)
    tasks = train_env.tasks
    num_tasks = len(tasks.train)
    eval_env = make_env(args, args.eval_copies)

    seed_everything(args.seed, 0, "initialise")
    networks = build(args, train_env, device)
    actor, critic, encoder, decoder, value_norm = networks.values()
    slow, fast = args.encoder_learning_rate, args.learning_rate
    learning_rate = dict(actor=fast, critic=fast, encoder=slow, decoder=slow)
    optimizers = {
        name: torch.optim.Adam(networks[name].parameters(), lr=lr, eps=args.adam_eps, fused=True)
        for name, lr in learning_rate.items()
    }
    start = 0
    if saved:
        try:
            restore(networks, saved["networks"], run)
            if not evaluate_only:
                restore(optimizers, copy.deepcopy(saved["optimizers"]), run)  # Adam would step in `saved`
        except ValueError as error:
            fail(str(error))
        start = saved["iteration"]
        csv_bytes = (run / "meta_test.csv").stat().st_size if (run / "meta_test.csv").is_file() else 0
        if csv_bytes < saved["csv_bytes"]:
            fail(f"{run / 'meta_test.csv'}: got {csv_bytes} bytes, expected at least {saved['csv_bytes']}")

    if evaluate_only:
        step, csv_path = iteration_steps(args, train_env, start), run / "meta_test_only.csv"
        try:
            csv_path.open("a").close()  # before minutes go into what then cannot be kept
            rows = meta_test(args, eval_env, actor, encoder, round(step / args.eval_interval), device, curve=True)
            csv_path.unlink()
            append_rows(csv_path, step, rows)
        except OSError as error:
            fail(f"{csv_path}: got {error.strerror}, expected a file that can be written")
        for task in tasks.test:
            means = summarise([row for row in rows if row["task"] == task])
            print(f"task {task} ({tasks.describe(task)}): " + ", ".join(f"{k[10:]} {v:.2f}" for k, v in means.items()))
        if args.capture_video:
            try:
                write_videos(args, actor, encoder, run / "videos", start, device)
            except Exception as error:  # no display, no driver
                fail(f"capture-video: got {type(error).__name__}: {error}; no video was written", 1)
        sys.exit()

    num_iterations = 0
    while iteration_steps(args, train_env, num_iterations + 1) <= args.total_timesteps:
        num_iterations += 1
    global_step = iteration_steps(args, train_env, start)
    if not saved:
        run = Path(args.run_dir) / (args.run_name or f"{args.env_id}__{SCRIPT}__{args.seed}__{int(time.time())}")
    try:
        run.mkdir(parents=True, exist_ok=bool(saved))
        (run / "args.json").write_text(json.dumps({"script": SCRIPT, **dataclasses.asdict(args)}, indent=2) + "\n")
    except OSError as error:
        fail(f"run-dir: got {run} ({error.strerror}), expected a new folder that can be written to")
    if args.track:
        import wandb

        where = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=run.name, dir=str(run))
        try:
            wandb.init(**where, config=dataclasses.asdict(args), sync_tensorboard=True)
        except wandb.Error as error:
            print(f"track: {error}; training goes on without Weights & Biases", file=sys.stderr)
    writer = SummaryWriter(str(run), purge_step=global_step + 1 if saved else None)
    csv_path = run / "meta_test.csv"
    if saved:
        with open(csv_path, "a") as file:
            file.truncate(saved["csv_bytes"])  # what was written after the checkpoint is done again
    print(f"{run}: {args.total_timesteps:,} steps (joint steps of one copy), {args.num_threads} threads, {device}")
    end = iteration_steps(args, train_env, num_iterations)
    progress = tqdm(total=end, initial=global_step, unit="step", unit_scale=True)
    start_time = checkpoint_time = time.time()
    start_step, boundary = global_step, saved and saved | {"args": dataclasses.asdict(args)}
    seconds = dict.fromkeys(("rollout", "ppo", "encoder", "eval"), 0.0)

    def stop(number, frame):
        """SIGINT and SIGTERM end the run by way of `keep`, once the interrupted call has let go of its locks."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: os._exit(128 + number))  # a second one stops at once
        atexit.register(keep, signal.Signals(number).name)
        sys.exit(128 + number)

    def keep(name: str) -> None:
        """Save what the last whole iteration left, and say how to go on."""
        progress.close()
        go_on = f"go on with: python {SCRIPT}.py --resume {run}" if boundary else "no iteration was finished"
        try:
            if boundary:
                save_checkpoint(run / "checkpoint.pt", boundary)
        except OSError as error:
            go_on = f"{run}: {error}, expected to write; the last checkpoint is as it was"
        print(f"{SCRIPT}.py: stopped by {name}; {go_on}", file=sys.stderr)
        with contextlib.suppress(OSError):  # closed already, if the signal came while it was being closed
            writer.close()

    def explain(kind, error, trace) -> None:
        """What can't be written ends the run in one line; any other error is one of the program and shows its trace."""
        if not isinstance(error, OSError):
            return sys.__excepthook__(kind, error, trace)
        print(f"\n{SCRIPT}.py: {run}: {error}, expected to write; the last checkpoint is as it was", file=sys.stderr)

    sys.excepthook = explain
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    def evaluate(step: int, curve: bool) -> None:
        begun = time.perf_counter()
        rows = meta_test(args, eval_env, actor, encoder, round(step / args.eval_interval), device, curve)
        append_rows(csv_path, step, rows)
        for name, value in summarise(rows).items():
            writer.add_scalar(name, value, step)
        seconds["eval"] += time.perf_counter() - begun

    if not saved:
        evaluate(0, curve=False)
    for iteration in range(start, num_iterations):  # Algorithm 1, line 1
        begun = time.perf_counter()
        # lines 8 to 13: collect transitions for RL, on what the agents remember of the episode
        env_seed = seed_everything(args.seed, iteration, "rollout")
        task = tasks.train[torch.randint(num_tasks, (args.num_envs,)).numpy()]  # [E], ids
        data = rollout_recurrent(train_env, actor, encoder, task, env_seed)  # lines 11 and 12
        now = time.perf_counter()
        seconds["rollout"] += now - begun
        begun = now

        # lines 14 to 20: update the networks
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = learning_rate[name] * (1 - iteration / num_iterations)
        seed_everything(args.seed, iteration, "update")
        metrics = update_mappo(args, data, actor, critic, value_norm, optimizers)
        now = time.perf_counter()
        seconds["ppo"] += now - begun
        begun = now
        past = own_past(actor, data.obs, data.action, data.reward)  # [n, T, E, past_dim]
        encoder.fit_input(past)
        updates = [update_encoder(args, data, past, encoder, decoder, optimizers) for _ in range(args.encoder_updates)]
        for name in updates[0] if updates else ():
            metrics[name] = torch.stack([update[name] for update in updates]).mean(0)
        seconds["encoder"] += time.perf_counter() - begun

        # the rest is bookkeeping
        global_step = iteration_steps(args, train_env, iteration + 1)
        metrics["charts/episodic_return"] = episodic_return(data).mean()
        del data, past  # evaluation needs the memory
        metrics = to_numbers(metrics, global_step)
        metrics["charts/learning_rate"] = optimizers["actor"].param_groups[0]["lr"]
        metrics["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step)
        progress.set_postfix({"return": f"{metrics['charts/episodic_return']:.1f}"}, refresh=False)
        progress.update(global_step - progress.n)

        last = iteration + 1 == num_iterations
        previous = iteration_steps(args, train_env, iteration)
        if last or global_step // args.eval_interval > previous // args.eval_interval:
            evaluate(global_step, curve=last)
        for name, value in seconds.items():
            writer.add_scalar(f"time/{name}", value, global_step)
        state = dict(script=SCRIPT, args=dataclasses.asdict(args), iteration=iteration + 1)
        state |= dict(csv_bytes=csv_path.stat().st_size)
        state["networks"] = copy.deepcopy({name: network.state_dict() for name, network in networks.items()})
        state["optimizers"] = copy.deepcopy({name: optimizer.state_dict() for name, optimizer in optimizers.items()})
        boundary = state  # copied, and whole at once: a signal may come at any time, and `stop` saves this
        due = global_step // args.checkpoint_interval > previous // args.checkpoint_interval
        if last or due or time.time() - checkpoint_time > 60 * args.checkpoint_minutes:
            writer.flush()
            save_checkpoint(run / "checkpoint.pt", boundary)
            checkpoint_time = time.time()

    progress.close()
    if args.capture_video:
        try:
            write_videos(args, actor, encoder, run / "videos", num_iterations, device)
        except Exception as error:  # no display, no driver: what was trained is whole all the same
            print(f"capture-video: got {type(error).__name__}: {error}; no video was written", file=sys.stderr)
    writer.close()
    with open(csv_path) as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) == global_step]
    for row in rows:
        row |= {key: float(row[key]) for key in ("return", "accuracy", "probe") if row[key]}
    size = (run / "checkpoint.pt").stat().st_size / 1e6
    print(f"{time.time() - start_time:.0f} s, checkpoint {size:.0f} MB, ", end="")
    print(", ".join(f"{k[10:]} {v:.2f}" for k, v in summarise(rows).items()))
