"""magent_gather: equal to a plain magent2 engine over whole episodes; letters, rewards, moves and pictures by hand."""

import copy
import math
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest

import envs
from envs.gather import gridworld  # and not from magent2, which would leave OMP_NUM_THREADS set for other tests

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's: a NaN or an overflow on the way
# fmt: off
MOVES = [(0, -2), (-1, -1), (0, -1), (1, -1), (-2, 0), (-1, 0), (0, 0), (1, 0), (2, 0), (-1, 1), (0, 1), (1, 1), (0, 2)]
# fmt: on
HITS = [(0, -1), (-1, 0), (1, 0), (0, 1)]  # actions 13 to 16
STAY, UP, LEFT, RIGHT, DOWN = 6, 13, 14, 15, 16
SMALL = {"num_agents": 8, "map_size": 20, "view_range": 2}


def plain_engine(map_size=28, view_range=4, **_):
    """The engine as gather_v5 sets it up, by hand: its food looks 1 cell far, and its agents have 3 hp."""
    config = gridworld.Config()
    config.set({"map_width": map_size, "map_height": map_size, "minimap_mode": False})
    view, touch = gridworld.CircleRange(view_range), gridworld.CircleRange(1)
    agent = dict(width=1, length=1, hp=3, speed=2, view_range=view, attack_range=touch, damage=6, step_recover=0)
    agent |= dict(attack_in_group=0, step_reward=-0.01, attack_penalty=-0.1, dead_penalty=-1)
    food = dict(width=1, length=1, hp=25, speed=0, kill_reward=5)
    food |= dict(view_range=gridworld.CircleRange(1), attack_range=gridworld.CircleRange(0))
    config.register_agent_type("agent", agent)
    config.register_agent_type("food", food)
    foods, agents = config.add_group("food"), config.add_group("agent")
    a, b = gridworld.AgentSymbol(agents, "any"), gridworld.AgentSymbol(foods, "any")
    config.add_reward_rule(gridworld.Event(a, "attack", b), receiver=a, value=0.5)
    return gridworld.GridWorld(config)


def begin(engine, rng, start, layout):
    engine.set_seed(int(rng.integers(2**31 - 1)))
    engine.reset()
    food, agents = engine.get_handles()
    engine.add_agents(agents, "custom", pos=start.tolist())
    engine.add_agents(food, "custom", pos=layout.tolist())


def engine_obs(engine):
    view, features = engine.get_observation(engine.get_handles()[1])
    return np.concatenate([view.reshape(len(view), -1), features], axis=1)


def engine_state(engine, map_size):
    """Agents, hits left and places, cell by cell."""
    food, agents = engine.get_handles()
    cells = np.zeros((2, map_size, map_size), np.float32)
    for x, y in engine.get_pos(agents):
        cells[0, y, x] = 1
    for (x, y), share in zip(engine.get_pos(food), engine.get_observation(food)[0][:, 1, 1, 2], strict=True):
        cells[1, y, x] = {25: 1, 19: 0.8, 13: 0.6, 7: 0.4, 1: 0.2}[round(25 * float(share))]
    places = engine.get_pos(agents).ravel() / map_size
    return np.concatenate([cells[:, 1:-1, 1:-1].ravel(), places]).astype(np.float32)


def read_state(env):
    """The state [E, state_dim] as maps [E, 2, y, x] inside the walls and places [E, n, 2] in cells."""
    state, cells = env.state(), 2 * (env.map_size - 2) ** 2
    maps = state[:, :cells].reshape(env.num_envs, 2, env.map_size - 2, -1)
    return maps, np.rint(state[:, cells:] * env.map_size).astype(int).reshape(env.num_envs, env.num_agents, 2)


def random_actions(env, rng):
    return rng.integers(17, size=(env.num_envs, env.num_agents))


def seek(env, rng):
    """Every agent hits the food beside it, or mostly goes to the nearest food there is."""
    actions = rng.integers(13, size=(env.num_envs, env.num_agents))
    maps, places = read_state(env)
    for k, i in np.ndindex(actions.shape):
        food = np.argwhere(maps[k, 1] > 0)[:, ::-1] + 1  # [f, (x, y)]
        x, y = places[k, i]
        beside = [j for j, (dx, dy) in enumerate(HITS) if ([x + dx, y + dy] == food).all(1).any()]
        if beside:
            actions[k, i] = UP + beside[0]
        elif len(food) and rng.random() < 0.8:
            goal = food[np.abs(food - (x, y)).sum(1).argmin()]
            actions[k, i] = np.abs(np.array(MOVES) + (x, y) - goal).sum(1).argmin()
    return actions


def by_hand(start, food, num_envs=1):
    """Agents and food where the test wants them; agents that it does not name stand below, out of the way."""
    env = envs.make("magent_gather", num_envs, num_agents=8)
    rest = [(2 + 3 * i, 26) for i in range(8 - len(start))]
    env.start, env.layouts[0] = np.array(list(start) + rest), np.array(food)
    env.reset(options={"task": [0] * num_envs})
    return env


def act(env, *actions):
    return env.step(np.array([[*actions, *[STAY] * (8 - len(actions))]] * env.num_envs))


# ---- the engine ----


@pytest.mark.parametrize("policy", [random_actions, seek])
@pytest.mark.parametrize("settings", [{}, SMALL])
def test_every_copy_is_a_plain_engine(settings, policy):
    env, size = envs.make("magent_gather", 3, seed=4, **settings), settings.get("map_size", 28)
    task, rngs = [0, 3, 5], [np.random.default_rng([4, k]) for k in range(3)]
    plain, rng = [plain_engine(**settings) for _ in range(3)], np.random.default_rng(0)
    for engine, own, t in zip(plain, rngs, task, strict=True):
        begin(engine, own, env.start, env.layouts[t])
    obs, _ = env.reset(options={"task": task})
    assert (obs.shape[2:], env.state().shape[1]) == (env.single_observation_space.shape, env.state_dim)
    hits, eaten, kills = 0, 0, 0
    for step in range(1, 301):  # over the end of an episode
        assert np.array_equal(obs, [engine_obs(engine) for engine in plain])
        assert np.array_equal(env.state(), [engine_state(engine, size) for engine in plain])
        actions = policy(env, rng)
        obs, reward, terminated, truncated, info = env.step(actions)
        for k, engine in enumerate(plain):
            food, agents = engine.get_handles()
            before = engine.get_num(food)
            engine.set_action(agents, actions[k].astype(np.int32))
            engine.step()
            assert np.array_equal(reward[k], engine.get_reward(agents))
            engine.clear_dead()
            eaten += before - engine.get_num(food)
        kills += np.isclose(reward, 4.89).sum()
        hits += np.isclose(reward, 0.39).sum()
        assert not terminated.any() and (truncated == (step == 200)).all()  # on to the end when all food is gone
        if step == 200:
            assert np.array_equal(info["final_obs"], [engine_obs(engine) for engine in plain])
            assert np.array_equal(info["final_state"], [engine_state(engine, size) for engine in plain])
            if policy is seek:
                assert not any(engine.get_num(engine.get_handles()[0]) for engine in plain)
            for engine, own, t in zip(plain, rngs, task, strict=True):
                begin(engine, own, env.start, env.layouts[t])
    assert kills == eaten and hits > 5
    assert eaten > sum(len(env.layouts[t]) for t in task) or policy is not seek


def test_one_hit_after_the_other_by_hand():
    env = by_hand(start=[(5, 5)], food=[(5, 4), (10, 10)])
    for left in (0.8, 0.6, 0.4, 0.2, 0):
        assert env.state()[0, :1352].reshape(2, 26, 26)[1, 3, 4] == pytest.approx(left + 0.2)
        obs, reward, *_ = act(env, UP)
        assert reward[0, 0] == pytest.approx(0.5 - 0.11 if left else 5 - 0.11)  # 5 instead of 0.5
        assert reward[0, 1:] == pytest.approx([-0.01] * 7)
        features = obs[0, 0, 405:]
        assert features[:17].argmax() == UP and features[:17].sum() == 1 and features[17] == reward[0, 0]
        food = obs[0, 0, :405].reshape(9, 9, 5)[3, 4, 3:]  # the cell above: is there food, and its hp
        assert food == pytest.approx([float(left > 0), max(0, 30 * left - 5) / 25], abs=1e-6)
    assert env.food.sum() == 1  # the other one
    assert act(env, UP)[1][0, 0] == pytest.approx(-0.11)  # nothing there any more


def test_agents_that_hit_at_once_each_get_theirs_and_chance_says_whose_is_the_kill():
    env = by_hand(start=[(5, 5), (4, 4), (6, 4)], food=[(5, 4), (10, 10)], num_envs=40)
    assert act(env, UP, RIGHT, LEFT)[1][:, :3] == pytest.approx(np.full((40, 3), 0.39))
    reward = act(env, UP, RIGHT, LEFT)[1][:, :3]  # hits four and five, and one at nothing
    assert np.sort(reward, axis=1) == pytest.approx(np.tile([-0.11, 0.39, 4.89], (40, 1)))
    assert {*reward.argmax(1)} == {0, 1, 2}


def test_agents_cannot_be_hurt():
    env = by_hand(start=[(5, 5), (5, 6)], food=[(10, 10)])
    for _ in range(6):
        obs, reward, *_ = act(env, DOWN, UP)
        assert reward[0, :2] == pytest.approx([-0.11, -0.11])
    assert obs[0, :2, :405].reshape(2, 9, 9, 5)[:, 4, 4, 1:3].tolist() == [[1, 1]] * 2  # here, with all their hp


def test_moves_by_hand():
    for action, (dx, dy) in enumerate(MOVES):
        env = by_hand(start=[(12, 12)], food=[(11, 12), (12, 11), (11, 13)])
        act(env, action)
        to = (12 + dx, 12 + dy)
        blocked = to in [(11, 12), (12, 11), (11, 13)]
        assert read_state(env)[1][0, 0].tolist() == ([12, 12] if blocked else list(to))  # over food, but not onto it
    env = by_hand(start=[(1, 1), (8, 8), (10, 8)], food=[(15, 15)])
    act(env, 4, 7, 5)  # into the wall; and two into (9, 8), which the lower number gets
    assert read_state(env)[1][0, :3].tolist() == [[1, 1], [9, 8], [10, 8]]
    plain = plain_engine()
    assert env.single_action_space.n == 17 == plain.get_action_space(plain.get_handles()[1])[0]


# ---- tasks and places ----

DRAWN = """
 ###  ####   ###  ####
#   # #   # #   # #   #
#   # #   # #     #   #
##### ####  #     #   #
#   # #   # #     #   #
#   # #   # #   # #   #
#   # ####   ###  ####
"""


@pytest.mark.parametrize("map_size", [20, 28, 43])
def test_the_food_draws_the_letters(map_size):
    env, scale = envs.make("magent_gather", 8, map_size=map_size), map_size // 14
    assert np.array_equal(env.tasks.parameters, [[letter, density] for letter in range(4) for density in (1, 0.5)])
    env.reset(options={"task": range(8)})
    lines = [line.ljust(23) for line in DRAWN.strip("\n").split("\n")]
    for j in range(4):
        full, half = env.food[2 * j], env.food[2 * j + 1]
        y, x = np.nonzero(full)
        for low, high in ((y.min(), y.max()), (x.min(), x.max())):
            assert abs(low - (map_size - 3 - high)) <= 1  # in the middle
        box = full[y.min() : y.max() + 1, x.min() : x.max() + 1] > 0
        strokes = np.array([[cell == "#" for cell in line[6 * j : 6 * j + 5]] for line in lines])
        assert np.array_equal(box, np.kron(strokes, np.ones((scale, scale))) > 0)
        assert not half[full == 0].any()
        assert (full.sum(), half.sum()) == ((18, 20, 13, 18)[j] * scale**2, full.sum() // 2)
        if map_size == 28:  # no two side by side
            assert not (half[1:] * half[:-1]).any() and not (half[:, 1:] * half[:, :-1]).any()


@pytest.mark.parametrize("num_agents", [8, 13, 16, 64])
@pytest.mark.parametrize("map_size", [20, 28, 99])
def test_agents_start_on_a_ring_along_the_wall_in_order(num_agents, map_size):
    env = envs.make("magent_gather", 2, num_agents=num_agents, map_size=map_size)
    env.reset()
    maps, places = read_state(env)
    assert np.array_equal(places, [env.start] * 2) and (maps[:, 0].sum((1, 2)) == num_agents).all()
    last, cells = map_size - 2, [(int(x), int(y)) for x, y in env.start]
    assert len({*cells}) == num_agents and all({1, last} & {*cell} for cell in cells)
    assert all(1 <= x <= last and 1 <= y <= last for x, y in cells)
    gaps = [math.dist(a, b) for a, b in zip(cells, cells[1:] + cells[:1], strict=True)]
    assert max(gaps) <= math.ceil(4 * (last - 1) / num_agents)  # around corners they are shorter


@pytest.mark.parametrize("cells", [[(5, 5), (5, 5), (6, 6)], [(5, 5), (0, 9), (6, 6)], [(5, 5), (27, 9), (6, 6)]])
def test_a_piece_that_vanishes_is_an_error(cells):
    for pieces in ("food", "agents"):
        with pytest.raises(RuntimeError, match=f"{pieces}: got {2 if pieces == 'food' else 7} on the map, expected"):
            by_hand([(9, 9)] if pieces == "food" else cells, cells if pieces == "food" else [(9, 9)])


@pytest.mark.parametrize("name, low, high", [("num_agents", 8, 64), ("map_size", 20, 99), ("view_range", 1, 10)])
def test_bad_settings_are_refused(name, low, high):
    for value in (low - 1, high + 1, low + 0.5, True, None, str(low)):
        with pytest.raises(ValueError, match=f"^{name}: got .+, expected .+ {low} to {high}$"):
            envs.make("magent_gather", **{name: value})


# ---- copies, seeds, memory ----


def test_who_gets_the_kill_depends_on_seed_and_copy_and_on_nothing_else():
    env, rng, played = envs.make("magent_gather", 1, seed=5), np.random.default_rng(0), []
    first = [env.reset(options={"task": [0]})[0][0]]
    for _ in range(60):
        played.append(seek(env, rng))
        first += [array[0] for array in env.step(played[-1])[:2]]

    def replay(num_envs, seed, copy):
        env = envs.make("magent_gather", num_envs, seed)
        seen = [env.reset(options={"task": [0] * num_envs})[0][copy]]
        for actions in played:
            seen += [array[copy] for array in env.step(actions.repeat(num_envs, axis=0))[:2]]
        return all(np.array_equal(one, other) for one, other in zip(seen, first, strict=True))

    assert replay(1, 5, 0) and replay(2, 5, 0)
    assert not replay(2, 5, 1) and not replay(1, 6, 0)


def test_a_closed_or_copied_environment_begins_with_a_reset():
    env = envs.make("magent_gather", 2, seed=1)
    env.reset()
    env.step(np.full((2, 16), STAY))
    twin, engine = copy.deepcopy(env), weakref.ref(env._worlds[0])
    env.close()
    assert engine() is None  # and with it what C++ holds
    for one in (env, twin):
        with pytest.raises(ValueError, match="before reset"):
            one.step(np.full((2, 16), STAY))
        with pytest.raises(ValueError, match="before reset"):
            one.render()
    assert np.array_equal(env.reset()[0], twin.reset()[0]) and np.array_equal(env.task, twin.task)


def test_memory_does_not_grow():
    def megabytes():
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    env = envs.make("magent_gather", 4)
    for count in (200, 1000):  # the first ones fill the allocator's pools
        before = megabytes()
        for _ in range(count):
            env.reset()
            env.step(np.full((4, 16), UP))
            env.state()
    assert megabytes() - before < 4
    before = megabytes()
    for _ in range(100):
        env = envs.make("magent_gather", 4)
        env.reset()
        env.close()
    assert megabytes() - before < 4


def test_the_import_leaves_no_thread_count_behind():
    code = "import os; before = dict(os.environ); import envs.gather; assert dict(os.environ) == before"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(envs.__file__)), os.getenv("PYTHONPATH")]))
    for threads in ({}, {"OMP_NUM_THREADS": "3"}):
        subprocess.run([sys.executable, "-c", code], check=True, env=clean | threads | {"PYTHONPATH": path})


# ---- pictures ----


def test_the_picture_shows_walls_food_and_agents_where_they_are():
    env, rng = envs.make("magent_gather", 2), np.random.default_rng(0)
    env.reset(options={"task": [2, 5]})
    pictures = []
    for _ in range(40):
        picture = env.render()
        pictures.append(picture)
        assert picture.shape == (252, 252, 3)
        shown = picture[5::9, 5::9].astype(int)  # [y, x, colour]
        assert (shown[[0, -1]] == 120).all() and (shown[:, [0, -1]] == 120).all()
        maps, _ = read_state(env)
        red, green, blue = shown[1:-1, 1:-1].transpose(2, 0, 1)
        assert np.array_equal(blue > red + 100, maps[0, 0] > 0)
        assert np.array_equal(green > red, maps[0, 1] > 0)
        levels = [set(red[maps[0, 1] == level]) for level in np.unique(maps[0, 1])[1:]]
        assert all(len(level) == 1 for level in levels) and len(set.union(*levels)) == len(levels)  # a shade for each
        env.step(seek(env, rng))
    assert len(levels) > 2 and all((one != two).any() for one, two in zip(pictures, pictures[1:], strict=False))
