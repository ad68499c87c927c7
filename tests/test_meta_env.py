"""The interface of `envs`, to which every environment in ENV_IDS is held; a toy shows what those here do not do."""

import gymnasium as gym
import numpy as np
import pytest
import supersuit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pettingzoo.test import parallel_api_test, parallel_seed_test

import envs
from envs import MetaVectorEnv, ParallelView, TaskSet

every_env = pytest.mark.parametrize("env_id", envs.ENV_IDS)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's: a NaN or an overflow on the way
some_examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
NAMED = "{}: got .+, expected .+"  # every complaint names the argument, what came and what was expected


class Toy(MetaVectorEnv):
    """Two agents see (count, episode): the sum of what both did, and which episode of its copy this is.

    A copy terminates when both agents play 2. The reward of an agent is its own action, the state is the count.
    """

    env_id = "toy"
    num_agents = 2
    max_episode_steps = 4
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    single_action_space = gym.spaces.Discrete(3)
    state_dim = 1
    tasks = TaskSet(np.arange(2), np.arange(2), np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), ("a", "b"))

    def __init__(self, num_envs=1, seed=0):
        super().__init__(num_envs, seed)
        self.count, self.episode = np.zeros(num_envs), np.zeros(num_envs)

    def _start(self, copies):
        self.count[copies] = 0
        self.episode[copies] += 1

    def _advance(self, actions):
        self.count += actions.sum(1)
        return actions.astype(np.float32), (actions == 2).all(1)

    def _observe(self):
        both = np.stack([self.count, self.episode], axis=1)  # [E, 2]
        return np.repeat(both[:, None], 2, axis=1).astype(np.float32)

    def _state(self):
        return self.count[:, None].astype(np.float32)


def random_actions(env, rng):
    """Valid actions for all agents of all copies."""
    space, shape = env.single_action_space, (env.num_envs, env.num_agents)
    if isinstance(space, gym.spaces.Box):
        return rng.uniform(space.low, space.high, (*shape, *space.shape)).astype(np.float32)
    return rng.integers(space.n, size=shape)


def any_actions(env):
    """Hypothesis: whatever `step` takes, far beyond the Box too."""
    space, shape = env.single_action_space, (env.num_envs, env.num_agents)
    if isinstance(space, gym.spaces.Box):
        near, far = st.floats(-3, 3, width=32), st.floats(allow_nan=False, allow_infinity=False, width=32)
        return hnp.arrays(np.float32, (*shape, *space.shape), elements=near | far)
    return hnp.arrays(np.int64, shape, elements=st.integers(0, int(space.n) - 1))


def assert_same(a, b):
    """Equal to the bit, through tuples, lists and dicts."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.array_equal(a, b)


def play(env, steps, actions_seed=0, **reset):
    """Everything a run returns, states included."""
    rng = np.random.default_rng(actions_seed)
    seen = [env.reset(**reset), env.state()]
    for _ in range(steps):
        seen += [env.step(random_actions(env, rng)), env.state()]
    return seen


def short(env_id, num_envs, steps, seed=0):
    """An environment whose episodes are cut after `steps`."""
    env = envs.make(env_id, num_envs, seed)
    env.max_episode_steps = steps
    return env


# ---- shapes and meaning ----


@every_env
def test_shapes_dtypes_and_attributes(env_id):
    env = short(env_id, 2, 3)
    num_envs, n, obs_dim = 2, env.num_agents, env.single_observation_space.shape[0]
    assert (env.env_id, env.num_envs) == (env_id, num_envs)
    assert env.agents == [f"agent_{i}" for i in range(n)]

    obs, info = env.reset(seed=0)
    for t in range(4):
        assert (obs.shape, obs.dtype) == ((num_envs, n, obs_dim), np.float32)
        assert all(env.single_observation_space.contains(one) for one in obs.reshape(-1, obs_dim))
        assert (env.state().shape, env.state().dtype) == ((num_envs, env.state_dim), np.float32)
        assert (info["task"].shape, info["task"].dtype) == ((num_envs,), np.int64)
        obs, reward, terminated, truncated, info = env.step(random_actions(env, np.random.default_rng(t)))
        assert (reward.shape, reward.dtype) == ((num_envs, n), np.float32)
        assert (terminated.shape, terminated.dtype) == ((num_envs,), bool)
        assert (truncated.shape, truncated.dtype) == ((num_envs,), bool)
        assert (
            ("final_obs" in info) == ("_final_obs" in info) == ("final_state" in info) == (terminated | truncated).any()
        )
    env.close()


@every_env
def test_the_state_is_all_observations_side_by_side(env_id):
    env = envs.make(env_id, 3)
    if type(env)._state is MetaVectorEnv._state:  # the others say in their own tests what the critic sees
        obs, _ = env.reset(seed=1)
        assert np.array_equal(env.state(), np.concatenate([obs[:, i] for i in range(env.num_agents)], axis=1))
        obs = env.step(random_actions(env, np.random.default_rng(0)))[0]
        assert np.array_equal(env.state(), np.concatenate([obs[:, i] for i in range(env.num_agents)], axis=1))


@every_env
def test_the_task_set_is_sound(env_id):
    tasks = envs.make(env_id).tasks
    assert tasks.train.dtype == tasks.test.dtype == np.int64
    assert tasks.labels.dtype == tasks.parameters.dtype == np.float32
    assert sorted({*tasks.train, *tasks.test}) == list(range(len(tasks)))
    assert len(set(tasks.train)) == len(tasks.train) and len(set(tasks.test)) == len(tasks.test)
    assert len(tasks.labels) == len(tasks.parameters) == len(tasks)
    assert (np.sort(tasks.labels, axis=1)[:, :-1] == 0).all() and (tasks.labels.max(1) == 1).all()  # one-hot
    assert len({tuple(label) for label in tasks.labels}) == len(tasks)
    assert tasks.parameters.shape == (len(tasks), len(tasks.names))
    assert len({tasks.describe(task) for task in range(len(tasks))}) == len(tasks)


def test_a_task_is_described_by_name_and_value():
    assert Toy.tasks.describe(1) == "a=0, b=1"


@every_env
def test_any_actions_keep_shapes_dtypes_and_finite_values(env_id):
    env = short(env_id, 2, 4)
    first, state = env.reset()[0], env.state()

    @some_examples
    @given(st.lists(any_actions(env), min_size=1, max_size=6))
    def holds(sequence):
        env.reset(seed=0)
        for actions in sequence:
            obs, reward, terminated, truncated, info = env.step(actions)
            for seen, like in ((obs, first), (env.state(), state), (reward, first[:, :, 0])):
                assert (seen.shape, seen.dtype) == (like.shape, np.float32)
                assert np.isfinite(seen).all()
            assert terminated.shape == truncated.shape == (2,) and terminated.dtype == truncated.dtype == bool
            if "final_obs" in info:
                assert (info["final_obs"].shape, info["final_obs"].dtype) == (first.shape, np.float32)
                assert (info["final_state"].shape, info["final_state"].dtype) == (state.shape, np.float32)
                assert np.isfinite(info["final_obs"]).all() and np.isfinite(info["final_state"]).all()

    holds()


@every_env
def test_actions_beyond_the_box_are_clipped_to_it(env_id):
    env, twin = envs.make(env_id, 2), envs.make(env_id, 2)
    if isinstance(env.single_action_space, gym.spaces.Box):
        low, high = env.single_action_space.low, env.single_action_space.high

        @some_examples
        @given(st.lists(any_actions(env), min_size=1, max_size=4))
        def holds(sequence):
            assert_same(env.reset(seed=0), twin.reset(seed=0))
            for actions in sequence:
                assert_same(env.step(actions), twin.step(np.clip(actions, low, high)))

        holds()


@every_env
def test_numbers_of_any_width_mean_the_same(env_id):
    env, twin = envs.make(env_id, 2), envs.make(env_id, 2)
    env.reset(), twin.reset()
    actions = random_actions(env, np.random.default_rng(0))
    box = isinstance(env.single_action_space, gym.spaces.Box)
    for dtype in (np.float64, np.longdouble) if box else (np.uint8, np.int32):
        assert_same(env.step(actions), twin.step(actions.astype(dtype)))
    assert_same(play(env, 20, seed=1), play(twin, 20, seed=1))  # and leave nothing behind


@every_env
def test_render_gives_a_picture_and_changes_nothing(env_id):
    env, twin = envs.make(env_id, 2), envs.make(env_id, 2)
    rng = np.random.default_rng(0)
    env.reset(seed=1), twin.reset(seed=1)
    pictures = []
    for _ in range(20):
        pictures.append(env.render())
        actions = random_actions(env, rng)
        assert_same(env.step(actions), twin.step(actions))
    height, width, _ = pictures[0].shape
    assert height >= 64 and width >= 64
    assert all((picture.shape, picture.dtype) == ((height, width, 3), np.uint8) for picture in pictures)
    assert any((picture != pictures[0]).any() for picture in pictures[1:])


@every_env
def test_nothing_returned_or_given_is_shared_with_the_inside(env_id):
    env, twin = short(env_id, 2, 2), short(env_id, 2, 2)
    task = env.tasks.train[[0, -1]]
    rng = np.random.default_rng(0)
    kept = twin.reset(seed=0, options={"task": task.copy()})
    obs, info = env.reset(seed=0, options={"task": task})
    assert_same((obs, info), kept)
    task[:] = -1
    for _ in range(5):
        obs[:] = np.nan
        env.state()[:] = np.nan
        env.render()[:] = 0
        for array in info.values():
            array[...] = 1
        assert_same(env.state(), twin.state())
        actions = random_actions(env, rng)
        given_to_twin = actions.copy()
        obs, reward, terminated, truncated, info = env.step(actions)
        assert_same((obs, reward, terminated, truncated, info), twin.step(given_to_twin))
        assert_same(env.state(), twin.state())
        assert np.array_equal(actions, given_to_twin)
        for array in (actions, reward, terminated, truncated):
            array[...] = 1


# ---- the end of an episode ----


@every_env
def test_an_ended_copy_keeps_the_last_observation_in_info_and_shows_the_next_first_one(env_id):
    steps, rng = 3, np.random.default_rng(0)
    env, unbroken = short(env_id, 3, steps), short(env_id, 3, 1000)
    task = env.tasks.test[[0, -1, 0]]
    assert_same(env.reset(seed=5, options={"task": task}), unbroken.reset(seed=5, options={"task": task}))
    for _ in range(2):
        for _ in range(steps - 1):
            actions = random_actions(env, rng)
            assert_same(env.step(actions), unbroken.step(actions))
        actions = random_actions(env, rng)
        obs, reward, terminated, truncated, info = env.step(actions)
        last_obs, last_reward, last_terminated, last_truncated, _ = unbroken.step(actions)
        assert truncated.all() and not last_truncated.any() and not terminated.any()
        assert_same((info["final_obs"], info["final_state"]), (last_obs, unbroken.state()))
        assert_same((reward, terminated), (last_reward, last_terminated))
        assert info["_final_obs"].dtype == bool and info["_final_obs"].all()
        assert np.array_equal(info["task"], task)
        # what the next episode of the other would show, were it begun now
        assert_same(obs, unbroken.reset(options={"task": task})[0])
        assert_same(env.state(), unbroken.state())


@every_env
def test_a_copy_keeps_its_task_over_episodes_until_a_reset_gives_another(env_id):
    env = short(env_id, 4, 2)
    _, info = env.reset(seed=3)
    drawn = info["task"]
    for t in range(7):
        assert np.array_equal(env.step(random_actions(env, np.random.default_rng(t)))[-1]["task"], drawn)
    other = env.tasks.test[[-1, 0, -1, 0]]
    assert np.array_equal(env.reset(options={"task": other.tolist()})[1]["task"], other)
    for t in range(5):
        assert np.array_equal(env.step(random_actions(env, np.random.default_rng(t)))[-1]["task"], other)


@every_env
def test_a_reset_in_the_middle_begins_a_whole_episode(env_id):
    env = short(env_id, 2, 3)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    env.step(random_actions(env, rng))
    env.step(random_actions(env, rng))
    env.reset()
    assert [bool(env.step(random_actions(env, rng))[3].all()) for _ in range(3)] == [False, False, True]


def test_only_the_copies_that_end_begin_anew():
    env = Toy(3)
    env.reset()
    env.step(np.array([[1, 0], [0, 0], [2, 0]]))
    obs, reward, terminated, truncated, info = env.step(np.array([[1, 2], [2, 2], [0, 1]]))
    assert terminated.tolist() == info["_final_obs"].tolist() == [False, True, False]
    assert not truncated.any()
    assert reward.tolist() == [[1, 2], [2, 2], [0, 1]]  # each agent its own
    assert obs.tolist() == [[[4, 1], [4, 1]], [[0, 2], [0, 2]], [[3, 1], [3, 1]]]
    assert env.state().tolist() == [[4], [0], [3]]
    assert info["final_obs"].tolist() == [[[0, 0], [0, 0]], [[4, 1], [4, 1]], [[0, 0], [0, 0]]]
    assert info["final_state"].tolist() == [[0], [4], [0]]
    # copies 0 and 2 reach the limit of 4 steps two steps on, copy 1 four steps on
    still = np.zeros((3, 2), int)
    assert [env.step(still)[3].tolist() for _ in range(4)] == [
        [False, False, False],
        [True, False, True],
        [False, False, False],
        [False, True, False],
    ]


def test_a_copy_may_terminate_in_the_step_that_is_its_last():
    env = Toy(1)
    env.reset()
    for _ in range(3):
        env.step(np.zeros((1, 2), int))
    obs, _, terminated, truncated, info = env.step(np.full((1, 2), 2))
    assert terminated.tolist() == truncated.tolist() == [True]
    assert obs.tolist() == [[[0, 2], [0, 2]]] and info["final_obs"].tolist() == [[[4, 1], [4, 1]]]


# ---- seeds and tasks ----


@every_env
def test_same_seed_and_actions_give_the_same_trajectory(env_id):
    env = short(env_id, 3, 7)
    first = play(env, 20, seed=11)
    assert_same(first, play(short(env_id, 3, 7, seed=99), 20, seed=11))
    assert_same(first, play(env, 20, seed=11))  # whatever happened before
    assert_same(first, play(short(env_id, 3, 7, seed=11), 20))  # make's seed is that of a first reset without one


@every_env
@pytest.mark.parametrize("few", [1, 2])
def test_a_copy_does_not_depend_on_how_many_there_are(env_id, few):
    small, large = short(env_id, few, 7), short(env_id, 5, 7)
    rng = np.random.default_rng(0)
    pairs = [(small.reset(seed=2), large.reset(seed=2))]
    for _ in range(20):
        actions = random_actions(large, rng)
        pairs.append((small.step(actions[:few]), large.step(actions)))
    for seen, of_more in pairs:
        assert_same(seen[:-1], [array[:few] for array in of_more[:-1]])
        assert_same(seen[-1], {key: value[:few] for key, value in of_more[-1].items()})


@every_env
def test_without_a_seed_a_reset_goes_on_and_copies_differ(env_id):
    env, twin = envs.make(env_id, 4), envs.make(env_id, 4)
    starts = [env.reset(seed=0)] + [env.reset() for _ in range(5)]
    assert_same(starts, [twin.reset(seed=0)] + [twin.reset() for _ in range(5)])
    described = [(obs[k].tobytes(), int(info["task"][k])) for obs, info in starts for k in range(4)]
    assert len(set(described)) > 1
    per_reset = [described[i : i + 4] for i in range(0, 24, 4)]
    assert any(one != per_reset[0] for one in per_reset[1:])
    assert any(len(set(one)) > 1 for one in per_reset)


@every_env
def test_another_seed_gives_another_start(env_id):
    env = envs.make(env_id, 4)
    one, other = env.reset(seed=0), env.reset(seed=1)
    assert (one[0] != other[0]).any() or (one[1]["task"] != other[1]["task"]).any()


@every_env
def test_tasks_left_out_are_drawn_uniformly_from_train(env_id):
    env = envs.make(env_id, 4)
    env.reset(seed=0)
    drawn = np.concatenate([env.reset()[1]["task"] for _ in range(150)])
    ids, counts = np.unique(drawn, return_counts=True)
    assert ids.tolist() == env.tasks.train.tolist()
    share = 1 / len(ids)
    assert np.abs(counts - 600 * share).max() < 5 * np.sqrt(600 * share * (1 - share))  # five standard deviations


@every_env
def test_every_task_can_be_asked_for(env_id):
    env = envs.make(env_id, 2)
    for task in range(len(env.tasks)):
        assert env.reset(options={"task": np.array([task, 0])})[1]["task"].tolist() == [task, 0]
        assert env.step(random_actions(env, np.random.default_rng(0)))[-1]["task"].tolist() == [task, 0]


# ---- bad input ----


def bad_actions(env):
    good = random_actions(env, np.random.default_rng(0))
    bad = {
        "one copy too many": np.concatenate([good, good[:1]]),
        "one agent too few": good[:, :-1],
        "no axis for the copies": good[0],
        "one axis too many": good[..., None],
        "nothing": None,
        "text": good.astype(str),
        "ragged": [good[0].tolist(), good[0, :-1].tolist()],
    }
    if isinstance(env.single_action_space, gym.spaces.Box):
        bad |= {"integers": np.zeros(good.shape, int), "booleans": np.ones(good.shape, bool)}
        for name, value in (("NaN", np.nan), ("infinity", np.inf), ("minus infinity", -np.inf)):
            bad[name] = good.copy()
            bad[name].flat[-1] = value
    else:
        bad |= {"floats": good.astype(float), "booleans": np.ones(good.shape, bool)}
        for value in (-1, int(env.single_action_space.n)):
            bad[f"action {value}"] = good.copy()
            bad[f"action {value}"].flat[-1] = value
    return bad


BAD_RESETS = {
    "negative seed": ("seed", {"seed": -1}),
    "seed no whole number": ("seed", {"seed": 1.5}),
    "seed a truth value": ("seed", {"seed": True}),
    "seed text": ("seed", {"seed": "1"}),
    "unknown option": ("options", {"options": {"tasks": [0, 0]}}),
    "one task for all": (r"options\['task'\]", {"options": {"task": 0}}),
    "one task too many": (r"options\['task'\]", {"options": {"task": [0, 0, 0]}}),
    "task no whole number": (r"options\['task'\]", {"options": {"task": [0.0, 0.0]}}),
    "negative task": (r"options\['task'\]", {"options": {"task": [0, -1]}}),
    "unknown task": (r"options\['task'\]", {"options": {"task": [0, 10**6]}}),
    "ragged tasks": (r"options\['task'\]", {"options": {"task": [0, [0, 0]]}}),
    "unknown task beside a good seed": (r"options\['task'\]", {"seed": 7, "options": {"task": [0, 10**6]}}),
}
ALL = {"toy": Toy} | {env_id: lambda num_envs, env_id=env_id: envs.make(env_id, num_envs) for env_id in envs.ENV_IDS}


def midway(env_id):
    """Two copies, in the middle of an episode that ends two steps on."""
    env = ALL[env_id](2)
    env.max_episode_steps = 4
    play(env, 2, seed=3)
    return env


def assert_as_if_nothing_happened(env, env_id):
    twin, rng = midway(env_id), np.random.default_rng(8)
    assert_same(env.state(), twin.state())
    for _ in range(6):  # over the end of an episode, where the copies' generators are drawn from
        actions = random_actions(env, rng)
        assert_same(env.step(actions), twin.step(actions))
    assert_same(env.reset(), twin.reset())


@pytest.mark.parametrize("env_id", ALL)
def test_bad_actions_are_refused_and_leave_the_environment_as_it_was(env_id):
    env = midway(env_id)
    for name, actions in bad_actions(env).items():
        with pytest.raises(ValueError, match=NAMED.format("actions")):
            env.step(actions)
            pytest.fail(f"{name} went through")
    assert_as_if_nothing_happened(env, env_id)


@pytest.mark.parametrize("env_id", ALL)
@pytest.mark.parametrize("bad", BAD_RESETS)
def test_a_bad_reset_is_refused_and_leaves_the_environment_as_it_was(env_id, bad):
    env = midway(env_id)
    named, arguments = BAD_RESETS[bad]
    with pytest.raises(ValueError, match=NAMED.format(named)):
        env.reset(**arguments)
    assert_as_if_nothing_happened(env, env_id)


@pytest.mark.parametrize("env_id", ALL)
def test_nothing_before_the_first_reset(env_id):
    env = ALL[env_id](2)
    with pytest.raises(ValueError, match=NAMED.format("step")):
        env.step(random_actions(env, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=NAMED.format("state")):
        env.state()
    assert_same(play(env, 3), play(ALL[env_id](2), 3))


def test_an_unknown_environment_is_refused_with_the_known_ones():
    for make in (envs.make, envs.parallel_env):
        with pytest.raises(ValueError, match=NAMED.format("env_id")) as refusal:
            make("hunting_targets")
        assert all(env_id in str(refusal.value) for env_id in ("'hunting_targets'", *envs.ENV_IDS))


@every_env
def test_bad_settings_are_refused(env_id):
    with pytest.raises(ValueError, match=NAMED.format(env_id)) as refusal:
        envs.make(env_id, num_shoes=2)
    assert "num_shoes" in str(refusal.value)
    for num_envs in (0, -1, 1.5, True, "2", None):
        with pytest.raises(ValueError, match=NAMED.format("num_envs")):
            envs.make(env_id, num_envs)
    for seed in (-1, 0.5, False, None):
        with pytest.raises(ValueError, match=NAMED.format("seed")):
            envs.make(env_id, 1, seed)


# ---- PettingZoo and SuperSuit ----


@every_env
@pytest.mark.filterwarnings("error:.*(given|agents)")  # PettingZoo warns of what it does not like
def test_pettingzoo_finds_nothing_wrong(env_id):
    parallel_api_test(envs.parallel_env(env_id), num_cycles=1000)
    parallel_seed_test(lambda: envs.parallel_env(env_id), num_cycles=500)


@every_env
def test_the_parallel_env_is_one_copy_of_the_same_thing(env_id):
    view, env = envs.parallel_env(env_id), short(env_id, 1, 3)
    view.env.max_episode_steps = 3
    assert view.possible_agents == env.agents
    rng = np.random.default_rng(0)
    for seed in (4, None):
        obs, infos = view.reset(seed=seed)
        joint, info = env.reset(seed=seed)
        for t in range(3):
            assert view.agents == env.agents
            assert_same(obs, {agent: joint[0, i] for i, agent in enumerate(env.agents)})
            assert_same(view.state(), env.state()[0])
            assert infos == {agent: {"task": int(info["task"][0])} for agent in env.agents}
            actions = random_actions(env, rng)
            obs, rewards, terminations, truncations, infos = view.step(dict(zip(env.agents, actions[0], strict=True)))
            joint, reward, terminated, truncated, info = env.step(actions)
            assert rewards == {agent: reward[0, i] for i, agent in enumerate(env.agents)}
            assert terminations == dict.fromkeys(env.agents, bool(terminated[0]))
            assert truncations == dict.fromkeys(env.agents, bool(truncated[0]) and t == 2)
        # the last observation and state, and not those of the next episode
        assert_same(obs, {agent: info["final_obs"][0, i] for i, agent in enumerate(env.agents)})
        assert_same(view.state(), info["final_state"][0])
        assert (info["final_obs"] != joint).any()
        assert view.agents == []
        assert view.step({}) == ({}, {}, {}, {}, {})


@every_env
def test_the_parallel_env_has_spaces_for_what_it_gives(env_id):
    view = envs.parallel_env(env_id)
    obs, _ = view.reset(seed=0)
    actions = {agent: view.action_space(agent).sample() for agent in view.agents}
    obs_after, *_ = view.step(actions)
    for agent in view.possible_agents:
        assert view.observation_space(agent).contains(obs[agent])
        assert view.observation_space(agent).contains(obs_after[agent])
    assert view.state_space.contains(view.state())
    assert (view.render().ndim, view.render().dtype) == (3, np.uint8)
    view.close()


@every_env
def test_the_parallel_env_plays_the_task_it_is_given(env_id):
    last = len(envs.make(env_id).tasks) - 1
    view = envs.parallel_env(env_id, task=last)
    for options in (None, {}, {"task": 0}, None):  # a reset's own task holds for that episode
        expected = 0 if options else last
        _, infos = view.reset(seed=0, options=options)
        assert infos == {agent: {"task": expected} for agent in view.agents}
        *_, infos = view.step({agent: view.action_space(agent).sample() for agent in view.agents})
        assert infos == {agent: {"task": expected} for agent in view.agents}
    free = envs.parallel_env(env_id)
    drawn = {free.reset(seed=seed)[1]["agent_0"]["task"] for seed in range(12)}
    assert len(drawn) > 1 and drawn <= set(free.env.tasks.train)


@every_env
def test_the_parallel_env_refuses_bad_input_and_stays_usable(env_id):
    view, twin = envs.parallel_env(env_id), envs.parallel_env(env_id)
    with pytest.raises(ValueError, match=NAMED.format("state")):
        view.state()
    assert_same(view.reset(seed=0), twin.reset(seed=0))
    good = {agent: view.action_space(agent).sample() for agent in view.agents}
    first = view.agents[0]
    some = dict(list(good.items())[1:])
    wrong_shape, wrong_dtype = good | {first: np.zeros(7)}, {agent: np.array("up") for agent in good}
    for actions in (some, good | {"agent_99": good[first]}, wrong_shape, wrong_dtype):
        with pytest.raises(ValueError, match=NAMED.format("actions")):
            view.step(actions)
    for task in (-1, 10**6, 0.5, [0, 0], "prey"):
        with pytest.raises(ValueError, match=NAMED.format(".*task.*")):
            view.reset(options={"task": task})
        with pytest.raises(ValueError, match=NAMED.format(".*task.*")):
            envs.parallel_env(env_id, task=task)
    with pytest.raises(ValueError, match=NAMED.format("seed")):
        view.reset(seed=-1)
    assert_same(view.step(good), twin.step(good))
    assert_same(view.state(), twin.state())


def test_the_parallel_env_shares_nothing_with_the_inside():
    view, twin = ParallelView(Toy(1)), ParallelView(Toy(1))
    obs, twin_obs = view.reset()[0], twin.reset()[0]
    for _ in range(4):
        assert_same((obs, view.state()), (twin_obs, twin.state()))
        view.state()[:] = -1
        for array in obs.values():
            array[:] = -1
        assert_same(view.state(), twin.state())
        actions = dict.fromkeys(view.agents, np.int64(1))
        obs, twin_obs = view.step(actions)[0], twin.step(actions)[0]


def test_the_parallel_env_ends_where_its_copy_terminates():
    view = ParallelView(Toy(1))
    view.reset()
    view.step({"agent_0": 1, "agent_1": 2})
    obs, rewards, terminations, truncations, _ = view.step({"agent_0": 2, "agent_1": 2})
    assert {agent: seen.tolist() for agent, seen in obs.items()} == {"agent_0": [7, 1], "agent_1": [7, 1]}
    assert rewards == {"agent_0": 2.0, "agent_1": 2.0}
    assert all(terminations.values()) and not any(truncations.values())
    assert view.state().tolist() == [7]
    assert view.agents == []


@every_env
def test_supersuit_makes_a_vector_environment_of_it(env_id):
    view = envs.parallel_env(env_id)
    view.env.max_episode_steps = 3
    agents, (obs_dim,) = len(view.possible_agents), view.observation_space("agent_0").shape
    vector = supersuit.pettingzoo_env_to_vec_env_v1(supersuit.frame_stack_v1(view, 2))
    vector = supersuit.concat_vec_envs_v1(vector, 2, num_cpus=1, base_class="gymnasium")
    obs, _ = vector.reset(seed=0)
    ends = []
    for _ in range(4):
        assert obs.shape == (2 * agents, 2 * obs_dim) and np.isfinite(obs).all()
        actions = np.stack([view.action_space("agent_0").sample() for _ in range(2 * agents)])
        obs, reward, terminated, truncated, _ = vector.step(actions)
        assert reward.shape == (2 * agents,) and np.isfinite(reward).all()
        ends.append(bool((np.asarray(terminated) | np.asarray(truncated)).all()))
    assert ends[2] and not ends[3]
    vector.close()
