"""Food that the agents of a magent_gather run eat in an episode, on every layout, beside random agents.

    python benchmark/food.py runs/RUN

RUN is a run of mg2l_mappo.py. Its agents explore on the prior, infer the layout from that, and then act by the mode of
their policies for one episode; the random ones draw every action uniformly. Eight copies of each layout.
"""

import argparse

import numpy as np
import torch

import mg2l_mappo

COPIES = 8


def eaten(env, task: np.ndarray, act) -> np.ndarray:
    """Pieces of food gone one step before the end of an episode, [E]; act(obs) -> actions [E, n]."""
    obs, _ = env.reset(seed=0, options={"task": task})
    before = np.count_nonzero(env.food, axis=(1, 2))
    for _ in range(env.max_episode_steps - 1):  # with the last step a copy starts again, with all its food
        obs, *_ = env.step(act(obs))
    return before - np.count_nonzero(env.food, axis=(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    run = parser.parse_args().run
    try:
        agents = mg2l_mappo.load_agents(run)
    except ValueError as error:
        parser.error(str(error))
    if agents.args.env_id != "magent_gather":
        parser.error(f"{run}: got a run of {agents.args.env_id}, expected one of magent_gather")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tasks = agents.env.tasks
    task = np.repeat(tasks.test, COPIES)
    env = mg2l_mappo.make_env(agents.args, len(task))
    n, num_steps, latent_dim = env.num_agents, env.max_episode_steps, agents.args.latent_dim
    memory = []
    for episode in range(agents.args.explore_episodes):
        z = agents.args.explore_scale * torch.randn(n, num_steps, len(task), latent_dim)
        memory.append(mg2l_mappo.transitions(mg2l_mappo.rollout(env, agents.actor, task, z, 1 + episode), agents.actor))
    memory = torch.cat(memory)  # [S, E, n, transition_dim]
    memory = list(memory.transpose(0, 1))
    posterior = mg2l_mappo.infer(agents.encoder, memory, agents.args.inference_size, 2, latent_dim)
    z = iter(mg2l_mappo.draw_z(*posterior, num_steps).transpose(0, 1))  # T of [n, E, d]
    trained = eaten(env, task, lambda obs: agents.act(obs, next(z)))
    random = eaten(env, task, lambda obs: rng.integers(env.single_action_space.n, size=(len(task), n)))
    print(f"{'layout':24} {'food':>5} {'trained':>8} {'random':>7} {'ratio':>6}")
    env.reset(seed=0, options={"task": task})
    for k, one in enumerate(tasks.test):
        ours, theirs = (counts[task == one].mean() for counts in (trained, random))
        food = np.count_nonzero(env.food[COPIES * k])
        print(f"{tasks.describe(one):24} {food:5} {ours:8.1f} {theirs:7.1f} {ours / theirs if theirs else np.inf:6.1f}")


if __name__ == "__main__":
    main()
