"""halfcheetah_dir and hopper_param: MuJoCo bodies whose joints are shared out among agents.

The physics, starts, rewards and ends of episodes are those of Gymnasium's HalfCheetah-v5 and Hopper-v5
(https://gymnasium.farama.org/environments/mujoco/), equal to them bit for bit; what an agent sees is what
Gymnasium-Robotics' MaMuJoCo shows it with `agent_obsk=0`; the tasks are those of the MG2L paper. Lengths are in metres,
angles in radians, times in seconds.
"""

import copy
import ctypes.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import as_file, files

# MuJoCo chooses how to draw when it is first imported, and its own choice needs a display
if sys.platform == "linux" and not os.environ.get("DISPLAY") and ctypes.util.find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium as gym
import mujoco
import numpy as np

from envs.meta_env import MetaVectorEnv, TaskSet
from envs.particle import check_count

POOL = ThreadPoolExecutor()  # starts a thread only when there is work for it
MARK = (220, 120, 20)  # the colour of what a picture says of the task


def load_model(name: str) -> mujoco.MjModel:
    """One of Gymnasium's models, in which MuJoCo does not begin anew where it diverges, and so hides that."""
    heard = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda _: None)  # the cheetah's file is old, and MuJoCo 4 would write a log of that
    try:
        with as_file(files("gymnasium") / "envs" / "mujoco" / "assets" / name) as path:
            model = mujoco.MjModel.from_xml_path(str(path))
    finally:
        mujoco.set_mju_user_warning(heard)
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    return model


class LocomotionEnv(MetaVectorEnv):
    """A body in the x-z plane; its first three joints are its place x, its height z and its pitch, the others motors.

    models [num_tasks]: the physics of each task, of the same body
    frame_skip: steps of the physics in one step of the environment
    joints [n]: whose motors and joints are agent i's, as indices into MuJoCo's `qpos`, in the order in which it sees
        them; together they are the motors' joints, and an agent acts on its own in ascending order
    max_speed: velocities are seen clipped to +-max_speed

    Observation of an agent: (angle, velocity) of each of its joints, then height, pitch and the velocities of x, z and
    pitch. State, for the central critic: Gymnasium's whole observation, all positions but x, then all velocities.
    Action: torques as shares of the motors' strength. They are rounded to float32, as Gymnasium's are.

    A subclass defines `_advance`, `_noise` (how far from the model's pose an episode starts, drawn from a generator:
    positions [nq], velocities [nv]) and `_mark` (draw copy 0's task onto a picture).
    """

    max_episode_steps = 1000

    def __init__(self, num_envs, seed, models, frame_skip, joints, max_speed):
        super().__init__(num_envs, seed)
        self.models, self.frame_skip, self.max_speed = models, frame_skip, max_speed
        self.num_agents = len(joints)
        self.dt = models[0].opt.timestep * frame_skip  # seconds a step
        nq, nv = models[0].nq, models[0].nv
        self.data = [mujoco.MjData(models[0]) for _ in range(self.num_envs)]
        self._read()
        # [n, obs_dim]: where in the state what agent i sees is
        own = np.array([[index for j in part for index in (j - 1, nq - 1 + j)] for part in joints])
        body = np.tile([0, 1, nq - 1, nq, nq + 1], (self.num_agents, 1))
        self.seen = np.concatenate([own, body], axis=1)
        self.state_dim = nq - 1 + nv
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (self.seen.shape[1],))
        self.single_action_space = gym.spaces.Box(-1, 1, (len(joints[0]),))
        self._renderer = None

    def _start(self, copies):
        for k in copies:
            model, data = self.models[self.task[k]], self.data[k]
            mujoco.mj_resetData(model, data)  # the solver's warm start too, or an episode depends on the one before
            pos, vel = self._noise(self.rngs[k])
            data.qpos[:] = model.qpos0 + pos
            data.qvel[:] = vel
            mujoco.mj_forward(model, data)  # for the pictures; a step does this itself
        self._read()

    def _read(self) -> None:
        # no view into MuJoCo's memory is kept: it would be cut off in a deep copy, such as SuperSuit makes
        rows = np.concatenate([part for data in self.data for part in (data.qpos, data.qvel)])
        self.physics = rows.reshape(self.num_envs, -1)  # [E, nq + nv]
        self.pos, self.vel = self.physics[:, : self.models[0].nq], self.physics[:, self.models[0].nq :]
        sound = (np.abs(self.physics) < mujoco.mjMAXVAL).all(1)  # [E]; a NaN is not
        if not sound.all():
            k = int(sound.argmin())
            task = self.tasks.describe(self.task[k])
            raise RuntimeError(f"{self.env_id}: the physics of copy {k} diverged (task {self.task[k]}: {task})")

    def _move(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step of the physics under actions [E, n, act_dim]: forward velocity [E] and their |a|^2 [E]."""
        torque = actions.reshape(self.num_envs, -1).astype(np.float32)  # [E, motor]
        before = self.pos[:, 0].copy()
        for data, own in zip(self.data, torque, strict=True):
            data.ctrl[:] = own
        models = [self.models[task] for task in self.task.tolist()]
        step, nstep = mujoco.mj_step, self.frame_skip

        threads = max(1, min(self.num_threads, self.num_envs // 8))  # handing out fewer copies costs more than it gains

        def move(first):  # every threads-th copy; MuJoCo lets go of Python's lock meanwhile
            part = slice(first, None, threads)
            for model, data in zip(models[part], self.data[part], strict=True):
                step(model, data, nstep)

        if threads > 1:
            list(POOL.map(move, range(threads)))
        else:
            move(0)
        self._read()
        return (self.pos[:, 0] - before) / self.dt, np.square(torque).sum(1)  # the sum in float32, as Gymnasium's

    def _shared(self, reward: np.ndarray) -> np.ndarray:
        return np.repeat(reward.astype(np.float32)[:, None], self.num_agents, axis=1)  # [E, n]

    def _observe(self):
        vel = np.clip(self.vel, -self.max_speed, self.max_speed) if np.isfinite(self.max_speed) else self.vel
        self._whole = np.concatenate([self.pos[:, 1:], vel], axis=1, dtype=np.float32)  # [E, state_dim]
        return self._whole[:, self.seen]

    def _state(self):
        return self._whole

    def render(self):
        """Copy 0 from the side, uint8 [240, 320, 3], the camera going along; in orange what its task is."""
        if self._renderer is None:
            scenery = copy.copy(self.models[0])
            scenery.geom_size[0, :2] = 0  # a floor without end: the cheetah runs off the file's within an episode
            scenery.mat_texrepeat[:] = 1  # in squares of a metre
            self._renderer = mujoco.Renderer(scenery, 240, 320)
        for _ in range(2):  # MuJoCo lays that floor around where the camera was in the scene before
            self._renderer.update_scene(self.data[0], camera="track")
        picture = self._renderer.render()
        self._mark(picture)
        return picture

    def close(self):
        """Free the renderer and its graphics context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class HalfCheetahDir(LocomotionEnv):
    """A cheetah runs forward (task 0) or backward (task 1), and only the reward tells which.

    Reward, shared: g v - 0.01 |a|^2, with g = +1 or -1, v the forward velocity and a the actions of all agents.
    Episodes are cut after 1000 steps (50 seconds) and never terminate.

    num_agents: 2 (back leg, front leg; each sees 11 numbers and acts on thigh, shin, foot) or 6 (one joint each, from
        the back thigh to the front foot; each sees 7 numbers). Raises ValueError otherwise.
    """

    env_id = "halfcheetah_dir"

    def __init__(self, num_envs: int, seed: int, num_agents: int = 2):
        joints = {2: [(5, 4, 3), (8, 7, 6)], 6: [(j,) for j in range(3, 9)]}  # seen from the foot up, as MaMuJoCo does
        if not isinstance(num_agents, int | np.integer) or num_agents not in joints:
            raise ValueError(f"num_agents: got {num_agents!r}, expected 2 or 6")
        model = load_model("half_cheetah.xml")
        super().__init__(num_envs, seed, [model, model], frame_skip=5, joints=joints[num_agents], max_speed=np.inf)
        ids, self.goal = np.arange(2), np.array([1.0, -1.0])
        labels, parameters = np.eye(2, dtype=np.float32), self.goal[:, None].astype(np.float32)
        self.tasks = TaskSet(ids, ids, labels, parameters, ("direction",))

    def _noise(self, rng):
        return rng.uniform(-0.1, 0.1, self.models[0].nq), 0.1 * rng.standard_normal(self.models[0].nv)

    def _advance(self, actions):
        velocity, effort = self._move(actions)
        reward = self.goal[self.task] * velocity - 0.01 * effort  # [E]
        return self._shared(reward), np.zeros(self.num_envs, bool)

    def _mark(self, picture):
        row, column = np.mgrid[-10:11, -20:21]
        arrow = np.abs(row) <= (20 - self.goal[self.task[0]] * column) / 4  # its tip on the side to run to
        picture[10:31, 140:181][arrow] = MARK


class HopperParam(LocomotionEnv):
    """A hopper goes forward whatever its masses, inertias, joint damping and friction, each scaled by the task.

    Three agents, one for each of thigh, leg and foot, which see 7 numbers. Reward, shared: 1 while healthy
    + v - 0.001 |a|^2, with v the forward velocity and a the actions of all agents. An episode terminates when the
    hopper is not healthy (its height is not above 0.7, its pitch not within +-0.2 or another number not within +-100);
    otherwise it is cut after 1000 steps (8 seconds).

    num_train, num_test, task_seed: how many tasks to draw, the four factors of each from U(0.5, 1.5), and from which
        seed (num_test=0: trained and tested on all of them); the first are the same whatever their number
    factors: (mass, inertia, damping, friction) of each task, numbers above 0, instead of drawn ones; trained and tested
        on all of them
    Raises ValueError on numbers out of range.
    """

    env_id = "hopper_param"

    def __init__(
        self,
        num_envs: int,
        seed: int,
        num_train: int = 40,
        num_test: int = 10,
        task_seed: int = 0,
        factors: list[tuple[float, float, float, float]] | None = None,
    ):
        if factors is None:
            check_count("num_train", num_train, 2)
            check_count("num_test", num_test, 0)
            check_count("task_seed", task_seed, 0)
            factors = np.random.default_rng(task_seed).uniform(0.5, 1.5, (num_train + num_test, 4))
        else:
            factors, num_test = check_factors(factors), 0
        factors = factors.astype(np.float32)  # so that the tasks' parameters are what the physics has, to the bit
        base = load_model("hopper.xml")
        scratch = mujoco.MjData(base)
        models = []
        for mass, inertia, damping, friction in factors.astype(np.float64):
            model = copy.copy(base)  # each task from the same model, never one from another
            model.body_mass *= mass
            model.body_inertia *= inertia
            model.dof_damping *= damping
            model.geom_friction *= friction
            mujoco.mj_setConst(model, scratch)  # what MuJoCo derives from them, such as the inverse weights
            models.append(model)
        super().__init__(num_envs, seed, models, frame_skip=4, joints=[(3,), (4,), (5,)], max_speed=10)
        ids = np.arange(len(factors))
        held_out = ids[len(ids) - num_test :] if num_test else ids
        labels = np.eye(len(ids), dtype=np.float32)
        names = ("mass", "inertia", "damping", "friction")
        self.tasks = TaskSet(ids[: len(ids) - num_test], held_out, labels, factors, names)

    def _noise(self, rng):
        return rng.uniform(-5e-3, 5e-3, self.models[0].nq), rng.uniform(-5e-3, 5e-3, self.models[0].nv)

    def _advance(self, actions):
        velocity, effort = self._move(actions)
        height, pitch = self.pos[:, 1], self.pos[:, 2]
        healthy = (np.abs(self.physics[:, 2:]) < 100).all(1) & (height > 0.7) & (np.abs(pitch) < 0.2)  # [E]
        reward = velocity + healthy - 0.001 * effort  # [E]
        return self._shared(reward), ~healthy

    def _mark(self, picture):
        for row, factor in enumerate(self.tasks.parameters[self.task[0]]):  # a bar each; the line is where 1 is
            picture[10 + 8 * row : 15 + 8 * row, 10 : 10 + int(60 * factor)] = MARK
        picture[8:41, 70] = 0


def check_factors(factors: list[tuple[float, float, float, float]]) -> np.ndarray:
    """The factors as an array [num_tasks, 4]. Raises ValueError unless there are two tasks, all numbers above 0."""
    try:
        with np.errstate(over="ignore"):
            checked = np.asarray(factors, np.float64).astype(np.float32)  # as the tasks' parameters have them
        sound = ((checked > 0) & (checked < np.inf)).all()
        if sound and checked.ndim == 2 and checked.shape[1] == 4 and len(checked) >= 2:
            return checked
        factors = checked.tolist()
    except (TypeError, ValueError):
        pass  # no numbers, or rows of several lengths
    raise ValueError(f"factors: got {factors!r}, expected two or more tasks of four finite numbers above 0")
