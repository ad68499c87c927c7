"""The meta-environments of MG2L: `make` for the scripts, `parallel_env` for other people's software."""

import importlib
import inspect

from envs.meta_env import MetaVectorEnv, ParallelView, TaskSet

__all__ = ["ENV_IDS", "MetaVectorEnv", "ParallelView", "TaskSet", "make", "parallel_env"]

# where each class is; imported when it is made, since an engine is slow to import and nobody needs all of them
_ENVS = {
    "hunting_target": ("envs.particle", "HuntingTarget"),
    "spread_target": ("envs.particle", "SpreadTarget"),
    "halfcheetah_dir": ("envs.locomotion", "HalfCheetahDir"),
    "hopper_param": ("envs.locomotion", "HopperParam"),
    "rware_layout": ("envs.warehouse", "RwareLayout"),
    "magent_gather": ("envs.gather", "MagentGather"),
}
ENV_IDS = tuple(_ENVS)


def make(env_id: str, num_envs: int = 1, seed: int = 0, **overrides) -> MetaVectorEnv:
    """`num_envs` copies of an environment, e.g. `make("hunting_target", 32, seed=1, num_preys=2)`.

    Raises ValueError on an unknown environment, an unknown override or a value out of range.
    """
    if env_id not in _ENVS:
        raise ValueError(f"env_id: got {env_id!r}, expected one of {', '.join(ENV_IDS)}")
    module, name = _ENVS[env_id]
    env_class = getattr(importlib.import_module(module), name)
    known = list(inspect.signature(env_class).parameters)[2:]  # after num_envs and seed
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"{env_id}: got unknown setting {', '.join(unknown)}, expected one of {', '.join(known)}")
    return env_class(num_envs, seed, **overrides)


def parallel_env(env_id: str, task: int | None = None, **overrides) -> ParallelView:
    """One copy of an environment as a PettingZoo ParallelEnv; `task=None` draws a training task at every reset."""
    return ParallelView(make(env_id, 1, 0, **overrides), task)
