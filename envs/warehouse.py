"""rware_layout: robots in a warehouse bring requested shelves to the goal; tasks differ in the layout and the orders.

Below is rware's own `Warehouse` (https://github.com/semitable/robotic-warehouse), with its agents, shelves, request
queue and grid. Two things are done in another way, equal to the bit: uncontested moves, and the observations, which are
built for all copies at once. Cells are (x, y): x to the right, y down, (0, 0) in the upper left corner.
"""

from copy import copy
from itertools import product

import gymnasium as gym
import numpy as np
from rware.warehouse import Action, Direction, RewardType, Warehouse

from envs.meta_env import MetaVectorEnv, TaskSet
from envs.particle import check_count

SIZE, RANGE = 10, 2  # cells along a side of the map; how far a robot sees in each direction
PADDED, VIEW = SIZE + 2 * RANGE, 2 * RANGE + 1  # cells along a side of the map with a rim; of what a robot sees
# figure 14: whether there are shelves in columns 2-3 and in columns 6-7, and their first and last row
LAYOUTS = ((1, 1, 1, 7), (0, 1, 1, 7), (1, 0, 1, 7), (1, 1, 1, 4), (1, 1, 4, 7))
FEWEST_SHELVES = 14  # of a layout
AGENT_LAYER, SHELF_LAYER = 0, 1  # of rware's grid, which holds ids from 1 and 0 for an empty cell
ACTIONS = tuple(Action)  # no-op, forward, left, right, toggle load
HEADING = {heading: i for i, heading in enumerate(Direction)}  # up, down, left, right
SHELF, REQUESTED = 5, 6  # features of a cell, after whether there is a robot and its heading, one-hot
FEATURES = 7


def draw_layout(left: int, right: int, first_row: int, last_row: int) -> str:
    """A layout as rware reads it: x is a shelf, g a goal, a dot is a highway, where no shelf may be put down."""
    rows = [list("." * SIZE) for _ in range(SIZE)]
    for row in rows[first_row : last_row + 1]:
        row[2:4], row[6:8] = "x" * 2 * left or "..", "x" * 2 * right or ".."
    rows[-1][4:6] = "gg"
    return "\n".join("".join(row) for row in rows)


class FastWarehouse(Warehouse):
    """rware's Warehouse without observations; `act` takes the place of `step`."""

    def _make_obs(self, agent):
        return None  # RwareLayout observes all copies at once

    def reset(self, seed=None, options=None):
        first = super().reset(seed=seed, options=options)
        for agent in self.agents:
            agent.x, agent.y = int(agent.x), int(agent.y)  # NumPy's integers are slow one by one
        return first

    def act(self, actions: list[int]) -> list[float]:
        """What rware's `step` does with the actions, and its rewards, one per agent (1 for a delivery).

        Moves follow pointers from each agent to whoever is in front of it. Where agents compete for a free cell, rware
        prefers the longest queue and breaks ties by the order of nodes in networkx's graph; its own `step` does those.
        """
        agents, grid = self.agents, self.grid
        target, ahead = {}, {}  # of those who try to leave their cell, by id: where to, and who is there (0: nobody)
        for agent, action in zip(agents, actions, strict=True):
            agent.req_action = ACTIONS[action]
            if agent.req_action is not Action.FORWARD:
                continue
            x, y = agent.req_location(self.grid_size)
            if (x, y) == (agent.x, agent.y):
                continue  # a wall
            other = int(grid[AGENT_LAYER, y, x])
            if agent.carrying_shelf and grid[SHELF_LAYER, y, x] and not (other and agents[other - 1].carrying_shelf):
                continue  # a shelf stands in the way of the one carried
            target[agent.id], ahead[agent.id] = (x, y), other
        moving, taken = [], set()
        for mover in target:
            end, length = ahead[mover], 1  # of the queue that starts at the mover
            while end in ahead and end != mover and length < self.n_agents:
                end, length = ahead[end], length + 1
            # a queue into a free cell moves, and so does a ring, save two who would have to change places
            if end == 0 and target[mover] in taken:
                return super().step(actions)[1]
            if end == 0 or (end == mover and length > 2):
                moving.append(agents[mover - 1])
                taken.add(target[mover])

        for agent in moving:  # all leave before anyone arrives
            grid[AGENT_LAYER, agent.y, agent.x] = 0
            if agent.carrying_shelf:
                grid[SHELF_LAYER, agent.y, agent.x] = 0
        for agent in moving:
            agent.x, agent.y = x, y = target[agent.id]
            grid[AGENT_LAYER, y, x] = agent.id
            if agent.carrying_shelf:
                agent.carrying_shelf.x, agent.carrying_shelf.y = x, y
                grid[SHELF_LAYER, y, x] = agent.carrying_shelf.id
        for agent in agents:
            if agent.req_action is Action.LEFT or agent.req_action is Action.RIGHT:
                agent.dir = agent.req_direction()
            elif agent.req_action is Action.TOGGLE_LOAD and agent.carrying_shelf:
                if not self._is_highway(agent.x, agent.y):
                    agent.carrying_shelf = None
            elif agent.req_action is Action.TOGGLE_LOAD and (shelf := grid[SHELF_LAYER, agent.y, agent.x]):
                agent.carrying_shelf = self.shelfs[shelf - 1]
        return self._deliver()

    def _deliver(self) -> list[float]:
        rewards = [0.0] * self.n_agents
        for x, y in self.goals:
            shelf = self.grid[SHELF_LAYER, y, x]
            if not shelf or (shelf := self.shelfs[shelf - 1]) not in self.request_queue:
                continue
            candidates = [other for other in self.shelfs if other not in self.request_queue]
            self.request_queue[self.request_queue.index(shelf)] = self.np_random.choice(candidates)
            rewards[self.grid[AGENT_LAYER, y, x] - 1] += 1  # goals are highways: whoever is there carries the shelf
        return rewards


class RwareLayout(MetaVectorEnv):
    """Robots bring requested shelves to the goal on a map of 10 x 10.

    A task is a layout of the shelves and how many of them are requested at a time; a robot sees only what is near it.

    Observation of an agent, as rware flattens it (183 numbers): own x and y (cells, 0 to 9), whether it carries a
    shelf, heading one-hot (up, down, left, right), whether it is on a highway, where no shelf may be put down; then for
    each of the 5 x 5 cells around it, row by row: whether there is an agent, its heading one-hot (up where there is
    none), whether there is a shelf, whether that is requested. Action: no-op, forward, turn left, turn right, load or
    unload. Reward, each agent's own: 1 for bringing a requested shelf to a goal, another is requested at once.

    `state`: the first 8 numbers of all agents side by side, then over the map, row by row, where shelves are and where
    requested ones are, 8 n + 200 numbers.

    num_agents: 1 to 100
    orders: the numbers of shelves requested at a time, 1 to 13, increasing; tasks are all five layouts by these
    """

    env_id = "rware_layout"
    max_episode_steps = 100
    own_dim = 8  # numbers of an observation that are not about cells

    def __init__(self, num_envs: int, seed: int, num_agents: int = 4, orders: tuple[int, ...] = (4, 8)):
        super().__init__(num_envs, seed)
        check_count("num_agents", num_agents, 1)
        if num_agents > SIZE**2:
            raise ValueError(f"num_agents: got {num_agents}, expected at most {SIZE**2}, the cells of the map")
        check_orders(orders)
        self.num_agents = num_agents
        obs_dim = self.own_dim + VIEW**2 * FEATURES
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.single_action_space = gym.spaces.Discrete(len(ACTIONS))
        self.state_dim = self.own_dim * num_agents + 2 * SIZE**2
        parameters = [(*layout, order) for layout, order in product(LAYOUTS, orders)]
        ids, names = np.arange(len(parameters)), ("left", "right", "first_row", "last_row", "orders")
        labels = np.eye(len(ids), dtype=np.float32)
        self.tasks = TaskSet(ids, ids, labels, np.array(parameters, np.float32), names)

        plans = [make_warehouse(draw_layout(*layout), num_agents) for layout in LAYOUTS]
        self.highways = np.repeat([plan.highways for plan in plans], len(orders), axis=0)  # [num_tasks, y, x]
        self.request_queue_size = list(orders) * len(LAYOUTS)  # [num_tasks]
        self.warehouses = [copy(plans[0]) for _ in range(self.num_envs)]
        for warehouse in self.warehouses:
            warehouse.grid = warehouse.grid.copy()  # all else that changes is made anew by a reset
        # [VIEW ** 2], from the upper left corner of a window to its cells, in the flat padded map
        self.window = (np.arange(VIEW)[:, None] * PADDED + np.arange(VIEW)).ravel()

    def _start(self, copies):
        for k in copies:
            warehouse, task = self.warehouses[k], self.task[k]
            # goals are where they are in every layout, so this is all that tells one task from another
            warehouse.highways, warehouse.request_queue_size = self.highways[task], self.request_queue_size[task]
            warehouse.np_random = self.rngs[k]
            warehouse.reset()

    def _advance(self, actions):
        joint = zip(self.warehouses, actions.tolist(), strict=True)
        reward = np.array([warehouse.act(each) for warehouse, each in joint], np.float32)  # [E, n]
        return reward, np.zeros(self.num_envs, bool)

    def _observe(self):
        num_envs, n = self.num_envs, self.num_agents
        agents = [
            (agent.x, agent.y, agent.carrying_shelf is not None, HEADING[agent.dir])
            for warehouse in self.warehouses
            for agent in warehouse.agents
        ]
        x, y, carrying, heading = np.array(agents).T.reshape(4, num_envs, n)
        heading = np.eye(4, dtype=np.float32)[heading]  # [E, n, 4]
        on_highway = self.highways[self.task[:, None], y, x]
        self.own = np.concatenate(
            [np.stack([x, y, carrying], -1), heading, on_highway[..., None]], -1, dtype=np.float32
        )

        inner = slice(RANGE, RANGE + SIZE)  # the map in the padded one
        shelf = np.zeros((num_envs, PADDED, PADDED), np.int32)  # ids
        shelf[:, inner, inner] = [warehouse.grid[SHELF_LAYER] for warehouse in self.warehouses]
        requested = np.zeros((num_envs, SIZE**2 + 1), np.float32)  # by id, 0 for no shelf
        for row, warehouse in zip(requested, self.warehouses, strict=True):
            row[[asked.id for asked in warehouse.request_queue]] = 1
        k = np.arange(num_envs)
        corner = (k[:, None] * PADDED + y) * PADDED + x  # [E, n], the upper left cell of each window in the flat map
        cells = np.zeros((num_envs, PADDED, PADDED, FEATURES), np.float32)
        cells[..., 1] = 1  # rware writes "up" where there is no agent
        by_cell = cells.reshape(-1, FEATURES)
        centre = corner + RANGE * PADDED + RANGE
        by_cell[centre, 0], by_cell[centre, 1:SHELF] = 1, heading
        cells[..., SHELF] = shelf > 0
        cells[..., REQUESTED] = requested[k[:, None, None], shelf]
        self.shelves = cells[:, inner, inner, SHELF:]  # [E, y, x, 2]
        seen = by_cell.take(corner[..., None] + self.window, axis=0)  # [E, n, VIEW ** 2, FEATURES]
        return np.concatenate([self.own, seen.reshape(num_envs, n, -1)], axis=-1)

    def _state(self):
        maps = self.shelves.transpose(0, 3, 1, 2)  # [E, 2, y, x]
        return np.concatenate([self.own.reshape(self.num_envs, -1), maps.reshape(self.num_envs, -1)], axis=1)

    def render(self):
        """Copy 0, 320 x 320: goals green, shelves blue, requested ones orange; a robot is a grey disc (red with a
        shelf) with a black bar towards where it heads. Raises ValueError before the first reset."""
        if self._obs is None:
            raise ValueError("render: got a call before reset, expected reset() first")
        pixels, warehouse = 32, self.warehouses[0]
        picture = np.full((SIZE * pixels, SIZE * pixels, 3), 255, np.uint8)
        picture[::pixels] = picture[:, ::pixels] = (210, 210, 210)
        cells = picture.reshape(SIZE, pixels, SIZE, pixels, 3).swapaxes(1, 2)  # a view, [y, x, pixel, pixel, 3]
        down, right = np.mgrid[:pixels, :pixels] - (pixels - 1) / 2  # from the centre of a cell
        for x, y in warehouse.goals:
            cells[y, x, 1:, 1:] = (150, 215, 150)
        for shelf in warehouse.shelfs:
            asked = shelf in warehouse.request_queue
            cells[shelf.y, shelf.x, 3:-2, 3:-2] = (255, 150, 0) if asked else (70, 90, 170)
        for agent in warehouse.agents:
            cell = cells[agent.y, agent.x]
            cell[np.hypot(down, right) < 10] = (220, 30, 30) if agent.carrying_shelf else (130, 130, 130)
            ahead = {Direction.UP: -down, Direction.DOWN: down, Direction.LEFT: -right, Direction.RIGHT: right}[
                agent.dir
            ]
            across = right if agent.dir in (Direction.UP, Direction.DOWN) else down
            cell[(ahead > 0) & (ahead < 12) & (np.abs(across) < 2)] = (0, 0, 0)
        return picture


def make_warehouse(layout: str, num_agents: int) -> FastWarehouse:
    """A warehouse of this layout. Its sizes and orders come from the layout and the task, its end from the caller."""
    return FastWarehouse(
        shelf_columns=0,
        column_height=0,
        shelf_rows=0,
        n_agents=num_agents,
        msg_bits=0,
        sensor_range=RANGE,
        request_queue_size=0,
        max_inactivity_steps=None,
        max_steps=None,
        reward_type=RewardType.INDIVIDUAL,
        layout=layout,
    )


def check_orders(orders: tuple[int, ...]) -> None:
    """Raises ValueError unless these are increasing whole numbers that leave a shelf to be requested next."""
    expected = f"increasing whole numbers from 1 to {FEWEST_SHELVES - 1} in a tuple, e.g. (4, 8)"
    if not isinstance(orders, tuple | list) or not orders or any(type(order) is not int for order in orders):
        raise ValueError(f"orders: got {orders!r}, expected {expected}")
    if orders[0] < 1 or orders[-1] >= FEWEST_SHELVES or sorted(set(orders)) != list(orders):
        raise ValueError(f"orders: got {orders!r}, expected {expected}")
