"""`--env.type=metaworld_fast`: Meta-World for LeRobot, quick enough for software rendering.

LeRobot's own `metaworld` environment renders 480×480 pixels with shadows and multisampling: about 7 frames
per second on a CPU. This one renders 96×96 without either, ends an episode at success, and shows no goal
marker, so that the two faucet tasks look the same and only the instruction tells them apart.

Plugin discovery imports this module, so it holds the settings only. The simulator is imported by
`metaworld_env` when an environment is made.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from lerobot_pi0.demo.metaworld_tasks import (
    ACTION_NAMES,
    FPS,
    OPPOSITES,
    STATE_NAMES,
    parse_tasks,
    task_instructions,
)
from lerobot_pi0.errors import UserError


@EnvConfig.register_subclass("metaworld_fast")
@dataclass
class MetaworldFastEnvConfig(EnvConfig):
    """Settings of the environment; `--env.task` takes one task or several, separated by commas."""

    task: str = "faucet-open-v3"
    fps: int = FPS
    # Steps after which an episode counts as failed. The scripted experts need about 40 to 90.
    episode_length: int = 200
    # Width and height of the camera image in pixels. Must be that of the training data.
    image_size: int = 96
    # Control steps per picture; in between, observations hold the last one. Rendering takes most of the time,
    # and a policy looks only when it plans: give its n_action_steps.
    steps_per_picture: int = 1
    # Draw the coloured dots that mark the goal. reach, push and pick-place cannot be solved without them;
    # elsewhere they would tell the policy which task it is, whatever the instruction says.
    show_goal: bool = False
    # Take positions of the hand for actions, as most robots do, instead of displacements.
    position_actions: bool = False
    # How far objects are moved at most, in metres, beyond the places that Meta-World gives them.
    moved: float = 0.0
    # Hand out the instruction of the opposite task (faucet-open ↔ faucet-close, ...), to see whether it is
    # obeyed.
    swap_instructions: bool = False
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {"pixels": OBS_IMAGE, "agent_pos": OBS_STATE, "action": ACTION}
    )

    def __post_init__(self) -> None:
        tasks = parse_tasks(self.task)
        for name in ("episode_length", "image_size", "steps_per_picture"):
            if getattr(self, name) < 1:
                raise UserError(f"--env.{name} must be at least 1, not {getattr(self, name)}.")
        if self.moved < 0:
            raise UserError(f"--env.moved must not be negative, but is {self.moved}.")
        single = [name for name in tasks if name not in OPPOSITES]
        if self.swap_instructions and single:
            raise UserError(
                f"--env.swap_instructions=true needs tasks that have an opposite ({', '.join(OPPOSITES)}), "
                f"not {', '.join(single)}. Take them out of --env.task."
            )
        self.features = {
            "pixels": PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (len(STATE_NAMES),)),
            "action": PolicyFeature(FeatureType.ACTION, (len(ACTION_NAMES),)),
        }

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """What every task's environment is made with."""
        return {
            "episode_length": self.episode_length,
            "image_size": self.image_size,
            "steps_per_picture": self.steps_per_picture,
            "show_goal": self.show_goal,
            "position_actions": self.position_actions,
            "moved": self.moved,
        }

    def instruction(self, task: str) -> str:
        """The sentence that the policy is given for a task."""
        return task_instructions()[OPPOSITES[task] if self.swap_instructions else task]

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """One vector environment per task, as {task: {0: environment}}, so that success is reported per task.

        Args:
            n_envs: copies of each task that run side by side. They run in this process: a simulator step
                costs far less than sending its image between processes.
            use_async_envs: not used, for that reason.
        """
        from lerobot_pi0.demo.metaworld_env import MetaworldFastEnv

        # LeRobot steps a batch until its last episode ends; frozen environments cost nothing meanwhile.
        return {
            task: {
                0: gym.vector.SyncVectorEnv(
                    [
                        freeze_after_episode_end(
                            partial(MetaworldFastEnv, task, self.instruction(task), **self.gym_kwargs)
                        )
                    ]
                    * n_envs
                )
            }
            for task in parse_tasks(self.task)
        }
