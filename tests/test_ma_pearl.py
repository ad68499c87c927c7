"""ma_pearl.py: products of Gaussians, what trains the encoder, inference from own experience, runs and resuming."""

import contextlib
import csv
import inspect
import io
import math
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import envs
import ma_pearl as pearl
from ma_pearl import ContextBuffer, TaskEncoder, infer, product_of_gaussians, rollout

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
own_or_shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def close(got, expected, tol=1e-5):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def make_encoder(shared=False, n=3, dim=7):
    return TaskEncoder(num_agents=n, transition_dim=dim, encoder_dim=16, latent_dim=5, shared=shared)


def make_memory(lengths, n=3, dim=7):
    return [torch.randn(length, n, dim) for length in lengths]


# ----------------------------------------------------------------------------------------------------------------------
# Products of Gaussians


def test_product_of_gaussians_in_closed_form():
    mean, variance = product_of_gaussians(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]), 0)
    close(mean, torch.tensor(2.0))  # (1 / 1 + 4 / 2) / (1 / 1 + 1 / 2)
    close(variance, torch.tensor(2 / 3))
    of_each, spread = torch.randn(4, 6, 5), torch.rand(4, 6, 5) + 0.1
    for dim in (0, 1, 2):
        mean, variance = product_of_gaussians(of_each, spread, dim)
        m, v = of_each.unbind(dim)[0], spread.unbind(dim)[0]
        for more, its_variance in zip(of_each.unbind(dim)[1:], spread.unbind(dim)[1:], strict=True):  # two at a time
            m, v = (m * its_variance + more * v) / (v + its_variance), v * its_variance / (v + its_variance)
        close(mean, m, 1e-4)
        close(variance, v, 1e-4)


def test_product_of_gaussians_on_a_grid():
    of_each = torch.randn(7, 1, dtype=torch.float64)
    spread = torch.rand(7, 1, dtype=torch.float64) + 0.2
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = Normal(of_each, spread.sqrt()).log_prob(x).sum(0).softmax(0)  # normalised numerically
    mean, variance = product_of_gaussians(of_each, spread, 0)
    close(mean[0], (density * x).sum())
    close(variance[0], (density * (x - mean).square()).sum())


@own_or_shared
def test_posteriors_are_products_of_what_each_transition_says(shared):
    """Of transitions for each agent's own posterior, of agents for the critic's; no prior among the factors."""
    encoder, context = make_encoder(shared), 3 * torch.randn(2, 3, 4, 7) + 1  # [Q, n, B, dim]
    encoder.fit_input(context)
    with torch.no_grad():
        mean, std = encoder.local_posterior(context)
        assert mean.shape == std.shape == (3, 2, 5)
        flat = context.flatten(0, -2)
        standard = (context - flat.mean(0)) / flat.std(0)
        for q in range(2):
            for i in range(3):
                precision, weighted = 0, 0
                for j in range(4):
                    raw = encoder.e_local(standard[q, :, j : j + 1])[i, 0]  # f_i of a single transition
                    variance = torch.log(1 + raw[5:].exp())
                    precision, weighted = precision + 1 / variance, weighted + raw[:5] / variance
                close(std[i, q], precision**-0.5)
                close(mean[i, q], weighted / precision)
        whole_mean, whole_std = encoder.global_posterior(mean, std)
        precision = sum(1 / std[i] ** 2 for i in range(3))
        close(whole_std, precision**-0.5)
        close(whole_mean, sum(mean[i] / std[i] ** 2 for i in range(3)) / precision)


def test_variance_of_a_transition_stays_above_zero():
    encoder, context = make_encoder(), torch.randn(1, 3, 4, 7)
    encoder.e_local.biases[-1].data[..., 5:] = -1000.0
    mean, std = encoder.local_posterior(context)
    close(std, torch.full((3, 1, 5), math.sqrt(1e-7 / 4)), 1e-8)
    (mean.sum() + pearl.kl_to_prior(mean, std)).backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@own_or_shared
def test_order_of_transitions_does_not_matter(shared):
    encoder, context = make_encoder(shared), torch.randn(2, 3, 30, 7)
    mean, std = encoder.local_posterior(context)
    for got, expected in zip(encoder.local_posterior(context[:, :, torch.randperm(30)]), (mean, std), strict=True):
        close(got, expected)
    agents = torch.tensor([2, 0, 1])
    whole = encoder.global_posterior(mean, std)
    for got, expected in zip(encoder.global_posterior(mean[agents], std[agents]), whole, strict=True):
        close(got, expected)


def test_more_context_makes_more_certain():
    encoder, context = make_encoder(), torch.randn(2, 3, 64, 7)
    spreads = [encoder.local_posterior(context[:, :, :size])[1] for size in (1, 2, 4, 8, 16, 32, 64)]
    assert all((more < less).all() for less, more in zip(spreads[:-1], spreads[1:], strict=True))
    twice = encoder.local_posterior(torch.cat([context, context], 2))
    once = encoder.local_posterior(context)
    close(twice[0], once[0])  # nothing new was said
    close(twice[1], once[1] / math.sqrt(2))
    assert (encoder.global_posterior(*once)[1] < once[1].amin(0)).all()  # together they know more than any one


# ----------------------------------------------------------------------------------------------------------------------
# What trains what


def small(env, **changes):
    """Arguments, networks, optimizers and a full context buffer, all small, as the script makes them."""
    wanted = dict(num_envs=env.num_envs, hidden_dim=16, latent_dim=4, encoder_dim=8, context_size=6, inference_size=6)
    wanted |= dict(update_epochs=3, rollout_contexts=3, eval_copies=6, context_episodes=2, kl_coef=0.01)
    args = pearl.Args(**(wanted | changes))
    nets = SimpleNamespace(**pearl.build(args, env, torch.device("cpu")))
    optimizers = {
        name: torch.optim.Adam(getattr(nets, name).parameters(), lr=1e-3) for name in ("actor", "critic", "encoder")
    }
    buffer = ContextBuffer(4)
    buffer.add(torch.randn(len(env.tasks.train), 4, 5, env.num_agents, len(nets.encoder.mean)))
    return args, nets, optimizers, buffer


def experience(env, args, nets, seed=7):
    """A rollout on random z with random tasks: data, z_local, z_global, task."""
    z_local = torch.randn(env.num_agents, 5, env.num_envs, args.latent_dim)
    z_global = torch.randn(5, env.num_envs, args.latent_dim)
    task = torch.randint(len(env.tasks.train), (env.num_envs,))
    return rollout(env, nets.actor, env.tasks.train[task.numpy()], z_local, seed), z_local, z_global, task


def update(args, nets, optimizers, buffer, *experience):
    parts = (nets.actor, nets.critic, nets.encoder, nets.value_norm)
    return pearl.update_mappo(args, *experience, *parts, buffer, optimizers)


def trained_by(loss, nets):
    """Networks whose every parameter gets a gradient other than zero; the others must be out of reach."""
    reached = set()
    for name in ("actor", "critic", "encoder"):
        parameters = list(getattr(nets, name).parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if any(g is not None for g in gradients):
            assert all(g is not None and g.abs().sum() > 0 for g in gradients), f"{name} is reached in part or by zeros"
            reached.add(name)
    return reached


@own_or_shared
def test_critic_trains_the_encoder_and_actors_do_not(shared, monkeypatch):
    env = envs.make("hunting_target", 4, 0)
    args, nets, optimizers, buffer = small(env, share_policy=shared)
    found = {}

    def watch(function):
        original = getattr(pearl, function)

        def spy(*given):
            loss = original(*given)
            found.setdefault(function, []).append(trained_by(loss, nets))
            return loss

        monkeypatch.setattr(pearl, function, spy)

    for function in ("value_loss", "policy_loss", "kl_to_prior"):
        watch(function)
    data, _, z_global, task = experience(env, args, nets)
    mean, std = nets.encoder.local_posterior(buffer.sample(task, 6, 2))
    z_local = pearl.draw_z(mean[None], std[None], 5)  # [n, T, E, d] with a gradient, which must go nowhere
    assert z_local.requires_grad
    old = [p.clone() for p in nets.encoder.parameters()]
    steps = dict.fromkeys(optimizers, 0)
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.__setitem__(name, steps[name] + 1))
    metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert found == {
        "value_loss": [{"critic", "encoder"}] * 3,
        "policy_loss": [{"actor"}] * 3,
        "kl_to_prior": [{"encoder"}] * 3,
    }
    assert steps == dict(actor=3, critic=3, encoder=3)  # one per epoch
    assert not any(torch.equal(p, before) for p, before in zip(nets.encoder.parameters(), old, strict=True))
    assert all(value.isfinite() for value in metrics.values())


def slices(loss, parameters):
    """Which agents' slices of stacked parameters get a gradient."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return {i for gradient in gradients for i in range(len(gradient)) if gradient[i].abs().sum() > 0}


def test_each_agent_by_itself():
    """An agent's policy loss reaches its own actor, its posterior its own encoder; the critic's loss all encoders."""
    env = envs.make("hunting_target", 4, 0)
    args, nets, _, buffer = small(env)
    mean, std = nets.encoder.local_posterior(buffer.sample(torch.tensor([0, 1, 2]), 6, 2))
    policy = nets.actor(torch.randn(3, 9, *env.single_observation_space.shape), mean[:, :1].expand(-1, 9, -1).detach())
    log_prob, entropy = policy.log_prob(policy.sample()), policy.entropy()
    for i in range(3):
        new, old, bonus = (x[i : i + 1] for x in (log_prob, log_prob.detach() + 0.01, entropy))
        loss = pearl.policy_loss(new, old, torch.linspace(-1, 1, 9)[None], bonus, 0.2, 0.01)
        assert slices(loss, list(nets.actor.parameters())) == {i}
        assert slices(mean[i].sum() + std[i].sum(), list(nets.encoder.parameters())) == {i}
    whole_mean, whole_std = nets.encoder.global_posterior(mean, std)  # [3, d]
    value = nets.critic(torch.randn(3, env.state_dim), whole_mean + whole_std * torch.randn_like(whole_std))
    assert slices(value.square().sum(), list(nets.encoder.parameters())) == {0, 1, 2}


def test_critic_reads_one_sample_for_each_copy_and_a_fresh_context_of_the_right_task(monkeypatch):
    env = envs.make("hunting_target", 5, 0)
    args, nets, optimizers, buffer = small(env)
    buffer.data[..., 0] = torch.arange(3.0)[:, None, None, None]  # each task's mark
    data, z_local, z_global, task = experience(env, args, nets)
    contexts, posteriors, samples, noises = [], [], [], []

    def spy(owner, name, calls):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append((given, original(*given))) or calls[-1][1])

    spy(nets.encoder, "local_posterior", contexts)
    spy(nets.encoder, "global_posterior", posteriors)
    spy(nets.critic, "forward", samples)
    update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert len(contexts) == len(posteriors) == 3
    for (context,), _ in contexts:
        assert context.shape == (5, 3, 6, len(nets.encoder.mean))  # one for each copy
        assert (context[..., 0] == task[:, None, None]).all()
    assert not torch.equal(contexts[0][0][0], contexts[1][0][0])
    learning = [given[1] for given, _ in samples if given[1].requires_grad]
    assert len(learning) == 3 and torch.equal(samples[0][0][1], z_global)
    for z, (_, (mean, std)) in zip(learning, posteriors, strict=True):
        assert z.shape == (5, 5, 4) and (z == z[0]).all()  # [T, E, d], held for the whole rollout
        noise = (z[0] - mean) / std  # [E, d]
        assert (noise[:, None] - noise).abs().amax(-1).add(torch.eye(5)).min() > 0.01
        noises.append(noise)
    assert 0.7 < torch.stack(noises).std() < 1.3 and torch.stack(noises).mean().abs() < 0.4
    assert not torch.equal(noises[0], noises[1])  # a new one in each epoch


def test_encoder_learns_what_the_critic_needs():
    """Rewards of a task are alike in context and rollout, and nothing else tells what the returns will be."""
    env = envs.make("hunting_target", 32, 0)
    args, nets, optimizers, buffer = small(env, update_epochs=15, context_size=16, kl_coef=0.001)
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = 2e-3
    pays = torch.tensor([-3.0, 0.0, 3.0])
    for iteration in range(12):
        data, z_local, _, task = experience(env, args, nets, seed=iteration)
        buffer.data = torch.randn_like(buffer.data)  # never the same experience again
        buffer.data[..., -1] += pays[:, None, None, None]
        with torch.no_grad():
            posterior = nets.encoder.global_posterior(*nets.encoder.local_posterior(buffer.sample(task, 16, 2)))
            z_global = pearl.draw_z(*(p[None, None] for p in posterior), 5)[0]
        data.reward[:] = pays[task][:, None]
        data.terminated[:], data.ended[:] = True, True
        data.state, data.next_state = torch.zeros_like(data.state), torch.zeros_like(data.state)
        metrics = update(args, nets, optimizers, buffer, data, z_local, z_global, task)
    assert metrics["losses/explained_variance"] > 0.8
    contexts = torch.randn(90, 3, 16, len(nets.encoder.mean))
    contexts[..., -1] += pays.repeat(30)[:, None, None]
    with torch.no_grad():
        mean, std = nets.encoder.local_posterior(contexts)  # [n, 90, d]
    task = torch.arange(3).repeat(30)
    _, probe = pearl.inference_accuracy(mean[None], std[None], task, "dot")
    assert probe.mean() > 0.8  # each agent alone knows it as well


# ----------------------------------------------------------------------------------------------------------------------
# Inference


def test_without_experience_the_posterior_is_the_prior():
    mean, std = infer(make_encoder(), make_memory([9, 0, 2]), 6, 4, 5)
    assert torch.equal(mean[:, :, 1], torch.zeros(4, 3, 5)) and torch.equal(std[:, :, 1], torch.ones(4, 3, 5))
    assert mean[:, :, [0, 2]].abs().min() > 0 and (std[:, :, [0, 2]] != 1).all()


def test_contexts_are_of_the_agents_own_copy_and_repeat_nothing(monkeypatch):
    encoder, lengths, calls = make_encoder(), [1, 4, 6, 30, 0, 700], []
    memory = make_memory(lengths)
    for e, transitions in enumerate(memory):
        transitions[..., 0] = torch.arange(len(transitions))[:, None]
        transitions[..., 1] = torch.arange(3.0)
        transitions[..., 2] = e
    original = encoder.local_posterior
    monkeypatch.setattr(encoder, "local_posterior", lambda c: calls.append((c, original(c))) or calls[-1][1])
    with torch.no_grad():
        mean, std = infer(encoder, memory, 6, 4, 5)
    assert mean.shape == std.shape == (4, 3, 6, 5) and len(calls) == 5
    for (context, posterior), e in zip(calls, (0, 1, 2, 3, 5), strict=True):
        size = min(6, lengths[e])
        assert context.shape == (4 if lengths[e] > 6 else 1, 3, size, 7)  # all that is stored needs one context
        assert (context[..., 1] == torch.arange(3.0)[:, None]).all() and (context[..., 2] == e).all()
        assert all(len(set(steps)) == size for steps in context[..., 0].flatten(0, 1).tolist())
        for got, expected in zip((mean, std), posterior, strict=True):
            assert torch.equal(got[:, :, e], expected.transpose(0, 1).expand(4, -1, -1))
    assert len({tuple(sorted(steps)) for steps in calls[-1][0][..., 0].flatten(0, 1).tolist()}) == 12


def test_contexts_are_drawn_uniformly(monkeypatch):
    encoder, memory, calls = make_encoder(), make_memory([5]), []
    memory[0][..., 0] = torch.arange(5.0)[:, None]
    memory[0][..., 1:] *= torch.tensor([0.01, 1, 1, 10, 100])[:, None, None]  # however remarkable some may be
    original = encoder.local_posterior
    monkeypatch.setattr(encoder, "local_posterior", lambda c: calls.append(c) or original(c))
    infer(encoder, memory, 2, 4000, 5)
    share = torch.stack([(calls[0][..., 0] == step).float().mean((0, 2)) for step in range(5)], 1)  # [n, 5]
    assert (share - 0.2).abs().max() < 0.03


@own_or_shared
def test_posterior_of_an_agent_is_its_own_affair(shared):
    encoder, memory = make_encoder(shared), make_memory([20, 3, 40])
    torch.manual_seed(1)
    mean, std = infer(encoder, memory, 6, 4, 5)
    for i in range(3):
        others = [j for j in range(3) if j != i]
        changed = [m.clone() for m in memory]
        for m in changed:
            m[:, others] = 10 * torch.randn_like(m[:, others])
        torch.manual_seed(1)
        new_mean, new_std = infer(encoder, changed, 6, 4, 5)
        close(new_mean[:, i], mean[:, i], 1e-6)
        close(new_std[:, i], std[:, i], 1e-6)
        assert not torch.allclose(new_mean[:, others], mean[:, others], atol=1e-2)
    assert list(inspect.signature(infer).parameters) == [
        "encoder", "memory", "context_size", "num_contexts", "latent_dim"
    ]  # fmt: skip


def test_meta_test_never_shows_the_task_or_what_the_critic_reads(monkeypatch):
    """With other names for the tasks and without a joint posterior everything but the names stays as it was."""
    env = envs.make("hunting_target", 6, 0)
    args, nets, _, _ = small(env)
    call = lambda: pearl.meta_test(args, env, nets.actor, nets.encoder, 0, torch.device("cpu"), curve=True)  # noqa: E731
    rows = call()
    monkeypatch.setattr(nets.encoder, "global_posterior", None)
    assert rows == call()
    seen, original = [], pearl.rollout

    def same_task(env, actor, task, *rest, **named):  # all copies play task 0, whatever they are called
        seen.append(task)
        return original(env, actor, np.zeros_like(task), *rest, **named)

    monkeypatch.setattr(pearl, "rollout", same_task)
    rows = call()
    env.tasks.test[:] = env.tasks.test[::-1].copy()
    renamed = call()
    env.tasks.test[:] = env.tasks.test[::-1].copy()
    assert [row["task"] for row in rows] != [row["task"] for row in renamed]
    assert [row["return"] for row in rows] == [row["return"] for row in renamed]
    assert all(row["accuracy"] == "" and (row["probe"] == "") == (row["context_steps"] == 0) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

SMALL = "--num-envs 2 --update-epochs 2 --eval-interval 400 --num-threads 1 --warmup-episodes 2 --no-cuda".split()
SMALL += "--context-episode-steps 100 --context-episodes 2".split()
SMALL += (
    "--checkpoint-interval 1 --explore-episodes 1 --test-episodes 2 --context-interval 1 --context-copies 1".split()
)


def call(*argv):
    """A command line, run in this process. Exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ma_pearl.py", *map(str, argv)])
        patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
        try:
            runpy.run_path(str(ROOT / "ma_pearl.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of three iterations, and its folder as it was right before the second checkpoint."""
    folder, replace, saves = tmp_path_factory.mktemp("pearl"), os.replace, []

    def watched(source, target):
        saves.append(target)
        if len(saves) == 2:
            shutil.copytree(folder / "run", folder / "killed")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        flags = "--total-timesteps 1800 --eval-copies 6 --run-name run".split()
        result = call(*SMALL, *flags, "--run-dir", folder)
    assert result.code == 0, result.err
    assert len(saves) == 3
    return folder


def rows_of(run):
    with open(run / "meta_test.csv", newline="") as file:
        return list(csv.DictReader(file))


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    return a == b


def test_finished_run(trained):
    rows = rows_of(trained / "run")
    assert [int(row["step"]) for row in rows[::12]] == [0, 800, 1300, 1800, 1800, 1800, 1800]  # the last with curve
    assert {row["phase"] for row in rows} == {"prior", "posterior", "curve"}
    assert all(row["accuracy"] == "" and math.isfinite(float(row["return"])) for row in rows)


def test_resume_to_the_same_bits(trained, tmp_path):
    run = shutil.copytree(trained / "killed", tmp_path / "run")
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 1
    assert len(rows_of(run)) == 36  # what the second iteration wrote before the kill is done again
    result = call("--resume", run)
    assert result.code == 0, result.err
    assert (run / "meta_test.csv").read_bytes() == (trained / "run" / "meta_test.csv").read_bytes()
    resumed, whole = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run, trained / "run"))
    assert resumed.keys() == whole.keys()
    for key in whole:
        assert identical(resumed[key], whole[key]), key


def test_load_agents(trained):
    agents = pearl.load_agents(trained / "run")
    env = agents.env
    obs, _ = env.reset(seed=0, options={"task": [1]})
    z, memory = agents.prior(1), []
    for _ in range(10):
        action = agents.act(obs, z)
        next_obs, reward, *_ = env.step(action)
        memory.append(np.concatenate([obs, action, reward[..., None], next_obs], -1)[0])
        obs = next_obs
    memory = torch.as_tensor(np.stack(memory), dtype=torch.float32)  # [S, n, transition_dim]
    z = agents.infer([memory, memory[:0]])
    assert z.shape == (3, 2, agents.args.latent_dim) and z.isfinite().all() and not z.requires_grad
    assert not np.array_equal(agents.act(obs, z[:, :1]), agents.act(obs, z[:, 1:]))


def test_discrete_actions(tmp_path):
    """Two iterations; with ten tasks the collection of context takes most of the steps."""
    steps = [100 * (10 + 2), 100 * (10 + 2 + 10 + 2)]
    flags = f"--env-id rware_layout --eval-copies 10 --warmup-episodes 1 --total-timesteps {steps[1]}".split()
    result = call(*SMALL, *flags, "--run-dir", tmp_path, "--run-name", "run")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "run")
    assert sorted({int(row["step"]) for row in rows}) == [0, *steps]
    assert all(math.isfinite(float(row["return"])) for row in rows)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["iteration"] == 2
