"""MG2L with MAPPO as CUDA graphs, for one GPU: mg2l_mappo.py, and what captures it.

Zhao et al., "Meta Learning Task Representation in Multiagent Reinforcement Learning: From Global Inference to Local
Inference", IEEE TNNLS 2025. Equation, algorithm and table numbers below are this paper's.

Agents meet many tasks and are never told which one they are in; they must infer it from what they experience. In
training an encoder turns the joint experience of all agents into a global representation z, learnt by contrast between
tasks (L_G) and from the critic that reads it (L_Q). Each agent's own part of that encoding gives a local representation
z^i, which learns to tell the tasks apart without the others (L_L), and the policies read only z^i. So at meta-test
every agent explores, infers the task and acts on its own.

Networks this small keep a GPU waiting for Python, which launches hundreds of kernels one by one. Here a policy's step,
all epochs of an update and a step of the encoder are each captured once and then replayed as one launch: the same
functions, and to the bit what they give without (--no-cudagraphs). Contexts are drawn before an update, in which
nothing may wait for the GPU; so a seed is another draw than in mg2l_mappo.py. On a CPU nothing is captured.

    python mg2l_mappo_cudagraphs.py --env-id hunting_target            # trains, meta-tests, leaves runs/...
    python mg2l_mappo_cudagraphs.py --resume runs/RUN                  # goes on where the run was cut off
    python mg2l_mappo_cudagraphs.py --meta-test runs/RUN --capture-video
    python mg2l_mappo_cudagraphs.py --no-cudagraphs                    # the same, kernel by kernel
    tensorboard --logdir runs
"""

import ast
import atexit
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
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
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# Shapes: E copies of the environment, n agents, T steps, N training tasks, d dimensions of z; B transitions in a
# context, C contexts per task to act on, Q contexts encoded together, S sets of N contexts (one per task) to compare,
# or S transitions that an agent has stored.
# phi_g: the encoder but for its local heads; phi_l: the local heads.
SCRIPT = "mg2l_mappo_cudagraphs"
CHECKPOINT_KEYS = {"args", "iteration", "csv_bytes", "networks", "optimizers", "context"}
# What depends on the environment; a flag given by hand wins. The first four rows are Table III (its batch size is our
# context_size), which has buffer 100,000 and context 32 for the first two columns, context 512 for hopper. The others
# are what measured best or fits the time, docs/mg2l_mappo.md.
# fmt: off
ENV_DEFAULTS = {  # hunting, spread, halfcheetah, hopper, rware, gather
    "total_timesteps": (500_000, 500_000, 5_000_000, 2_000_000, 500_000, 1_000_000),
    "eval_interval":   (50_000, 50_000, 500_000, 200_000, 50_000, 100_000),
    "buffer_size":     (300_000, 600_000, 1_000_000, 500_000, 100_000, 200_000),
    "context_size":    (16, 16, 512, 128, 64, 128),
    "inference_size":  (200, 200, 512, 512, 200, 128),
    "latent_scale":    (1.0, 0.25, 1.0, 0.1, 0.1, 1.0),
    "explore_scale":   (1.0, 2.0, 1.0, 0.1, 0.1, 1.0),
    "encoder_learning_rate": (7e-5, 1e-4, 2e-4, 3e-4, 2e-4, 2e-4),
    "warmup_learning_rate": (2e-3, 2e-3, 5e-4, 5e-4, 5e-4, 5e-4),
    "context_sets":    (32, 96, 6, 3, 4, 2),
    "rollout_contexts": (8, 8, 8, 2, 8, 2),
    "rollout_context_size": (200, 200, 512, 512, 200, 128),
    "rollout_context_episodes": (64, 64, 2, 2, 2, 2),
    "critic_context_size": (64, 64, 512, 128, 64, 128),
    "local_temperature": (128.0, 128.0, 16.0, 16.0, 16.0, 16.0),
    "encoder_updates": (1, 1, 5, 10, 5, 5),
    "warmup_episodes": (1500, 3000, 10, 2, 20, 4),
    "warmup_updates":  (300, 400, 200, 200, 300, 60),
    "context_episodes": (8, 16, 2, 2, 2, 2),
    "context_episode_steps": (12, 4, 1000, 1000, 100, 200),
    "context_copies":  (40, 60, 1, 1, 1, 1),
    "context_interval": (5, 10, 1, 5, 2, 2),
    "share_policy":    (False, False, False, False, False, True),
    "eval_sample":     (False, False, False, False, True, False),
}
# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class Graph:
    """A function of tensors as a CUDA graph: its kernels are captured once and from then on replayed in one launch.

    The first WARMUP calls run as they are, the next is captured; a capture for each set of input shapes. Inputs are
    copied to where the graph reads them, and what comes back is copied as well, without gradient. The function may not
    wait for the GPU. Of all else that it reads, a tensor is read anew at each replay if it was changed in place; what
    else changes, a name bound to another tensor too, goes unseen.
    """

    WARMUP = 3  # calls in which libraries and optimisers set themselves up
    enabled = False

    def __init__(self, function):
        self.function, self.calls, self.captured = function, collections.Counter(), {}

    def __call__(self, *inputs: torch.Tensor):
        shapes = tuple(x.shape for x in inputs)
        self.calls[shapes] += 1
        if not Graph.enabled or self.calls[shapes] <= Graph.WARMUP:
            return tree_map(torch.Tensor.detach, self.function(*inputs))
        if shapes not in self.captured:
            graph, places = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                outputs = self.function(*places)
            self.captured[shapes] = graph, places, outputs
        graph, places, outputs = self.captured[shapes]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return tree_map(lambda x: x.detach().clone(), outputs)


# what a rollout consists of
ROLLOUT = ("obs", "action", "log_prob", "next_obs", "reward", "state", "next_state", "terminated", "ended")


def decide(actor, greedy: bool, obs: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions and their log-probabilities. Normal.sample would wait for the GPU; rsample draws the same numbers."""
    policy = actor(obs, z)
    action = policy.mode if greedy else policy.sample() if actor.discrete else policy.rsample()
    return action, policy.log_prob(action)


def deciding(actor, greedy: bool) -> Graph:
    """`decide` as a graph, the same one in each rollout: the actor keeps it."""
    graphs = vars(actor).setdefault("graphs", {})
    if greedy not in graphs:
        graphs[greedy] = Graph(functools.partial(decide, actor, greedy))
    return graphs[greedy]


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
    cudagraphs: bool = True
    """on a GPU, replay what was captured instead of launching kernel by kernel"""
    num_threads: int = 0
    """CPU threads, of PyTorch and of MuJoCo (0: one per core, at most 4)"""
    run_dir: str = "runs"
    """folder that run folders are made in"""
    run_name: str | None = None
    """name of the run folder (default: {env_id}__{script}__{seed}__{time})"""
    resume: str | None = None
    """run folder to go on with; total-timesteps, track, wandb-*, checkpoint-*, capture-video, cudagraphs may differ"""
    meta_test: str | None = None
    """run folder to evaluate; may differ: explore-episodes, test-episodes, eval-copies, eval-sample, seed, num-threads,
    cuda, cudagraphs, capture-video"""
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
    """steps of one environment copy, summed over copies, context collection included (None: Table III)"""
    num_envs: int = 32
    """copies of the environment that gather experience for the policies, E"""
    learning_rate: float = 5e-4
    """of actors and critic; decays linearly to 0"""
    encoder_learning_rate: float | None = None
    """of the encoder after its warm-up; decays too; slow, or policies are wrong as soon as z moves (Table II: 5e-4)"""
    warmup_learning_rate: float | None = None
    """of the encoder in its warm-up, before the policies learn; constant"""
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
    """gradient clipping: each actor by itself, the critic and each part of the encoder as a whole"""
    hidden_dim: int = 128
    """width of the two hidden layers of actors and critic"""
    share_policy: bool | None = None
    """one actor and one local encoder for all agents, told the agent's id: True or False (default: on magent_gather)"""

    # task representation (Tables I to III)
    latent_dim: int = 64
    """dimensions of z and of each z^i, d"""
    latent_scale: float | None = None
    """means of z and z^i lie within plus and minus this: the larger, the more policies read z and not observations"""
    explore_scale: float | None = None
    """agents explore on z from N(0, I) times this (the paper: 1)"""
    encoder_dim: int = 64
    """width of the encoder"""
    encoder_blocks: int = 1
    """attention blocks before each permutation-invariant head (Table I: 2)"""
    encoder_heads: int = 4
    """heads of each attention block"""
    critic_coef: float = 0.1
    """factor on L_Q's gradient to the encoder; L_Q and L_G take turns on one Adam (Algorithm 1: one step on the sum)"""
    kl_coef: float = 0.001
    """alpha, the weight of the KL of z / latent_scale to the prior N(0, I), mean over dimensions (Table II: 0.1)"""
    local_loss: Literal["infonce", "cmi", "kl"] = "infonce"
    """L_L: infonce contrasts z^i alone, cmi is eq. 24 as printed, kl is the consistency loss of section V-F"""
    similarity: Literal["dot", "cosine"] = "dot"
    """similarity of two representations in the contrastive losses; cosine needs temperatures of about 0.2"""
    temperature: float = 16.0
    """similarity of z / latent_scale is divided by it, in L_G and, in the warm-up, in L_L: the higher, the softer"""
    local_temperature: float | None = None
    """the same in L_L (infonce) after the warm-up; at 128 a z^i in doubt takes the likelier code, not one between"""
    context_size: int | None = None
    """transitions in one context while the encoder learns, B"""
    inference_size: int | None = None
    """transitions, at most, that agents infer z^i from at meta-test"""
    buffer_size: int | None = None
    """transitions of single agents that the context buffers of all tasks hold together"""
    context_episodes: int | None = None
    """episodes that one context is drawn from while the encoder learns"""
    context_episode_steps: int | None = None
    """steps of an episode of context: shorter ones buy more different starts"""
    context_copies: int | None = None
    """episodes gathered per training task in each collection of context after the first"""
    warmup_episodes: int | None = None
    """episodes gathered per training task in the first collection, before anything is learnt"""
    warmup_updates: int | None = None
    """steps on L_G + L_L after the first collection, so that the policies have a representation to begin with"""
    context_interval: int | None = None
    """iterations between two collections of context"""
    encoder_updates: int | None = None
    """steps on L_G + L_L in an iteration"""
    context_sets: int | None = None
    """sets of one context per training task in a step on L_G + L_L; every context is compared with all other sets"""
    rollout_contexts: int | None = None
    """contexts encoded per task before a rollout, and by an agent at meta-test; each step picks one"""
    rollout_context_size: int | None = None
    """transitions in a context of a rollout: with many, policies meet one clear code per task; with few, doubt too"""
    rollout_context_episodes: int | None = None
    """episodes that a context of a rollout, or of the critic, is drawn from"""
    critic_context_size: int | None = None
    """transitions in each context that the critic reads while it learns"""

    # meta-test (Algorithm 2)
    eval_interval: int | None = None
    """steps between two evaluations (None: Table III)"""
    eval_copies: int = 32
    """meta-test runs in one evaluation, spread evenly over the test tasks"""
    explore_episodes: int = 2
    """exploration episodes of a meta-test run, on the prior (the paper's K)"""
    test_episodes: int = 4
    """all episodes of a meta-test run (the paper's N)"""
    eval_sample: bool | None = None
    """after exploration, sample actions, not the mode: True or False (default: on rware_layout, which gets stuck)"""


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
# Multi-level task encoder (eq. 7)


class AttentionBlock(nn.Module):
    """Self-attention among L rows, then an MLP on each row; LayerNorm before and a residual around each of the two.

    The function and initial values of nn.TransformerEncoderLayer with norm_first and without dropout, in half of its
    time: its gradient fills arrays with zeros. LayerNorm has no scale and offset: a linear layer follows that has.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        nn.init.xavier_uniform_(self.query_key_value.weight)
        for bias in (self.query_key_value.bias, self.out.bias):
            nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, L, dim] -> [batch, L, dim]"""
        parts = self.query_key_value(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))  # each [batch, heads, L, dim / heads]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class PIA(nn.Module):
    """Permutation-invariant attention (eq. 26): attention blocks without positions, then one learnt query."""

    def __init__(self, dim: int, blocks: int, heads: int):
        super().__init__()
        self.blocks = nn.Sequential(*[AttentionBlock(dim, heads) for _ in range(blocks)])
        self.query = nn.Parameter(torch.randn(dim))  # Q
        self.key = nn.Linear(dim, dim, bias=False)  # W_k
        self.value = nn.Linear(dim, dim, bias=False)  # W_v

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., L, dim] -> weighted mean of the rows' values [..., dim], and their scores before softmax [..., L]."""
        x = self.blocks(x.flatten(0, -3)).view_as(x)
        score = x @ (self.key.weight.T @ self.query) / math.sqrt(x.shape[-1])  # Q (x W_k)^T / sqrt(dim), query first
        pooled = (score.softmax(-1)[..., None, :] @ x)[..., 0, :]  # [..., dim]
        return self.value(pooled), score  # W_v after the sum: the same product, L times cheaper


class TaskEncoder(nn.Module):
    """From transitions to the posteriors q(z | c) and q^i(z^i | c^i) (eq. 7)."""

    def __init__(self, num_agents, transition_dim, encoder_dim, latent_dim, blocks, heads, shared, latent_scale):
        super().__init__()
        self.latent_scale = latent_scale
        # without a standard scale of its input the encoder does not learn
        self.register_buffer("mean", torch.zeros(transition_dim))
        self.register_buffer("std", torch.ones(transition_dim))
        self.e_tran = nn.Sequential(
            nn.Linear(transition_dim, encoder_dim), nn.ReLU(), nn.Linear(encoder_dim, encoder_dim)
        )
        self.e_agg = PIA(encoder_dim, blocks, heads)
        self.e_global = PIA(encoder_dim, blocks, heads)
        self.global_head = nn.Linear(encoder_dim, 2 * latent_dim)
        sizes = [encoder_dim, encoder_dim, encoder_dim, 2 * latent_dim]
        self.e_local = AgentMLP(num_agents, sizes, head_gain=1.0, norm=False, shared=shared)

    def phi_g(self) -> list[nn.Parameter]:
        """What L_Q and L_G train: everything but the local encoders."""
        return [p for name, p in self.named_parameters() if not name.startswith("e_local")]

    def phi_l(self) -> list[nn.Parameter]:
        """What L_L trains: the local encoders."""
        return list(self.e_local.parameters())

    def fit_input(self, transitions: torch.Tensor) -> None:
        """Take the mean and standard deviation of every entry of a transition from [..., transition_dim]."""
        flat = transitions.flatten(0, -2)
        std, mean = torch.std_mean(flat, 0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-2))

    def embed(self, context: torch.Tensor) -> torch.Tensor:
        """context [Q, n, B, transition_dim] -> x^i, what each agent's transitions say together, [Q, n, encoder_dim]."""
        return self.e_agg(self.e_tran((context - self.mean) / self.std))[0]

    def global_posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [Q, n, encoder_dim] -> mean and standard deviation of q(z | c), [Q, d]."""
        return to_gaussian(self.global_head(self.e_global(x)[0]), self.latent_scale)

    def local_posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [Q, n, encoder_dim] -> mean and standard deviation of q^i(z^i | c^i), [n, Q, d]; no gradient to x."""
        return to_gaussian(self.e_local(x.detach().transpose(0, 1)), self.latent_scale)

    def priorities(self, transitions: torch.Tensor, chunk: int = 512) -> torch.Tensor:
        """omega_t^i (eq. 32): how much each agent's transition tells, [n, S, transition_dim] -> [n, S], sum 1.

        Attention blocks see at most `chunk` transitions at a time; the softmax is over all. So beyond that the order in
        which they are stored plays a small part.
        """
        x = self.e_tran((transitions - self.mean) / self.std)  # [n, S, encoder_dim]
        return torch.cat([self.e_agg(part)[1] for part in x.split(chunk, dim=1)], -1).softmax(-1)


def to_gaussian(raw: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A head's output as mean and standard deviation, both times `scale`.

    tanh(3 x) saturates, so that contexts of one task, which differ a little, give nearly the same mean: a policy would
    read the difference as noise. Standard deviations start at softplus(-2) = 0.13; with 1, noise would hide the mean.
    """
    mean, spread = raw.chunk(2, -1)
    return scale * torch.tanh(3 * mean), scale * (F.softplus(spread - 2) + 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def similarity_scores(query: torch.Tensor, keys: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """g, the log of h(c; z) up to a constant: query [..., Q, d], keys [..., S, N, d] -> [..., Q, S, N]."""
    if kind == "cosine":
        query, keys = F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
    return torch.einsum("...qd,...snd->...qsn", query, keys) / temperature


def info_nce(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """I_NCE of Theorem 1, a lower bound of information if h is the density ratio: [..., Q, S, N], [Q] -> [...]."""
    own = label[:, None, None].expand(*scores.shape[:-1], 1)  # [..., Q, S, 1]
    positive = scores.gather(-1, own)[..., 0]  # [..., Q, S]
    return (positive - scores.logsumexp(-1)).mean((-2, -1)) + math.log(scores.shape[-1])


def leave_one_out(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """I_L1O of eq. 20, an upper bound of information if h is the density ratio: [..., Q, S, N], [Q] -> [...]."""
    own = label[:, None, None].expand(*scores.shape[:-1], 1)  # [..., Q, S, 1]
    positive = scores.gather(-1, own)[..., 0]  # [..., Q, S]
    negative = scores.scatter(-1, own, -torch.inf).logsumexp(-1)
    return (positive - negative).mean((-2, -1)) + math.log(scores.shape[-1])


def cl_accuracy(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """How often the key of the query's own task has the highest score (Fig. 7d): [..., Q, S, N], [Q] -> [...]."""
    return (scores.argmax(-1) == label[:, None]).float().mean((-2, -1))


def kl_to_prior(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """D_KL(N(mean, std^2) || N(0, I)), the mean over dimensions and batch."""
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).mean()


def kl_between(mean: torch.Tensor, std: torch.Tensor, mean_to: torch.Tensor, std_to: torch.Tensor) -> torch.Tensor:
    """D_KL(N(mean, std^2) || N(mean_to, std_to^2)), the mean over dimensions and batch."""
    return (std_to.log() - std.log() + (std.square() + (mean - mean_to).square()) / (2 * std_to.square()) - 0.5).mean()


def global_loss(scores, label, mean, std, kl_coef) -> torch.Tensor:
    """L_G (eq. 16): contrast between tasks, and the KL to the prior; mean and std are of z / latent_scale."""
    return -info_nce(scores, label) + kl_coef * kl_to_prior(mean, std)


def local_loss(form, scores_global, scores_local, label, posterior_global, posterior_local, kl_coef) -> torch.Tensor:
    """L_L, averaged over agents; it reaches phi_l alone. Scores [Q, S, N] of z and [n, Q, S, N] of z^i.

    infonce: -I_NCE(z^i; c) + alpha KL, z^i must tell the task by itself
    cmi: eq. 24, I_L1O(z; c) - I_NCE(z, z^i; c) + alpha KL; h of a concatenation is the product of its parts' h. I_L1O
        depends on z alone, so it has no gradient here and is only logged
    kl: the consistency loss of section V-F, D_KL(q^i(z^i | c^i) || q(z | c))
    """
    mean, std = (p.detach() for p in posterior_global)  # [Q, d]
    if form == "kl":
        return kl_between(*posterior_local, mean, std)
    if form == "infonce":
        return -info_nce(scores_local, label).mean() + kl_coef * kl_to_prior(*posterior_local)
    joint = scores_global.detach() + scores_local  # [n, Q, S, N]
    kl = 0.5 * (kl_to_prior(mean, std) + kl_to_prior(*posterior_local))  # of the concatenation, mean over 2d dimensions
    return -info_nce(joint, label).mean() + kl_coef * kl


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


class ContextBuffer:
    """C_k of Algorithm 1: for each training task the latest episodes, all gathered with the prior.

    data [N, M, T, n, transition_dim]: M episodes of T steps and n agents for each of N tasks, growing to `capacity`.
    A context is B steps drawn from at most `num_episodes` of them: few while the encoder learns, or two contexts of one
    task share episodes, and it learns to tell tasks by those (by where the obstacles are) instead of by reward.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.data = None

    def add(self, episodes: torch.Tensor) -> None:
        """episodes [N, k, T, n, transition_dim]; the oldest go when the buffer is full."""
        episodes = episodes[:, -self.capacity :]
        if self.data is not None:
            too_many = max(0, self.data.shape[1] + episodes.shape[1] - self.capacity)
            episodes = torch.cat([self.data[:, too_many:], episodes], 1)
        self.data = episodes.contiguous()

    def sample(self, task: torch.Tensor, context_size: int, num_episodes: int) -> torch.Tensor:
        """For task indices [Q]: contexts [Q, n, B, transition_dim], B steps each, the same for all agents."""
        device, shape = self.data.device, (len(task), context_size)
        of_context = torch.randint(self.data.shape[1], (len(task), num_episodes), device=device)
        episode = of_context.gather(1, torch.randint(num_episodes, shape, device=device))  # [Q, B]
        step = torch.randint(self.data.shape[2], shape, device=device)
        return self.data[task[:, None], episode, step].transpose(1, 2)


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


def draw_z(mean: torch.Tensor, std: torch.Tensor, num_steps: int) -> torch.Tensor:
    """z_t^i [n, num_steps, E, d]: each step samples from one of an agent's C posteriors, mean and std [C, n, E, d]."""
    contexts, n, num_envs, _ = mean.shape
    pick = torch.randint(contexts, (n, num_steps, num_envs), device=mean.device)
    agent = torch.arange(n, device=mean.device)[:, None, None]
    env = torch.arange(num_envs, device=mean.device)
    mean, std = mean[pick, agent, env], std[pick, agent, env]  # [n, num_steps, E, d]
    return mean + std * torch.randn_like(mean)


@torch.no_grad()
def rollout(env, actor, task, z, seed, greedy=False, frames=None) -> SimpleNamespace:
    """T steps of every copy of `env` from a seeded reset, agent i of copy e acting on z[i, t, e] (z [n, T, E, d]).

    A copy that ends starts again on the same task. `frames`, a list, gets pictures of copy 0's first 200 steps.
    Returns tensors: obs, next_obs [n, T, E, obs_dim], action [n, T, E(, act_dim)], log_prob [n, T, E], reward
    [T, E, n], state, next_state [T, E, state_dim], terminated, ended [T, E]. next_obs and next_state are what an action
    led to, also where the copy then started again.
    """
    steps = []
    obs, _ = env.reset(seed=seed, options={"task": task})
    for t in range(z.shape[1]):
        if frames is not None and t < 200:
            frames.append(env.render())
        state = env.state()
        obs_in = torch.from_numpy(obs).to(z.device).transpose(0, 1)  # [n, E, obs_dim]
        action, log_prob = deciding(actor, greedy)(obs_in, z[:, t])  # [n, E] or [n, E, act_dim]; [n, E]
        obs, reward, terminated, truncated, info = env.step(action.transpose(0, 1).cpu().numpy())
        next_obs, next_state, ended = obs, env.state(), terminated | truncated
        if ended.any():
            next_obs = np.where(ended[:, None, None], info["final_obs"], obs)
            next_state = np.where(ended[:, None], info["final_state"], next_state)
        for what, values in dict(observation=next_obs, reward=reward).items():
            if not np.isfinite(values).all():
                fail(f"{what} not finite after {t + 1} steps of {env.env_id}; the last checkpoint is as it was", 1)
        step = dict(obs=obs_in, action=action, log_prob=log_prob, next_obs=next_obs.swapaxes(0, 1))
        step |= dict(reward=reward, state=state, next_state=next_state, terminated=terminated, ended=ended)
        steps.append(step)
    agents_first = ("obs", "action", "log_prob", "next_obs")
    stacked = {
        key: torch.stack([torch.as_tensor(step[key]) for step in steps], dim=int(key in agents_first)).to(z.device)
        for key in steps[0]
    }
    return SimpleNamespace(**stacked)


def transitions(data: SimpleNamespace, actor: Actor) -> torch.Tensor:
    """What each agent goes through, c_t^i = (o, a, r, o'), from a rollout: [T, E, n, transition_dim]."""
    action = F.one_hot(data.action, actor.action_dim).float() if actor.discrete else data.action
    own = torch.cat([data.obs, action, data.reward.permute(2, 0, 1)[..., None], data.next_obs], -1)
    return own.permute(1, 2, 0, 3)


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


def update_mappo(args, data, z_local, z_global, task, actor, critic, encoder, value_norm, contexts, optimizers) -> dict:
    """Epochs of PPO on one rollout (Algorithm 1, lines 16 to 18).

    z_local [n, T, E, d] is what the actors acted on, z_global [T, E, d] what the critic reads for the old values, task
    [E] each copy's index among the training tasks, contexts [epochs, N, n, B, transition_dim] what z is encoded
    from for the critic. Returns metrics, 0-d tensors.
    """
    with torch.no_grad():
        value = critic(data.state, z_global)  # [T, E, n]
        next_value = critic(data.next_state, z_global)
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
        obs, z_local = data.obs.flatten(1, 2), z_local.flatten(1, 2)  # [n, T * E, ...]
        action, old_log_prob = data.action.flatten(1, 2), data.log_prob.flatten(1, 2)

    for epoch, context in enumerate(contexts):
        # line 17, L_Q: the critic and, through z, the global part of the encoder
        z, _ = encoder.global_posterior(encoder.embed(context))  # [N, d], means: noise costs accuracy
        z = z.detach() + args.critic_coef * (z - z.detach())  # the same value, the gradient times critic_coef
        z = z[task].expand(len(data.state), -1, -1)  # [T, E, d]
        loss_q = value_loss(critic(data.state, z), value, target, args.clip_coef, args.huber_delta)
        optimizers["critic"].zero_grad()
        optimizers["phi_g"].zero_grad()
        loss_q.backward()
        critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
        encoder_norm = nn.utils.clip_grad_norm_(encoder.phi_g(), args.max_grad_norm)
        optimizers["critic"].step()
        optimizers["phi_g"].step()

        # line 18: the actors, on the z^i they acted on
        policy = actor(obs, z_local)
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
        "losses/critic_encoder_grad_norm": encoder_norm,
    }


def contrast(args, mean, std, num_tasks: int) -> torch.Tensor:
    """Similarity of a sample of each of Q posteriors, S sets of one per task, to the samples of all other sets.

    mean, std [..., Q, d], Q = S * N -> scores [..., Q, S - 1, N]
    """
    z = mean + std * torch.randn_like(mean)  # [..., Q, d]
    score = similarity_scores(z, z.unflatten(-2, (-1, num_tasks)), args.similarity, args.temperature)  # [..., Q, S, N]
    num_sets = score.shape[-2]
    own = torch.arange(num_sets, device=z.device).repeat_interleave(num_tasks)[:, None]  # [Q, 1]
    other = torch.arange(num_sets - 1, device=z.device).expand(len(own), -1)  # [Q, S - 1]
    other = other + (other >= own)  # no set is compared with itself
    return score.gather(-2, other[..., None].expand(*score.shape[:-2], -1, num_tasks))


def update_encoder(args, encoder, num_tasks, optimizers, local_temperature, label, context) -> dict:
    """One step on L_G + L_L (Algorithm 1, L_G of line 17 and line 19). Returns metrics, tensors.

    label [Q], context [Q, n, B, transition_dim]: sets of one context per training task, and which task each is of.

    Similarity is divided by args.temperature in L_G, and by local_temperature in L_L; eq. 24 compares z and z^i in one
    product, so there both are divided by the former.
    """
    x = encoder.embed(context)
    posteriors = [encoder.global_posterior(x), encoder.local_posterior(x)]  # [Q, d], [n, Q, d]
    # of z / latent_scale, so that temperatures and the weight of the KL mean the same at every scale
    posteriors = [[moment / args.latent_scale for moment in posterior] for posterior in posteriors]
    scores = [contrast(args, *posterior, num_tasks) for posterior in posteriors]  # [(n,) Q, sets - 1, N]
    loss_g = global_loss(scores[0], label, *posteriors[0], args.kl_coef)
    softer = 1 if args.local_loss == "cmi" else args.temperature / local_temperature  # contrast divides by the former
    loss_l = local_loss(args.local_loss, scores[0], scores[1] * softer, label, *posteriors, args.kl_coef)
    optimizers["phi_g"].zero_grad()
    optimizers["phi_l"].zero_grad()
    (loss_g + loss_l).backward()  # the two meet in no parameter
    norm_g = nn.utils.clip_grad_norm_(encoder.phi_g(), args.max_grad_norm)
    norm_l = nn.utils.clip_grad_norm_(encoder.phi_l(), args.max_grad_norm)
    optimizers["phi_g"].step()
    optimizers["phi_l"].step()
    with torch.no_grad():
        return {
            "losses/global_loss": loss_g,
            "losses/local_loss": loss_l,
            "losses/global_grad_norm": norm_g,
            "losses/local_grad_norm": norm_l,
            "losses/global_kl": kl_to_prior(*posteriors[0]),
            "losses/local_kl": kl_to_prior(*posteriors[1]),
            "losses/consistency_kl": kl_between(*posteriors[1], *posteriors[0]),
            "losses/info_nce_global": info_nce(scores[0], label),
            "losses/info_nce_local": info_nce(scores[1], label).mean(),
            "losses/info_nce_joint": info_nce(scores[0] + scores[1], label).mean(),
            "losses/leave_one_out_global": leave_one_out(scores[0], label),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Meta-test (Algorithm 2)


@torch.no_grad()
def infer(encoder, memory, context_size, num_contexts, latent_dim) -> tuple[torch.Tensor, torch.Tensor]:
    """Each agent's posterior from its own transitions alone (Algorithm 2, lines 6 and 10).

    memory: for each of E copies what its agents went through, [S, n, transition_dim]; S may differ, and be 0
    Returns mean and standard deviation of `num_contexts` posteriors, [C, n, E, d]; N(0, I) where S is 0.
    """
    means, stds = [], []
    for lived in memory:
        steps, n, _ = lived.shape
        own = lived.transpose(0, 1)  # [n, S, transition_dim]
        if steps == 0:
            mean = torch.zeros(n, num_contexts, latent_dim, device=own.device)
            std = torch.ones_like(mean)
        else:
            omega = encoder.priorities(own).clamp(min=1e-12)  # [n, S]
            size = min(context_size, steps)
            contexts = num_contexts if size < steps else 1  # contexts of all S transitions are the same
            # omega chooses only where more is stored than a context holds
            pick = torch.multinomial(omega.repeat_interleave(contexts, 0), size)  # [n * C, B], none twice
            pick = pick.view(n, contexts * size, 1).expand(-1, -1, own.shape[-1])
            context = own.gather(1, pick).unflatten(1, (contexts, size))  # [n, C, B, transition_dim]
            mean, std = encoder.local_posterior(encoder.embed(context.transpose(0, 1)))  # [n, C, d]
            mean, std = mean.expand(-1, num_contexts, -1), std.expand(-1, num_contexts, -1)
        means.append(mean.transpose(0, 1))
        stds.append(std.transpose(0, 1))
    return torch.stack(means, 2), torch.stack(stds, 2)


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
    """Algorithm 2 on every copy of `env`: explore with the prior, infer the task, act on the posterior.

    Returns one row per copy and episode for meta_test.csv. With `curve` also Fig. 7: one more episode on each
    of the posteriors from the first 0, 10, 20, 50, ... transitions.
    """
    env_seed = seed_everything(args.seed, evaluation, "meta-test")
    num_steps, n, num_envs = env.max_episode_steps, env.num_agents, env.num_envs
    task = np.resize(env.tasks.test, num_envs)  # spread evenly
    task_on_device = torch.from_numpy(task).to(device)
    memory = [torch.zeros(0, n, len(encoder.mean), device=device) for _ in range(num_envs)]  # each [S, n, dim]
    rows = []

    def record(phase, episode, seen, returns, posterior=None):  # seen: for each copy the transitions it inferred from
        accuracy = probe = torch.full((num_envs,), torch.nan)
        if posterior is not None:
            accuracy, probe = inference_accuracy(*posterior, task_on_device, args.similarity)
        table = torch.stack([returns.cpu(), accuracy.cpu(), probe.cpu()], 1).tolist()
        for run, (episodic, *accuracies) in enumerate(table):
            accuracy, probe = ("" if math.isnan(a) else a for a in accuracies)
            rows.append(dict(run=run, task=int(task[run]), episode=episode, phase=phase, context_steps=len(seen[run])))
            rows[-1] |= {"return": episodic, "accuracy": accuracy, "probe": probe}

    for episode in range(args.explore_episodes):  # lines 1 to 7
        z = args.explore_scale * torch.randn(n, num_steps, num_envs, args.latent_dim, device=device)  # line 3
        data = rollout(env, actor, task, z, env_seed + episode)
        record("prior", episode, [()] * num_envs, episodic_return(data))
        lived, kept = transitions(data, actor), first_episode(data.ended)  # [T, E, n, transition_dim], [T, E]
        del data  # as large as what is kept of it
        for e in range(num_envs):
            memory[e] = torch.cat([memory[e], lived[kept[:, e], e]])
        del lived
    posterior = infer(encoder, memory, args.inference_size, args.rollout_contexts, args.latent_dim)  # lines 6 and 10
    for episode in range(args.explore_episodes, args.test_episodes):  # lines 8 to 13
        z = draw_z(*posterior, num_steps)
        returns = episodic_return(rollout(env, actor, task, z, env_seed + episode, greedy=not args.eval_sample))
        record("posterior", episode, memory, returns, posterior)
    if curve:
        env_seed = seed_everything(args.seed, evaluation, "curve")
        longest = max(len(lived) for lived in memory)
        for steps in [0, *(m * 10**k for k in range(1, 6) for m in (1, 2, 5) if m * 10**k <= longest)]:
            begun = [lived[:steps] for lived in memory]
            posterior = infer(encoder, begun, args.inference_size, args.rollout_contexts, args.latent_dim)
            z = draw_z(*posterior, num_steps)
            returns = episodic_return(rollout(env, actor, task, z, env_seed, greedy=not args.eval_sample))
            record("curve", args.test_episodes, begun, returns, posterior if steps else None)
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
    """For each test task a GIF: the last exploration episode on the left, on the right one with what they taught."""
    from PIL import Image, ImageDraw

    folder.mkdir(exist_ok=True)
    env = make_env(args, 1)
    num_steps = env.max_episode_steps
    for task in env.tasks.test:
        env_seed = seed_everything(args.seed, iteration, "video") + int(task)
        frames = {"prior (exploration)": [], "posterior (after inference)": []}
        memory = []
        for episode in reversed(range(args.explore_episodes)):
            prior_frames, posterior_frames = frames.values()
            z = args.explore_scale * torch.randn(env.num_agents, num_steps, 1, args.latent_dim, device=device)
            kept = None if episode else prior_frames
            data = rollout(env, actor, np.array([task]), z, env_seed + episode, frames=kept)
            memory.append(transitions(data, actor)[first_episode(data.ended)[:, 0], 0])
        posterior = infer(encoder, [torch.cat(memory)], args.inference_size, args.rollout_contexts, args.latent_dim)
        z = draw_z(*posterior, num_steps)
        rollout(env, actor, np.array([task]), z, env_seed, greedy=not args.eval_sample, frames=posterior_frames)
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
    """Steps that this many iterations take, context collection included."""
    collections = -(-iterations // args.context_interval)  # the first is the warm-up
    episodes = bool(collections) * args.warmup_episodes + max(collections - 1, 0) * args.context_copies
    context_steps = len(env.tasks.train) * episodes * args.context_episode_steps
    return env.max_episode_steps * iterations * args.num_envs + context_steps


def check_args(args: Args) -> None:
    """Fill in what depends on the environment. Raises ValueError: what came and what was expected."""
    env = make_env(args, 1)
    for name, by_env in ENV_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, by_env[envs.ENV_IDS.index(args.env_id)])
    if args.num_threads == 0:
        args.num_threads = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    zero_is_fine = {"seed", "num_threads", "kl_coef", "ent_coef", "gae_lambda", "encoder_blocks"}
    zero_is_fine |= {"encoder_updates", "warmup_updates"}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fine = math.isfinite(value) and (value > 0 or value == 0 and field.name in zero_is_fine)
            expect(fine, field.name, value, f"a number {'of at least' if field.name in zero_is_fine else 'above'} 0")
    n, num_tasks = env.num_agents, len(env.tasks.train)
    expect(args.num_threads <= 1024, "num_threads", args.num_threads, "at most 1024")
    expect(args.gamma <= 1, "gamma", args.gamma, "at most 1")
    expect(args.gae_lambda <= 1, "gae_lambda", args.gae_lambda, "at most 1")
    more = args.test_episodes > args.explore_episodes
    expect(more, "test_episodes", args.test_episodes, "more than explore_episodes")
    expect(args.eval_copies >= len(env.tasks.test), "eval_copies", args.eval_copies, "at least one per test task")
    for name in ("context_sets", "rollout_contexts"):
        expect(getattr(args, name) > 1, name, getattr(args, name), "at least 2 to compare")
    expect(args.encoder_dim % args.encoder_heads == 0, "encoder_heads", args.encoder_heads, "a divisor of encoder_dim")
    expect(num_tasks > 1, "env_kwargs", f"{num_tasks} training task", "at least 2 to tell apart")
    longest = env.max_episode_steps
    fine = args.context_episode_steps <= longest
    expect(fine, "context_episode_steps", args.context_episode_steps, f"at most the {longest} of an episode")
    share = args.buffer_size // (num_tasks * n)
    expect(args.context_size <= share, "context_size", args.context_size, f"at most {share}, a task's share of buffer")
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

    `prior(E)` gives z^i [n, E, d] to explore with, `infer(memory)` a sample of the posterior from transitions,
    `act(obs, z)` the actions: obs float32 [E, n, obs_dim] as the environment gives it, actions as it takes them. Raises
    ValueError if there is no readable checkpoint of this script.
    """
    saved = load_checkpoint(run)
    args = Args(**saved["args"])
    env = make_env(args, 1)
    networks = build(args, env, torch.device("cpu"))
    restore(networks, saved["networks"], run)

    @torch.no_grad()
    def act(obs, z, greedy=True):
        policy = networks["actor"](torch.as_tensor(obs).transpose(0, 1), z)
        return (policy.mode if greedy else policy.sample()).transpose(0, 1).numpy()

    def posterior(memory):
        mean, std = infer(networks["encoder"], memory, args.inference_size, 1, args.latent_dim)
        return (mean + std * torch.randn_like(mean))[0]

    prior = lambda num_envs: args.explore_scale * torch.randn(env.num_agents, num_envs, args.latent_dim)  # noqa: E731
    return SimpleNamespace(args=args, env=env, act=act, prior=prior, infer=posterior, **networks)


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
    free = {"resume", "meta_test", "capture_video", "cudagraphs"}
    if given.resume:
        free |= {"total_timesteps", "track", "wandb_project_name", "wandb_entity", "checkpoint_interval"}
        free |= {"checkpoint_minutes"}
    else:
        free |= {"explore_episodes", "test_episodes", "eval_copies", "eval_sample", "seed", "num_threads", "cuda"}
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
    actor = Actor(n, obs_dim, args.latent_dim, env.single_action_space, args.hidden_dim, args.share_policy)
    critic = Critic(n, env.state_dim, args.latent_dim, args.hidden_dim)
    transition_dim = 2 * obs_dim + actor.action_dim + 1  # (o, a, r, o')
    dims = (transition_dim, args.encoder_dim, args.latent_dim)
    encoder = TaskEncoder(n, *dims, args.encoder_blocks, args.encoder_heads, args.share_policy, args.latent_scale)
    networks = dict(actor=actor, critic=critic, encoder=encoder, value_norm=ValueNorm())
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
    Graph.enabled = args.cudagraphs and device.type == "cuda"
    if Graph.enabled:
        torch.cuda.set_stream(torch.cuda.Stream())  # nothing can be captured on the default one

    train_env = make_env(args, args.num_envs)
    tasks = train_env.tasks
    num_tasks = len(tasks.train)
    warmup_env = make_env(args, num_tasks * args.warmup_episodes)
    collect_env = make_env(args, num_tasks * args.context_copies)
    eval_env = make_env(args, args.eval_copies)

    seed_everything(args.seed, 0, "initialise")
    networks = build(args, train_env, device)
    actor, critic, encoder, value_norm = networks.values()
    parameters = {
        "actor": list(actor.parameters()),
        "critic": list(critic.parameters()),
        "phi_g": encoder.phi_g(),
        "phi_l": encoder.phi_l(),
    }
    slow, fast = args.encoder_learning_rate, args.learning_rate
    learning_rate = dict(actor=fast, critic=fast, phi_g=slow, phi_l=slow)  # after the encoder's warm-up
    optimizers = {  # the encoder warms up at this rate; then every iteration sets all four rates
        name: torch.optim.Adam(params, lr=args.warmup_learning_rate, eps=args.adam_eps, fused=True)
        for name, params in parameters.items()
    }
    n, num_steps, d = train_env.num_agents, train_env.max_episode_steps, args.latent_dim
    buffer = ContextBuffer(max(1, args.buffer_size // (num_tasks * n * args.context_episode_steps)))
    start = 0
    if saved:
        try:
            restore(networks, saved["networks"], run)
            if not evaluate_only:
                restore(optimizers, copy.deepcopy(saved["optimizers"]), run)  # Adam would step in `saved`
        except ValueError as error:
            fail(str(error))
        buffer.data, start = saved["context"].to(device), saved["iteration"]
        csv_bytes = (run / "meta_test.csv").stat().st_size if (run / "meta_test.csv").is_file() else 0
        if csv_bytes < saved["csv_bytes"]:
            fail(f"{run / 'meta_test.csv'}: got {csv_bytes} bytes, expected at least {saved['csv_bytes']}")

    for optimizer in optimizers.values():
        rate = torch.tensor(args.warmup_learning_rate, device=device)  # a tensor, which replays read anew
        optimizer.param_groups[0] |= dict(lr=rate, capturable=device.type == "cuda")  # also where a checkpoint was not
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

    def draw_contexts(copies: int, size: int, episodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Task indices [copies * N] and a context of each, [copies * N, n, B, transition_dim], for what is captured."""
        label = torch.arange(num_tasks, device=device).repeat(copies)
        return label, buffer.sample(label, size, episodes)

    def update_from(contexts, z_local, z_global, task, *of_rollout) -> dict:
        """`update_mappo` with nothing but tensors for arguments; of_rollout in the order of ROLLOUT."""
        data = SimpleNamespace(**dict(zip(ROLLOUT, of_rollout, strict=True)))
        return update_mappo(args, data, z_local, z_global, task, *networks.values(), contexts, optimizers)

    learn, encoding = Graph(update_from), (args, encoder, num_tasks, optimizers)
    encode_warmup, encode = (
        Graph(functools.partial(update_encoder, *encoding, temperature))
        for temperature in (args.temperature, args.local_temperature)
    )
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
        # lines 2 to 7: collect transitions for context, on the prior
        begun = time.perf_counter()
        if iteration % args.context_interval == 0:
            env_seed = seed_everything(args.seed, iteration, "context")
            context_env = warmup_env if iteration == 0 else collect_env
            z = torch.randn(n, args.context_episode_steps, context_env.num_envs, d, device=device)  # line 4
            z *= args.explore_scale
            each_task = np.repeat(tasks.train, context_env.num_envs // num_tasks)
            data = rollout(context_env, actor, each_task, z, env_seed)  # line 5
            buffer.add(transitions(data, actor).transpose(0, 1).unflatten(0, (num_tasks, -1)))  # line 6
            encoder.fit_input(buffer.data)
        if iteration == 0:
            now = time.perf_counter()
            for _ in range(args.warmup_updates):  # with L_L at local_temperature two tasks may keep one code
                warmed_up = encode_warmup(*draw_contexts(args.context_sets, args.context_size, args.context_episodes))
            if args.warmup_updates:
                to_numbers(warmed_up, 0)  # ends the run if a loss is not finite
            seconds["encoder"] += time.perf_counter() - now
            begun += time.perf_counter() - now

        # lines 8 to 13: collect transitions for RL, on the posterior
        env_seed = seed_everything(args.seed, iteration, "rollout")
        task = torch.randint(num_tasks, (args.num_envs,), device=device)  # [E], index among the training tasks
        with torch.no_grad():  # line 10: C contexts of every task
            every = torch.arange(num_tasks, device=device).repeat(args.rollout_contexts)  # [C * N]
            context = buffer.sample(every, args.rollout_context_size, args.rollout_context_episodes)
            x = encoder.embed(context)  # [C * N, n, encoder_dim]
            posteriors = {"global": encoder.global_posterior(x), "local": encoder.local_posterior(x)}
            by_context = (args.rollout_contexts, num_tasks)
            # mean and standard deviation, [C, n, E, d]: of C contexts of the task that each copy is on
            local = [p.unflatten(1, by_context).transpose(0, 1)[:, :, task] for p in posteriors["local"]]
            z_local = draw_z(*local, num_steps)  # [n, T, E, d]
            # one z per copy: values in a rollout must come from one function, or V(s) and V(s') in GAE do not cancel
            z_global = posteriors["global"][0].unflatten(0, by_context)[0, task]  # [E, d]
            z_global = z_global.expand(num_steps, -1, -1)  # [T, E, d]
        data = rollout(train_env, actor, tasks.train[task.cpu().numpy()], z_local, env_seed)  # lines 11 and 12
        now = time.perf_counter()
        seconds["rollout"] += now - begun
        begun = now

        # lines 14 to 20: update the networks
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"].fill_(learning_rate[name] * (1 - iteration / num_iterations))
        seed_everything(args.seed, iteration, "update")
        of_critic = (args.update_epochs, args.critic_context_size, args.rollout_context_episodes)
        contexts = draw_contexts(*of_critic)[1].unflatten(0, (args.update_epochs, num_tasks))
        metrics = learn(contexts, z_local, z_global, task, *(getattr(data, name) for name in ROLLOUT))
        now = time.perf_counter()
        seconds["ppo"] += now - begun
        begun = now
        of_encoder = (args.context_sets, args.context_size, args.context_episodes)
        updates = [encode(*draw_contexts(*of_encoder)) for _ in range(args.encoder_updates)]
        for name in updates[0] if updates else ():
            metrics[name] = torch.stack([update[name] for update in updates]).mean(0)
        seconds["encoder"] += time.perf_counter() - begun

        # the rest is bookkeeping
        global_step = iteration_steps(args, train_env, iteration + 1)
        metrics["charts/episodic_return"] = episodic_return(data).mean()
        del data, contexts  # evaluation needs the memory
        for name, posterior in posteriors.items():  # of the contexts acted on; a scale of z changes no argmax
            metrics[f"charts/cl_accuracy_{name}"] = cl_accuracy(contrast(args, *posterior, num_tasks), every)
        metrics = to_numbers(metrics, global_step)
        metrics["charts/learning_rate"] = optimizers["actor"].param_groups[0]["lr"].item()
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
        state |= dict(csv_bytes=csv_path.stat().st_size, context=buffer.data)
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
