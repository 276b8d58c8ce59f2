"""`--env.type=libero_varied`: scenes of LIBERO with moved objects, or another instruction than their own.

LeRobot's own `libero` cannot do either. Everything else is as there: cameras, state, actions, initial states.
Plugin discovery imports this module, so it holds the settings only; the simulator is imported by `libero_env`
when an environment is made.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.configs import LiberoEnv
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION

from lerobot_pi0.demo.libero_tasks import (
    ACTION_NAMES,
    EPISODE_LENGTH,
    OTHERS,
    SUITE_NAME,
    TASK_IDS,
    instruction,
)
from lerobot_pi0.demo.suites import split_tasks
from lerobot_pi0.errors import UserError


@EnvConfig.register_subclass("libero_varied")
@dataclass
class LiberoVariedEnvConfig(LiberoEnv):
    """Settings of the environment, beside those of LeRobot's LIBERO; the suite is libero_object."""

    task: str = SUITE_NAME
    # The target and the basket are displaced by at most so many metres along x and y.
    moved: float = 0.0
    # Tell the policy to pick up another object than the task's own: objects, separated by commas, of which
    # the first that stands in a task's scene is named there.
    instruction_of: str | None = None
    # Control steps per picture; in between, observations hold the last one. Rendering takes most of the time,
    # and a policy looks only when it plans: give its n_action_steps.
    steps_per_picture: int = 1
    observation_height: int = 96
    observation_width: int = 96
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(ACTION_NAMES),))}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != SUITE_NAME:
            raise UserError(f"--env.task must be {SUITE_NAME} for --env.type=libero_varied, not {self.task}.")
        if self.observation_height != self.observation_width:
            raise UserError(
                "--env.observation_height and --env.observation_width must be equal, not "
                f"{self.observation_height} and {self.observation_width}."
            )
        if self.steps_per_picture < 1:
            raise UserError(f"--env.steps_per_picture must be at least 1, not {self.steps_per_picture}.")
        if self.moved < 0:
            raise UserError(f"--env.moved must not be negative, but is {self.moved}.")
        numbers = range(len(TASK_IDS))
        if unknown := [number for number in self.task_ids or () if number not in numbers]:
            raise UserError(
                f"--env.task_ids: {SUITE_NAME} has the tasks 0 to {numbers[-1]}, not {unknown[0]}."
            )
        if self.instruction_of is not None:
            split_tasks(self.instruction_of, TASK_IDS, SUITE_NAME, "alphabet_soup")
        for scene in self.scenes:
            self.named(scene)

    @property
    def scenes(self) -> list[str]:
        """The tasks' names, in the order of their numbers."""
        return [name for name, number in TASK_IDS.items() if self.task_ids is None or number in self.task_ids]

    def named(self, scene: str) -> str:
        """The object that the policy is told to pick up in a task's scene."""
        if self.instruction_of is None:
            return scene
        objects = split_tasks(self.instruction_of, TASK_IDS, SUITE_NAME, "alphabet_soup")
        for thing in objects:
            if thing in OTHERS[scene]:
                return thing
        raise UserError(
            f"--env.instruction_of={self.instruction_of}: none of these stands beside {scene} in its "
            f"scene. There are {', '.join(OTHERS[scene])}."
        )

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """One vector environment per task: {"libero_object": {task's number: environment}}.

        Args:
            n_envs: copies of each task that run side by side, in this process.
            use_async_envs: not used: a simulator takes 2 GB of memory.
        """
        from lerobot_pi0.demo.libero_env import LiberoVariedEnv

        return {
            SUITE_NAME: {
                TASK_IDS[scene]: gym.vector.SyncVectorEnv(
                    [
                        freeze_after_episode_end(
                            partial(LiberoVariedEnv, first=first, stride=n_envs, **self._settings(scene))
                        )
                        for first in range(n_envs)
                    ]
                )
                for scene in self.scenes
            }
        }

    def _settings(self, scene: str) -> dict[str, Any]:
        return {
            "scene": scene,
            "task_description": instruction(self.named(scene)),
            "moved": self.moved,
            "episode_length": self.episode_length or EPISODE_LENGTH,
            "image_size": self.observation_height,
            "steps_per_picture": self.steps_per_picture,
        }
