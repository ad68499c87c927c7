"""halfcheetah_dir and hopper_param: Gymnasium's physics to the bit, MaMuJoCo's observations, tasks, pictures."""

import copy
import os
import resource
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

import envs

# not `import mujoco`: that would come first, and then MuJoCo looks for a display (see envs/locomotion.py)
from envs.locomotion import MARK, mujoco

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's: a NaN or an overflow on the way
both = pytest.mark.parametrize("env_id", ["halfcheetah_dir", "hopper_param"])
SCALED = ("body_mass", "body_inertia", "dof_damping", "geom_friction")
ONE_BY_ONE = [(1, 1, 1, 1), (1.4, 1, 1, 1), (1, 0.6, 1, 1), (1, 1, 0.5, 1), (1, 1, 1, 0.1)]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """MuJoCo writes its log into the working directory, for Gymnasium's own HalfCheetah already."""
    monkeypatch.chdir(tmp_path)


def random_actions(env, rng, size=1.0):
    return rng.uniform(-size, size, (env.num_envs, env.num_agents, *env.single_action_space.shape)).astype(np.float32)


def arrays(model):
    """Everything in a model that is an array, by name."""
    values = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: value.copy() for name, value in values.items() if isinstance(value, np.ndarray)}


# ---- the physics, rewards and ends: equal to Gymnasium's to the bit ----


def oracle(env, k, seed):
    """Gymnasium's environment with the task of copy k, and about to draw what copy k draws."""
    values = env.tasks.parameters[env.task[k]].tolist()
    if env.env_id == "halfcheetah_dir":
        theirs = gym.make("HalfCheetah-v5", forward_reward_weight=values[0], ctrl_cost_weight=0.01).unwrapped
    else:
        theirs = gym.make("Hopper-v5").unwrapped
        if values != [1, 1, 1, 1]:
            for name, factor in zip(SCALED, values, strict=True):
                getattr(theirs.model, name)[:] = getattr(theirs.model, name) * factor
            mujoco.mj_setConst(theirs.model, mujoco.MjData(theirs.model))
    theirs.np_random = np.random.default_rng([seed, k])
    return theirs


@pytest.mark.parametrize(
    ("env_id", "settings", "task", "steps", "max_steps", "num_ended"),
    [
        ("halfcheetah_dir", {}, [0, 1, 0], 2100, 1000, (6, 6)),
        ("halfcheetah_dir", {"num_agents": 6}, [1, 0, 0], 300, 70, (12, 12)),
        ("hopper_param", {}, [0, 39, 49], 900, 1000, (20, 900)),
        ("hopper_param", {}, [7, 7, 41], 900, 12, (225, 300)),
        ("hopper_param", {"factors": ONE_BY_ONE}, [0, 2, 4], 900, 1000, (20, 900)),
    ],
)
def test_every_step_is_gymnasiums(env_id, settings, task, steps, max_steps, num_ended):
    env = envs.make(env_id, 3, seed=5, **settings)
    assert env.max_episode_steps == 1000
    env.max_episode_steps = max_steps
    env.reset(options={"task": task})
    theirs = [oracle(env, k, 5) for k in range(3)]
    states = [one.reset()[0] for one in theirs]
    assert np.array_equal(env.state(), np.float32(states))
    rng, length, ended, kinds = np.random.default_rng(0), [0] * 3, 0, set()
    for t in range(steps):
        actions = random_actions(env, rng, size=1.3 if t % 400 < 200 else 0.2)
        _, reward, terminated, truncated, info = env.step(actions)
        for k, one in enumerate(theirs):
            state, their_reward, their_terminated, *_ = one.step(np.clip(actions[k].ravel(), -1, 1))
            length[k] += 1
            assert reward[k].tolist() == [np.float32(their_reward)] * env.num_agents
            assert (terminated[k], truncated[k]) == (their_terminated, length[k] == max_steps)
            if terminated[k] or truncated[k]:
                assert np.array_equal(info["final_state"][k], np.float32(state))
                kinds.add((bool(terminated[k]), bool(truncated[k])))
                (state, _), length[k], ended = one.reset(), 0, ended + 1
            assert np.array_equal(env.state()[k], np.float32(state))
            assert np.array_equal(env.data[k].qpos, one.data.qpos)
            assert np.array_equal(env.data[k].qvel, one.data.qvel)
    assert num_ended[0] <= ended <= num_ended[1]
    assert ((False, True) in kinds) == (env_id == "halfcheetah_dir" or max_steps == 12)
    assert ((True, False) in kinds) == (env_id == "hopper_param")


def test_the_hopper_is_healthy_where_gymnasium_says_so():
    env = envs.make("hopper_param", 2, factors=[(1, 1, 1, 1)] * 2)
    env.reset(options={"task": [0, 0]})
    theirs, verdicts = oracle(env, 0, 0), set()
    heights, pitches = [(1, z) for z in np.linspace(0.4, 1.3, 40)], [(2, a) for a in np.linspace(-0.3, 0.3, 40)]
    angles, speeds = [(4, -120.0), (4, 120.0)], [(6, -99.0), (6, -101.0), (8, 99.0), (8, 101.0), (11, 300.0)]
    for index, value in heights + pitches + angles + speeds:
        for data in (env.data[0], theirs.data):
            mujoco.mj_resetData(theirs.model, data)
            (data.qpos if index < 6 else data.qvel)[index % 6] = value
        env._read()
        _, their_reward, their_terminated, *_ = theirs.step(np.zeros(3, np.float32))
        _, reward, terminated, truncated, info = env.step(np.zeros((2, 3, 1)))
        assert terminated.tolist() == [their_terminated, False] and not truncated.any()
        assert reward[0, 0] == np.float32(their_reward)
        assert ("final_obs" in info) == their_terminated
        verdicts.add((index, bool(their_terminated)))
        env.reset(options={"task": [0, 0]})
    assert verdicts >= {(index, verdict) for index in (1, 2, 6) for verdict in (False, True)}


# ---- observations and rewards ----


@pytest.mark.parametrize(
    ("env_id", "settings", "scenario", "parts", "obs_dim"),
    [
        ("halfcheetah_dir", {}, "HalfCheetah", "2x3", 11),
        ("halfcheetah_dir", {"num_agents": 6}, "HalfCheetah", "6x1", 7),
        ("hopper_param", {}, "Hopper", "3x1", 7),
    ],
)
def test_agents_see_and_move_what_mamujoco_says(env_id, settings, scenario, parts, obs_dim):
    from gymnasium_robotics import mamujoco_v1  # here: it imports mujoco

    theirs = mamujoco_v1.parallel_env(scenario, parts, agent_obsk=0)
    theirs.reset(seed=0)
    env = envs.make(env_id, 2, **settings)
    assert env.agents == theirs.possible_agents
    assert env.single_observation_space.shape == (obs_dim,)
    obs, _ = env.reset()
    rng = np.random.default_rng(0)
    for t in range(200):
        if t % 20 == 10:
            env.data[1].qvel[:] = rng.uniform(-20, 20, env.data[1].qvel.shape)  # the hopper's are seen within +-10
            env._read()
            obs = env._observe()
        for k in range(2):
            theirs.single_agent_env.unwrapped.set_state(env.data[k].qpos, env.data[k].qvel)
            seen = theirs._get_obs()
            assert np.array_equal(obs[k], np.float32([seen[agent] for agent in env.agents]))
        actions = random_actions(env, rng)
        obs, _, terminated, *_ = env.step(actions)
        for k in np.flatnonzero(~terminated):
            torque = theirs.map_local_actions_to_global_action(dict(zip(env.agents, actions[k], strict=True)))
            assert np.array_equal(env.data[k].ctrl, torque)
    theirs.close()


@both
def test_reward_by_hand(env_id):
    env = envs.make(env_id, 2)
    env.reset(seed=0, options={"task": [0, 1]})
    dt, weight, alive = (0.05, 0.01, 0) if env_id == "halfcheetah_dir" else (0.008, 0.001, 1)
    sign = [1, -1] if env_id == "halfcheetah_dir" else [1, 1]
    rng, checked = np.random.default_rng(0), 0
    for _ in range(50):
        before, actions = [data.qpos[0] for data in env.data], random_actions(env, rng)
        _, reward, terminated, *_ = env.step(actions)
        for k in np.flatnonzero(~terminated):
            velocity = (env.data[k].qpos[0] - before[k]) / dt
            expected = sign[k] * velocity + alive - weight * sum(float(a) ** 2 for a in actions[k].ravel())
            assert reward[k].tolist() == pytest.approx([expected] * env.num_agents, abs=1e-5)
            checked += 1
    assert checked > 80


def test_nothing_but_the_reward_tells_the_cheetahs_task():
    env, other = envs.make("halfcheetah_dir", 2), envs.make("halfcheetah_dir", 2)
    env.max_episode_steps = other.max_episode_steps = 30
    env.reset(seed=3, options={"task": [0, 1]}), other.reset(seed=3, options={"task": [1, 0]})
    rng = np.random.default_rng(0)
    for _ in range(70):
        actions = random_actions(env, rng)
        (obs, reward, *_), (other_obs, other_reward, *_) = env.step(actions), other.step(actions)
        assert np.array_equal(obs, other_obs) and np.array_equal(env.state(), other.state())
        assert (reward != other_reward).all()


# ---- tasks ----


def test_each_factor_scales_its_own_array_and_what_follows_from_it():
    env = envs.make("hopper_param", 5, factors=ONE_BY_ONE)
    base = gym.make("Hopper-v5").unwrapped.model
    for model, factors in zip(env.models, np.float32(ONE_BY_ONE).tolist(), strict=True):
        for name, factor in zip(SCALED, factors, strict=True):
            assert np.array_equal(getattr(model, name), getattr(base, name) * factor)
        data, unit = mujoco.MjData(model), np.eye(model.nv)
        mujoco.mj_forward(model, data)
        inverse = np.zeros_like(unit)
        mujoco.mj_solveM(model, data, inverse, unit)  # of the mass matrix
        assert model.dof_invweight0 == pytest.approx(np.diag(inverse), rel=1e-9)
        moved = factors[:2] != [1, 1]  # mass and inertia change it
        assert np.array_equal(model.dof_invweight0, base.dof_invweight0) != moved
    env.reset(options={"task": range(5)})
    for k in range(5):  # all from the same start
        env.rngs[k] = np.random.default_rng(0)
    env._start(np.arange(5))
    for _ in range(8):  # friction shows once they stand, in the last one
        env.step(np.tile([[-0.5], [0.5], [0.5]], (5, 1, 1)))
    assert len({state.tobytes() for state in env.state()}) == 5


def test_tasks_are_drawn_once_and_the_held_out_ones_are_others():
    tasks = envs.make("hopper_param", seed=0).tasks
    assert (len(tasks.train), len(tasks.test)) == (40, 10)
    assert not set(tasks.train) & set(tasks.test)
    assert len(np.unique(tasks.parameters, axis=0)) == 50
    assert tasks.names == ("mass", "inertia", "damping", "friction")
    assert (tasks.parameters >= 0.5).all() and (tasks.parameters <= 1.5).all()
    spread = np.sort(tasks.parameters, axis=0) - np.linspace(0.5, 1.5, 50)[:, None]
    assert np.abs(spread).max() < 0.25  # each factor uniform: Kolmogorov-Smirnov, p < 0.01
    assert np.array_equal(envs.make("hopper_param", seed=9).tasks.parameters, tasks.parameters)
    assert (envs.make("hopper_param", task_seed=1).tasks.parameters != tasks.parameters).all()
    few = envs.make("hopper_param", num_train=5, num_test=0).tasks
    assert few.train.tolist() == few.test.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(few.parameters, tasks.parameters[:5])
    given = envs.make("hopper_param", factors=ONE_BY_ONE).tasks
    assert given.train.tolist() == given.test.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(given.parameters, np.float32(ONE_BY_ONE))


@both
def test_models_are_the_same_after_a_thousand_switches_and_nothing_piles_up(env_id):
    env = envs.make(env_id, 3)
    before = [arrays(model) for model in env.models]
    rng = np.random.default_rng(0)
    env.reset(), env.step(random_actions(env, rng))
    in_use = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        env.reset(options={"task": rng.integers(len(env.tasks), size=3)})
        env.step(random_actions(env, rng))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - in_use < 30_000  # KiB on Linux; a model has 500
    assert len(env.data) == 3 and len(env.models) == len(env.tasks)
    for model, was in zip(env.models, before, strict=True):
        now = arrays(model)
        assert len(now) > 200 and all(np.array_equal(now[name], was[name], equal_nan=True) for name in was)


# ---- copies ----


@both
def test_a_copy_does_not_feel_what_the_others_do(env_id):
    env, twin = envs.make(env_id, 2), envs.make(env_id, 2)
    env.reset(seed=0, options={"task": [1, 0]}), twin.reset(seed=0, options={"task": [1, 1]})
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions, other = random_actions(env, rng), random_actions(env, rng)
        other[0] = actions[0]
        env.step(actions), twin.step(other)
        assert np.array_equal(env.state()[0], twin.state()[0])
        assert (env.state()[1] != twin.state()[1]).any()


@both
def test_a_deep_copy_goes_on_alone(env_id):
    env = envs.make(env_id, 2)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    env.step(random_actions(env, rng))
    twin = copy.deepcopy(env)
    actions = [random_actions(env, rng) for _ in range(40)]
    first, again = ([one.step(a)[0] for a in actions] for one in (env, twin))
    assert np.array_equal(first, again) and len({obs.tobytes() for obs in first}) == 40


@both
@pytest.mark.parametrize(("name", "value"), [("qvel", np.nan), ("qvel", np.inf), ("qvel", 1e12), ("qpos", 1e12)])
def test_physics_that_diverges_is_an_error_until_the_next_reset(env_id, name, value):
    env = envs.make(env_id, 3)
    env.reset(seed=0)
    getattr(env.data[1], name)[0] = value  # far away alone is no NaN
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{env_id}: the physics of copy 1 diverged"):
            env.step(random_actions(env, np.random.default_rng(0)))
    assert np.array_equal(env.reset(seed=0)[0], envs.make(env_id, 3).reset(seed=0)[0])


# ---- pictures ----


def picture(env, place=()):
    """Copy 0 in its resting pose, but for some `qpos`."""
    data = env.data[0]
    data.qpos[:] = env.models[0].qpos0
    for index, value in place:
        data.qpos[index] = value
    mujoco.mj_forward(env.models[0], data)
    return env.render().astype(int)


@both
def test_the_camera_goes_along_over_a_floor_of_squares_without_end(env_id):
    env = envs.make(env_id, 2)
    env.reset(seed=0, options={"task": [0, 0]})
    here = picture(env)
    for x in (2, -40, 600):
        assert np.abs(picture(env, [(0, x)]) - here).mean() < 1
    floor = np.s_[225:, :]
    inverted = picture(env, [(0, 1)])
    assert np.abs(inverted[floor] - here[floor]).mean() > 50
    assert np.abs(inverted[:100] - here[:100]).max() < 30  # sky, body and mark stay
    ahead = picture(env, [(0, 0.2)])[floor]
    env.reset(seed=1)
    first = env.render()
    mujoco.mj_forward(env.models[0], env.data[0])
    assert np.array_equal(env.render(), first)  # the start and not what was before
    shift = {s: np.abs(np.roll(here[floor], s, axis=1) - ahead).mean() for s in range(-40, 41)}
    assert -35 < min(shift, key=shift.get) < -5  # the body goes right, so the floor goes left
    env.close()


def test_the_cheetahs_picture_shows_its_pitch_and_where_to_run():
    env = envs.make("halfcheetah_dir", 2)
    for task, side in ((0, -1), (1, 1)):
        env.reset(seed=0, options={"task": [task, 1 - task]})
        arrow = np.argwhere((picture(env) == MARK).all(2))
        assert len(arrow) > 200 and arrow.max(0)[0] < 40
        assert side * (arrow.mean(0)[1] - 160) > 3  # most of an arrow is away from its tip
    heads = []
    for pitch in (-0.4, 0.4):  # about y, which points away from the camera
        shown = picture(env, [(2, pitch)])
        brown = (shown[40:, 180:, 0] - shown[40:, 180:, 2] > 40) & (shown[40:, 180:, 0] > 60)
        heads.append(np.argwhere(brown).min(0)[0])
    assert heads[0] + 20 < heads[1]  # nose up, nose down
    env.close()
    env.close()
    assert picture(env).any()  # a renderer of its own again
    env.close()


def test_the_hoppers_picture_shows_its_factors():
    env = envs.make("hopper_param", 2, factors=[(0.5, 1, 1.5, 0.75), (1, 1, 1, 1)])
    for task, bars in ((0, [30, 60, 90, 45]), (1, [60, 60, 60, 60])):
        env.reset(options={"task": [task, 0]})
        shown = picture(env)
        assert [(shown[12 + 8 * row] == MARK).all(1).sum() + (bars[row] > 60) for row in range(4)] == bars
    env.close()


def test_no_display_is_needed_and_no_log_is_left(tmp_path):
    code = "import envs\nfor name in ('halfcheetah_dir', 'hopper_param'):\n env = envs.make(name)\n env.reset()\n"
    code += " assert env.render().std() > 10\n env.close()"
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(envs.__file__)))
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- settings ----


@pytest.mark.parametrize("num_agents", [1, 3, True, "2", 2.0, None, [2]])
def test_a_cheetah_has_two_agents_or_six(num_agents):
    with pytest.raises(ValueError, match="^num_agents: got .+, expected 2 or 6$"):
        envs.make("halfcheetah_dir", num_agents=num_agents)


BAD_FACTORS = [[], [(1, 1, 1, 1)], [(1, 1, 1)] * 2, [(1, 1, 1, 1), (1, 1)], [(1, 1, 0, 1)] * 2, [(1, -1, 1, 1)] * 2]
BAD_FACTORS += [[(1, 1, 1, value)] * 2 for value in (np.nan, np.inf, "heavy", 1e39, 1e-46)] + [
    2,
    np.ones((2, 4, 1)),
    "light",
]


@pytest.mark.parametrize("factors", BAD_FACTORS)
def test_bad_factors_are_refused(factors):
    with pytest.raises(ValueError, match="^factors: got .+, expected .+$"):
        envs.make("hopper_param", factors=factors)


@pytest.mark.parametrize("name", ["num_train", "num_test", "task_seed"])
@pytest.mark.parametrize("value", [-1, 0.5, True, None, "2"])
def test_bad_numbers_of_tasks_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got .+, expected .+$"):
        envs.make("hopper_param", **{name: value})


def test_threads_change_no_bit():
    found = []
    for num_threads in (1, 3):
        env = envs.make("hopper_param", 25, 0)
        env.num_threads = num_threads
        rng = np.random.default_rng(0)
        steps = [env.reset(seed=0)[0]]
        for _ in range(60):  # hoppers fall and start again
            steps += env.step(rng.uniform(-1, 1, (25, 3, 1)).astype(np.float32))[:3]
        found.append([*steps, env.physics])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
