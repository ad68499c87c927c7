"""MetaVectorEnv: many copies of a multi-agent environment, each on a task of its own, stepped as one batch."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pettingzoo


@dataclass(frozen=True)
class TaskSet:
    """The tasks of an environment. A task id is a row of `labels` and `parameters`.

    train: ids met in meta-training, int64 [num_train]
    test: ids met at meta-test, int64 [num_test]; the same as `train` where the set of tasks is finite and small
    labels: what an agent that is told the task is told, float32 [num_tasks, label_dim], one-hot
    parameters: what the id means, float32 [num_tasks, num_parameters]
    names: what each column of `parameters` is
    """

    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    parameters: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.parameters)

    def describe(self, task: int) -> str:
        """One line that says what the task with this id is."""
        return ", ".join(f"{name}={value:g}" for name, value in zip(self.names, self.parameters[task], strict=True))


class MetaVectorEnv:
    """E copies of one environment with n agents; names, signatures and autoreset as in Gymnasium's vector environments.

    Its arrays carry an agent axis, so it is no subclass of `gymnasium.vector.VectorEnv`. Autoreset is same-step: a copy
    that ends returns the first observation of its next episode, and `info` keeps the last one of the old. A copy keeps
    its task until `reset` gives it another. Copy k draws from a generator of its own, seeded from (seed, k), so that it
    does not depend on how many copies there are.

    A subclass sets the attributes below and defines `_start`, `_advance`, `_observe`, `render` (and `_state`, where the
    central critic should see something else than all observations side by side).
    """

    env_id: str
    num_envs: int  # E
    num_agents: int  # n
    max_episode_steps: int
    single_observation_space: gym.spaces.Box  # [obs_dim], one agent's
    single_action_space: gym.spaces.Box | gym.spaces.Discrete  # one agent's
    state_dim: int
    tasks: TaskSet
    num_threads = 1  # CPU threads, at most, that share the copies of halfcheetah_dir and hopper_param; same bits

    def __init__(self, num_envs: int, seed: int):
        if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ValueError(f"num_envs: got {num_envs!r}, expected a whole number of at least 1")
        self.num_envs = int(num_envs)
        self.task = np.zeros(self.num_envs, np.int64)  # [E]
        self._elapsed = np.zeros(self.num_envs, np.int64)  # [E] steps since the episode began
        self._obs = None  # [E, n, obs_dim]; None until the first reset
        self._seed_copies(seed)

    @property
    def agents(self) -> list[str]:
        return [f"agent_{i}" for i in range(self.num_agents)]

    def _start(self, copies: np.ndarray) -> None:
        """Begin an episode in these copies (int64 [<= E]), drawing copy k's chance from `self.rngs[k]`."""
        raise NotImplementedError

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step of every copy with checked and clipped actions: reward [E, n], terminated [E]."""
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        """What each agent sees now, a new float32 array [E, n, obs_dim]."""
        raise NotImplementedError

    def _state(self) -> np.ndarray:
        return self._obs.reshape(self.num_envs, -1)

    def render(self) -> np.ndarray:
        """A picture of copy 0, uint8 [H, W, 3]; needs no display."""
        raise NotImplementedError

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode in every copy.

        seed: seeds every copy's generator; None lets them go on
        options: {"task": ids [E]}; without it each copy draws a task uniformly from `tasks.train`

        Returns obs float32 [E, n, obs_dim] and info with "task" int64 [E]. Raises ValueError on a bad seed, an unknown
        option or an unknown task id.
        """
        options = {} if options is None else options
        if unknown := set(options) - {"task"}:
            raise ValueError(f"options: got {sorted(unknown)}, expected only 'task'")
        task = self._check_task(options["task"]) if options.get("task") is not None else None
        if seed is not None:
            self._seed_copies(seed)
        if task is None:
            task = np.array([rng.choice(self.tasks.train) for rng in self.rngs])
        self.task = task
        self._elapsed[:] = 0
        self._start(np.arange(self.num_envs))
        self._obs = self._observe()
        return self._obs.copy(), {"task": self.task.copy()}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """All agents of all copies act once.

        actions: float [E, n, act_dim] (Box; finite values are clipped to it) or int [E, n] (Discrete)

        Returns obs float32 [E, n, obs_dim], reward float32 [E, n], terminated bool [E], truncated bool [E] and info:
        "task" [E]; and in a step in which a copy ended "_final_obs" bool [E] (which ones), "final_obs" [E, n, obs_dim]
        and "final_state" [E, state_dim] (the last of the old episode; zeros elsewhere). Raises ValueError, and leaves
        the environment as it was, on actions of a wrong shape, dtype or range, and before the first reset.
        """
        if self._obs is None:
            raise ValueError("step: got a call before reset, expected reset() first")
        reward, terminated = self._advance(self._check_actions(actions))
        self._elapsed += 1
        truncated = self._elapsed >= self.max_episode_steps
        self._obs = self._observe()
        info = {"task": self.task.copy()}
        ended = terminated | truncated
        if ended.any():
            info["_final_obs"] = ended
            info["final_obs"] = np.where(ended[:, None, None], self._obs, np.float32(0))
            info["final_state"] = np.where(ended[:, None], self._state(), np.float32(0))
            self._elapsed[ended] = 0
            self._start(np.flatnonzero(ended))
            self._obs = self._observe()
        return self._obs.copy(), reward, terminated, truncated, info

    def state(self) -> np.ndarray:
        """What the central critic sees now, float32 [E, state_dim]. Raises ValueError before the first reset."""
        if self._obs is None:
            raise ValueError("state: got a call before reset, expected reset() first")
        return self._state().copy()

    def close(self) -> None:
        """Free what the engine holds; nothing here."""

    def _seed_copies(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed: got {seed!r}, expected a whole number of at least 0")
        self.rngs = [np.random.default_rng([int(seed), k]) for k in range(self.num_envs)]

    def _check_task(self, task: np.ndarray) -> np.ndarray:
        try:
            task = np.asarray(task)
        except ValueError:
            raise ValueError(f"options['task']: got {task!r}, expected integers of shape ({self.num_envs},)") from None
        if task.shape != (self.num_envs,) or not np.issubdtype(task.dtype, np.integer):
            raise ValueError(
                f"options['task']: got {task.dtype} {task.shape}, expected integers of shape ({self.num_envs},)"
            )
        if task.min() < 0 or task.max() >= len(self.tasks):
            raise ValueError(f"options['task']: got {task.tolist()}, expected ids from 0 to {len(self.tasks) - 1}")
        return task.astype(np.int64)

    def _check_actions(self, actions: np.ndarray) -> np.ndarray:
        space = self.single_action_space
        shape = (self.num_envs, self.num_agents, *space.shape)
        kinds, name = ("f", "floats") if isinstance(space, gym.spaces.Box) else ("iu", "integers")
        try:
            actions = np.asarray(actions)
        except ValueError:
            raise ValueError(f"actions: got lists of several lengths, expected {name} of shape {shape}") from None
        if actions.shape != shape or actions.dtype.kind not in kinds:
            raise ValueError(f"actions: got {actions.dtype} of shape {actions.shape}, expected {name} of shape {shape}")
        if isinstance(space, gym.spaces.Box):
            if not np.isfinite(actions).all():
                raise ValueError("actions: got NaN or infinity, expected finite numbers")
            return np.minimum(np.maximum(actions.astype(np.float64), space.low), space.high)
        if actions.min() < 0 or actions.max() >= space.n:
            raise ValueError(f"actions: got {actions.min()} to {actions.max()}, expected 0 to {space.n - 1}")
        return actions


class ParallelView(pettingzoo.ParallelEnv):
    """One copy of a MetaVectorEnv as a PettingZoo ParallelEnv, for other people's software.

    task: the id of its task, or None for one drawn from `tasks.train` at every reset (info["task"] says which;
    `reset(options={"task": id})` chooses one; other options are ignored, as PettingZoo's own tests pass some). Raises
    ValueError as the MetaVectorEnv does.
    """

    def __init__(self, env: MetaVectorEnv, task: int | None = None):
        self.env = env
        self.metadata = {"name": env.env_id, "render_modes": ["rgb_array"], "render_fps": 20, "is_parallelizable": True}
        self.render_mode = "rgb_array"
        self.possible_agents = list(env.agents)
        self.agents = []
        self._last_state = None
        self._task = None if task is None else env._check_task([task])
        # one object per agent and life: PettingZoo's API test asks for the same space each time
        self.observation_spaces = {
            a: gym.spaces.Box(-np.inf, np.inf, env.single_observation_space.shape) for a in env.agents
        }
        box = isinstance(env.single_action_space, gym.spaces.Box)
        space = env.single_action_space
        self.action_spaces = {
            a: gym.spaces.Box(space.low, space.high) if box else gym.spaces.Discrete(space.n) for a in env.agents
        }
        self.state_space = gym.spaces.Box(-np.inf, np.inf, (env.state_dim,))

    def observation_space(self, agent: str) -> gym.spaces.Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.spaces.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        task = (options or {}).get("task")
        obs, info = self.env.reset(seed, {"task": self._task if task is None else [task]})
        self.agents = self.possible_agents[:]
        self._last_state = self.env.state()[0]
        return self._by_agent(obs), {a: {"task": int(info["task"][0])} for a in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        if set(actions) != set(self.agents):
            raise ValueError(f"actions: got agents {sorted(actions)}, expected {sorted(self.agents)}")
        if not self.agents:
            return {}, {}, {}, {}, {}
        joint = [[actions[a] for a in self.agents]]  # [1, n, act_dim] or [1, n]
        obs, reward, terminated, truncated, info = self.env.step(joint)
        ended = bool(terminated[0] or truncated[0])
        # the MetaVectorEnv has begun the next episode; a ParallelEnv shows the last observation of this one
        obs = self._by_agent(info["final_obs"] if ended else obs)
        self._last_state = info["final_state"][0] if ended else self.env.state()[0]
        rewards = {a: float(reward[0, i]) for i, a in enumerate(self.agents)}
        terminations = dict.fromkeys(self.agents, bool(terminated[0]))
        truncations = dict.fromkeys(self.agents, bool(truncated[0]))
        infos = {a: {"task": int(info["task"][0])} for a in self.agents}
        if ended:
            self.agents = []
        return obs, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        if self._last_state is None:
            raise ValueError("state: got a call before reset, expected reset() first")
        return self._last_state.copy()

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    def _by_agent(self, values: np.ndarray) -> dict:
        return {a: values[0, i] for i, a in enumerate(self.possible_agents)}
