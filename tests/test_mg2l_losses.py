"""What mg2l_mappo.py computes with: losses, task encoder and networks, each against a reference written out here."""

import math

import gymnasium as gym
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from mg2l_mappo import (
    PIA,
    Actor,
    AgentMLP,
    AttentionBlock,
    Critic,
    TaskEncoder,
    ValueNorm,
    cl_accuracy,
    clip_gradient_per_agent,
    global_loss,
    info_nce,
    kl_between,
    kl_to_prior,
    leave_one_out,
    local_loss,
    policy_loss,
    similarity_scores,
    to_gaussian,
    value_loss,
)

torch.set_num_threads(1)
BOX, DISCRETE = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(5)
every_depth = pytest.mark.parametrize("blocks", [0, 1, 2])
own_or_shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(got, expected, tol=1e-12):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def inputs_of(module):
    """Everything that goes into this module from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# Task encoder


def make_encoder(blocks=1, shared=False, num_agents=3, dim=7):
    encoder = TaskEncoder(num_agents, dim, 16, 5, blocks, heads=4, shared=shared, latent_scale=0.5).double()
    encoder.fit_input(3 * rand(50, dim) + 1)
    return encoder


@every_depth
def test_theorem_3_order_of_transitions_does_not_matter(blocks):
    encoder, context = make_encoder(blocks), rand(4, 3, 9, 7)
    x = encoder.embed(context)
    assert x.shape == (4, 3, 16)
    close(encoder.embed(context[:, :, torch.randperm(9)]), x)
    each_its_own = torch.stack([context[:, i, torch.randperm(9)] for i in range(3)], 1)
    close(encoder.embed(each_its_own), x)
    changed = context.clone()
    changed[:, :, 4] = changed[:, :, 5]  # so that the test can fail
    assert (encoder.embed(changed) - x).abs().amax(-1).min() > 1e-4


@every_depth
def test_theorem_3_order_of_agents_does_not_matter_to_z(blocks):
    encoder, context = make_encoder(blocks), rand(4, 3, 9, 7)
    posterior = encoder.global_posterior(encoder.embed(context))
    assert posterior[0].shape == posterior[1].shape == (4, 5)
    for order in ([1, 0, 2], [2, 0, 1]):
        for got, expected in zip(encoder.global_posterior(encoder.embed(context[:, order])), posterior, strict=True):
            close(got, expected)
    other = encoder.global_posterior(encoder.embed(context[:, [0, 0, 2]]))
    assert (other[0] - posterior[0]).abs().amax(-1).min() > 1e-4


@every_depth
def test_priorities_are_permuted_like_the_transitions(blocks):
    encoder, transitions, order = make_encoder(blocks), rand(3, 11, 7), torch.randperm(11)
    omega = encoder.priorities(transitions)
    assert omega.shape == (3, 11)
    close(encoder.priorities(transitions[:, order]), omega[:, order])
    assert omega.std(1).min() > 1e-3
    assert (encoder.priorities(transitions[:, order]) - omega).abs().max() > 1e-3


def test_priorities_are_the_weights_of_the_head_and_chunks_do_not_change_them():
    encoder, transitions = make_encoder(blocks=0), rand(3, 23, 7)
    x, head = encoder.e_tran((transitions - encoder.mean) / encoder.std), encoder.e_agg
    expected = (head.key(x) @ head.query / math.sqrt(16)).softmax(-1)  # eq. 32
    for chunk in (512, 23, 22, 5, 1):
        omega = encoder.priorities(transitions, chunk)
        close(omega, expected)
        close(omega.sum(-1), torch.ones(3, dtype=torch.float64))


@every_depth
def test_priorities_sum_to_one_when_attention_is_chunked(blocks):
    omega = make_encoder(blocks).priorities(rand(3, 23, 7), chunk=10)
    assert omega.shape == (3, 23) and omega.min() > 0
    close(omega.sum(-1), torch.ones(3, dtype=torch.float64))


def test_pia_is_equation_26():
    pia, x = PIA(8, blocks=0, heads=2).double(), rand(2, 3, 6, 8)
    out, score = pia(x)
    assert out.shape == (2, 3, 8) and score.shape == (2, 3, 6)
    for a in range(2):
        for b in range(3):
            q_k = [torch.dot(pia.query, pia.key.weight @ row) / math.sqrt(8) for row in x[a, b]]
            weights = torch.stack([q.exp() for q in q_k]) / sum(q.exp() for q in q_k)
            close(score[a, b], torch.stack(q_k))
            close(out[a, b], sum(w * (pia.value.weight @ row) for w, row in zip(weights, x[a, b], strict=True)))


def test_attention_block_is_that_of_the_library():
    """nn.TransformerEncoderLayer given the same weights, outputs and gradients."""
    block, x = AttentionBlock(8, heads=2).double(), rand(3, 6, 8)
    for p in block.parameters():  # biases begin at 0
        p.data = rand(*p.shape)
    library = torch.nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, norm_first=True).double()
    ours = [*block.query_key_value.parameters(), *block.out.parameters(), *block.mlp.parameters()]
    theirs = [p for name, p in library.named_parameters() if "norm" not in name]
    for a, b in zip(ours, theirs, strict=True):
        b.data = a.data.clone()
    for a, b in zip(ours, theirs, strict=True):
        (of_ours,) = torch.autograd.grad(block(x).square().sum(), a)
        (of_theirs,) = torch.autograd.grad(library(x).square().sum(), b)
        size = of_theirs.abs().max()  # the biases of the keys get rounding alone: softmax drops them
        close(of_ours / size, of_theirs / size)
    close(block(x), library(x))


def test_attention_block_starts_as_that_of_the_library():
    torch.manual_seed(0)
    block = AttentionBlock(64, heads=4)
    library = torch.nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    ours = [*block.query_key_value.parameters(), *block.out.parameters(), *block.mlp.parameters()]
    theirs = [p for name, p in library.named_parameters() if "norm" not in name]
    for a, b in zip(ours, theirs, strict=True):
        assert (a == 0).all() == (b == 0).all()
        assert abs(a.std() - b.std()) <= 0.2 * b.std()


def test_pia_reads_what_its_blocks_leave():
    pia, x = PIA(8, blocks=2, heads=2).double(), rand(3, 6, 8)
    expected = pia.blocks[1](pia.blocks[0](x))
    close(pia(x)[1], pia.key(expected) @ pia.query / math.sqrt(8))
    close(pia(x)[0], PIA.forward(without_blocks(pia), expected)[0])


def without_blocks(pia):
    same = PIA(8, blocks=0, heads=2).double()
    same.load_state_dict(pia.state_dict(), strict=False)
    return same


def test_input_is_standardised_by_what_fit_input_saw():
    encoder = TaskEncoder(2, 3, 8, 4, blocks=0, heads=1, shared=False, latent_scale=1.0).double()
    data = rand(5, 6, 2, 3) * torch.tensor([1.0, 100.0, 0.0]) + torch.tensor([5.0, -300.0, 7.0])
    encoder.fit_input(data)
    close(encoder.mean, data.reshape(-1, 3).mean(0))
    close(encoder.std[:2], data.reshape(-1, 3).std(0)[:2])
    assert encoder.std[2] == 1e-2  # constant: no division by zero
    assert {"mean", "std"} <= set(encoder.state_dict())
    # the units of the input do not matter any more
    context, scale = data[:, 0].transpose(1, 2).reshape(5, 2, -1, 3), torch.tensor([0.5, 40.0, 1.0])
    x, omega = encoder.embed(context), encoder.priorities(context[0])
    encoder.fit_input(data * scale)
    close(encoder.embed(context * scale), x, 1e-9)
    close(encoder.priorities(context[0] * scale), omega, 1e-9)


def test_embedding_of_an_agent_comes_from_its_own_transitions():
    encoder, context = make_encoder(), rand(4, 3, 9, 7)
    x = encoder.embed(context)
    for i in range(3):
        changed = rand(4, 3, 9, 7)
        changed[:, i] = context[:, i]
        assert torch.equal(encoder.embed(changed)[:, i], x[:, i])


@own_or_shared
def test_local_posteriors_are_each_agents_own_mlp(shared):
    encoder, x = make_encoder(shared=shared), rand(4, 3, 16)
    mean, std = encoder.local_posterior(x)
    assert mean.shape == std.shape == (3, 4, 5) and std.min() > 0
    for i in range(3):
        expected_mean, expected_std = to_gaussian(plain_forward(encoder.e_local, i, x[:, i]), 0.5)
        close(mean[i], expected_mean)
        close(std[i], expected_std)
    same = x[:, :1].expand(-1, 3, -1)  # agents differ by themselves, not by their inputs alone
    assert (encoder.local_posterior(same)[0][0] - encoder.local_posterior(same)[0][1]).abs().max() > 1e-3


def test_to_gaussian_gives_mean_and_positive_std():
    raw = torch.tensor([[1.0, -2.0, 0.0, -300.0], [3.0, 4.0, 60.0, 1.0]], dtype=torch.float64)
    mean, std = to_gaussian(raw, 1.0)
    close(mean, torch.tanh(3 * raw[:, :2]))  # within (-1, 1), and soon near a corner
    assert std[0, 1] > 0 and torch.isfinite(std.log()).all()
    shift = torch.log(torch.expm1(std)) - raw[:, 2:]  # softplus of the raw number, moved by a constant at most
    close(shift[[1, 1], [0, 1]], shift[0, 0].expand(2), 2e-5)
    for whole, half in zip((mean, std), to_gaussian(raw, 0.5), strict=True):
        close(half, whole / 2)


@own_or_shared
def test_phi_g_and_phi_l_are_the_encoder_without_overlap(shared):
    encoder = make_encoder(shared=shared)
    global_part, local_part = ({id(p) for p in part} for part in (encoder.phi_g(), encoder.phi_l()))
    assert not global_part & local_part
    assert global_part | local_part == {id(p) for p in encoder.parameters()}
    assert local_part == {id(p) for p in encoder.e_local.parameters()}


# ----------------------------------------------------------------------------------------------------------------------
# Contrast


def gaussian_pairs(batches, num_queries, num_sets, num_keys, rho):
    """Scores log p(z|x) - log p(z) of x ~ N(0, 1), z = rho x + noise of unit variance in all; and the true MI."""
    label = torch.randint(num_keys, (num_queries,))
    x = rand(batches, num_queries, num_sets, num_keys)
    own = x.gather(-1, label[:, None, None].expand(batches, -1, num_sets, 1))
    spread = math.sqrt(1 - rho**2)
    z = rho * own + spread * rand(*own.shape)
    return Normal(rho * x, spread).log_prob(z) - Normal(0, 1).log_prob(z), label, -0.5 * math.log(1 - rho**2)


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("num_keys", [2, 8, 64])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9, 0.99])
def test_bounds_hold_the_mutual_information_between_them(num_keys, rho):
    scores, label, mutual = gaussian_pairs(400, 16, 2, num_keys, rho)
    lower, upper = info_nce(scores, label), leave_one_out(scores, label)
    assert lower.shape == upper.shape == (400,)
    (low, low_error), (high, high_error) = mean_and_error(lower), mean_and_error(upper)
    assert low <= mutual + 4 * low_error
    assert high >= mutual - 4 * high_error
    assert high - math.log(num_keys / (num_keys - 1)) >= mutual - 4 * high_error  # Poole's, the tighter one
    assert lower.max() <= math.log(num_keys) + 1e-12 and (lower < upper).all()
    if rho == 0.99 and num_keys == 2:  # no bound from N keys can show more than log N
        assert 0.8 * math.log(2) < low < mutual / 2


def test_both_bounds_are_close_to_a_small_mutual_information_when_keys_are_many():
    scores, label, mutual = gaussian_pairs(400, 8, 1, 256, 0.4)
    for bound in (info_nce, leave_one_out):
        mean, error = mean_and_error(bound(scores, label))
        assert error < 0.01 and abs(mean - mutual) < 4 * error + 0.01
    own = scores.gather(-1, label[:, None, None].expand(400, -1, 1, 1)).mean()  # the same samples without a bound
    assert abs(info_nce(scores, label).mean() - own) < 0.01


def test_independent_variables_have_no_information():
    label = torch.randint(4, (6,))
    scores = torch.full((6, 3, 4), 1.7, dtype=torch.float64)
    close(info_nce(scores, label), torch.tensor(0.0, dtype=torch.float64))
    close(leave_one_out(scores, label), torch.tensor(math.log(4 / 3), dtype=torch.float64))


def plain_bounds(scores, label):
    """I_NCE and I_L1O of scores [Q, S, N] in plain Python, the latter with Poole's log(N - 1) besides."""
    nce, l1o, poole, terms = 0.0, 0.0, 0.0, 0
    for query, own in zip(scores.tolist(), label.tolist(), strict=True):
        for key_set in query:
            h = [math.exp(score) for score in key_set]
            others = sum(h) - h[own]
            nce += math.log(h[own] / (sum(h) / len(h)))
            l1o += math.log(len(h) * h[own] / others)
            poole += math.log(h[own] / (others / (len(h) - 1)))
            terms += 1
    return nce / terms, l1o / terms, poole / terms


@pytest.mark.parametrize("num_keys", [2, 3, 7])
def test_bounds_are_their_equations(num_keys):
    scores, label = 2 * rand(3, 5, 4, num_keys), torch.randint(num_keys, (5,))
    lower, upper = info_nce(scores, label), leave_one_out(scores, label)
    for agent in range(3):
        nce, l1o, poole = plain_bounds(scores[agent], label)
        assert lower[agent].item() == pytest.approx(nce, abs=1e-12)
        assert upper[agent].item() == pytest.approx(l1o, abs=1e-12)
        assert upper[agent].item() - poole == pytest.approx(math.log(num_keys / (num_keys - 1)), abs=1e-12)
    close(info_nce(scores[0], label), lower[0])  # without the leading axis the same
    close(leave_one_out(scores[0], label), upper[0])
    close(info_nce(scores + 100, label), lower)  # a constant in the log of h does not matter
    for bound in (info_nce, leave_one_out):
        assert torch.isfinite(bound(1e4 * scores, label)).all()


def test_info_nce_is_cross_entropy():
    scores, label = rand(5, 4, 3), torch.randint(3, (5,))
    expected = F.cross_entropy(scores.flatten(0, 1), label.repeat_interleave(4))  # eq. 16
    close(math.log(3) - info_nce(scores, label), expected)


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_similarity_scores_are_laid_out_query_set_task(kind):
    query, keys = rand(2, 5, 6), rand(2, 3, 4, 6)  # of two agents
    scores = similarity_scores(query, keys, kind, temperature=0.5)
    assert scores.shape == (2, 5, 3, 4)
    for i, q, s, n in [(0, 0, 0, 0), (1, 4, 2, 3), (0, 3, 1, 2), (1, 0, 2, 1)]:
        product = sum(a * b for a, b in zip(query[i, q].tolist(), keys[i, s, n].tolist(), strict=True))
        if kind == "cosine":
            product /= math.hypot(*query[i, q].tolist()) * math.hypot(*keys[i, s, n].tolist())
        assert scores[i, q, s, n].item() == pytest.approx(product / 0.5, abs=1e-12)
    close(similarity_scores(query[0], keys[0], kind, 0.5), scores[0])
    with torch.no_grad():
        bounded = similarity_scores(100 * query, keys, "cosine", 1.0)
    assert bounded.abs().max() <= 1 + 1e-12


def test_queries_that_equal_their_tasks_key_are_found():
    keys = 5 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4)  # [S, N, d], the same in both sets
    label = torch.tensor([2, 0, 3, 3, 1])
    scores = similarity_scores(keys[0, label], keys, "dot", 1.0)
    assert scores.shape == (5, 2, 4)
    assert cl_accuracy(scores, label) == 1 and info_nce(scores, label).item() == pytest.approx(math.log(4), abs=1e-9)
    assert cl_accuracy(scores, (label + 1) % 4) == 0


def test_cl_accuracy_counts():
    scores = torch.tensor([[[3.0, 1, 2], [1, 3, 2]], [[0, 1, 2], [2, 1, 3]]])  # best [[0, 1], [2, 2]]; [Q, S, N]
    assert cl_accuracy(scores, torch.tensor([0, 2])).item() == 0.75
    assert cl_accuracy(torch.stack([scores, -scores]), torch.tensor([1, 2])).tolist() == [0.75, 0.25]


# ----------------------------------------------------------------------------------------------------------------------
# Divergences, L_G and L_L


def test_divergences_are_those_of_torch():
    mean, std, mean_to, std_to = rand(3, 4, 5), rand(3, 4, 5).exp(), rand(3, 4, 5), rand(3, 4, 5).exp()
    close(kl_to_prior(mean, std), kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean())
    close(kl_between(mean, std, mean_to, std_to), kl_divergence(Normal(mean, std), Normal(mean_to, std_to)).mean())
    close(kl_between(mean, std, 0 * mean, 0 * std + 1), kl_to_prior(mean, std))
    assert abs(kl_between(mean, std, mean, std)) < 1e-12 and abs(kl_to_prior(0 * mean, 0 * std + 1)) < 1e-12


def test_kl_between_takes_one_target_for_all_agents():
    mean, std, mean_to, std_to = rand(3, 4, 5), rand(3, 4, 5).exp(), rand(4, 5), rand(4, 5).exp()
    parts = [kl_divergence(Normal(mean[i], std[i]), Normal(mean_to, std_to)) for i in range(3)]
    close(kl_between(mean, std, mean_to, std_to), torch.stack(parts).mean())


def test_divergences_are_those_of_samples():
    mean, std = rand(2, 3), rand(2, 3).exp()
    mean_to, std_to = rand(2, 3), rand(2, 3).exp() + 0.5
    z = mean + std * rand(100_000, 2, 3)
    for target, got in (
        (Normal(mean_to, std_to), kl_between(mean, std, mean_to, std_to)),
        (Normal(torch.zeros_like(mean), 1.0), kl_to_prior(mean, std)),
    ):
        estimate, error = mean_and_error((Normal(mean, std).log_prob(z) - target.log_prob(z)).mean((1, 2)))
        assert abs(estimate - got.item()) < 4 * error < 0.1


def contrast(num_agents=3):
    label = torch.randint(4, (6,))
    posterior = lambda *shape: (rand(*shape), rand(*shape).exp())  # noqa: E731
    return rand(6, 2, 4), rand(num_agents, 6, 2, 4), label, posterior(9, 5), posterior(num_agents, 9, 5)


def test_global_loss_is_equation_16():
    scores, _, label, (mean, std), _ = contrast()
    cross_entropy = F.cross_entropy(scores.flatten(0, 1), label.repeat_interleave(2))
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    got = [global_loss(scores, label, mean, std, alpha) for alpha in (0.0, 0.1, 1.0)]
    constant = got[0] - cross_entropy  # whatever is constant in the scores has no gradient
    close(constant, torch.tensor(-math.log(4), dtype=torch.float64))
    close(got[1] - got[0], 0.1 * kl)
    close(got[2] - got[0], kl)


def test_local_loss_is_the_mean_over_agents_of_what_its_form_says():
    scores, scores_local, label, posterior, posterior_local = contrast()
    expected = {"infonce": 0.0, "cmi": 0.0, "kl": 0.0}
    for i in range(3):
        own = Normal(posterior_local[0][i], posterior_local[1][i])
        kl_own = kl_divergence(own, Normal(0.0, 1.0)).mean().item()
        kl_global = kl_divergence(Normal(*posterior), Normal(0.0, 1.0)).mean().item()
        expected["infonce"] += (-plain_bounds(scores_local[i], label)[0] + 0.1 * kl_own) / 3
        # the score of a concatenation is the sum of its parts'; KL as mean over all dimensions of both
        joint = plain_bounds(scores + scores_local[i], label)[0]
        expected["cmi"] += (-joint + 0.1 * (kl_own + kl_global) / 2) / 3
        expected["kl"] += kl_divergence(own, Normal(*posterior)).mean().item() / 3
    for form, value in expected.items():
        got = local_loss(form, scores, scores_local, label, posterior, posterior_local, 0.1)
        assert got.item() == pytest.approx(value, abs=1e-12), form


@pytest.mark.parametrize("form", ["infonce", "cmi", "kl"])
def test_local_loss_sends_no_gradient_to_what_is_global(form):
    scores, scores_local, label, posterior, posterior_local = contrast()
    of_z = [scores, *posterior]
    of_each = [scores_local, *posterior_local]
    for tensor in of_z + of_each:
        tensor.requires_grad_()
    local_loss(form, scores, scores_local, label, posterior, posterior_local, 0.1).backward()
    assert all(tensor.grad is None for tensor in of_z)
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in of_each[1:])
    assert (scores_local.grad is None) == (form == "kl")


def test_local_loss_of_equation_24_has_the_gradient_of_the_whole_equation():
    """I_L1O(z; c), left out because it depends on z alone, would change nothing."""
    scores, scores_local, label, posterior, posterior_local = contrast()
    scores_local.requires_grad_()
    local_loss("cmi", scores, scores_local, label, posterior, posterior_local, 0.0).backward()
    got, scores_local.grad = scores_local.grad, None
    (leave_one_out(scores, label) - info_nce(scores + scores_local, label)).mean().backward()
    close(got, scores_local.grad)


# ----------------------------------------------------------------------------------------------------------------------
# PPO's losses


def test_policy_loss_by_hand():
    ratio = torch.tensor([[1.0, 1.1, 1.5, 1.5, 0.5, 0.5], [1.3, 0.7, 1.3, 0.7, 1.0, 2.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -2.0, 2.0, -2.0, 3.0, -3.0], [0.0, 1.0, 1.0, -1.0, 5.0, -0.5]]).double()
    # clipped at 0.8 and 1.2 only where that lowers the surrogate
    surrogate = [[1.0, -2.2, 2.4, -3.0, 1.5, -2.4], [0.0, 0.7, 1.2, -0.8, 5.0, -1.0]]
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 0.0, 0.0, 6.0]]).double()
    old, factor = rand(2, 6), 0.05
    log_prob = (old + ratio.log()).requires_grad_()
    loss = policy_loss(log_prob, old, advantage, entropy, 0.2, factor)
    expected = -(sum(surrogate[0]) / 6 + sum(surrogate[1]) / 6) - factor * (3.5 + 1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    free = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1]])  # advantage 0 has no gradient either
    close(log_prob.grad, -free * ratio * advantage / 6)


def test_policy_loss_rewards_entropy_and_weighs_agents_alike():
    old, advantage, entropy = rand(3, 8), rand(3, 8), rand(3, 8).requires_grad_()
    log_prob = old + 0.1 * rand(3, 8)
    loss = policy_loss(log_prob, old, advantage, entropy, 0.2, 0.5)
    loss.backward()
    close(entropy.grad, torch.full((3, 8), -0.5 / 8, dtype=torch.float64))
    args = [(log_prob[i : i + 1], old[i : i + 1], advantage[i : i + 1], entropy[i : i + 1]) for i in range(3)]
    close(loss, sum(policy_loss(*own, 0.2, 0.5) for own in args))


def huber(error, delta):
    return error**2 / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)


def test_value_loss_by_hand():
    #          unclipped; clipped up, target above; clipped up, target below; clipped down, both sides; beyond delta
    value = [0.1, 1.0, 1.0, -1.0, -1.0, 0.15, 30.0]
    target = [1.0, 2.0, 0.0, -2.0, 1.0, -40.0, 3.0]
    # the worse of value and clipped value (0.2 from an old value of 0)
    worse = [0.1, 0.2, 1.0, -0.2, -1.0, 0.15, 30.0]
    expected = [huber(w - t, 10.0) for w, t in zip(worse, target, strict=True)]
    assert expected[-2] == 10 * (40.15 - 5) and expected[-1] == 10 * (27 - 5)
    shape = (7, 1, 1)  # [T, E, n]
    new = torch.tensor(value, dtype=torch.float64).view(shape).requires_grad_()
    old, goal = torch.zeros(shape, dtype=torch.float64), torch.tensor(target, dtype=torch.float64).view(shape)
    loss = value_loss(new, old, goal, 0.2, 10.0)
    assert loss.item() == pytest.approx(sum(expected) / 7, abs=1e-12)
    loss.backward()
    # none where the clipped value is the worse one
    gradient = torch.tensor([-0.9, 0.0, 1.0, 0.0, -2.0, 10.0, 10.0], dtype=torch.float64) / 7
    close(new.grad.flatten(), gradient)


def test_value_loss_against_loops():
    value, old, target = 3 * rand(4, 3, 2), rand(4, 3, 2), 3 * rand(4, 3, 2)
    total = 0.0
    for v, o, t in zip(value.flatten().tolist(), old.flatten().tolist(), target.flatten().tolist(), strict=True):
        clipped = o + min(max(v - o, -0.3), 0.3)
        total += max(huber(v - t, 1.5), huber(clipped - t, 1.5)) / 24
    assert value_loss(value, old, target, 0.3, 1.5).item() == pytest.approx(total, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def plain_nets(mlp):
    """The perceptrons of an AgentMLP as separate torch modules: one per agent, or the shared one."""
    nets = []
    for i in range(len(mlp.weights[0])):
        layers = []
        for k, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
            linear = nn.Linear(*weight[i].shape)
            linear.weight.data, linear.bias.data = weight[i].detach().T.clone(), bias[i, 0].detach().clone()
            layers.append(linear)
            if k < len(mlp.weights) - 1:
                layers.append(nn.ReLU())
                layers += [nn.LayerNorm(weight.shape[-1], elementwise_affine=False)] if mlp.norm else []
        nets.append(nn.Sequential(*layers))
    return nets


def plain_input(mlp, i, x):
    if not mlp.shared:
        return x
    agent = torch.zeros(len(x), mlp.num_agents, dtype=x.dtype)
    agent[:, i] = 1
    return torch.cat([x, agent], -1)


def plain_forward(mlp, i, x):
    return plain_nets(mlp)[0 if mlp.shared else i](plain_input(mlp, i, x))


def make_mlp(shared, norm):
    mlp = AgentMLP(3, [5, 8, 6, 4], head_gain=1.0, norm=norm, shared=shared).double()
    for bias in mlp.biases:
        nn.init.normal_(bias)
    return mlp


@own_or_shared
@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
def test_agent_mlp_is_separate_perceptrons(shared, norm):
    mlp = make_mlp(shared, norm)
    nets = plain_nets(mlp)
    assert len(nets) == (1 if shared else 3)
    x, target = rand(3, 10, 5), rand(3, 10, 4)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.01, eps=1e-5, fused=True)
    plain = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=0.01, eps=1e-5)
    for _ in range(2):
        out = mlp(x)
        expected = torch.stack([nets[0 if shared else i](plain_input(mlp, i, x[i])) for i in range(3)])
        close(out, expected, 1e-10)
        optimizer.zero_grad()
        plain.zero_grad()
        (out - target).square().sum().backward()
        (expected - target).square().sum().backward()
        for i, net in enumerate(nets):
            for k, linear in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
                close(mlp.weights[k].grad[i], linear.weight.grad.T, 1e-9)
                close(mlp.biases[k].grad[i, 0], linear.bias.grad, 1e-9)
        optimizer.step()
        plain.step()
        for i, net in enumerate(nets):
            for k, linear in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
                close(mlp.weights[k][i], linear.weight.T, 1e-8)
                close(mlp.biases[k][i, 0], linear.bias, 1e-8)


@own_or_shared
def test_agent_mlp_starts_orthogonal_with_its_gains(shared):
    mlp = AgentMLP(3, [5, 8, 6, 4], head_gain=0.01, norm=True, shared=shared)
    for k, (weight, gain) in enumerate(zip(mlp.weights, (math.sqrt(2), math.sqrt(2), 0.01), strict=True)):
        assert len(weight) == (1 if shared else 3)
        for w in weight:
            small = w if w.shape[0] <= w.shape[1] else w.T
            torch.testing.assert_close(small @ small.T, gain**2 * torch.eye(len(small)), rtol=1e-4, atol=1e-6)
        assert shared or (weight[0] - weight[1]).abs().max() > 1e-4
        assert not mlp.biases[k].any()


@own_or_shared
@pytest.mark.parametrize("max_norm", [1e-3, 3.0, 1e6])
def test_gradients_are_clipped_for_each_agent_as_torch_does(shared, max_norm):
    actor = Actor(3, 5, 4, BOX, 8, shared).double()
    parameters = list(actor.parameters())
    nets = 1 if shared else 3
    size = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)[:nets]  # so that 3.0 clips some and not others
    for p in parameters:
        p.grad = rand(*p.shape) * size.view(-1, *[1] * (p.dim() - 1))
    copies = [[nn.Parameter(p[i].detach().clone()) for p in parameters] for i in range(nets)]
    for i, own in enumerate(copies):
        for mine, p in zip(own, parameters, strict=True):
            mine.grad = p.grad[i].clone()
    expected = torch.stack([nn.utils.clip_grad_norm_(own, max_norm) for own in copies])
    close(clip_gradient_per_agent(parameters, max_norm), expected)
    for i, own in enumerate(copies):
        for mine, p in zip(own, parameters, strict=True):
            close(p.grad[i], mine.grad)


@own_or_shared
def test_box_actor_is_a_normal_with_free_log_std(shared):
    actor, obs, z = Actor(3, 5, 4, BOX, 8, shared).double(), rand(3, 10, 5), rand(3, 10, 4)
    assert actor.action_dim == 2 and torch.equal(actor.log_std, torch.full_like(actor.log_std, -0.5))
    nn.init.normal_(actor.log_std)
    seen = inputs_of(actor.mlp)
    policy, action = actor(obs, z), rand(3, 10, 2)
    assert policy.log_prob(action).shape == policy.entropy().shape == (3, 10)
    assert seen[0].shape == (3, 10, 9) and torch.equal(seen[0][..., 5:], z)  # z goes in as it is
    for i in range(3):
        log_std = actor.log_std[0 if shared else i, 0]
        mean = plain_forward(actor.mlp, i, seen[0][i])
        close(policy.mode[i], mean, 1e-10)
        gauss = -0.5 * ((action[i] - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
        close(policy.log_prob(action)[i], gauss.sum(-1), 1e-9)
        close(policy.entropy()[i], (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(10), 1e-10)
    assert 0 < policy.mode.abs().max() < 0.1  # a small head: all actions open at first
    for changed in (actor(obs.flip(-1), z), actor(obs, z.flip(-1))):
        assert (changed.mode - policy.mode).abs().max() > 1e-4


@own_or_shared
def test_discrete_actor_is_categorical(shared):
    actor, obs, z = Actor(3, 5, 4, DISCRETE, 8, shared), torch.randn(3, 10, 5), torch.randn(3, 10, 4)
    assert actor.discrete and actor.action_dim == 5 and not hasattr(actor, "log_std")
    policy = actor(obs, z)
    action = policy.sample()
    assert action.shape == policy.mode.shape == (3, 10) and action.dtype == torch.int64
    assert policy.log_prob(action).shape == policy.entropy().shape == (3, 10)
    every = torch.stack([policy.log_prob(torch.full((3, 10), a)) for a in range(5)], -1)  # [n, batch, 5]
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(3, 10))
    torch.testing.assert_close(policy.entropy(), -(every.exp() * every).sum(-1))
    assert torch.equal(policy.mode, every.argmax(-1))
    assert policy.entropy().min() > 0.99 * math.log(5)
    policy.log_prob(action).sum().backward()
    assert all(p.grad is not None for p in actor.parameters())


def test_critic_has_one_output_per_agent():
    critic, state, z = Critic(3, 6, 4, 8).double(), rand(7, 2, 6), rand(7, 2, 4)
    first, second, last = critic.layers
    seen = inputs_of(first)
    value = critic(state, z)
    assert value.shape == (7, 2, 3) and torch.equal(seen[0][..., 6:], z)  # z goes in as it is
    x = seen[0]
    for layer in (first, second):
        x = F.layer_norm(F.relu(x @ layer.weight.T + layer.bias), (8,))
    close(value, x @ last.weight.T + last.bias)
    for changed in (critic(state.flip(-1), z), critic(state, z.flip(-1))):
        assert (changed - value).abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.5, 0.99999])
def test_value_norm_is_debiased(beta):
    norm, seen = ValueNorm(beta), [20 * torch.randn(6, 4, 3) + 70 for _ in range(5)]
    for count in range(1, 6):
        norm.update(seen[count - 1])
        mean, std = norm.mean_std()
        weight = [(1 - beta) * beta ** (count - 1 - k) for k in range(count)]
        first = sum(w * r.double().mean() for w, r in zip(weight, seen, strict=False)) / sum(weight)
        square = sum(w * r.double().square().mean() for w, r in zip(weight, seen, strict=False)) / sum(weight)
        torch.testing.assert_close(mean, first.float())
        torch.testing.assert_close(std, (square - first.square()).sqrt().float(), rtol=1e-4, atol=1e-4)
        if beta > 0.9:  # nearly all of the same weight: plain mean and standard deviation of everything seen
            everything = torch.stack(seen[:count])
            torch.testing.assert_close(mean, everything.mean(), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(std, everything.std(unbiased=False), rtol=1e-3, atol=1e-3)


def test_value_norm_of_constant_or_no_returns_stays_usable():
    norm = ValueNorm()
    mean, std = norm.mean_std()
    assert mean == 0 and std > 0
    norm.update(torch.full((3, 2, 2), 5.0))
    mean, std = norm.mean_std()
    assert mean.item() == pytest.approx(5, abs=1e-5) and std.item() == pytest.approx(0.1, abs=1e-6)
    copy = ValueNorm()
    copy.load_state_dict(norm.state_dict())  # it is part of the checkpoint
    assert copy.mean_std() == norm.mean_std()
