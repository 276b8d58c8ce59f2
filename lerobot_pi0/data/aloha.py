"""ALOHA's joints ↔ those that openpi's base models were trained with (`--policy.adapt_to_pi`).

Some joints turn the other way, and a gripper is the angle of its motor in place of the opening that its
linkage makes of it. openpi's `adapt_to_pi` (policies/aloha_policy.py), with its constants: of state and
actions before all else, relative actions too, and of actions after all else. Each arm has six joints and
a gripper, the left one first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config

SIGNS = (1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0) * 2
GRIPPERS = [6, 13]
# A gripper's fingers, metres from the motor's axis where it is closed and open, and its linkage: horn, arm.
CLOSED, OPEN, HORN, ARM = 0.01844, 0.058, 0.022, 0.036
# The motor's angle at 0 and at 1 of openpi's gripper, in radians, and of ALOHA's commands.
PI_ZERO, PI_ONE = 0.5476, 1.6296
COMMAND_ZERO, COMMAND_ONE = -0.6213, 1.4910


def adapted_state(state: Tensor) -> Tensor:
    """openpi's state (…, 14) of ALOHA's."""
    found = state * state.new_tensor(SIGNS)
    opening = state[..., GRIPPERS]
    x = opening * (OPEN - CLOSED) + CLOSED
    # arcsin((HORN² + x² - ARM²) / (2 · HORN · x)), the law of cosines, by half of the angle that is left to
    # π/2: near an open gripper the arcsine of float32 loses three digits.
    half = (1 - opening) * (OPEN - CLOSED) * (x + ARM - HORN) / (4 * HORN * x)
    angle = math.pi / 2 - 2 * half.clamp(0, 1).sqrt().asin()
    found[..., GRIPPERS] = (angle - PI_ZERO) / (PI_ONE - PI_ZERO)
    return found


def adapted_actions(actions: Tensor) -> Tensor:
    """openpi's actions (…, 14) of ALOHA's: the inverse of `restored_actions`."""
    found = actions * actions.new_tensor(SIGNS)
    command = actions[..., GRIPPERS]
    found[..., GRIPPERS] = command * (COMMAND_ONE - COMMAND_ZERO) + COMMAND_ZERO - PI_ZERO
    return found


def restored_actions(actions: Tensor) -> Tensor:
    """ALOHA's actions (…, 14) of openpi's."""
    found = actions * actions.new_tensor(SIGNS)
    angle = actions[..., GRIPPERS] + PI_ZERO
    found[..., GRIPPERS] = (angle - COMMAND_ZERO) / (COMMAND_ONE - COMMAND_ZERO)
    return found


def policy_columns(config: Pi0Config, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Columns of a dataset as a policy of this config learns them: with `adapt_to_pi`, state and action
    (frames, 14) become openpi's, float64."""
    found = dict(columns)
    if not config.adapt_to_pi:
        return found
    for key, adapt in ((OBS_STATE, adapted_state), (ACTION, adapted_actions)):
        if key in found:
            found[key] = adapt(torch.from_numpy(found[key].astype(np.float64))).numpy()
    return found


@ProcessorStepRegistry.register("lerobot_pi0_adapt_to_pi")
@dataclass
class AdaptToPiStep(ProcessorStep):
    """State and actions of ALOHA as openpi's, before they are normalized."""

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = transition.copy()
        of: Any = transition  # LeRobot indexes by the enum and types by its values
        observation = {**(of.get(TransitionKey.OBSERVATION) or {})}
        of[TransitionKey.OBSERVATION] = observation
        vectors = ((observation, OBS_STATE, adapted_state), (of, TransitionKey.ACTION, adapted_actions))
        for parts, key, adapt in vectors:
            if isinstance(parts.get(key), Tensor):
                parts[key] = adapt(parts[key])
        return transition

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


@ProcessorStepRegistry.register("lerobot_pi0_adapt_from_pi")
@dataclass
class AdaptFromPiStep(ProcessorStep):
    """Actions as ALOHA's, after they were unnormalized."""

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = transition.copy()
        of: Any = transition
        of[TransitionKey.ACTION] = restored_actions(of[TransitionKey.ACTION])
        return transition

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features
