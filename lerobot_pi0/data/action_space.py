"""The robot's actions ↔ the network's: padding, relative actions, limits, names."""

import math
from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from lerobot.configs import PolicyFeature
from lerobot.utils.constants import ACTION
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config, ReferenceState
from lerobot_pi0.errors import UserError
from lerobot_pi0.sampling.guard import ChunkGuard, not_finite

# Normalized actions beyond it are as damaged as infinite ones. Within it unnormalizing does not overflow
# (`checkpoints.processors.LARGEST`).
LARGEST = 1e8


class ActionSpace:
    """Chunks (B, steps, size) as LeRobot has them, normalized and absolute; (B, steps, padded) as the
    network does.

    `guard` holds what leaves the policy to the limits of the training data; None: nothing is held. What never
    changes there stays as it is, with and without a guard: for robosuite's arm controller (LIBERO) a turn of
    exactly zero holds the hand's orientation, and one of a thousandth lets go of it.
    """

    def __init__(self, config: Pi0Config):
        self.config = config
        self.size = cast(PolicyFeature, config.action_feature).shape[0]
        self.guard: ChunkGuard | None = None
        if config.chunk_guard and config.action_limits is not None:
            self.guard = ChunkGuard(config.action_limits, self.names)
        # The normalized action of each dimension that never changes in the training data.
        self._constants: dict[int, float] = {}
        if (limits := config.action_limits) is not None:
            by_dimension = zip(limits.low, limits.high, limits.gain, limits.offset, strict=False)
            self._constants = {
                i: low * gain + offset
                for i, (low, high, gain, offset) in enumerate(by_dimension)
                if low == high and i < self.size
            }

    @property
    def names(self) -> list[str]:
        """What the dimensions are called, or their numbers."""
        return self.config.action_feature_names or [str(i) for i in range(self.size)]

    def reference(self, state: Tensor) -> Tensor | None:
        """What relative actions are relative to, of normalized states (B, state size): float32 (B, size),
        normalized, zero where actions are absolute. None if all are.
        """
        by = self.config.reference_state
        return None if by is None else self._of_state(state, by, 0.0)

    def to_network(self, batch: Mapping[str, Tensor], reference: Tensor | None) -> Tensor:
        """Actions of a batch as the network learns them: float32, relative to `reference`, padded."""
        actions = pad(batch, ACTION, self.config.action_feature, self.config.max_action_dim)
        if reference is not None:
            actions = actions - F.pad(reference, (0, actions.shape[-1] - self.size))[:, None]
        return actions

    def from_network(self, actions: Tensor, reference: Tensor | None) -> Tensor:
        """What leaves the policy: absolute actions within the limits.

        Raises UserError for NaN, Inf and numbers beyond `LARGEST`, so that unnormalizing gives finite ones.
        """
        actions = actions[..., : self.size]
        actions = actions if reference is None else actions + reference[:, None]
        on_host = actions.cpu()  # a GPU is waited for once, here
        if bad := not_finite(on_host, self.names, LARGEST):
            raise UserError(
                f"the policy returned NaN or Inf for {bad} from a finite observation (beyond {LARGEST:g} is "
                "Inf); no action was sent. Its weights are damaged, or overflow: `lerobot-pi0 doctor "
                f"--policy.path={self.config.pretrained_path or '...'}` checks them"
            )
        held = self.held(on_host)
        if self._constants:
            held = held.clone()
            held[..., list(self._constants)] = held.new_tensor(list(self._constants.values()))
        return actions if held is on_host else held.to(actions.device)

    def first(self, actions: Tensor, state: Tensor) -> Tensor:
        """A first chunk (B, steps, size), which begins near where the robot is by its normalized state.

        As the config's `first_action` says. Raises UserError with the distance where that refuses.
        """
        limits, setting = self.config.action_limits, self.config.first_action
        if self.guard is None or limits is None or limits.pose is None or setting == "free":
            return actions
        pose = self._of_state(state, limits.pose, math.nan)
        if setting == "refuse" and (far := self.guard.beyond_one_step(actions[:, 0], pose)):
            raise UserError(
                f"the first action is further from where the robot is than any step of the training data: "
                f"{far}. No action was sent. Move the robot to where episodes of the data begin, or let it "
                "approach by steps of the data (--policy.first_action=clamp)"
            )
        return self.guard.hold(actions, pose)

    def _of_state(self, state: Tensor, by: ReferenceState, elsewhere: float) -> Tensor:
        """Normalized actions (B, size) that belong to normalized states (B, state size): float32."""
        state = state.float()
        found = state.new_full((len(state), self.size), elsewhere)
        gain, offset = state.new_tensor(by.gain), state.new_tensor(by.offset)
        found[:, by.actions] = state[:, by.states] * gain + offset
        return found

    def held(self, actions: Tensor, before: Tensor | None = None) -> Tensor:
        """Actions within the limits; `before` (B, size) is the action that they follow."""
        return actions if self.guard is None else self.guard.hold(actions, before)


def pad(batch: Mapping[str, Tensor], key: str, feature: PolicyFeature | None, size: int) -> Tensor:
    """A vector of a batch, zero-padded to float32 (…, size). Raises UserError if it is not the feature's."""
    vector, dims = batch[key].float(), cast(PolicyFeature, feature).shape[0]
    if vector.shape[-1] != dims:
        raise UserError(
            f"'{key}' has {vector.shape[-1]} dimensions, the policy was made for {dims}: give it those that "
            "it was trained with, or train on data of this robot"
        )
    return F.pad(vector, (0, size - dims))
