"""What agents infer, and what they do with it: Fig. 8 to 10, the priorities of eq. 32 and codes, from finished runs.

    python benchmark/analysis.py tsne RUN...         # Fig. 9: representations of up to ten tasks, one column per run
    python benchmark/analysis.py mismatch RUN        # Fig. 10: acting in one hopper on what was inferred in another
    python benchmark/analysis.py trajectories RUN    # Fig. 8: on the prior, while exploring, after exploration
    python benchmark/analysis.py priorities RUN      # which transitions count, and whether drawing by that is of use
    python benchmark/analysis.py codes RUN...        # what return is lost to inference, and what to the policy

Each but the last writes a PNG and an SVG into --out; all print their numbers. Agents explore as in the meta-test of
their run.
"""

import argparse
import copy
import importlib
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import COLOURS, FLOOR, interval, resample
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestCentroid

import envs

SCRIPTS = ("mg2l_mappo", "mg2l_ablations", "ma_pearl", "mix_mate")
PHASES = ("on the prior, nothing explored", "exploring, on what was seen so far", "after exploration")
AGENT, TARGET, OTHER = COLOURS["task_given"], COLOURS["mg2l_mappo"], "#999999"
# for tasks, Okabe and Ito's colours again, and two more
MANY = ["#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#F0E442", "#999999", "#882255"]


def expect(fine: bool, name, got, expected: str) -> None:
    """Raises ValueError, in one line, unless `fine`."""
    if not fine:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def load(run: Path, scripts=SCRIPTS, env_ids=envs.ENV_IDS):
    """The script that made a run, as a module, and its agents. Raises ValueError unless it is one of these."""
    expect((run / "args.json").is_file(), run, "no args.json there", "a run folder")
    args = json.loads((run / "args.json").read_text())
    expect(args.get("script") in scripts, run, f"a run of {args.get('script')}", f"one of {', '.join(scripts)}")
    expect(args["env_id"] in env_ids, run, f"a run on {args['env_id']}", f"one on {', '.join(env_ids)}")
    module = importlib.import_module(args["script"])
    return module, module.load_agents(run)


@torch.no_grad()
def explore(module, agents, env, task: np.ndarray, seed: int) -> list[torch.Tensor]:
    """Exploration of a meta-test run in every copy of `env`, on tasks [E]: what they went through, E of [S, n, dim]."""
    torch.manual_seed(seed)
    args, actor, encoder = agents.args, agents.actor, agents.encoder
    memory = [torch.zeros(0, env.num_agents, len(encoder.mean)) for _ in task]
    for episode in range(args.explore_episodes):
        if module.SCRIPT == "mix_mate":
            recalled = None if args.reset_per_episode or not episode else module.recall(encoder, memory)
            data = module.rollout_recurrent(env, actor, encoder, task, seed + episode, recalled)
            lived = module.own_past(actor, data.obs, data.action, data.reward).permute(1, 2, 0, 3)  # [T, E, n, dim]
        else:
            z = args.explore_scale * torch.randn(env.num_agents, env.max_episode_steps, env.num_envs, args.latent_dim)
            data = module.rollout(env, actor, task, z, seed + episode)
            lived = module.transitions(data, actor)
        kept = module.first_episode(data.ended)  # [T, E]
        memory = [torch.cat([old, lived[kept[:, e], e]]) for e, old in enumerate(memory)]
    return memory


def infer(module, agents, memory, size: int | None = None, encoder=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posteriors that agents act on after exploration, [C, n, E, d]."""
    args = agents.args
    size, encoder = size or args.inference_size, encoder or agents.encoder
    return module.infer(encoder, memory, size, args.rollout_contexts, args.latent_dim)


# ----------------------------------------------------------------------------------------------------------------------
# Fig. 9


@torch.no_grad()
def representations(module, agents, memory: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Means of what is inferred from each of E memories: z^i of up to eight agents, and z where it is, each [E, d]."""
    encoder, size = agents.encoder, getattr(agents.args, "inference_size", None)
    if module.SCRIPT == "mix_mate":
        local, whole = module.mean_and_std(module.recall(encoder, memory)[0])[0], []
    else:
        local, whole = infer(module, agents, memory)[0][0], []  # [n, E, d], of the first context
        for own in memory:
            context = own[torch.randperm(len(own))[:size]].transpose(0, 1)[None]  # [1, n, B, dim]
            of_all = encoder.local_posterior(context) if module.SCRIPT == "ma_pearl" else [encoder.embed(context)]
            whole.append(encoder.global_posterior(*of_all)[0])
    found = {f"$z^{i + 1}$": own.numpy() for i, own in enumerate(local[:8])}
    return found | ({"global $z$": torch.cat(whole).numpy()} if whole else {})


def separation(z: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """How far apart tasks are in z [M, d], label [M]: silhouette score of all, and accuracy of the nearest centroid.

    The centroids are those of every second row, and the others are classified.
    """
    centroids = NearestCentroid().fit(z[::2], label[::2])
    return float(silhouette_score(z, label)), float(centroids.score(z[1::2], label[1::2]))


def tsne(args) -> None:
    """Representations of up to ten test tasks in two dimensions; the numbers are of the space itself."""
    expect(args.contexts >= 4, "contexts", args.contexts, "at least 4")
    columns = []
    for run in args.runs:
        module, agents = load(run)
        tasks, env = agents.env.tasks.test[:10], module.make_env(agents.args, args.contexts)
        memory = [m for t in tasks for m in explore(module, agents, env, np.full(args.contexts, t), args.seed + t)]
        columns.append((module.SCRIPT, tasks, representations(module, agents, memory)))
    rows = sorted({name for *_, found in columns for name in found}, key=lambda name: (name[0] == "g", name))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(3.4 * len(columns), 3.2 * len(rows)), squeeze=False)
    for k, (script, tasks, found) in enumerate(columns):
        label = np.repeat(np.arange(len(tasks)), args.contexts)
        for axis, name in zip(axes[:, k], rows, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{script}: {name}", fontsize=10, color=COLOURS.get(script, "black"))
            if name not in found:
                axis.set_xlabel("has none")
                continue
            silhouette, probe = separation(found[name], label)
            axis.set_xlabel(f"silhouette {silhouette:.2f}, probe {probe:.2f}")
            print(f"{args.runs[k]}: {name.replace('$', '')} {axis.get_xlabel()}")
            perplexity = min(30, (len(label) - 1) / 3)
            flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(found[name])
            for t, task in enumerate(tasks):
                axis.scatter(*flat[label == t].T, s=5, color=MANY[t], label=f"task {task}")
        dots = dict(handles=axes[0, k].get_legend_handles_labels()[0], markerscale=2, handletextpad=0, columnspacing=1)
        axes[-1, k].legend(**dots, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, fontsize=6)
    env_id = agents.args.env_id
    save(figure, args.out / f"tsne_{env_id}", f"t-SNE on {env_id}, {args.contexts} contexts per task")


# ----------------------------------------------------------------------------------------------------------------------
# Fig. 10


def advantage(matrix: np.ndarray) -> list[float]:
    """For each task of returns [source, target]: how much more it is to act on one's own z than on another source's.

    What is due to the source alone or to the target alone is taken off: a context or a task may be good by itself.
    """
    rest = matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()
    return (np.diag(rest) * len(matrix) / (len(matrix) - 1)).tolist()


@torch.no_grad()
def mismatch_returns(module, agents, env, copies: int, seed: int) -> np.ndarray:
    """Eq. 33, undiscounted, for the tasks of `env`, which has `copies` for each: mean returns [source, target]."""
    num_tasks = len(env.tasks)
    posterior = infer(module, agents, explore(module, agents, env, np.repeat(np.arange(num_tasks), copies), seed))
    columns = []
    for target in range(num_tasks):  # on z of every source, from the same starts in every target
        z, task = module.draw_z(*posterior, env.max_episode_steps), np.full(env.num_envs, target)
        start, greedy = seed + agents.args.explore_episodes, not agents.args.eval_sample
        data = module.rollout(env, agents.actor, task, z, start, greedy=greedy)
        columns.append(module.episodic_return(data).view(num_tasks, copies).mean(1).numpy())
    return np.stack(columns, 1)


def mismatch(args) -> None:
    """For each parameter of hopper_param, tasks that vary it alone: act in one on what was inferred in another."""
    module, agents = load(args.run, SCRIPTS[:3], ("hopper_param",))
    expect(args.tasks >= 2, "tasks", args.tasks, "at least 2")
    expect(args.copies >= 1, "copies", args.copies, "at least 1")
    grid, names = np.linspace(0.5, 1.5, args.tasks), agents.env.tasks.names
    distance = np.abs(grid[:, None] - grid)
    figure, axes = plt.subplots(2, 3, figsize=(11, 7))
    panels, step = {"distance of the parameters": distance}, grid[1] - grid[0]
    for p, name in enumerate(names):
        factors = np.ones((args.tasks, len(names)))
        factors[:, p] = grid
        env = envs.make("hopper_param", args.tasks * args.copies, 0, factors=[tuple(row) for row in factors.tolist()])
        matrix = mismatch_returns(module, agents, env, args.copies, args.seed)
        gain, low, high = advantage(matrix), matrix.min(), matrix.max()
        print(f"{name}: returns {low:.1f} to {high:.1f}, diagonal {np.diag(matrix).mean():.1f}, ", end="")
        print(f"its advantage {interval(gain)}")
        panels[f"{name}: advantage {np.mean(gain):.1f}"] = normal = (matrix - low) / max(high - low, 1e-9)
        apart = range(args.tasks)  # in steps of the grid
        fading = [normal[np.isclose(distance, k * step)].mean() for k in apart]
        axes[1, 2].plot([k * step for k in apart], fading, "o-", markersize=3, color=MANY[p], label=name)
    for axis, (title, matrix) in zip(axes.flat, panels.items(), strict=False):
        extent = (0.5 - step / 2, 1.5 + step / 2, 1.5 + step / 2, 0.5 - step / 2)
        figure.colorbar(axis.imshow(matrix, extent=extent, cmap="viridis"), ax=axis, shrink=0.8)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="target: factor", ylabel="source: factor", xticks=[0.5, 1, 1.5], yticks=[0.5, 1, 1.5])
    axes[1, 2].set(xlabel="distance of source and target", ylabel="mean normalised return")
    axes[1, 2].legend(fontsize=8)
    save(figure, args.out / "mismatch", f"{module.SCRIPT}: return on another task's z, from 0 to 1 within each matrix")


# ----------------------------------------------------------------------------------------------------------------------
# Fig. 8


def episode(agents, task: int, seed: int, z_of) -> np.ndarray:
    """The transitions [T, n, dim] of an episode on z_of(step, transitions so far) [n, 1, d]; actions are the mode."""
    obs, _ = agents.env.reset(seed=seed, options={"task": np.array([task])})
    lived, ended = np.zeros((0, agents.env.num_agents, len(agents.encoder.mean)), np.float32), False
    while not ended:
        action = agents.act(obs, z_of(len(lived), torch.from_numpy(lived)))
        led_to, reward, terminated, truncated, info = agents.env.step(action)
        ended = bool(terminated[0] or truncated[0])
        now = [obs[0], action[0], reward[0][:, None], (info["final_obs"] if ended else led_to)[0]]
        lived, obs = np.concatenate([lived, np.concatenate(now, -1)[None]]), led_to
    return lived


@torch.no_grad()
def three_phases(module, agents, task: int, seed: int) -> list[np.ndarray]:
    """The episodes of Fig. 8, all from one start: transitions [T, n, dim] on the prior, while and after exploring."""
    torch.manual_seed(seed)
    num_steps, held = agents.env.max_episode_steps, {}

    def while_exploring(step, lived):
        if step % max(1, num_steps // 100) == 0:  # a hundred times
            held["z"] = agents.infer([lived])
        return held["z"]

    memory = explore(module, agents, agents.env, np.array([task]), seed + 1)
    z = module.draw_z(*infer(module, agents, memory), num_steps)
    phases = (lambda step, lived: agents.prior(1)), while_exploring, (lambda step, lived: z[:, step])
    return [episode(agents, task, seed, z_of) for z_of in phases]


def positions(env, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a particle environment, from observations [T, n, obs_dim]: agents [T, n, 2], fixed bodies, preys [T, ., 2].

    A prey that nobody sees is NaN.
    """
    own, fixed = obs[..., 2:4], 4 + 2 * (env.num_entities - env.num_movers)
    first = obs.shape[-1] if env.env_id == "spread_target" else fixed + 3 * (env.num_agents - 1)
    preys = obs[..., first:].reshape(*obs.shape[:2], -1, 3)  # [T, n, prey, (x, y, seen)]
    with np.errstate(invalid="ignore"):
        preys = ((own[:, :, None] + preys[..., :2]) * preys[..., 2:]).sum(1) / preys[..., 2:].sum(1)
    return own, obs[:, 0, 4:fixed].reshape(len(obs), -1, 2) + own[:, :1], preys


def draw_paths(axis, env, obs: np.ndarray, task: int) -> None:
    """Everybody's path in an episode of a particle environment; a mark where it ends."""
    own, fixed, preys = positions(env, obs)
    hunting = env.env_id == "hunting_target"
    for centre in fixed[0] if hunting else ():
        axis.add_patch(plt.Circle(centre, env.size[-1, 0], color="#E4E4E4"))
    for path in own.swapaxes(0, 1):
        axis.plot(*path.T, color=AGENT, linewidth=1, alpha=0.8)
        axis.plot(*path[-1], "o", color=AGENT, label="agent")
    for path, wanted in zip((preys if hunting else fixed).swapaxes(0, 1), env.tasks.parameters[task], strict=True):
        path, colour = path[np.isfinite(path[:, 0])], TARGET if wanted else OTHER
        axis.plot(*path.T, color=colour, linewidth=0.6)
        axis.plot(*path[-1:].T, "*", markersize=10, color=colour, label="target" if wanted else "other")
    axis.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")


def trajectories(args) -> None:
    """Paths of the particles, or the speed of the cheetah, before, while and after agents explore."""
    module, agents = load(args.run, SCRIPTS[:3], ("hunting_target", "spread_target", "halfcheetah_dir"))
    env, obs_dim, tasks = agents.env, agents.env.single_observation_space.shape[0], agents.env.tasks.test[:4]
    cheetah = env.env_id == "halfcheetah_dir"
    rows = 1 if cheetah else len(tasks)
    figure, axes = plt.subplots(rows, 3, figsize=(10, 3.3 * rows), squeeze=False, sharex=True, sharey=True)
    for row, task in enumerate(tasks):
        for column, lived in enumerate(three_phases(module, agents, task, args.seed)):
            axis, obs, total = axes[0 if cheetah else row, column], lived[..., :obs_dim], lived[..., -obs_dim - 1]
            told = f"task {task}: return {total.mean(1).sum():.1f}"
            print(f"{PHASES[column]}, {told} ({env.tasks.describe(task)})")
            if cheetah:
                name = ("forward", "backward")[row]
                speed = np.convolve(obs[:, 0, -3], np.ones(20) / 20, "valid")  # mean of a second
                axis.plot(np.arange(len(speed)) * env.dt, speed, ("-", "--")[row], color=MANY[row], label=name)
                axis.set(xlabel="time (s)", ylabel="" if column else "forward speed (m/s)")
            else:
                draw_paths(axis, env, obs, task)
            before = axis.get_title() or PHASES[column] * (not row)
            axis.set_title(f"{before}\n{told}".strip(), fontsize=9)
    labels = {label: handle for handle, label in zip(*axes[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=3, fontsize=8)
    save(figure, args.out / f"trajectories_{env.env_id}", f"{module.SCRIPT} on {env.env_id}: one start, three phases")


# ----------------------------------------------------------------------------------------------------------------------
# Eq. 32


@torch.no_grad()
def measure(module, agents, env, task: np.ndarray, memory, sizes: list[int], seed: int) -> dict:
    """Returns and CL accuracies [E] after inference from `size` transitions, {(how they were drawn, size): (both)}.

    Accuracies are means over 16 sets of keys, since one key can be a bad one.
    """
    uniform, found = copy.copy(agents.encoder), {}
    uniform.priorities = lambda own: torch.full(own.shape[:2], 1 / own.shape[1])
    for size in sizes:
        for name, encoder in (("priority", agents.encoder), ("uniform", uniform)):
            torch.manual_seed(seed)
            mean, std = infer(module, agents, memory, size, encoder)
            accuracy = torch.zeros(len(task))
            for order in [torch.randperm(len(task)) for _ in range(16)]:
                shuffled = (mean[:, :, order], std[:, :, order], torch.from_numpy(task)[order])
                accuracy[order] += module.inference_accuracy(*shuffled, agents.args.similarity)[0] / 16
            z = module.draw_z(mean, std, env.max_episode_steps)
            start, greedy = seed + agents.args.explore_episodes, not agents.args.eval_sample
            data = module.rollout(env, agents.actor, task, z, start, greedy=greedy)
            found[name, size] = module.episodic_return(data).numpy(), accuracy.numpy()
    return found


def priorities(args) -> None:
    """How much each transition weighs, and what agents gain from drawing their context by that."""
    module, agents = load(args.run, SCRIPTS[:2])
    known, reward_at = agents.env.tasks.test, agents.env.single_observation_space.shape[0] + agents.actor.action_dim
    expect(args.copies >= 2 * len(known), "copies", args.copies, f"at least two for each of {len(known)} tasks")
    expect(min(args.sizes) >= 1, "sizes", args.sizes, "numbers of at least 1")
    env, task = module.make_env(agents.args, args.copies), np.resize(known, args.copies)
    memory = explore(module, agents, env, task, args.seed)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4))
    with torch.no_grad():
        omega = [agents.encoder.priorities(own.transpose(0, 1)).numpy() for own in memory]  # each [n, S]
    share = np.mean([1 / (w.shape[1] * np.square(w).sum(1)) for w in omega])
    print(f"omega is as wide as if {share:.0%} of the transitions weighed alike and the others nothing")
    pairs = [(np.log(w).ravel(), own[..., reward_at].T.ravel()) for w, own in zip(omega, memory, strict=True)]
    if together := [np.corrcoef(*pair)[0, 1] for pair in pairs if all(np.std(x) > 1e-6 for x in map(np.asarray, pair))]:
        print(f"correlation of log omega with reward, within a run: {np.mean(together):.2f}")
    for e, axis in enumerate(axes[0]):  # the first copies are on different tasks, as far as there are some
        for i, own in enumerate(omega[e]):
            axis.plot(own * len(own), linewidth=0.7, color=MANY[i % len(MANY)], label=f"agent {i + 1}")
        axis.axhline(1, color="black", linewidth=0.5, linestyle=":")
        axis.set(xlabel="transition of exploration", ylabel=r"$\omega_t^i$ times their number")
        axis.set_title(f"a run on task {task[e]}", fontsize=10)
    axes[0, 0].legend(fontsize=7)

    found = measure(module, agents, env, task, memory, args.sizes, args.seed)
    colours, rng = {"priority": COLOURS["mg2l_mappo"], "uniform": COLOURS[FLOOR]}, np.random.default_rng(0)

    def band(axis, values, name):  # values of each size [E]
        axis.plot(args.sizes, [v.mean() for v in values], "o-", markersize=3, color=colours[name], label=name)
        limits = [np.percentile(resample(v, rng), [2.5, 97.5]) for v in values]
        axis.fill_between(args.sizes, *np.transpose(limits), color=colours[name], alpha=0.2, linewidth=0)
        axis.set(xscale="log", xticks=args.sizes, xticklabels=args.sizes, xlabel="transitions in a context")
        axis.minorticks_off()

    for k, (key, digits) in enumerate((("return", 1), ("CL accuracy", 2))):
        drawn = {name: [found[name, size][k] for size in args.sizes] for name in colours}
        gains = [a - b for a, b in zip(*drawn.values(), strict=True)]
        for size, *values in zip(args.sizes, *drawn.values(), gains, strict=True):
            texts = (interval(v, digits) for v in values)
            print(f"{key} from {size} transitions: by priority {next(texts)}, uniformly {next(texts)}, ", end="")
            print(f"difference {next(texts)}")
        for name in colours:
            band(axes[1, k], drawn[name], name)
        axes[1, k].set_ylabel(f"{key} after inference")
        axes[1, k].legend(fontsize=8)
        if key == "return":
            band(axes[1, 2], gains, "priority")
            axes[1, 2].axhline(0, color="black", linewidth=0.5, linestyle=":")
            axes[1, 2].set_ylabel("return: priority less uniform")
    title = f"{module.SCRIPT} on {agents.args.env_id}: weights, and mean and 95 % bootstrap interval"
    save(figure, args.out / "priorities", f"{title} of {args.copies} meta-test runs")


# ----------------------------------------------------------------------------------------------------------------------
# Codes


def read_codes(mean: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How well means of z^i [n, E, d] are read as the codes of their tasks, label [E] in 0 to N - 1.

    A task's code is the median of what an agent infers in it. Returns codes [n, N, d]; which copies have every agent
    nearest to the code of its own task [E]; the most entries of an agent's mean whose sign is not its code's [E].
    """
    code = torch.stack([mean[:, label == k].median(1).values for k in range(int(label.max()) + 1)], 1)  # [n, N, d]
    nearest = torch.cdist(mean, code).argmin(-1)  # [n, E]
    wrong_signs = (mean * code[:, label] < 0).sum(-1)  # [n, E]
    return code, (nearest == label).all(0), wrong_signs.amax(0)


@torch.no_grad()
def returns_on_codes(run: Path, copies: int, seed: int) -> dict[str, np.ndarray]:
    """Groups of a run's meta-test runs, by how z^i was read and by task: returns as inferred and on the code, [2, M].

    Both are from the same starts. A group that nothing fell into is left out.
    """
    module, agents = load(run, SCRIPTS[:2])
    known = agents.env.tasks.test
    expect(copies >= 2 * len(known), "copies", copies, f"at least two for each of {len(known)} tasks")
    env, task = module.make_env(agents.args, copies), np.resize(known, copies)
    label = torch.arange(copies) % len(known)  # [E]
    posterior = infer(module, agents, explore(module, agents, env, task, seed))  # two of [C, n, E, d]
    code, right, wrong_signs = read_codes(posterior[0].mean(0), label)
    on_code = code[:, label][None]  # [1, n, E, d]
    both = []
    for mean, std in (posterior, (on_code, torch.zeros_like(on_code))):
        z = module.draw_z(mean, std, env.max_episode_steps)  # [n, T, E, d]
        start, greedy = seed + agents.args.explore_episodes, not agents.args.eval_sample
        both.append(module.episodic_return(module.rollout(env, agents.actor, task, z, start, greedy=greedy)))
    groups = {
        "all": np.ones(copies, bool),
        "read right, every sign": (right & (wrong_signs == 0)).numpy(),
        "read right, but for some signs": (right & (wrong_signs > 0)).numpy(),
        "read as another task": (~right).numpy(),
    }
    groups |= {f"task {k} ({env.tasks.describe(k)})": task == k for k in known}
    returns = torch.stack(both).numpy()  # [2, E]
    return {name: returns[:, group] for name, group in groups.items() if group.any()}


def codes(args) -> None:
    """Return after inference beside that on the code of the task, by how well z^i was read.

    Of one run the intervals are over its meta-test runs, of several over the runs' means.
    """
    tables = [returns_on_codes(run, args.copies, args.seed) for run in args.runs]
    settings = {tuple(name for name in table if name.startswith("task ")) for table in tables}
    expect(len(settings) == 1, "runs", f"{len(settings)} sets of tasks", "runs of one setting")
    for name in dict.fromkeys(name for table in tables for name in table):
        found = [table[name] for table in tables if name in table]  # each [2, M]
        share = sum(returns.shape[1] for returns in found) / (args.copies * len(tables))
        values = found[0] if len(tables) == 1 else np.stack([returns.mean(1) for returns in found], 1)
        lost = values[1] - values[0]
        inferred, told, lost = (interval(each, 1).replace("seed", "run") for each in (*values, lost))
        print(f"{name}: {share:.0%} of meta-test runs, return {inferred} as inferred, {told} on the code, {lost} lost")


def save(figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05 if figure.legends else 0, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=110, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
    print(f"figure: {path.with_suffix('.png')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function in (tsne, mismatch, trajectories, priorities, codes):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        if function in (tsne, codes):
            command.add_argument("runs", nargs="+", type=Path, help="run folders")
        else:
            command.add_argument("run", type=Path, help="run folder")
        if function is tsne:
            command.add_argument("--contexts", type=int, default=100, help="contexts per task")
        if function is mismatch:
            command.add_argument("--tasks", type=int, default=10, help="tasks per parameter")
            command.add_argument("--copies", type=int, default=8, help="meta-test runs per source and target")
        if function is priorities:
            command.add_argument("--copies", type=int, default=96, help="meta-test runs")
            command.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="of a context")
        if function is codes:
            command.add_argument("--copies", type=int, default=300, help="meta-test runs")
        else:
            command.add_argument("--out", type=Path, default=Path("benchmark/results"), help="folder to write into")
        command.add_argument("--seed", type=int, default=0, help="of exploration and test")
    args = parser.parse_args()
    try:
        args.function(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
