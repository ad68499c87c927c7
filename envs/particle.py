"""hunting_target and spread_target: the multi-agent particle environment (MPE), batched over copies in NumPy.

The physics is that of mpe2 (https://github.com/Farama-Foundation/MPE2), equal to it bit for bit with the walls off;
the tasks and rewards are those of the MG2L paper, appendix B. Arrays keep the copies last, `[2, entity, E]`, so that
every operation runs over contiguous copies. Lengths are in MPE's units: the arena is [-1, 1] x [-1, 1].
"""

from itertools import combinations

import gymnasium as gym
import numpy as np

from envs.meta_env import MetaVectorEnv, TaskSet

DT, DAMPING = 0.1, 0.25  # seconds a step; share of the velocity lost in it
CONTACT_FORCE, CONTACT_MARGIN = 100.0, 1e-3


def softplus_depth(depth: np.ndarray) -> np.ndarray:
    """MPE's soft contact: how far two bodies are inside each other, smoothed over CONTACT_MARGIN."""
    return np.logaddexp(0, depth / CONTACT_MARGIN) * CONTACT_MARGIN


class ParticleEnv(MetaVectorEnv):
    """The particle world; the first `num_agents` of its bodies are ours, then scripted ones, then fixed ones.

    size [entity], accel [mover], max_speed [mover]: radii, force per unit of action, speed limits (inf: none)
    start_range [entity]: a body starts uniformly in [-start_range, start_range]^2
    collide: whether bodies push each other
    walls: whether the arena has walls, with their inner faces at +-1 and the bodies' soft contact
    """

    max_episode_steps = 100

    def __init__(self, num_envs, seed, num_agents, size, accel, max_speed, start_range, collide, walls):
        super().__init__(num_envs, seed)
        if not isinstance(walls, bool):
            raise ValueError(f"walls: got {walls!r}, expected True or False")
        self.num_agents = num_agents
        self.num_entities, self.num_movers = len(size), len(accel)
        column = (-1, 1)  # [entity] -> [entity, 1], beside the copies
        self.size = np.reshape(size, column)
        self.accel = np.reshape(accel, column)
        self.max_speed = np.reshape(max_speed, column)
        self.start_range = np.reshape(start_range, column)
        self.collide, self.walls = collide, walls
        self.touch_distance = self.size[: self.num_movers, None] + self.size[None]  # [mover, entity, 1]
        self.pos = np.zeros((2, self.num_entities, num_envs))  # [2, entity, E]
        self.vel = np.zeros((2, self.num_movers, num_envs))  # [2, mover, E]
        self.single_action_space = gym.spaces.Box(-1, 1, (2,))  # force in x and y, as a share of `accel`

    def _set_obs_dim(self, obs_dim: int) -> None:
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.state_dim = obs_dim * self.num_agents

    def _start(self, copies):
        for k in copies:
            start = self.rngs[k].uniform(-1, 1, (self.num_entities, 2)) * self.start_range  # [entity, 2]
            self.pos[:, :, k] = start.T
        self.vel[:, :, copies] = 0
        self._measure()

    def _measure(self) -> None:
        """Where everybody is seen from: offset [2, mover, entity, E] from a mover to an entity, and its length."""
        self.offset = self.pos[:, None] - self.pos[:, : self.num_movers, None]
        self.distance = np.sqrt(np.square(self.offset[0]) + np.square(self.offset[1]))  # [mover, entity, E]

    def _integrate(self, control: np.ndarray) -> None:
        """One step of the physics under the movers' control forces [2, mover, E], in mpe2's order of operations."""
        force = control
        if self.collide:
            depth = softplus_depth(-(self.distance - self.touch_distance))  # [mover, entity, E]
            distance = self.distance.copy()
            body = np.arange(self.num_movers)
            distance[body, body] = np.inf  # nobody pushes itself
            push = CONTACT_FORCE * -self.offset / distance * depth  # [2, mover, entity, E]
            for entity in range(self.num_entities):  # one after the other, as mpe2 adds them
                force = force + push[:, :, entity]  # [2, mover, E]
        if self.walls:
            pos = self.pos[:, : self.num_movers]
            reach = self.size[: self.num_movers] - 1
            force = force + CONTACT_FORCE * (softplus_depth(reach - pos) - softplus_depth(reach + pos))
        self.pos[:, : self.num_movers] += self.vel * DT  # the old velocity
        self.vel = self.vel * (1 - DAMPING) + force * DT  # every mass is 1
        speed = np.sqrt(np.square(self.vel[0]) + np.square(self.vel[1]))  # [mover, E]
        fast = speed > self.max_speed
        limit = np.where(fast, self.max_speed, 1)
        self.vel = np.where(fast, self.vel / np.where(fast, speed, 1) * limit, self.vel)
        self._measure()

    def _picture(self, bodies: list[tuple[int, tuple[int, int, int]]], marked: list[int]) -> np.ndarray:
        """Copy 0 from above, 320 x 320: discs (entity, colour) in order, a black ring around the `marked` ones."""
        pixels = 320
        centre = (np.arange(pixels) + 0.5) / pixels * 2.4 - 1.2
        x, y = centre[None, :], -centre[:, None]
        picture = np.full((pixels, pixels, 3), 255, np.uint8)
        picture[(np.abs(x) > 1) | (np.abs(y) > 1)] = (200, 200, 200)  # the walls
        for entity, colour in bodies:
            radius = np.hypot(x - self.pos[0, entity, 0], y - self.pos[1, entity, 0])
            picture[radius < self.size[entity, 0]] = colour
            if entity in marked:
                ring = self.size[entity, 0]
                picture[(radius > ring + 0.02) & (radius < ring + 0.04)] = (0, 0, 0)
        return picture


class HuntingTarget(ParticleEnv):
    """Predators (ours) hunt one of several scripted preys; task j: prey j is the target, and only the reward tells.

    Every prey flees straight from its nearest predator. Observation of a predator: own velocity, own position, relative
    positions of the obstacles, then (x, y, seen) of each other predator and of each prey, zeros farther than `radius`.
    Reward, shared: minus the mean over predators of the squared distance to the target.
    """

    env_id = "hunting_target"

    def __init__(
        self,
        num_envs: int,
        seed: int,
        num_predators: int = 3,
        num_preys: int = 3,
        num_obstacles: int = 2,
        radius: float = 1.414,
        walls: bool = True,
    ):
        check_count("num_predators", num_predators, 1)
        check_count("num_preys", num_preys, 1)
        check_count("num_obstacles", num_obstacles, 0)
        if not (isinstance(radius, int | float) and radius > 0):
            raise ValueError(f"radius: got {radius!r}, expected a number above 0")
        counts = (num_predators, num_preys, num_obstacles)
        super().__init__(
            num_envs,
            seed,
            num_agents=num_predators,
            size=np.repeat([0.075, 0.05, 0.2], counts),
            accel=np.repeat([3.0, 4.0], counts[:2]),
            max_speed=np.repeat([1.0, 1.3], counts[:2]),
            start_range=np.repeat([1.0, 1.0, 0.9], counts),
            collide=True,
            walls=walls,
        )
        self.radius = radius
        predator = range(num_predators)
        self.prey = slice(num_predators, num_predators + num_preys)
        self.obstacle = slice(num_predators + num_preys, None)
        # [n, others + preys]: whom predator i may see
        self.seen = np.array([[j for j in range(num_predators + num_preys) if j != i] for i in predator])
        self._set_obs_dim(4 + 2 * num_obstacles + 3 * self.seen.shape[1])
        ids, one_hot = np.arange(num_preys), np.eye(num_preys, dtype=np.float32)
        self.tasks = TaskSet(ids, ids, one_hot, one_hot, tuple(f"prey_{j}" for j in ids))

    def prey_action(self) -> np.ndarray:
        """What the preys do now: full force straight away from the nearest predator, [2, prey, E] of length 1."""
        n = self.num_agents
        nearest = self.distance[self.prey, :n].argmin(1)[:, None]  # [prey, 1, E]
        to_predator = np.take_along_axis(self.offset[:, self.prey, :n], nearest[None], 2)[:, :, 0]  # [2, prey, E]
        distance = np.take_along_axis(self.distance[self.prey, :n], nearest, 1)[:, 0]  # [prey, E]
        return -to_predator / np.maximum(distance, 1e-12)

    def _advance(self, actions):
        control = np.concatenate([actions.transpose(2, 1, 0), self.prey_action()], axis=1) * self.accel  # [2, mover, E]
        self._integrate(control)
        target = self.num_agents + self.task  # [E]
        distance = self.distance[: self.num_agents, target, np.arange(self.num_envs)]  # [n, E]
        reward = -np.square(distance).mean(0)  # [E], appendix B averaged over predators
        shared = np.repeat(reward.astype(np.float32)[:, None], self.num_agents, axis=1)  # [E, n]
        return shared, np.zeros(self.num_envs, bool)

    def _observe(self):
        n, num_envs = self.num_agents, self.num_envs
        agent = np.arange(n)[:, None]
        visible = self.distance[agent, self.seen] <= self.radius  # [n, seen, E]
        offset = self.offset[:, agent, self.seen] * visible  # [2, n, seen, E]
        seen = np.concatenate([offset, visible[None]])  # [3, n, seen, E]
        obs = np.concatenate(
            [
                self.vel[:, :n],
                self.pos[:, :n],
                self.offset[:, :n, self.obstacle].transpose(2, 0, 1, 3).reshape(-1, n, num_envs),
                seen.transpose(2, 0, 1, 3).reshape(-1, n, num_envs),
            ]
        )  # [obs_dim, n, E]
        return obs.transpose(2, 1, 0).astype(np.float32, order="C")

    def render(self):
        n, preys = self.num_agents, self.tasks.labels.shape[0]
        bodies = [(j, (90, 90, 90)) for j in range(n + preys, self.num_entities)]
        bodies += [(j, (80, 170, 80)) for j in range(n, n + preys)] + [(j, (200, 70, 70)) for j in range(n)]
        return self._picture(bodies, marked=[n + int(self.task[0])])


class SpreadTarget(ParticleEnv):
    """Agents cover the effective landmarks; a task is which ones are effective, and only the reward tells.

    Observation: own velocity, own position, relative positions of all landmarks and of the other agents. Reward,
    shared: minus the sum over effective landmarks of the squared distance to the nearest agent (appendix B).

    num_test: how many of the tasks are held out of training for meta-test (0: trained and tested on all of them)
    """

    env_id = "spread_target"

    def __init__(
        self,
        num_envs: int,
        seed: int,
        num_agents: int = 3,
        num_landmarks: int = 4,
        num_test: int = 0,
        walls: bool = True,
    ):
        check_count("num_agents", num_agents, 1)
        check_count("num_landmarks", num_landmarks, num_agents + 1)
        super().__init__(
            num_envs,
            seed,
            num_agents=num_agents,
            size=np.repeat([0.15, 0.05], (num_agents, num_landmarks)),
            accel=np.full(num_agents, 5.0),
            max_speed=np.full(num_agents, np.inf),
            start_range=np.ones(num_agents + num_landmarks),
            collide=False,
            walls=walls,
        )
        self.others = np.array([[j for j in range(num_agents) if j != i] for i in range(num_agents)], int)  # [n, n - 1]
        self._set_obs_dim(4 + 2 * num_landmarks + 2 * (num_agents - 1))
        choices = list(combinations(range(num_landmarks), num_agents))
        self.effective = np.zeros((len(choices), num_landmarks), np.float32)  # [num_tasks, landmark], the paper's g
        for task, chosen in enumerate(choices):
            self.effective[task, list(chosen)] = 1
        check_count("num_test", num_test, 0)
        if num_test >= len(choices):
            raise ValueError(f"num_test: got {num_test}, expected fewer than the {len(choices)} tasks")
        ids = np.arange(len(choices))
        held_out = ids[len(ids) - num_test :] if num_test else ids
        labels = np.eye(len(ids), dtype=np.float32)
        names = tuple(f"landmark_{j}" for j in range(num_landmarks))
        self.tasks = TaskSet(ids[: len(ids) - num_test], held_out, labels, self.effective, names)

    def _advance(self, actions):
        self._integrate(actions.transpose(2, 1, 0) * self.accel)  # [2, n, E]
        nearest = np.square(self.distance[:, self.num_agents :]).min(0)  # [landmark, E]
        reward = -(self.effective[self.task].T * nearest).sum(0)  # [E]
        shared = np.repeat(reward.astype(np.float32)[:, None], self.num_agents, axis=1)  # [E, n]
        return shared, np.zeros(self.num_envs, bool)

    def _observe(self):
        n, num_envs = self.num_agents, self.num_envs
        others = self.offset[:, np.arange(n)[:, None], self.others]  # [2, n, n - 1, E]
        obs = np.concatenate(
            [
                self.vel,
                self.pos[:, :n],
                self.offset[:, :, n:].transpose(2, 0, 1, 3).reshape(-1, n, num_envs),
                others.transpose(2, 0, 1, 3).reshape(-1, n, num_envs),
            ]
        )  # [obs_dim, n, E]
        return obs.transpose(2, 1, 0).astype(np.float32, order="C")

    def render(self):
        n = self.num_agents
        on = np.flatnonzero(self.effective[self.task[0]]) + n
        bodies = [(j, (80, 80, 200)) for j in range(n)]
        bodies += [(j, (220, 120, 20) if j in on else (170, 170, 170)) for j in range(n, self.num_entities)]
        return self._picture(bodies, marked=list(on))


def check_count(name: str, value: int, least: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
