"""rware_layout: every step against plain rware, layouts and rewards by hand, what the picture shows."""

import copy
import gc
import pickle
import re
import sys
import tracemalloc
from collections import deque

import numpy as np
import pytest
from gymnasium.utils import seeding
from rware.warehouse import Action, Direction, RewardType, Warehouse

import envs

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's: a NaN or an overflow on the way
NOOP, FORWARD, LEFT, RIGHT, TOGGLE = (action.value for action in Action)
STEP = {Direction.UP: (0, -1), Direction.DOWN: (0, 1), Direction.LEFT: (-1, 0), Direction.RIGHT: (1, 0)}
FREE, LEFT_ONLY, RIGHT_ONLY, BOTH, GOALS = "..........", "..xx......", "......xx..", "..xx..xx..", "....gg...."
LAYOUTS = [  # figure 14
    [FREE, BOTH, BOTH, BOTH, BOTH, BOTH, BOTH, BOTH, FREE, GOALS],
    [FREE, RIGHT_ONLY, RIGHT_ONLY, RIGHT_ONLY, RIGHT_ONLY, RIGHT_ONLY, RIGHT_ONLY, RIGHT_ONLY, FREE, GOALS],
    [FREE, LEFT_ONLY, LEFT_ONLY, LEFT_ONLY, LEFT_ONLY, LEFT_ONLY, LEFT_ONLY, LEFT_ONLY, FREE, GOALS],
    [FREE, BOTH, BOTH, BOTH, BOTH, FREE, FREE, FREE, FREE, GOALS],
    [FREE, FREE, FREE, FREE, BOTH, BOTH, BOTH, BOTH, FREE, GOALS],
]
ORDERS = [4, 8]
NUM_TASKS = 10


def plain_rware(task, num_agents=4):
    """rware as it comes, for the task with this id."""
    layout, orders = "\n".join(LAYOUTS[task // 2]), ORDERS[task % 2]
    return Warehouse(0, 0, 0, num_agents, 0, 2, orders, None, 100, RewardType.INDIVIDUAL, layout=layout)


def beside_plain(num_agents=4, seed=0):
    """An environment with a copy on every task, and a plain rware of the same seed for each copy: both begun."""
    env = envs.make("rware_layout", NUM_TASKS, num_agents=num_agents)
    env.rngs = [seeding.np_random(seed + task)[0] for task in range(NUM_TASKS)]
    plain = [plain_rware(task, num_agents) for task in range(NUM_TASKS)]
    obs, _ = env.reset(options={"task": np.arange(NUM_TASKS)})
    for k, warehouse in enumerate(plain):
        assert np.array_equal(obs[k], warehouse.reset(seed=seed + k)[0])
    return env, plain


def inside(warehouse):
    """Everything about a warehouse that matters for what comes next."""
    loads = [agent.carrying_shelf and agent.carrying_shelf.id for agent in warehouse.agents]
    return {
        "agents": [(agent.x, agent.y, agent.dir) for agent in warehouse.agents],
        "loads": loads,
        "shelves": [(shelf.x, shelf.y) for shelf in warehouse.shelfs],
        "requests": [shelf.id for shelf in warehouse.request_queue],
        "grid": warehouse.grid.tolist(),
    }


def put(warehouse, shelves, places):
    """Shelves at these (x, y), then agents where `places` says: (x, y, heading, carried shelf's id or None) each."""
    for shelf, (x, y) in zip(warehouse.shelfs, shelves, strict=True):
        shelf.x, shelf.y = x, y
    for agent, (x, y, heading, load) in zip(warehouse.agents, places, strict=True):
        agent.x, agent.y, agent.dir = x, y, heading
        agent.carrying_shelf = warehouse.shelfs[load - 1] if load else None
        if load:
            agent.carrying_shelf.x, agent.carrying_shelf.y = x, y
    warehouse._recalc_grid()


class Driver:
    """Brings requested shelves to the goal and puts them down again, with some luck, from all there is to know."""

    def __init__(self, seed, noise=0.1):
        self.rng, self.noise = np.random.default_rng(seed), noise

    def __call__(self, warehouse):
        return [self.action(warehouse, agent) for agent in warehouse.agents]

    def action(self, warehouse, agent):
        if self.rng.random() < self.noise:  # so that nobody waits for ever
            return int(self.rng.choice([FORWARD, LEFT, RIGHT]))
        load, requests = agent.carrying_shelf, warehouse.request_queue
        carried = [other.carrying_shelf for other in warehouse.agents]
        if not load:
            ends = {(shelf.x, shelf.y) for shelf in requests if shelf not in carried}
        elif load in requests:
            ends = set(warehouse.goals)
        else:
            ends = {(int(x), int(y)) for y, x in np.argwhere((warehouse.highways == 0) & (warehouse.grid[1] == 0))}
        if (agent.x, agent.y) in ends:
            return TOGGLE
        nearest, heading = self.way(warehouse, agent, ends)
        if not nearest:
            return NOOP
        clockwise = [Direction.UP, Direction.RIGHT, Direction.DOWN, Direction.LEFT]
        return [FORWARD, RIGHT, RIGHT, LEFT][(clockwise.index(heading) - clockwise.index(agent.dir)) % 4]

    def way(self, warehouse, agent, ends):
        """The nearest of `ends` and the heading in which the shortest way there begins."""
        first, queue = {(agent.x, agent.y): None}, deque([(agent.x, agent.y)])
        while queue:
            x, y = queue.popleft()
            if (x, y) in ends:
                return (x, y), first[x, y]
            for heading, (right, down) in STEP.items():
                cell = (x + right, y + down)
                if cell in first or not (0 <= cell[0] < 10 and 0 <= cell[1] < 10):
                    continue
                if agent.carrying_shelf and warehouse.grid[1, cell[1], cell[0]]:
                    continue
                first[cell] = first[x, y] or heading
                queue.append(cell)
        return None, None


# ---- equal to plain rware to the bit ----


def policy(share):
    """Actions drawn with these shares."""
    rng = np.random.default_rng(0)
    return lambda warehouse: rng.choice(5, p=share, size=warehouse.n_agents).tolist()


POLICIES = {
    "random": (lambda: policy([0.2] * 5), 4, 0),
    "one agent": (lambda: policy([0.2] * 5), 1, 0),
    "crowd": (lambda: policy([0.05, 0.6, 0.1, 0.1, 0.15]), 20, 0),
    "driver": (lambda: Driver(0), 4, 40),
    "crowd of drivers": (lambda: Driver(1, noise=0.3), 12, 20),
}


@pytest.mark.parametrize("name", POLICIES)
def test_whole_episodes_are_those_of_plain_rware(name):
    make_policy, num_agents, least_deliveries = POLICIES[name]
    act, delivered = make_policy(), 0
    env, plain = beside_plain(num_agents)
    for t in range(1, 202):  # two episodes and the beginning of a third
        actions = [act(warehouse) for warehouse in plain]
        obs, reward, terminated, truncated, info = env.step(np.array(actions))
        assert not terminated.any()
        assert ("final_obs" in info) == (t % 100 == 0)
        for k, warehouse in enumerate(plain):
            seen, rewards, done, _, _ = warehouse.step(actions[k])
            assert reward[k].tolist() == rewards
            assert truncated[k] == done == (t % 100 == 0)  # what rware calls terminated is its time limit
            if done:
                assert np.array_equal(info["final_obs"][k], seen)
                seen, _ = warehouse.reset()
            assert np.array_equal(obs[k], seen)
            assert inside(env.warehouses[k]) == inside(warehouse)
        delivered += reward.sum()
    assert delivered >= least_deliveries


def test_one_step_out_of_any_heap_is_that_of_plain_rware():
    """Eight agents in a corner, up to four with shelves, mostly forward."""
    env, plain = beside_plain(num_agents=8)
    rng, homes = np.random.default_rng(0), [inside(warehouse)["shelves"] for warehouse in plain]
    for _ in range(100):
        actions = rng.choice(5, p=[0.04, 0.84, 0.04, 0.04, 0.04], size=(NUM_TASKS, 8))
        for k, warehouse in enumerate(plain):
            cells = [divmod(cell, 4) for cell in rng.permutation(16)[:8].tolist()]
            headings = rng.permutation(list(Direction) * 2)
            loads = [i + 1 if i < 4 and cell not in homes[k] else None for i, cell in enumerate(cells)]
            places = [(*cell, *rest) for cell, *rest in zip(cells, headings, loads, strict=True)]
            put(warehouse, homes[k], places), put(env.warehouses[k], homes[k], places)
        obs, reward, *_ = env.step(actions)
        env._elapsed[:] = 0
        for k, warehouse in enumerate(plain):
            seen, rewards, *_ = warehouse.step(actions[k])
            assert inside(env.warehouses[k]) == inside(warehouse)
            assert np.array_equal(obs[k], seen) and reward[k].tolist() == rewards


MEETINGS = {  # agents that go forward, R: right with a shelf, o: stays, s: a shelf; and which of them get on
    "ring": (">v/^<", "1111"),
    "ring with one behind": (">>v/.^<", "01111"),
    "change of places": ("><", "00"),
    "change of places with one behind": (">><", "000"),
    "queue": (">>>", "111"),
    "queue behind one who stays": (">>o", "000"),
    "competition": (">./.^", "10"),
    "competition, the longer queue first": (">.<<", "011"),
    "shelf in the way": ("Rs", "0"),
    "shelf in the way of the first": ("RRs", "00"),
    "under a shelf": (">s", "1"),
    "with a shelf behind another": ("RR", "11"),
    "with a shelf behind one without": ("R>", "11"),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_who_gets_on_where_agents_meet(meeting):
    drawing, moved = MEETINGS[meeting]
    heading = {"<": Direction.LEFT, "^": Direction.UP, "v": Direction.DOWN}
    places, shelves, actions = [], [(i % 10, 1 + i // 10) for i in range(16)], []
    for y, row in enumerate(drawing.split("/"), 5):
        for x, what in enumerate(row, 4):
            if what in "<>^voR":
                places.append((x, y, heading.get(what, Direction.RIGHT), len(places) + 1 if what == "R" else None))
                actions.append(NOOP if what == "o" else FORWARD)
            elif what == "s":
                shelves[-1] = (x, y)
    env = envs.make("rware_layout", 1, num_agents=len(places))
    env.reset(options={"task": [6]})  # only the upper rows have shelves
    plain = plain_rware(6, len(places))
    plain.reset(seed=0)
    plain.request_queue, env.warehouses[0].request_queue = [], []
    put(plain, shelves, places), put(env.warehouses[0], shelves, places)
    plain.step(actions), env.step(np.array([actions]))
    assert inside(env.warehouses[0]) == inside(plain)
    after = inside(plain)["agents"]
    assert "".join(str(int(here != was[:3])) for here, was in zip(after, places, strict=True)) == moved


# ---- tasks ----


def drawn(warehouse):
    rows = [["."] * 10 for _ in range(10)]
    for shelf in warehouse.shelfs:
        rows[shelf.y][shelf.x] = "x"
    for x, y in warehouse.goals:
        rows[y][x] = "g"
    return ["".join(row) for row in rows]


def test_tasks_are_the_layouts_by_the_orders():
    env = envs.make("rware_layout", NUM_TASKS)
    env.reset(options={"task": np.arange(NUM_TASKS)})
    for task, warehouse in enumerate(env.warehouses):
        assert drawn(warehouse) == LAYOUTS[task // 2]
        assert len(set(warehouse.request_queue)) == len(warehouse.request_queue) == ORDERS[task % 2]
        assert set(warehouse.request_queue) <= set(warehouse.shelfs)
    assert env.tasks.train.tolist() == env.tasks.test.tolist() == list(range(NUM_TASKS))
    assert env.tasks.describe(0) == "left=1, right=1, first_row=1, last_row=7, orders=4"
    assert env.tasks.describe(9) == "left=1, right=1, first_row=4, last_row=7, orders=8"
    assert np.array_equal(env.tasks.labels, np.eye(NUM_TASKS))


def test_orders_and_agents_can_be_chosen():
    env = envs.make("rware_layout", 5, orders=(13,), num_agents=2)
    obs, _ = env.reset(options={"task": np.arange(5)})
    assert len(env.tasks) == 5 and obs.shape == (5, 2, 183) and env.state().shape == (5, 216)
    assert [len(warehouse.request_queue) for warehouse in env.warehouses] == [13] * 5
    assert [drawn(warehouse) for warehouse in env.warehouses] == LAYOUTS
    assert envs.make("rware_layout", orders=(1, 2, 3)).tasks.parameters[:4, -1].tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("bad", [(), (0,), (14,), (4, 4), (8, 4), (4.0,), (True,), 4, "4", None])
def test_bad_orders_are_refused(bad):
    with pytest.raises(ValueError, match=re.escape(f"orders: got {bad!r}, expected ")):
        envs.make("rware_layout", orders=bad)


@pytest.mark.parametrize("bad", [0, -1, 101, 2.0, True, None])
def test_bad_numbers_of_agents_are_refused(bad):
    with pytest.raises(ValueError, match=re.escape(f"num_agents: got {bad!r}, expected ")):
        envs.make("rware_layout", num_agents=bad)


def test_another_task_leaves_nothing_of_the_old_one_and_copies_do_not_depend_on_their_number():
    env, drive, delivered = envs.make("rware_layout", 3), Driver(0), 0
    for seed, tasks in enumerate(([0, 9, 5], [3, 0, 7], [8, 2, 2], [3, 0, 7])):
        fresh = envs.make("rware_layout", 5)
        first, _ = env.reset(seed=seed, options={"task": tasks})
        assert np.array_equal(first, fresh.reset(seed=seed, options={"task": [*tasks, 1, 4]})[0][:3])
        for _ in range(130):  # into the second episode on this task
            actions = np.array([drive(warehouse) for warehouse in fresh.warehouses])
            (obs, reward, *_), (of_fresh, reward_of_fresh, *_) = env.step(actions[:3]), fresh.step(actions)
            assert np.array_equal(obs, of_fresh[:3]) and np.array_equal(reward, reward_of_fresh[:3])
            delivered += reward.sum()
            assert np.array_equal(env.state(), fresh.state()[:3])
    assert delivered > 10


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_of_the_environment_goes_on_by_itself(twin_of):
    """SuperSuit copies environments, and arrays that share memory no longer do so in a copy."""
    env, drive = envs.make("rware_layout", 3), Driver(0)
    env.reset(seed=0, options={"task": [1, 4, 9]})
    for _ in range(50):
        env.step(np.array([drive(warehouse) for warehouse in env.warehouses]))
    twin = twin_of(env)
    for _ in range(100):
        actions = np.array([drive(warehouse) for warehouse in env.warehouses])
        for seen, of_twin in zip(env.step(actions)[:4], twin.step(actions)[:4], strict=True):
            assert np.array_equal(seen, of_twin)
        assert np.array_equal(env.state(), twin.state())


# ---- rewards, states and pictures by hand ----


def at_the_goal(load):
    """One copy with agent 2 a step above the left goal, carrying a requested shelf, another one or none."""
    env = envs.make("rware_layout", 1)
    env.reset(seed=0, options={"task": [0]})
    warehouse = env.warehouses[0]
    requested = [shelf.id for shelf in warehouse.request_queue]
    other = next(shelf.id for shelf in warehouse.shelfs if shelf.id not in requested)
    carried = {"requested": requested[1], "other": other, "none": None}[load]
    corners = [(0, 0, Direction.UP, None), (9, 0, Direction.UP, None), (0, 9, Direction.DOWN, None)]
    shelves = inside(warehouse)["shelves"]
    put(warehouse, shelves, [*corners[:2], (4, 8, Direction.DOWN, carried), corners[2]])
    return env, warehouse, requested, carried


def test_only_who_delivers_is_rewarded_and_only_once():
    env, warehouse, requested, carried = at_the_goal("requested")
    actions = np.array([[NOOP, NOOP, FORWARD, NOOP]])
    assert env.step(actions)[1].tolist() == [[0, 0, 1, 0]]
    now = [shelf.id for shelf in warehouse.request_queue]
    assert carried not in now and len(set(now)) == 4
    assert [now[i] for i in (0, 2, 3)] == [requested[i] for i in (0, 2, 3)]  # the others still wait
    assert env.step(actions)[1].tolist() == [[0, 0, 0, 0]]
    assert warehouse.agents[2].carrying_shelf.id == carried
    env.step(np.array([[NOOP, NOOP, TOGGLE, NOOP]]))
    assert warehouse.agents[2].carrying_shelf.id == carried  # no shelf is put down on a highway


@pytest.mark.parametrize("load", ["other", "none"])
def test_nothing_but_a_requested_shelf_is_rewarded(load):
    env, warehouse, requested, _ = at_the_goal(load)
    assert env.step(np.array([[NOOP, NOOP, FORWARD, NOOP]]))[1].tolist() == [[0, 0, 0, 0]]
    assert (warehouse.agents[2].x, warehouse.agents[2].y) == (4, 9)
    assert [shelf.id for shelf in warehouse.request_queue] == requested


def test_the_state_is_what_agents_know_of_themselves_and_where_shelves_are():
    env, drive = envs.make("rware_layout", 3), Driver(0)
    obs, _ = env.reset(seed=0, options={"task": [0, 3, 9]})
    for _ in range(60):
        for k, warehouse in enumerate(env.warehouses):
            shelves, requested = np.zeros((2, 10, 10))
            for shelf in warehouse.shelfs:
                shelves[shelf.y, shelf.x] = 1
                requested[shelf.y, shelf.x] = shelf in warehouse.request_queue
            expected = np.concatenate([obs[k, :, :8].ravel(), shelves.ravel(), requested.ravel()])
            assert np.array_equal(env.state()[k], expected) and env.state_dim == 232
        obs, *_ = env.step(np.array([drive(warehouse) for warehouse in env.warehouses]))


def test_no_picture_before_the_first_reset():
    with pytest.raises(ValueError, match="before reset"):
        envs.make("rware_layout").render()


def test_the_picture_shows_shelves_requests_goals_and_agents(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyglet", None)  # rware's own pictures need a display
    env, drive = envs.make("rware_layout", 2), Driver(0)
    env.reset(seed=0, options={"task": [6, 1]})
    warehouse, before, loads, moved = env.warehouses[0], None, set(), 0
    orange, blue, red, grey, black = (255, 150, 0), (70, 90, 170), (220, 30, 30), (130, 130, 130), (0, 0, 0)
    for _ in range(80):
        picture = env.render()
        assert (picture.shape, picture.dtype) == ((320, 320, 3), np.uint8)
        assert np.array_equal(picture, env.render())
        cells = picture.reshape(10, 32, 10, 32, 3).swapaxes(1, 2)  # [y, x, pixel, pixel, 3]
        for shelf in warehouse.shelfs:
            assert tuple(cells[shelf.y, shelf.x, 5, 5]) == (orange if shelf in warehouse.request_queue else blue)
        assert (cells[:, :, 5, 5] == orange).all(-1).sum() == 4
        for agent in warehouse.agents:
            right, down = STEP[agent.dir]
            cell = cells[agent.y, agent.x]
            assert tuple(cell[16 + 8 * down, 16 + 8 * right]) == black
            assert tuple(cell[16 - 6 * down, 16 - 6 * right]) == (red if agent.carrying_shelf else grey)
            loads.add(agent.carrying_shelf is not None)
        where = inside(warehouse)["agents"]
        if before is not None:
            moved += where != before[0]
            assert (where != before[0]) <= (picture != before[1]).any()
        before = where, picture
        env.step(np.array([drive(one) for one in env.warehouses]))
    assert loads == {False, True} and moved > 40
    assert tuple(env.render()[9 * 32 + 2, 4 * 32 + 2]) == tuple(env.render()[9 * 32 + 2, 5 * 32 + 2]) == (150, 215, 150)


def test_a_thousand_resets_take_no_more_memory():
    env = envs.make("rware_layout", 2)
    sizes = []
    tracemalloc.start()
    for i in range(1200):
        env.reset()
        if i in (199, 1199):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 20_000  # bytes; the shelves of one reset are 14 to 28 objects
