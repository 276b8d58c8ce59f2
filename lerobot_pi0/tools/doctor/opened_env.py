"""An environment, made and reset as lerobot-eval does it, and what it shows before a policy acts in it."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lerobot.envs import EnvConfig, close_envs, make_env, preprocess_observation
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

SEED = 1000  # of lerobot-eval's first episode
RESETS = 2


@dataclass(frozen=True)
class OpenedEnv:
    """Of the first task: what it shows after a reset, by the policy's names, and how its state responds."""

    task: str  # as LeRobot calls it: the suite's name, and the task's number
    cameras: dict[str, Tensor]  # (resets, 3, height, width) in [0, 1]
    state: np.ndarray | None  # (resets, dims)
    low: np.ndarray  # (action dims,) what it takes
    high: np.ndarray
    longest: int  # steps of an episode
    instructions: list[str]  # of all tasks
    responses: list[np.ndarray]  # of each reset: the states (steps + 1, dims) from then on


def open_env(config: EnvConfig, rename_map: dict[str, str], tries: Sequence[np.ndarray]) -> OpenedEnv:
    """Make the environment, reset its first task twice, and close it.

    `tries`: actions (steps, dims) to try after the first reset, the second, …; those of another size than
    the environment takes are not tried. Raises what the environment raises.
    """
    with redirect_stdout(sys.stderr):  # LeRobot prints what it imports, beside our JSON
        envs = make_env(config, n_envs=1)
    try:
        every: dict[Any, Any] = {(name, i): env for name, of in envs.items() for i, env in of.items()}
        (suite, number), env = next(iter(every.items()))
        instructions = [_instruction(env) for env in every.values()]
        space: Any = getattr(env, "single_action_space", env.action_space)
        before, after = cast(tuple[Any, Any], config.get_env_processors())
        rename = RenameObservationsProcessorStep(rename_map)

        def processed(observation: dict[str, Any]) -> dict[str, Any]:
            found = preprocess_observation(observation) | {"task": instructions[:1]}
            return rename.observation(before(found))

        wanted = [actions for actions in tries if actions.shape[1:] == space.shape]
        observations, responses = [], []
        for reset in range(RESETS):
            raw, _ = env.reset(seed=[SEED + reset], options={NEW_ROLLOUT_OPTION: True})
            observations.append(processed(raw))
            states = [observations[-1].get(OBS_STATE)]
            for action in wanted[reset] if reset < len(wanted) else ():
                taken = after({ACTION: torch.from_numpy(action[None].astype(np.float32))})[ACTION]
                raw, _, terminated, truncated, _ = env.step(taken.numpy())
                if terminated[0] or truncated[0]:
                    break
                states.append(processed(raw).get(OBS_STATE))
            if states[0] is not None:
                responses.append(torch.cat(states).double().numpy())
        longest = int(env.call("_max_episode_steps")[0])
    finally:
        close_envs(envs)
    images = {
        key: torch.cat([observation[key] for observation in observations])
        for key, value in observations[0].items()
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3
    }
    return OpenedEnv(
        task=f"{suite}, {number}",
        cameras=images,
        state=np.stack([states[0] for states in responses]) if responses else None,
        low=np.broadcast_to(space.low, space.shape).astype(np.float64),
        high=np.broadcast_to(space.high, space.shape).astype(np.float64),
        longest=longest,
        instructions=instructions,
        responses=responses,
    )


def _instruction(env: Any) -> str:
    """As lerobot-eval asks for it."""
    for name in ("task_description", "task"):
        with suppress(AttributeError, NotImplementedError):
            return str(env.call(name)[0])
    return ""
