"""Real-time chunking: a new chunk that goes on where the old one, still being executed, is.

Two ways, both beside the model: guidance, which bends the velocity of any flow policy towards the actions
that are left over (Black et al., 2025, "Real-Time Execution of Action Chunking Flow Policies"), and
conditioning, for a policy that was trained to continue an action prefix (Black et al., 2025, "Training-Time
Action Conditioning for Efficient Real-Time Chunking"). Time runs from 1 (noise) to 0 (actions); the papers'
runs the other way. Shapes as in `model/`: b batch, a actions of a chunk, e their padded size.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lerobot_pi0.model.flow import Velocity

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

logger = logging.getLogger(__name__)

# How the pull of the remainder fades behind what is certain to be executed.
Schedule = Literal["ZEROS", "ONES", "LINEAR", "EXP"]


@dataclass(frozen=True)
class Remainder:
    """Actions of the last chunk that were not executed when the observation was taken, as the network's are.

    The first `delay` of them will have been executed before the new chunk arrives.
    """

    actions: Float[Tensor, "b a e"]  # zero where there is none
    known: Bool[Tensor, "a e"]
    delay: int

    @property
    def length(self) -> int:
        """Steps that there are."""
        return int(self.known.any(1).sum())


def read_remainder(
    left: Float[Tensor, "*b s d"],
    delay: int,
    noise: Float[Tensor, "b a e"],
    reference: Float[Tensor, "b d"] | None,
) -> Remainder | None:
    """The remainder that LeRobot hands over, of a chunk like `noise`; None if nothing is left.

    LeRobot fills a short one up with rows of zeros: these are no actions, and would pull the arm to the mean
    pose of the data. Relative actions are so to the `reference` of the observation at hand.
    """
    left = (left if left.ndim == 3 else left[None]).to(noise)
    real = left.ne(0).any(2).any(0).nonzero()
    if not len(real):
        return None
    chunk_size, padded_size = noise.shape[1:]
    steps, size = min(int(real.max()) + 1, chunk_size), left.shape[2]
    actions = torch.zeros_like(noise)
    actions[:, :steps, :size] = left[:, :steps] if reference is None else left[:, :steps] - reference[:, None]
    known = torch.zeros(chunk_size, padded_size, dtype=torch.bool, device=left.device)
    known[:steps, :size] = True
    return Remainder(actions, known, min(delay, steps))


def prefix_weights(delay: int, end: int, chunk_size: int, schedule: Schedule) -> Float[Tensor, " a"]:
    """How much each action of the remainder counts: all before `delay`, none from `end` on (paper, eq. 5)."""
    step = torch.arange(chunk_size, dtype=torch.float32)
    fading = ((end - step) / (end - min(delay, end) + 1)).clamp(0, 1)
    weights = {
        "ZEROS": torch.zeros_like(step),
        "ONES": torch.ones_like(step),
        "LINEAR": fading,
        "EXP": fading * torch.expm1(fading) / (math.e - 1),
    }[schedule]
    weights = torch.where(step < delay, torch.ones_like(step), weights)
    return torch.where(step < end, weights, torch.zeros_like(step))


@dataclass(frozen=True)
class Guidance:
    """Where the velocity is bent to: near `target`, where `weights` say so.

    `max_weight` bounds the correction near noise.
    """

    target: Float[Tensor, "b a e"]
    weights: Float[Tensor, "a e"]
    max_weight: float


def guidance(remainder: Remainder, schedule: Schedule, execution_horizon: int, max_weight: float) -> Guidance:
    """Guidance towards a remainder, over the first `execution_horizon` steps of it."""
    steps, end = len(remainder.known), min(execution_horizon, remainder.length)
    weights = prefix_weights(remainder.delay, end, steps, schedule).to(remainder.known.device)
    return Guidance(remainder.actions, weights[:, None] * remainder.known, max_weight)


def guided(velocity: Velocity, by: Guidance) -> Velocity:
    """The velocity, bent so that it ends where it is guided to (paper, eq. 2 to 4).

    The correction is the error of the actions that the velocity leads to, taken back through the network: a
    vector-Jacobian product, whose graph lives for one step.
    """

    def bent(x: Float[Tensor, "b a e"], time: Float[Tensor, " b"]) -> Float[Tensor, "b a e"]:
        t = time[:, None, None]

        def denoised(x: Tensor) -> tuple[Tensor, Tensor]:
            v = velocity(x, time)
            return x - t * v, v

        # Not `autograd.grad`: with this one the step can be compiled as one graph, and weights are constants.
        actions, back, v = torch.func.vjp(denoised, x, has_aux=True)  # pyrefly: ignore[bad-unpacking]
        (correction,) = back((by.target - actions) * by.weights)
        # (1 - τ) / (τ r²) with τ = 1 - t and r² = t² / (t² + (1 - t)²); infinite at t = 1.
        weight = ((t**2 + (1 - t) ** 2) / (t * (1 - t))).clamp(max=by.max_weight)
        return v - weight * correction

    return bent


@dataclass(frozen=True)
class ActionPrefix:
    """Actions that the network is given as they are, at time 0, instead of denoising them.

    Which they are is a mask: of the same shape whatever the delay.
    """

    actions: Float[Tensor, "b a e"]
    mask: Bool[Tensor, " a"]

    def put(self, x: Float[Tensor, "b a e"]) -> Float[Tensor, "b a e"]:
        """The actions, with the committed ones in their places."""
        return torch.where(self.mask[:, None], self.actions, x)

    def put_time(
        self, step: Float[Tensor, "_ ..."], at_zero: Float[Tensor, "_ ..."]
    ) -> Float[Tensor, "a ..."]:
        """What was prepared of a step, for the committed actions that of time 0."""
        return torch.where(self.mask.view(-1, *[1] * (step.ndim - 1)), at_zero, step)


def action_prefix(remainder: Remainder, max_delay: int) -> ActionPrefix:
    """The committed actions of a remainder, as many of them as the policy was trained to continue."""
    if remainder.delay > max_delay:
        _warn_of_training(remainder.delay, max_delay)
    step = torch.arange(remainder.actions.shape[1], device=remainder.actions.device)
    return ActionPrefix(remainder.actions, step < min(remainder.delay, max_delay))


@functools.cache  # once for each
def warn_of_horizon(delay: int, horizon: int, enough: int) -> None:
    """Warn of a delay beyond the execution horizon, which is all that LeRobot hands over of a remainder."""
    logger.warning(
        "real-time chunking: %d actions will be executed before the new chunk arrives, but it is held to %d "
        "of them, and will jump: set --inference.rtc.execution_horizon=%d or more",
        delay,
        horizon,
        enough,
    )


@functools.cache
def _warn_of_training(delay: int, max_delay: int) -> None:
    logger.warning(
        "real-time chunking: %d actions will be executed before the new chunk arrives, but the policy has "
        "learnt to go on from %d of them, and may jump: train with --policy.rtc_training_max_delay=%d or "
        "more, or find out what is slow with `lerobot-pi0 latency`",
        delay,
        max_delay,
        delay,
    )
