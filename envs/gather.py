"""magent_gather: agents eat food that is drawn as a letter, in MAgent2's C++ grid world.

The engine is magent2 (https://github.com/Farama-Foundation/MAgent2), one `GridWorld` per copy in this process; agents,
food and rewards are those of its gather_v5, save that agents cannot hurt each other, look 4 cells far and move by 2.
The tasks are the layouts of the MG2L paper, Fig. 15. A cell is (x, y), x to the right and y down; the outermost cells
of the map are walls. magent2's Linux wheel has no OpenMP: one thread, whatever OMP_NUM_THREADS says.
"""

import os

import gymnasium as gym
import numpy as np

from envs.meta_env import MetaVectorEnv, TaskSet

threads_before = os.environ.get("OMP_NUM_THREADS")
from magent2 import gridworld  # noqa: E402

if threads_before is None:  # magent2 has set it to half the cores, and a PyTorch imported later would obey
    os.environ.pop("OMP_NUM_THREADS", None)

NUM_MOVES, NUM_ATTACKS = 13, 4
FOOD_HP, DAMAGE = 25, 6
HITS = FOOD_HP // DAMAGE + 1  # food dies when its hp is below zero
CELL = 9  # pixels a side, in the picture
LETTERS = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "B": ("####.", "#...#", "#...#", "####.", "#...#", "#...#", "####."),
    "C": (".###.", "#...#", "#....", "#....", "#....", "#...#", ".###."),
    "D": ("####.", "#...#", "#...#", "#...#", "#...#", "#...#", "####."),
}


class MagentGather(MetaVectorEnv):
    """Agents start on a ring along the wall and eat the food; a task is its layout (A, B, C, D) and density (1, 0.5).

    Observation: the square around the agent, [y, x, channel] flattened, channels wall, agent, its hp, food, its hp (hp
    as shares; zero outside the map and farther than `view_range`, as the corners are); then the engine's features: the
    agent's last action one-hot (17) and its last reward. It has neither the agent's place nor its number.

    Actions: 0 to 12 move by (dx, dy) = (0,-2), (-1,-1), (0,-1), (1,-1), (-2,0), (-1,0), (0,0), (1,0), (2,0), (-1,1),
    (0,1), (1,1), (0,2), if that cell is free, whatever lies between; 13 to 16 attack the cell above, to the left, to
    the right, below. Attacks come before moves, in random order; moves go by the agents' numbers.

    Reward of an agent, each step: -0.01; -0.1 for an attack; +0.5 if it hits food, but +5 for the fifth hit, which
    kills it. Agents cannot be hurt. Never terminated: the episode goes on to its 200th step when all food is gone.

    State: the map inside the walls, [2, y, x] flattened: agents (1), food (the share of its five hits that are left);
    then (x, y) of each agent as shares of the map, since the critic has an output for each of them.

    num_agents: 8 to 64
    map_size: cells a side with the walls, 20 to 99; the letter grows with it
    view_range: cells, 1 to 10
    """

    env_id = "magent_gather"
    max_episode_steps = 200

    def __init__(self, num_envs: int, seed: int, num_agents: int = 16, map_size: int = 28, view_range: int = 4):
        super().__init__(num_envs, seed)
        check_between("num_agents", num_agents, 8, 64)
        check_between("map_size", map_size, 20, 99)  # 64 fit on the ring; magent2 leaks memory at resets of larger maps
        check_between("view_range", view_range, 1, 10)
        self.num_agents, self.map_size, self.view_range = int(num_agents), int(map_size), int(view_range)
        self.view_dim = (2 * self.view_range + 1) ** 2 * 5
        obs_dim = self.view_dim + NUM_MOVES + NUM_ATTACKS + 1
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.single_action_space = gym.spaces.Discrete(NUM_MOVES + NUM_ATTACKS)
        self.state_dim = 2 * (self.map_size - 2) ** 2 + 2 * self.num_agents
        self.start = ring(self.num_agents, self.map_size)  # [n, 2]
        parameters = np.array([(j, density) for j in range(len(LETTERS)) for density in (1, 0.5)], np.float32)
        self.layouts = [letter(list(LETTERS)[int(j)], density == 0.5, self.map_size) for j, density in parameters]
        ids = np.arange(len(parameters))
        self.tasks = TaskSet(ids, ids, np.eye(len(ids), dtype=np.float32), parameters, ("layout", "density"))
        inside = self.map_size - 2
        self.food = np.zeros((self.num_envs, inside, inside), np.float32)  # [E, y, x], share of the five hits left
        self._worlds = []  # E engines from the first reset on

    def __getstate__(self):
        """For pickle and copy: the engines are C++'s and stay behind, so that a copy begins with a reset."""
        return self.__dict__ | {"_worlds": [], "_obs": None}

    def close(self) -> None:
        """Free the engines; a reset makes new ones."""
        self._worlds, self._obs = [], None

    def _start(self, copies):
        if not self._worlds:
            self._worlds = [new_world(self.map_size, self.view_range) for _ in range(self.num_envs)]
        for k in copies:
            world, (food, agents) = self._worlds[k], self._worlds[k].get_handles()
            world.set_seed(int(self.rngs[k].integers(2**31 - 1)))  # without one the engine goes on from the old episode
            world.reset()
            place(world, agents, self.start, "agents")
            place(world, food, self.layouts[self.task[k]], "food")
            self._see_food(k)

    def _advance(self, actions):
        actions = np.ascontiguousarray(actions, np.int32)
        reward = np.empty((self.num_envs, self.num_agents), np.float32)
        for k, world in enumerate(self._worlds):
            agents = world.get_handles()[1]
            world.set_action(agents, actions[k])
            world.step()
            reward[k] = world.get_reward(agents)
            world.clear_dead()  # before observing, or the last reward in the features is that of the step before
            if reward[k].max() > 0:  # some food was hit
                self._see_food(k)
        return reward, np.zeros(self.num_envs, bool)

    def _observe(self):
        obs = np.empty((self.num_envs, self.num_agents, *self.single_observation_space.shape), np.float32)
        for k, world in enumerate(self._worlds):
            view, features = world.get_observation(world.get_handles()[1])  # buffers that the next call overwrites
            obs[k, :, : self.view_dim] = view.reshape(self.num_agents, -1)
            obs[k, :, self.view_dim :] = features
        return obs

    def _state(self):
        places = np.stack([world.get_pos(world.get_handles()[1]) for world in self._worlds])  # [E, n, (x, y)]
        agents = np.zeros_like(self.food)
        agents[np.arange(self.num_envs)[:, None], places[:, :, 1] - 1, places[:, :, 0] - 1] = 1
        parts = agents, self.food, (places / self.map_size).astype(np.float32)
        return np.concatenate([part.reshape(self.num_envs, -1) for part in parts], axis=1)

    def _see_food(self, k: int) -> None:
        """Bring `food` of copy k up to date."""
        world, food = self._worlds[k], self._worlds[k].get_handles()[0]
        hp = FOOD_HP * world.get_observation(food)[0][:, 0, 0, 2]  # [food], each sees its own cell only
        x, y = world.get_pos(food).T - 1
        self.food[k] = 0
        self.food[k, y, x] = (np.floor(hp / DAMAGE) + 1) / HITS

    def render(self):
        """Copy 0, uint8 [H, W, 3]; food fades with the hits it has taken. Raises ValueError before the first reset."""
        if self._obs is None:
            raise ValueError("render: got a call before reset, expected reset() first")
        picture = np.full((self.map_size, self.map_size, 3), 120, np.uint8)  # [y, x, colour], a pixel a cell
        left = self.food[0, :, :, None]  # [y, x, 1]
        picture[1:-1, 1:-1] = np.where(left > 0, left * (60, 160, 60) + (1 - left) * (215, 235, 215), 255)
        x, y = self._worlds[0].get_pos(self._worlds[0].get_handles()[1]).T
        picture[y, x] = (70, 70, 200)
        picture = picture.repeat(CELL, axis=0).repeat(CELL, axis=1)
        picture[::CELL] = picture[:, ::CELL] = (235, 235, 235)  # lines between the cells
        return picture


def ring(num_agents: int, map_size: int) -> np.ndarray:
    """Cells beside the wall, [num_agents, 2], evenly spaced and clockwise from the upper left corner."""
    first, last = 1, map_size - 2
    side = last - first
    edge, along = np.divmod(np.arange(num_agents) * 4 * side // num_agents, side)
    x = np.choose(edge, [first + along, last, last - along, first])
    y = np.choose(edge, [first, first + along, last, last - along])
    return np.stack([x, y], axis=1)


def letter(name: str, half: bool, map_size: int) -> np.ndarray:
    """Cells of a letter in the middle of the map, [food, 2]; `half` of them: first those white on a chess board."""
    scale = map_size // 14  # 5 x 7 strokes of 2 x 2 cells in 28 x 28
    drawn = np.array([[stroke == "#" for stroke in row] for row in LETTERS[name]])
    drawn = drawn.repeat(scale, axis=0).repeat(scale, axis=1)  # [height, width]
    y, x = np.nonzero(drawn)
    cells = np.stack([x, y], axis=1) + (map_size - np.array(drawn.shape[::-1])) // 2
    white_first = np.argsort((x + y) % 2, kind="stable")
    return cells[white_first[: len(cells) // 2]] if half else cells


def new_world(map_size: int, view_range: int) -> gridworld.GridWorld:
    """An empty engine; its groups are food and agents."""
    config = gridworld.Config()  # for one engine: GridWorld rewrites it
    config.set({"map_width": map_size, "map_height": map_size})
    food = {
        "width": 1,
        "length": 1,
        "hp": FOOD_HP,
        "speed": 0,
        "view_range": gridworld.CircleRange(0),
        "attack_range": gridworld.CircleRange(0),
        "kill_reward": 5,
    }
    agent = {
        "width": 1,
        "length": 1,
        "hp": 1,
        "speed": 2,
        "view_range": gridworld.CircleRange(view_range),
        "attack_range": gridworld.CircleRange(1),
        "damage": DAMAGE,
        "attack_in_group": 0,
        "step_reward": -0.01,
        "attack_penalty": -0.1,
    }
    food_group = config.add_group(config.register_agent_type("food", food))
    agent_group = config.add_group(config.register_agent_type("agent", agent))
    eater, eaten = gridworld.AgentSymbol(agent_group, "any"), gridworld.AgentSymbol(food_group, "any")
    config.add_reward_rule(gridworld.Event(eater, "attack", eaten), receiver=eater, value=0.5)
    return gridworld.GridWorld(config)


def place(world: gridworld.GridWorld, group, cells: np.ndarray, name: str) -> None:
    """Put pieces on these cells, [piece, 2]. Raises RuntimeError unless all get there; the engine skips taken cells."""
    world.add_agents(group, "custom", pos=cells)
    if (count := world.get_num(group)) != len(cells):
        raise RuntimeError(f"{name}: got {count} on the map, expected {len(cells)}")


def check_between(name: str, value: int, least: int, most: int) -> None:
    """Raises ValueError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise ValueError(f"{name}: got {value!r}, expected a whole number from {least} to {most}")
