"""hunting_target and spread_target: physics against mpe2, rewards and observations by hand, what the pictures show."""

import math

import numpy as np
import pytest
from mpe2 import simple_spread_v3, simple_tag_v3
from mpe2._mpe_utils.core import Landmark

import envs
from envs.particle import HuntingTarget, SpreadTarget

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's: a NaN or an overflow on the way
both = pytest.mark.parametrize("env_id", ["hunting_target", "spread_target"])
EVERYTHING = 1e9  # a radius that lets everybody see everybody
SPREAD = {"num_agents": 2, "num_landmarks": 5}
HUNTING = {"num_predators": 2, "num_preys": 4, "num_obstacles": 1, "radius": 0.8}


def random_actions(env, rng):
    return rng.uniform(-1, 1, (env.num_envs, env.num_agents, 2))


def outward(env, seed=0):
    """A constant push for every agent, too strong for the Box, half of them straight into a wall or a corner."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, (env.num_envs, env.num_agents))
    angle[::2] = np.round(angle[::2] / (np.pi / 4)) * (np.pi / 4)
    return 2 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def place(copy, env):
    """The positions [entity, 2] of one copy, as plain floats."""
    return env.pos[:, :, copy].T.tolist()


# ---- physics: equal to mpe2 to the bit ----


def tag_worlds(env, num_obstacles):
    """One simple_tag for each copy, with our preys as its good agents."""
    worlds = []
    for _ in range(env.num_envs):
        world = simple_tag_v3.raw_env(
            num_good=len(env.tasks),
            num_adversaries=env.num_agents,
            num_obstacles=num_obstacles,
            max_cycles=10**6,
            continuous_actions=True,
        )
        world.reset(seed=0)
        worlds.append(world)
    return worlds


def spread_worlds(env):
    """One simple_spread for each copy, with as many landmarks as ours and nobody pushing anybody."""
    worlds = []
    for _ in range(env.num_envs):
        world = simple_spread_v3.raw_env(N=env.num_agents, max_cycles=10**6, continuous_actions=True)
        world.reset(seed=0)
        for agent in world.world.agents:
            agent.collide = False
        while len(world.world.landmarks) < env.num_entities - env.num_agents:
            landmark = Landmark()
            landmark.collide, landmark.movable = False, False
            world.world.landmarks.append(landmark)
        worlds.append(world)
    return worlds


def put_where_we_are(worlds, env):
    for k, world in enumerate(worlds):
        for j, entity in enumerate(world.world.entities):
            entity.state.p_pos = env.pos[:, j, k].copy()
            entity.state.p_vel = np.zeros(2)


def step_world(world, forces):
    """One step of an mpe2 environment under `forces` [agent, 2] in [-1, 1]."""
    for x, y in forces:
        world.step(np.array([0, max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)]))


def assert_worlds_equal(worlds, env, obs):
    """Positions, velocities and observations; hunting's own observation has a visibility bit after each pair."""
    for k, world in enumerate(worlds):
        entities, agents = world.world.entities, world.world.agents
        assert np.array_equal(env.pos[:, :, k].T, [entity.state.p_pos for entity in entities])
        assert np.array_equal(env.vel[:, :, k].T, [agent.state.p_vel for agent in agents])
        for i in range(env.num_agents):
            ours, theirs = obs[k, i], world.observe(agents[i].name)
            if isinstance(env, HuntingTarget):
                fixed = 4 + 2 * (len(entities) - len(agents))
                seen = ours[fixed:].reshape(-1, 3)
                assert (seen[:, 2] == 1).all()
                ours = np.concatenate([ours[:fixed], seen[:, :2].ravel()])
            assert np.array_equal(ours, theirs[: len(ours)])
            assert len(ours) == 4 + 2 * (len(entities) - 1)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("counts", [(3, 3, 2), (1, 1, 0), (4, 3, 2)])
def test_hunting_moves_as_simple_tag_does(num_envs, counts):
    num_predators, num_preys, num_obstacles = counts
    names = ("num_predators", "num_preys", "num_obstacles")
    settings = dict(zip(names, counts, strict=True), radius=EVERYTHING, walls=False)
    env = envs.make("hunting_target", num_envs, seed=1, **settings)
    env.max_episode_steps = 101  # the 100th observation is this episode's own
    worlds = tag_worlds(env, num_obstacles)
    rng = np.random.default_rng(2)
    touching = 0
    for crowd in (1.0, 0.2):  # the arena as it is, and everybody in a heap
        env.start_range = np.full_like(env.start_range, crowd)
        obs, _ = env.reset()
        put_where_we_are(worlds, env)
        assert_worlds_equal(worlds, env, obs)
        for _ in range(100):
            actions, flight = random_actions(env, rng), env.prey_action()
            for k, world in enumerate(worlds):
                entities = world.world.entities
                touching += (
                    sum(world.scenario.is_collision(a, b) for a in entities for b in entities if a is not b) // 2
                )
                step_world(world, [*actions[k], *flight[:, :, k].T])
            obs, *_ = env.step(actions)
            assert_worlds_equal(worlds, env, obs)
    if num_predators > 1:
        assert touching > 50  # bodies did push each other


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"num_agents": 5, "num_landmarks": 7}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spread_moves_as_simple_spread_does(num_envs, settings, dtype):
    env = envs.make("spread_target", num_envs, seed=1, walls=False, **settings)
    env.max_episode_steps = 101
    env.start_range = env.start_range * 0.1
    worlds = spread_worlds(env)
    rng = np.random.default_rng(2)
    obs, _ = env.reset()
    put_where_we_are(worlds, env)
    assert_worlds_equal(worlds, env, obs)
    overlapping = 0
    for _ in range(100):
        actions = random_actions(env, rng).astype(dtype)
        for k, world in enumerate(worlds):
            agents = world.world.agents
            overlapping += sum(world.scenario.is_collision(a, b) for a in agents for b in agents if a is not b) // 2
            step_world(world, actions[k])
        obs, *_ = env.step(actions)
        assert_worlds_equal(worlds, env, obs)
    assert overlapping > 20, overlapping  # agents went through each other


# ---- physics: what mpe2 has not ----


def softplus(depth):
    """The soft contact with its margin of 1e-3, in plain Python."""
    return max(depth, 0) + 1e-3 * math.log1p(math.exp(-abs(depth) / 1e-3))


@both
def test_walls_push_with_the_soft_contact_at_plus_and_minus_one(env_id):
    settings = {"num_predators": 1, "num_preys": 1, "num_obstacles": 0} if env_id == "hunting_target" else {}
    walled, free = (envs.make(env_id, 200, seed=0, walls=walls, **settings) for walls in (True, False))
    walled.max_speed = free.max_speed = np.full_like(free.max_speed, np.inf)
    walled.reset(), free.reset()
    start = walled.pos.copy()
    actions = random_actions(free, np.random.default_rng(0))
    walled.step(actions), free.step(actions)
    assert np.array_equal(walled.pos, free.pos)  # a force shows in the velocity first
    pushed = set()
    for (axis, body, k), velocity in np.ndenumerate(walled.vel):
        x, size = start[axis, body, k], walled.size[body, 0]
        push = 100 * (softplus(-1 - (x - size)) - softplus((x + size) - 1))
        assert velocity - free.vel[axis, body, k] == pytest.approx(push * 0.1, abs=1e-12)
        if abs(push) > 1:
            pushed.add((axis, body, push > 0))
    assert len(pushed) == 4 * walled.num_movers  # everybody met all four walls


@both
def test_walls_hold_under_a_constant_push(env_id):
    """Soft walls give way: a body at full speed is two steps deep before it is thrown back."""
    env = envs.make(env_id, 64, seed=0)
    free = envs.make(env_id, 64, seed=0, walls=False)
    env.max_episode_steps = free.max_episode_steps = 1000
    env.reset(), free.reset()
    pushes = outward(env)
    reached, inside = [], []
    for _ in range(300):
        env.step(pushes), free.step(pushes)
        movers = np.abs(env.pos[:, : env.num_movers])
        reached.append(movers.max())
        inside.append((movers < 1.1).all(0).mean())
    assert 1 < max(reached) < 1.4
    assert np.mean(inside) > 0.8
    assert np.abs(free.pos[:, : free.num_agents]).max(0).min() > 5  # the same push without walls


def test_hunting_has_speed_limits():
    env = envs.make("hunting_target", 32, seed=0)
    env.reset()
    pushes, fastest = outward(env), np.zeros(6)
    for _ in range(60):
        env.step(pushes)
        fastest = np.maximum(fastest, np.hypot(*env.vel).max(1))
    assert fastest == pytest.approx([1.0, 1.0, 1.0, 1.3, 1.3, 1.3], rel=1e-12)


def test_spread_has_no_speed_limit():
    env = envs.make("spread_target", 4, seed=0, walls=False)
    env.reset()
    for _ in range(60):
        env.step(np.ones((4, 3, 2)))
    assert env.vel == pytest.approx(5 * 0.1 / 0.25, rel=1e-6)  # where damping meets the push


def test_agents_left_alone_stay_where_they_are():
    env = envs.make("spread_target", 20, seed=0)
    env.start_range = env.start_range * 0.8  # away from the walls
    env.reset()
    start = env.pos.copy()
    for _ in range(3):
        env.step(np.zeros((20, 3, 2)))
    assert np.abs(env.pos - start).max() < 1e-9


@both
def test_starts_are_uniform_and_at_rest(env_id):
    env = envs.make(env_id, 500, seed=0)
    env.reset()
    assert (env.vel == 0).all()
    for j in range(env.num_entities):
        reach = 0.9 if env_id == "hunting_target" and j >= 6 else 1.0
        for axis in range(2):
            values = np.sort(env.pos[axis, j]) / reach
            assert values[0] >= -1 and values[-1] <= 1
            even = np.linspace(-1, 1, 500)
            assert np.abs(values - even).max() < 0.2  # Kolmogorov-Smirnov at 0.1: p < 1e-4
    assert len(np.unique(env.pos)) == env.pos.size


# ---- preys ----


def nearest_predator(prey, predators):
    return min(predators, key=lambda predator: math.dist(predator, prey))


@pytest.mark.parametrize("settings", [{}, HUNTING])
def test_every_prey_flees_straight_from_its_nearest_predator(settings):
    env = envs.make("hunting_target", 5, seed=0, **settings)
    n, rng = env.num_agents, np.random.default_rng(0)
    env.reset()
    followed = set()
    for _ in range(50):
        flight = env.prey_action()
        assert flight.shape == (2, len(env.tasks), 5)
        for k in range(5):
            bodies = place(k, env)
            for j in range(len(env.tasks)):
                prey, hunter = bodies[n + j], nearest_predator(bodies[n + j], bodies[:n])
                away = [(p - h) / math.dist(prey, hunter) for p, h in zip(prey, hunter, strict=True)]
                assert flight[:, j, k].tolist() == pytest.approx(away, abs=1e-9)
                followed.add((j, bodies.index(hunter)))
        env.step(random_actions(env, rng))
    assert len(followed) == n * len(env.tasks)  # every predator was the nearest of every prey at some time


def test_preys_do_what_the_rule_says_with_their_full_force():
    env = envs.make("hunting_target", 20, seed=0, num_obstacles=0, walls=False)
    env.reset()
    start = [place(k, env) for k in range(20)]
    env.step(np.zeros((20, 3, 2)))
    alone = 0
    for k, bodies in enumerate(start):
        for j in range(3, 6):
            if min(math.dist(bodies[j], other) for i, other in enumerate(bodies) if i != j) < 0.2:
                continue  # pushed as well
            alone += 1
            hunter = nearest_predator(bodies[j], bodies[:3])
            away = [(p - h) / math.dist(bodies[j], hunter) for p, h in zip(bodies[j], hunter, strict=True)]
            assert env.vel[:, j, k].tolist() == pytest.approx([4 * 0.1 * x for x in away], abs=1e-9)
    assert alone > 20


@both
def test_nothing_but_the_reward_tells_the_task(env_id):
    env, other = envs.make(env_id, 4, seed=0), envs.make(env_id, 4, seed=0)
    first = env.reset(seed=3, options={"task": [0, 1, 2, 0]})[0]
    assert np.array_equal(first, other.reset(seed=3, options={"task": [1, 2, 0, 2]})[0])
    rng, rewards = np.random.default_rng(0), []
    for _ in range(150):  # over the end of an episode
        actions = random_actions(env, rng)
        (obs, reward, *_), (other_obs, other_reward, *_) = env.step(actions), other.step(actions)
        assert np.array_equal(obs, other_obs) and np.array_equal(env.state(), other.state())
        rewards.append(reward - other_reward)
    assert (np.abs(rewards).max((0, 2)) > 0.01).all()


def test_targets_and_decoys_go_the_same_ways():
    """Means over an episode, target minus decoys, are zero within four standard errors of 1,500 episodes."""
    env = envs.make("hunting_target", 300, seed=0)
    differences, rng = [], np.random.default_rng(0)
    for _ in range(5):
        env.reset()
        target = np.eye(3, dtype=bool)[env.task].T  # [prey, E]
        track = []
        for _ in range(99):
            env.step(random_actions(env, rng))
            predators, preys = env.pos[:, :3].copy(), env.pos[:, 3:6].copy()
            nearest = np.sqrt(np.square(preys[:, :, None] - predators[:, None]).sum(0)).min(1)  # [prey, E]
            track.append([*preys, nearest])
        track = np.array(track)  # [t, (x, y, nearest), prey, E]
        seen = np.concatenate([track.mean(0), track.std(0), np.abs(track[-1, :2])])  # [statistic, prey, E]
        decoys = (seen * ~target).sum(1) / 2
        differences.append((seen * target).sum(1) - decoys)
    differences = np.concatenate(differences, axis=1)  # [statistic, episode]
    error = differences.std(1) / math.sqrt(differences.shape[1])
    assert (1e-4 < error).all() and (4 * error < 0.1).all()  # so the tolerance is a twentieth of the arena or finer
    assert (np.abs(differences.mean(1)) < 4 * error).all()


# ---- observations and rewards, by hand ----


def hunting_obs(env, k, i, num_obstacles, radius):
    n, bodies = env.num_agents, place(k, env)
    me = bodies[i]
    obs = [*env.vel[:, i, k], *me]
    for obstacle in bodies[len(bodies) - num_obstacles :]:
        obs += [obstacle[0] - me[0], obstacle[1] - me[1]]
    for j in range(n + len(env.tasks)):
        if j != i:
            seen = math.dist(bodies[j], me) <= radius
            obs += [bodies[j][0] - me[0], bodies[j][1] - me[1], 1] if seen else [0, 0, 0]
    return np.array(obs, np.float32)


def spread_obs(env, k, i):
    n, bodies = env.num_agents, place(k, env)
    others = bodies[n:] + [bodies[j] for j in range(n) if j != i]
    relative = [x - y for body in others for x, y in zip(body, bodies[i], strict=True)]
    return np.array([*env.vel[:, i, k], *bodies[i], *relative], np.float32)


@pytest.mark.parametrize("settings", [{}, HUNTING, {"num_predators": 1, "num_preys": 1, "num_obstacles": 0}])
def test_hunting_observations_by_hand(settings):
    env = envs.make("hunting_target", 4, seed=0, **settings)
    num_obstacles, radius = settings.get("num_obstacles", 2), settings.get("radius", 1.414)
    obs, _ = env.reset()
    rng, bits = np.random.default_rng(0), []
    for _ in range(30):
        for k in range(4):
            for i in range(env.num_agents):
                assert np.array_equal(obs[k, i], hunting_obs(env, k, i, num_obstacles, radius))
                bits += obs[k, i, 4 + 2 * num_obstacles + 2 :: 3].tolist()
        obs, *_ = env.step(random_actions(env, rng))
    assert set(bits) == {0, 1}  # some were out of sight


@pytest.mark.parametrize("settings", [{}, SPREAD, {"num_agents": 1, "num_landmarks": 2}])
def test_spread_observations_by_hand(settings):
    env = envs.make("spread_target", 4, seed=0, **settings)
    obs, _ = env.reset()
    rng = np.random.default_rng(0)
    for _ in range(30):
        for k in range(4):
            for i in range(env.num_agents):
                assert np.array_equal(obs[k, i], spread_obs(env, k, i))
        obs, *_ = env.step(random_actions(env, rng))


@pytest.mark.parametrize("settings", [{}, HUNTING])
def test_hunting_reward_by_hand(settings):
    env = envs.make("hunting_target", 6, seed=0, **settings)
    n, rng = env.num_agents, np.random.default_rng(0)
    task = [0, 1, 2, 2, 1, 0]
    env.reset(options={"task": task})
    for _ in range(50):
        _, reward, terminated, _, _ = env.step(random_actions(env, rng))
        for k in range(6):
            bodies = place(k, env)
            expected = -sum(math.dist(bodies[i], bodies[n + task[k]]) ** 2 for i in range(n)) / n
            assert reward[k].tolist() == pytest.approx([expected] * n, rel=1e-6)
            assert len(set(reward[k])) == 1
        assert not terminated.any()


@pytest.mark.parametrize("settings", [{}, SPREAD])
def test_spread_reward_by_hand(settings):
    env = envs.make("spread_target", 6, seed=0, **settings)
    n, rng = env.num_agents, np.random.default_rng(0)
    task = [0, 1, 2, 3, 3, 0]
    env.reset(options={"task": task})
    for _ in range(50):
        _, reward, terminated, _, _ = env.step(random_actions(env, rng))
        for k in range(6):
            bodies, effective = place(k, env), env.tasks.parameters[task[k]]
            expected = 0.0
            for j, landmark in enumerate(bodies[n:]):
                if effective[j]:
                    expected -= min(math.dist(agent, landmark) for agent in bodies[:n]) ** 2
            assert reward[k].tolist() == pytest.approx([expected] * n, rel=1e-6)
            assert len(set(reward[k])) == 1
        assert not terminated.any()


# ---- tasks and settings ----


def test_spread_tasks_are_all_choices():
    tasks = envs.make("spread_target").tasks
    assert tasks.parameters.tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    assert tasks.train.tolist() == tasks.test.tolist() == [0, 1, 2, 3]
    many = envs.make("spread_target", num_agents=2, num_landmarks=5).tasks
    assert len(many) == 10 and len({tuple(row) for row in many.parameters}) == 10
    assert (many.parameters.sum(1) == 2).all()


def test_spread_tasks_held_out_are_never_drawn():
    env = envs.make("spread_target", 50, num_agents=2, num_landmarks=4, num_test=2)
    assert (env.tasks.train.tolist(), env.tasks.test.tolist()) == ([0, 1, 2, 3], [4, 5])
    drawn = {int(task) for _ in range(4) for task in env.reset()[1]["task"]}
    assert drawn == {0, 1, 2, 3}
    assert env.reset(options={"task": [4, 5] * 25})[1]["task"].tolist() == [4, 5] * 25


@pytest.mark.parametrize("num_preys", [1, 2, 5])
def test_hunting_has_one_task_for_each_prey(num_preys):
    tasks = envs.make("hunting_target", num_preys=num_preys).tasks
    assert np.array_equal(tasks.labels, np.eye(num_preys)) and np.array_equal(tasks.parameters, np.eye(num_preys))
    assert tasks.train.tolist() == tasks.test.tolist() == list(range(num_preys))


@both
def test_sizes_follow_the_settings(env_id):
    settings = HUNTING if env_id == "hunting_target" else SPREAD
    for env, agents, obs_dim in (
        (envs.make(env_id), 3, 4 + 2 * 2 + 3 * 5 if env_id == "hunting_target" else 4 + 2 * 4 + 2 * 2),
        (envs.make(env_id, **settings), 2, 4 + 2 * 1 + 3 * 5 if env_id == "hunting_target" else 4 + 2 * 5 + 2 * 1),
    ):
        assert (env.num_agents, env.single_observation_space.shape, env.state_dim) == (
            agents,
            (obs_dim,),
            agents * obs_dim,
        )
        assert env.reset()[0].shape == (1, agents, obs_dim)
        assert env.max_episode_steps == 100
        assert [bool(env.step(np.zeros((1, agents, 2)))[3][0]) for _ in range(100)] == [False] * 99 + [True]


BAD_SETTINGS = [
    ("hunting_target", "num_predators", 0),
    ("hunting_target", "num_predators", 1.5),
    ("hunting_target", "num_preys", 0),
    ("hunting_target", "num_preys", True),
    ("hunting_target", "num_preys", "3"),
    ("hunting_target", "num_obstacles", -1),
    ("hunting_target", "radius", -1),
    ("hunting_target", "radius", 0),
    ("hunting_target", "radius", float("nan")),
    ("hunting_target", "radius", "far"),
    ("hunting_target", "walls", "off"),
    ("spread_target", "walls", 1),
    ("spread_target", "num_agents", 0),
    ("spread_target", "num_landmarks", 3),  # as many as agents: no choice left
    ("spread_target", "num_landmarks", None),
    ("spread_target", "num_test", -1),
    ("spread_target", "num_test", 4),  # nothing left to train on
    ("spread_target", "num_test", 0.5),
]


@pytest.mark.parametrize(("env_id", "name", "value"), BAD_SETTINGS)
def test_bad_settings_are_refused(env_id, name, value):
    with pytest.raises(ValueError, match=f"{name}: got .+, expected .+") as refusal:
        envs.make(env_id, **{name: value})
    assert str(value) in str(refusal.value)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    known = {
        "hunting_target": ("num_predators", "num_preys", "num_obstacles", "radius", "walls"),
        "spread_target": ("num_agents", "num_landmarks", "num_test", "walls"),
    }
    for env_id, names in known.items():
        for make in (envs.make, envs.parallel_env):
            with pytest.raises(ValueError, match="got unknown setting num_prey, expected one of") as refusal:
                make(env_id, num_prey=3)
            assert str(refusal.value).endswith(", ".join(names))


def test_settings_reach_the_parallel_env():
    view = envs.parallel_env("hunting_target", task=1, num_preys=2, num_predators=4)
    obs, _ = view.reset(seed=0)
    assert len(obs) == 4 and obs["agent_3"].shape == (4 + 2 * 2 + 3 * 5,)


# ---- pictures ----


def pixel_places(picture, colour):
    """Where in the arena the pixels of this colour are, [pixel, 2]; the picture shows [-1.2, 1.2]."""
    row, column = np.nonzero((picture == colour).all(2))
    height, width, _ = picture.shape
    return np.stack([(column + 0.5) / width * 2.4 - 1.2, 1.2 - (row + 0.5) / height * 2.4], axis=1)


def colour_at(picture, place):
    height, width, _ = picture.shape
    return picture[int((1.2 - place[1]) / 2.4 * height), int((place[0] + 1.2) / 2.4 * width)]


@both
def test_the_disc_of_an_agent_is_where_the_agent_is(env_id):
    if env_id == "hunting_target":
        env, size = HuntingTarget(2, 4, num_predators=1, num_preys=1, num_obstacles=0), 0.075
    else:
        env, size = SpreadTarget(2, 1, num_agents=1, num_landmarks=2), 0.15
    env.reset()
    places = []
    for _ in range(3):
        picture, (x, y) = env.render(), env.pos[:, 0, 0]
        assert max(abs(x), abs(y)) < 1
        disc = pixel_places(picture, colour_at(picture, (x, y)))
        assert disc.mean(0) == pytest.approx([x, y], abs=0.01)
        assert len(disc) * (2.4 / len(picture)) ** 2 == pytest.approx(math.pi * size**2, rel=0.05)
        places.append((x, y))
        for _ in range(6):
            env.step(np.full((2, 1, 2), 0.5 if x < 0 else -0.5))
    assert all(math.dist(places[0], place) > 0.1 for place in places[1:])


def test_the_ring_is_around_the_target_and_follows_the_task():
    env = envs.make("hunting_target", 2, seed=6, num_predators=1, num_obstacles=0)
    for task in (0, 1, 2):
        env.reset(seed=6, options={"task": [task, 0]})  # copy 0 is the one in the picture
        for _ in range(5):
            ring, target = pixel_places(env.render(), (0, 0, 0)), env.pos[:, 1 + task, 0]
            distance = np.hypot(*(ring - target).T)
            assert len(ring) > 100 and distance.min() > 0.06 and distance.max() < 0.1
            assert len(ring) * (2.4 / 320) ** 2 == pytest.approx(math.pi * (0.09**2 - 0.07**2), rel=0.1)
            env.step(np.zeros((2, 1, 2)))


def test_rings_and_colours_tell_the_effective_landmarks():
    env = envs.make("spread_target", 1, seed=2)
    for task in range(4):
        env.reset(seed=2, options={"task": [task]})
        picture, landmarks = env.render(), env.pos[:, 3:, 0].T
        effective = env.tasks.parameters[task] == 1
        ring = pixel_places(picture, (0, 0, 0))
        distance = np.hypot(*(ring[:, None] - landmarks).T)  # [landmark, pixel]
        near = ((distance > 0.06) & (distance < 0.1)).sum(1)
        assert ((distance < 0.1) & effective[:, None]).any(0).all()  # no ring elsewhere
        assert (near[effective] > 100).all() and (near[~effective] == 0).all()
        colours = [tuple(colour_at(picture, landmark)) for landmark in landmarks]
        assert len({colours[j] for j in range(4) if effective[j]}) == 1
        assert colours[list(effective).index(False)] != colours[list(effective).index(True)]
