"""The meta-environments of MG2L: `make` for the scripts, `parallel_env` for other people's software."""

import inspect

from envs.meta_env import MetaVectorEnv, ParallelView, TaskSet
from envs.particle import HuntingTarget, SpreadTarget

__all__ = ["ENV_IDS", "MetaVectorEnv", "ParallelView", "TaskSet", "make", "parallel_env"]

_ENVS = {"hunting_target": HuntingTarget, "spread_target": SpreadTarget}
ENV_IDS = tuple(_ENVS)


def make(env_id: str, num_envs: int = 1, seed: int = 0, **overrides) -> MetaVectorEnv:
    """`num_envs` copies of an environment, e.g. `make("hunting_target", 32, seed=1, num_preys=2)`.

    Raises ValueError on an unknown environment, an unknown override or a value out of range.
    """
    if env_id not in _ENVS:
        raise ValueError(f"env_id: got {env_id!r}, expected one of {', '.join(ENV_IDS)}")
    known = list(inspect.signature(_ENVS[env_id]).parameters)[2:]  # after num_envs and seed
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"{env_id}: got unknown setting {', '.join(unknown)}, expected one of {', '.join(known)}")
    return _ENVS[env_id](num_envs, seed, **overrides)


def parallel_env(env_id: str, task: int | None = None, **overrides) -> ParallelView:
    """One copy of an environment as a PettingZoo ParallelEnv; `task=None` draws a training task at every reset."""
    return ParallelView(make(env_id, 1, 0, **overrides), task)
