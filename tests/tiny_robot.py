"""A robot that moves at once and has no hardware, and a checkpoint of a policy for it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.policies.factory import make_pre_post_processors
from lerobot.robots import Robot, RobotConfig
from tiny_policy import statistics, tiny_policy

STATES = ["pan.pos", "lift.pos", "elbow.pos", "wrist.pos", "gripper.pos"]
ACTIONS = STATES[:4]


@RobotConfig.register_subclass("test_arm")
@dataclass
class ArmConfig(RobotConfig):
    actions: list[str] = field(default_factory=lambda: list(ACTIONS))
    camera: str = "front"


class Arm(Robot):
    config_class = ArmConfig
    name = "test_arm"
    connected: list["Arm"] = []  # noqa: RUF012  # all that ever were

    def __init__(self, config: ArmConfig):
        super().__init__(config)
        self.config, self.is_on = config, False
        self.joints = dict.fromkeys(STATES, 0.5)
        self.sent: list[dict[str, float]] = []

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return dict.fromkeys(STATES, float) | {self.config.camera: (48, 64, 3)}

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.config.actions, float)

    @property
    def is_connected(self) -> bool:
        return self.is_on

    def connect(self, calibrate: bool = True) -> None:
        self.is_on = True
        Arm.connected.append(self)

    def disconnect(self) -> None:
        self.is_on = False

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        return dict(self.joints) | {self.config.camera: np.zeros((48, 64, 3), np.uint8)}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.sent.append(dict(action))
        self.joints |= action
        return action


def save_checkpoint(folder: Path, model: str = "pi0", /, **changes: Any) -> Path:
    names = {"state_feature_names": STATES, "action_feature_names": ACTIONS}
    policy = tiny_policy(model, **names | changes)
    policy.save_pretrained(folder)
    stats = statistics()
    if policy.config.action_feature_names != ACTIONS:  # of all joints
        stats["action"] = stats["observation.state"]
    for pipeline in make_pre_post_processors(policy.config, dataset_stats=stats):
        pipeline.save_pretrained(folder)
    return folder
