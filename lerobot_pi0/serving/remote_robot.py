"""The robot at the other end of LeRobot's async inference: what it says of itself in the handshake, checked
against the policy, and its observations as the policy's preprocessor takes them.

A picture stays as large as it is. LeRobot's server squeezes it to the size of the training pictures, whatever
its proportions; this policy scales any size by itself and keeps them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.joints import check_joints
from lerobot_pi0.inputs.policy import LoadedPolicy

logger = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)
# Characters. Far more than a policy reads of an instruction, and few enough to tokenize at once.
MAX_INSTRUCTION = 1000


@dataclass(frozen=True)
class Camera:
    """One of the robot's cameras that the policy looks at."""

    name: str  # at the robot
    shape: tuple[int, int, int]  # height, width, 3


@dataclass(frozen=True)
class RemoteRobot:
    """Joints and cameras of a robot that fits the policy, and how many actions it wants at once."""

    joints: tuple[str, ...]
    cameras: Mapping[str, Camera]  # by what the policy's preprocessor is given
    actions_per_chunk: int

    def observation(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What the robot reports, for the preprocessor: state (joints,), pictures (3, height, width) of
        uint8, which are a quarter of the bytes to copy to a GPU, task.

        Raises ValueError for anything that no policy should act upon.
        """
        cameras = [camera.name for camera in self.cameras.values()]
        missing = [name for name in (*self.joints, *cameras, "task") if name not in raw]
        if missing:
            raise UserError(f"the observation has no {missing}, which the handshake announced")
        if not isinstance(raw["task"], str):
            raise UserError(f"the instruction is a {type(raw['task']).__name__}, not a text: --task='…'")
        if (length := len(raw["task"])) > MAX_INSTRUCTION:
            raise UserError(
                f"the instruction has {length:,} characters, more than {MAX_INSTRUCTION:,}: --task='…'"
            )
        state = [_number(joint, raw[joint]) for joint in self.joints]
        pictures = {key: _picture(camera, raw[camera.name]) for key, camera in self.cameras.items()}
        return {OBS_STATE: torch.tensor(state), **pictures, "task": raw["task"]}


def check_robot(instructions: RemotePolicyConfig, loaded: LoadedPolicy) -> RemoteRobot:
    """The robot that a handshake describes.

    Raises ValueError when the policy was not made for it. Cameras that it does not know are left out.
    """
    config = loaded.config
    features: Mapping[str, Any] = instructions.lerobot_features  # LeRobot's annotation is of other values
    trained_with = next(
        (
            step.rename_map
            for step in loaded.preprocess.steps
            if isinstance(step, RenameObservationsProcessorStep)
        ),
        {},
    )
    given = {key: instructions.rename_map.get(key, key) for key in features}
    seen_as = {trained_with.get(name, name): key for key, name in given.items()}
    joints = _joints(config, features.get(seen_as.get(OBS_STATE, ""), {}))
    known = {name: key for name, key in seen_as.items() if name in config.cameras.values()}
    unknown = [key for name, key in seen_as.items() if name != OBS_STATE and name not in known]
    missing = [name for name in config.cameras.values() if name not in known]
    if missing:
        prefix = f"{OBS_IMAGES}."
        raise UserError(
            f"the policy looks at {missing}, and the robot does not have it. Its cameras are "
            f"{[key.removeprefix(prefix) for key in seen_as.values() if key != OBS_STATE]}: name them like "
            "the policy's in --robot.cameras (the part behind 'observation.images.')"
        )
    if unknown:
        logger.warning("the policy does not look at %s: leave it out, sending it takes time", unknown)
    cameras = {given[key]: _camera(config, name, key, features[key]) for name, key in known.items()}
    if instructions.actions_per_chunk > config.chunk_size:
        logger.warning(
            "the client asks for %d actions at once, the policy predicts %d",
            instructions.actions_per_chunk,
            config.chunk_size,
        )
    return RemoteRobot(joints, cameras, min(instructions.actions_per_chunk, config.chunk_size))


def _joints(config: Pi0Config, feature: Mapping[str, Any]) -> tuple[str, ...]:
    names = feature.get("names")
    if not (names and isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise UserError("the robot names no joints: the handshake has no 'observation.state' with names")
    # The handshake does not name the actions. Where the policy was trained on actions that are called like
    # the state, those of the robot are taken to be so too.
    assert config.robot_state_feature is not None
    assert config.action_feature is not None
    trained, size = config.action_feature_names, config.action_feature.shape[0]
    if trained == config.state_feature_names and size == config.robot_state_feature.shape[0]:
        actions = names
    else:
        actions = trained or [str(i) for i in range(size)]
    check_joints(config, names, actions)
    return tuple(names)


def _camera(config: Pi0Config, name: str, key: str, feature: Mapping[str, Any]) -> Camera:
    shape = feature.get("shape")
    if not (
        isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(isinstance(size, int) and size > 0 for size in shape)
        and shape[2] == 3
    ):
        raise UserError(f"the robot's '{key}' has shape {shape}; the policy takes (height, width, 3)")
    height, width, _ = shape
    _, trained_height, trained_width = config.image_features[name].shape
    if abs(width * trained_height - height * trained_width) > 0.02 * height * trained_width:
        logger.warning(
            "the robot's %r is %d×%d, the policy was trained on %d×%d: other proportions show the scene "
            "from elsewhere. Set the camera to those of the training",
            key,
            width,
            height,
            trained_width,
            trained_height,
        )
    return Camera(key.removeprefix(f"{OBS_IMAGES}."), (height, width, 3))


def _number(joint: str, value: Any) -> float:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise UserError(f"joint '{joint}' is a {type(value).__name__}, not a number")
    if not abs(value) <= _LARGEST:  # NaN is not, either
        raise UserError(f"joint '{joint}' is not a finite number: {value}")
    return float(value)


def _picture(camera: Camera, picture: Any) -> Tensor:
    if not isinstance(picture, np.ndarray):
        raise UserError(f"camera '{camera.name}' gives a {type(picture).__name__}, not a numpy array")
    if picture.dtype != np.uint8:
        raise UserError(f"camera '{camera.name}' gives {picture.dtype}; LeRobot's cameras give uint8")
    if picture.shape != camera.shape:
        raise UserError(
            f"camera '{camera.name}' gives {picture.shape}; the handshake announced {camera.shape}"
        )
    return torch.tensor(picture).permute(2, 0, 1)
