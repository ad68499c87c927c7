"""benchmark/mg2l_ablations.py: mg2l_mappo.py but for its marked blocks, and what each of its flags changes."""

import dataclasses
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import envs
import mg2l_mappo

ROOT = Path(__file__).parents[1]
COPY = ROOT / "benchmark" / "mg2l_ablations.py"
BEGIN, END = "# ablation >>>", "# <<< ablation"
spec = importlib.util.spec_from_file_location("mg2l_ablations", COPY)
ablations = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)

GLOBAL_LOSSES, SCHEMES = ("infonce", "none", "dynamics", "task"), ("g2l", "global_only", "local_only")
AGGREGATORS = ("pia", "gaussian_product", "transformer", "rnn")
TINY = "--env-id hunting_target --num-envs 2 --update-epochs 2 --hidden-dim 16 --latent-dim 8 --encoder-dim 16"
TINY += " --num-threads 1 --no-cuda --explore-episodes 1 --test-episodes 2 --eval-copies 4 --eval-interval 800"
TINY += " --context-size 16 --inference-size 16 --context-sets 2 --rollout-contexts 2 --warmup-episodes 1"
TINY += " --context-episode-steps 100"
TINY += " --warmup-updates 2 --context-copies 1 --context-interval 1 --encoder-updates 2 --total-timesteps 800"
TINY += " --env-kwargs num_preys=2"


# ----------------------------------------------------------------------------------------------------------------------
# The copy


def blocks_and_rest(copy: str) -> tuple[list[list[str]], list[list[str]]]:
    """The lines of a copy between the marks and outside of them, in order; there is one more rest than blocks."""
    blocks, rests, inside = [], [[]], False
    for line in filter(None, map(str.rstrip, copy.splitlines())):  # blank lines aside: the style has rules for them
        if line.strip() in (BEGIN, END):
            assert inside == (line.strip() == END), "marks do not alternate"
            inside = not inside
            (blocks if inside else rests).append([])
        else:
            (blocks if inside else rests)[-1].append(line)
    assert not inside, "a block does not end"
    return blocks, rests


def check_copy(original: str, copy: str) -> None:
    """Outside the blocks the copy is the original; what a block leaves out of the original it holds, if more deeply."""
    blocks, rests = blocks_and_rest(copy)
    lines, at = list(filter(None, map(str.rstrip, original.splitlines()))), 0
    for k, rest in enumerate(rests):
        begins = [i for i in range(at, len(lines) - len(rest) + 1) if lines[i : i + len(rest)] == rest]
        assert begins, f"not in the original after its line {lines[at - 1]!r}: the lines after block {k}, {rest[:2]}"
        left_out = lines[at : begins[0]]
        held = [line.strip() for line in blocks[k - 1]] if k else []
        assert all(line.strip() in held for line in left_out), f"block {k} left out {left_out}"
        at = begins[0] + len(rest)
    assert at == len(lines), f"left out at the end: {lines[at:]}"


def test_same_text_outside_the_blocks():
    """After a change of the original: git merge-file benchmark/mg2l_ablations.py OLD_mg2l_mappo.py mg2l_mappo.py."""
    check_copy((ROOT / "mg2l_mappo.py").read_text(), COPY.read_text())


ORIGINAL = "a = 1\nb = 2\nc = 3\n"


@pytest.mark.parametrize("copy", [ORIGINAL, f"a = 1\n\n{BEGIN}\nb = 0\n\n{END}\nb = 2\nc = 3\n",
                                  f"a = 1\n{BEGIN}\nif x:\n    b = 2\n{END}\nc = 3\n"])  # fmt: skip
def test_check_of_the_copy_accepts(copy):
    check_copy(ORIGINAL, copy)


@pytest.mark.parametrize("copy", [
    "a = 1\nb = 2\nc = 4\n", "a = 1\nc = 3\n", "a = 1\nb = 2\n", "a = 1\nb = 2\nc = 3\nd = 4\n",  # no block
    f"a = 1\n{BEGIN}\nb = 0\n{END}\nc = 3\n",  # what it replaces is lost
    f"a = 1\n{BEGIN}\nx = 0\n{END}\ny = 0\nb = 2\nc = 3\n",  # a line too many beside the block
    f"a = 1\n{BEGIN}\nb = 2\nc = 3\n", f"a = 1\n{END}\nb = 2\nc = 3\n",  # marks that do not match
])  # fmt: skip
def test_check_of_the_copy_refuses(copy):
    with pytest.raises(AssertionError):
        check_copy(ORIGINAL, copy)


def run(path, folder, name, *flags):
    """A command line, run in this process: the script's globals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *TINY.split(), "--run-dir", str(folder), "--run-name", name, *flags])
        return runpy.run_path(str(path), run_name="__main__")


def test_with_default_flags_the_same_bits(tmp_path):
    run(ROOT / "mg2l_mappo.py", tmp_path, "original")
    run(COPY, tmp_path, "copy")
    first = mg2l_mappo.load_checkpoint(tmp_path / "original")
    second = ablations.load_checkpoint(tmp_path / "copy")
    assert first["iteration"] == second["iteration"] == 2
    for part in ("networks", "optimizers"):
        assert first[part].keys() == second[part].keys()
        for name in first[part]:
            ours, theirs = (torch.utils._pytree.tree_leaves(saved[part][name]) for saved in (first, second))
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    rows = [(tmp_path / name / "meta_test.csv").read_text() for name in ("original", "copy")]
    assert rows[0] == rows[1]
    assert json.loads((tmp_path / "copy" / "args.json").read_text())["script"] == "mg2l_ablations"


FLAGS = [("--global-loss", value) for value in GLOBAL_LOSSES[1:]]
FLAGS += [("--scheme", value) for value in SCHEMES[1:]] + [("--aggregator", value) for value in AGGREGATORS[1:]]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[1])
def test_two_iterations(flags, tmp_path, monkeypatch):
    run(COPY, tmp_path, "run", *flags)
    agents = ablations.load_agents(tmp_path / "run")
    assert getattr(agents.args, flags[0][2:].replace("-", "_")) == flags[1]
    obs, _ = agents.env.reset(seed=0)
    z = agents.infer([torch.randn(5, agents.env.num_agents, len(agents.encoder.mean))])
    assert agents.act(obs, z).shape == (1, 3, 2)
    monkeypatch.setattr(sys, "argv", ["mg2l_ablations.py", "--meta-test", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(COPY), run_name="__main__")
    assert not stop.value.code and (tmp_path / "run" / "meta_test_only.csv").stat().st_size > 0


def test_stopped_run_names_the_command_that_goes_on(tmp_path):
    flags = ["--total-timesteps", "100000000", "--checkpoint-interval", "1", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(COPY), *TINY.split(), *flags, "--run-name", "run"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        for _ in range(600):
            if (tmp_path / "run" / "checkpoint.pt").is_file():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert f"go on with: python benchmark/mg2l_ablations.py --resume {tmp_path / 'run'}" in error


# ----------------------------------------------------------------------------------------------------------------------
# What the flags change


def made(env_id="hunting_target", **changes):
    """Arguments, networks, optimizers, a full context buffer and the environment, all small, as the script does it."""
    torch.manual_seed(0)
    env = envs.make(env_id, 2)
    small = dict(hidden_dim=16, latent_dim=4, encoder_dim=8, encoder_heads=2, context_size=6, inference_size=6)
    small |= dict(update_epochs=1, rollout_contexts=2, context_sets=2, context_episodes=2, share_policy=False)
    small |= dict(latent_scale=0.5, temperature=16.0, rollout_context_episodes=2, critic_context_size=6)
    args = ablations.Args(env_id=env_id, **(small | changes))
    nets = SimpleNamespace(**ablations.build(args, env, torch.device("cpu")))
    groups = dict(actor=nets.actor.parameters(), critic=nets.critic.parameters())
    groups |= dict(phi_g=nets.encoder.phi_g(), phi_l=nets.encoder.phi_l())
    optimizers = {name: torch.optim.Adam(p, lr=1e-3, fused=True) for name, p in groups.items()}
    buffer = ablations.ContextBuffer(2)
    buffer.add(torch.randn(len(env.tasks.train), 2, 9, env.num_agents, len(nets.encoder.mean)))
    return SimpleNamespace(args=args, nets=nets, optimizers=optimizers, buffer=buffer, env=env)


def encoder_step(of):
    return ablations.update_encoder(
        of.args, of.nets.encoder, of.buffer, len(of.env.tasks.train), of.optimizers, of.args.temperature
    )


PARTS = {"e_tran": "E_tran", "e_agg": "E_agg", "e_global": "E_G", "global_head": "E_G", "e_local": "E_L"}
PARTS["predictor"] = "predictor"


def trained(encoder, step):
    """Parts of the encoder that a step moves; they must be those that got a gradient other than zero."""
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    step()
    part = {name: PARTS[name.split(".")[0]] for name in before}
    moved = {part[name] for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    reached = {part[n] for n, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == reached
    return moved


L_G = {"g2l": {"E_tran", "E_agg", "E_G"}, "global_only": {"E_tran", "E_agg", "E_G"}}
L_G["local_only"] = {"E_tran", "E_agg", "E_L"}


@pytest.mark.parametrize("loss, scheme, shared", list(product(GLOBAL_LOSSES, SCHEMES, [False, True])))
def test_what_the_encoder_losses_train(loss, scheme, shared):
    of, metrics = made(global_loss=loss, scheme=scheme, share_policy=shared), {}
    expected = set() if loss == "none" else set(L_G[scheme])
    expected |= {"predictor"} if loss in ("dynamics", "task") else set()
    expected |= {"E_L"} if scheme == "g2l" else set()  # L_L, which the other schemes have not
    assert trained(of.nets.encoder, lambda: metrics.update(encoder_step(of))) == expected
    assert all(value.isfinite().all() for value in metrics.values())
    logged = {"losses/leave_one_out_global", "losses/info_nce_global", "losses/info_nce_local", "losses/consistency_kl"}
    assert logged <= metrics.keys()
    assert (metrics["losses/consistency_kl"] == 0) == (scheme != "g2l")


def mappo_step(of):
    n, num_steps, num_envs = of.env.num_agents, 4, of.env.num_envs
    task = torch.arange(num_envs)
    z_local = torch.randn(n, num_steps, num_envs, of.args.latent_dim)
    data = ablations.rollout(of.env, of.nets.actor, task.numpy(), z_local, 0)
    x = of.nets.encoder.embed(of.buffer.sample(task, 6, 1))
    z_global = of.nets.encoder.global_posterior(x)[0].detach().expand(num_steps, -1, -1)
    nets = (of.nets.actor, of.nets.critic, of.nets.encoder, of.nets.value_norm)
    return ablations.update_mappo(of.args, data, z_local, z_global, task, *nets, of.buffer, of.optimizers)


@pytest.mark.parametrize("loss, scheme", list(product(GLOBAL_LOSSES, SCHEMES)))
def test_what_the_critic_loss_trains(loss, scheme):
    of = made(global_loss=loss, scheme=scheme)
    assert trained(of.nets.encoder, lambda: mappo_step(of)) == L_G[scheme]  # also where there is no L_G


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_of_the_encoder_has_one_optimizer(scheme):
    encoder = made(scheme=scheme, global_loss="dynamics").nets.encoder
    both = [id(p) for p in (*encoder.phi_g(), *encoder.phi_l())]
    assert sorted(both) == sorted(id(p) for p in encoder.parameters())


def test_without_a_global_loss_its_optimizer_rests():
    """L_Q leaves momentum behind, with which a step on a gradient of zeros would still move the parameters."""
    of = made(global_loss="none")
    mappo_step(of)
    before = [p.clone() for p in of.nets.encoder.phi_g()]
    encoder_step(of)
    assert all(torch.equal(a, b) for a, b in zip(before, of.nets.encoder.phi_g(), strict=True))


def test_local_only_puts_all_z_side_by_side():
    of = made(scheme="local_only")
    x = torch.randn(5, 3, 8)
    local, whole = of.nets.encoder.local_posterior(x), of.nets.encoder.global_posterior(x)
    assert torch.equal(whole[0], torch.cat(list(local[0]), -1)) and torch.equal(whole[1], torch.cat(list(local[1]), -1))
    for half, one in zip(
        whole, made(scheme="local_only", latent_scale=1.0).nets.encoder.global_posterior(x), strict=True
    ):
        assert torch.equal(half, one / 2)
    assert of.nets.critic.layers[0].in_features == of.env.state_dim + 3 * 4
    base = made()
    assert base.nets.critic.layers[0].in_features == base.env.state_dim + 4


def test_global_only_gives_every_agent_z():
    encoder = made(scheme="global_only").nets.encoder
    x = torch.randn(5, 3, 8)
    for own, whole in zip(encoder.local_posterior(x), encoder.global_posterior(x), strict=True):
        assert own.shape == (3, 5, 4) and all(torch.equal(agent, whole) for agent in own)
    memory = torch.randn(4, 3, len(encoder.mean))
    other = memory.clone()
    other[:, 1:] += 1  # what the others went through tells agent 0 something, as it may not in g2l
    for net, differs in ((encoder, True), (made().nets.encoder, False)):
        means = []
        for own in (memory, other):
            torch.manual_seed(0)
            means.append(ablations.infer(net, [own], 4, 1, 4)[0][:, 0])
        assert torch.allclose(*means, atol=1e-6) != differs


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_order_of_the_context(aggregator):
    torch.manual_seed(0)
    of = made(aggregator=aggregator)
    order = torch.randperm(6)
    depends = aggregator in ("transformer", "rnn")
    x = torch.randn(5, 3, 6, 8)
    assert torch.allclose(of.nets.encoder.e_agg(x)[0], of.nets.encoder.e_agg(x[:, :, order])[0], atol=1e-5) != depends
    agents = torch.randn(5, 3, 8)  # E_G, over agents
    swapped = of.nets.encoder.e_global(agents[:, [2, 0, 1]])[0]
    assert torch.allclose(of.nets.encoder.e_global(agents)[0], swapped, atol=1e-5) != depends
    context = torch.randn(5, 3, 6, len(of.nets.encoder.mean))
    means = [of.nets.encoder.local_posterior(of.nets.encoder.embed(c))[0] for c in (context, context[:, :, order])]
    assert torch.allclose(*means, atol=1e-5) != depends
    omega = of.nets.encoder.priorities(context[0])  # [n, S]
    assert torch.allclose(omega, torch.full_like(omega, 1 / 6)) == (aggregator != "pia")


def test_gaussian_product_by_hand():
    layer = ablations.GaussianProduct(1, 1, 1)
    with torch.no_grad():
        layer.gaussian.weight.copy_(torch.tensor([[1.0], [0.0]]))  # means are the rows
        layer.gaussian.bias.copy_(torch.tensor([0.0, 1.0]).expm1().log())  # softplus(log(e - 1)) = 1
        layer.gaussian.bias[0] = 0
        layer.value.weight.copy_(torch.tensor([[1.0, 10.0]]))
        layer.value.bias.zero_()
    out, score = layer(torch.tensor([[[[1.0], [2.0], [3.0], [6.0]]]]))
    assert out.item() == pytest.approx(3.0 + 10 * 0.5, abs=1e-5) and score.shape == (1, 1, 4)


@pytest.mark.parametrize("env_id", ["hunting_target", "rware_layout"])
def test_dynamics_are_predicted_from_z_o_and_a(env_id):
    """Every transition of the buffer is (o, a, r, o') = (o, a, sum of o and a, 2 o); whoever knows that has no loss."""
    of = made(env_id, global_loss="dynamics", kl_coef=0.0)
    obs_dim, n = of.env.single_observation_space.shape[0], of.env.num_agents
    known = of.buffer.data[..., : len(of.nets.encoder.mean) - obs_dim - 1]
    of.buffer.data = torch.cat([known, known.sum(-1, keepdim=True), 2 * known[..., :obs_dim]], -1)
    assert of.buffer.data.shape[-1] == len(of.nets.encoder.mean)
    seen = []

    def knows(given):  # [Q, B, d + n * (obs_dim + act_dim)]
        seen.append(given)
        own = given[..., 4:].unflatten(-1, (n, -1))
        return torch.cat([own.sum(-1, keepdim=True), 2 * own[..., :obs_dim]], -1).flatten(2)

    label, mean = torch.arange(2), torch.arange(8.0).view(2, 4)
    encoder = SimpleNamespace(**vars(of.nets.encoder), predictor=knows, mean=torch.zeros(1), std=torch.ones(1))
    loss = ablations.prediction_loss(of.args, encoder, of.buffer, label, mean, torch.zeros_like(mean) + 1e-9)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert torch.allclose(seen[0][..., :4], mean[:, None].expand(-1, 6, -1), atol=1e-6)
    assert of.nets.encoder.predictor(seen[0]).shape == (2, 6, n * (1 + obs_dim))


def test_task_is_classified_from_z():
    of = made(global_loss="task", kl_coef=0.0)
    with torch.no_grad():
        of.nets.encoder.predictor.weight.zero_()
    uniform = ablations.prediction_loss(
        of.args, of.nets.encoder, of.buffer, torch.arange(3), torch.zeros(3, 4), torch.ones(3, 4)
    )
    bias = of.nets.encoder.predictor.bias
    assert uniform.item() == pytest.approx((bias.logsumexp(0) - bias.mean()).item(), rel=1e-5)


def test_flags_of_the_copy_are_six_more():
    ours, theirs = ({field.name for field in dataclasses.fields(m.Args)} for m in (ablations, mg2l_mappo))
    added = {"global_loss", "scheme", "aggregator", "paired_context", "warmup_start_episodes", "warmup_codes"}
    assert ours - theirs == added and not theirs - ours


# ----------------------------------------------------------------------------------------------------------------------
# Context in pairs


@pytest.mark.parametrize("paired", [True, False])
def test_paired_context_differs_by_the_reward_alone(paired, tmp_path):
    """The dynamics of all preys' tasks are one, so the same start and noise give the same episode."""
    flags = ["--env-kwargs", "num_preys=3", "--warmup-episodes", "3", "--context-copies", "2"]
    flags += ["--context-episode-steps", "7", "--paired-context" if paired else "--no-paired-context"]
    run(COPY, tmp_path, "run", *flags)
    context = ablations.load_checkpoint(tmp_path / "run")["context"]  # [N, 3 + 2 ..., T, n, (o, a, r, o')]
    obs_dim = ablations.load_agents(tmp_path / "run").env.single_observation_space.shape[0]
    reward = context[..., -obs_dim - 1]
    experience = torch.cat([context[..., : -obs_dim - 1], context[..., -obs_dim:]], -1)
    assert context.shape[0] == 3 and context.shape[1] >= 5 and context.shape[2:4] == (7, 3)
    assert not torch.equal(experience[:, :2], experience[:, 2:4])  # of other episodes
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = (experience[a] == experience[b]).all((-1, -2))
        assert same.all() if paired else not same.any()
        assert (reward[a] != reward[b]).any(-1).all(-1).all()


def test_contexts_of_a_set_are_drawn_alike_from_the_newest_episodes():
    buffer = ablations.ContextBuffer(10)
    tag = torch.stack(torch.meshgrid(*map(torch.arange, (3, 6, 4, 2)), indexing="ij"), -1)  # task, episode, step, agent
    buffer.add(tag.float())
    buffer.newest = 4
    context = buffer.sample_alike(200, 9, 2)  # [Q, n, B, 4]
    assert context.shape == (600, 2, 9, 4)
    assert (context[..., 0] == torch.arange(3).repeat(200)[:, None, None]).all()
    of_sets = context.unflatten(0, (200, 3))
    assert torch.equal(of_sets[:, :1, ..., 1:].expand(-1, 3, -1, -1, -1), of_sets[..., 1:])
    assert not torch.equal(of_sets[0], of_sets[1])
    assert all(len(set(episodes.tolist())) <= 2 for episodes in context[:, 0, :, 1])
    assert set(context[..., 1].flatten().tolist()) == {2, 3, 4, 5}
    assert set(context[..., 2].flatten().tolist()) == {0, 1, 2, 3}
    assert (context[..., 3] == torch.arange(2)[:, None]).all()
    buffer.newest = None
    assert set(buffer.sample_alike(200, 9, 2)[..., 1].flatten().tolist()) == {0, 1, 2, 3, 4, 5}


def test_warmup_begins_on_few_episodes_and_has_all_by_its_half(tmp_path, monkeypatch):
    drawn_from, randint = [], torch.randint

    def spy(high, *args, **kwargs):
        if args == ((2, 3),):  # of two sets, three episodes each
            drawn_from.append(high)
        return randint(high, *args, **kwargs)

    monkeypatch.setattr(torch, "randint", spy)
    flags = ["--paired-context", "--warmup-start-episodes", "2", "--warmup-episodes", "32", "--warmup-updates", "8"]
    flags += ["--context-episodes", "3", "--context-episode-steps", "5", "--total-timesteps", "1200"]
    run(COPY, tmp_path, "run", *flags)
    assert drawn_from[:8] == [2, 4, 8, 16, 32, 32, 32, 32]
    assert drawn_from[8:10] == [32, 32] and max(drawn_from) > 32  # all, and those gathered later too


@pytest.mark.parametrize("flags", [("--warmup-start-episodes", "1"),
                                   ("--warmup-start-episodes", "2", "--paired-context")])  # fmt: skip
def test_a_start_that_cannot_be(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(COPY, tmp_path, "run", *flags)
    assert stop.value.code == 2 and "warmup-start-episodes: got" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Codes in the warm-up


@pytest.mark.parametrize("flags", [("--scheme", "local_only"), ("--global-loss", "none"), ("--local-loss", "kl")])
def test_codes_that_nothing_is_compared_with(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(COPY, tmp_path, "run", "--warmup-codes", *flags)
    assert stop.value.code == 2 and "warmup-codes: got" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("codes", [True, False])
def test_keys_are_codes_in_the_warmup_and_contexts_after_it(codes, tmp_path, monkeypatch):
    losses, einsum, info_nce = [], torch.einsum, "...qd,...snd->...qsn"

    def spy(form, *operands):
        if form == info_nce:
            losses.append(operands[1])
        return einsum(form, *operands)

    monkeypatch.setattr(torch, "einsum", spy)
    run(COPY, tmp_path, "run", "--warmup-codes" if codes else "--no-warmup-codes", "--env-kwargs", "num_preys=3")
    fixed = [keys for keys in losses if keys.shape == (1, 3, 8)]  # one set, three tasks, eight dimensions
    assert len(fixed) == (4 if codes else 0)  # of z and z^i in each of two updates
    if codes:
        assert all(torch.equal(keys, fixed[0]) for keys in fixed)
        assert (fixed[0].abs() == 1).all() and (fixed[0].sum(1).abs() == 1).all()  # no sign is that of all tasks
        last = max(k for k, keys in enumerate(losses) if keys is fixed[-1])
        assert len(losses) - last > 4  # contexts are compared with contexts afterwards


def test_codes_are_what_the_warmup_teaches():
    of = made()
    codes = of.nets.encoder.codes = torch.tensor([[1.0, 1, -1, -1], [-1, 1, 1, -1], [1, -1, -1, 1]])

    def agreement() -> float:
        posterior = of.nets.encoder.global_posterior(of.nets.encoder.embed(of.buffer.sample(torch.arange(3), 16, 2)))
        return (posterior[0] * codes).mean().item()

    before = agreement()
    for _ in range(120):
        ablations.update_encoder(of.args, of.nets.encoder, of.buffer, 3, of.optimizers, of.args.temperature)
    assert agreement() > before + 0.3
