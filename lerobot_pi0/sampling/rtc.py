"""Real-time chunking: a new chunk that goes on where the old one, still being executed, is.

Two ways, both beside the model: guidance, which bends the velocity of any flow policy towards the actions
that are left over (Black et al., 2025, "Real-Time Execution of Action Chunking Flow Policies"), and
conditioning, for a policy that was trained with actions already decided (Black et al., 2025, "Training-Time
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

# How the pull of the leftover fades behind what is certain to be executed.
Schedule = Literal["ZEROS", "ONES", "LINEAR", "EXP"]


@dataclass(frozen=True)
class Leftover:
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


def read_leftover(
    left: Float[Tensor, "*b s d"],
    delay: int,
    noise: Float[Tensor, "b a e"],
    anchor: Float[Tensor, "b d"] | None,
) -> Leftover | None:
    """The leftover that LeRobot hands over, of a chunk like `noise`; None if nothing is left.

    LeRobot fills a short one up with rows of zeros: these are no actions, and would pull the arm to the mean
    pose of the data. Relative actions are so to the `anchor` of the observation at hand.
    """
    left = (left if left.ndim == 3 else left[None]).to(noise)
    real = left.ne(0).any(2).any(0).nonzero()
    if not len(real):
        return None
    chunk_size, padded_size = noise.shape[1:]
    steps, size = min(int(real.max()) + 1, chunk_size), left.shape[2]
    actions = torch.zeros_like(noise)
    actions[:, :steps, :size] = left[:, :steps] if anchor is None else left[:, :steps] - anchor[:, None]
    known = torch.zeros(chunk_size, padded_size, dtype=torch.bool, device=left.device)
    known[:steps, :size] = True
    return Leftover(actions, known, min(delay, steps))


def prefix_weights(delay: int, end: int, chunk_size: int, schedule: Schedule) -> Float[Tensor, " a"]:
    """How much each action of the leftover counts: all before `delay`, none from `end` on (paper, eq. 5)."""
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


def guidance(leftover: Leftover, schedule: Schedule, execution_horizon: int, max_weight: float) -> Guidance:
    """Guidance towards a leftover, over the first `execution_horizon` steps of it."""
    steps, end = len(leftover.known), min(execution_horizon, leftover.length)
    weights = prefix_weights(leftover.delay, end, steps, schedule).to(leftover.known.device)
    return Guidance(leftover.actions, weights[:, None] * leftover.known, max_weight)


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
class Decided:
    """Actions that the network is given as they are, at time 0, instead of denoising them.

    Which they are is a mask: of the same shape whatever the delay.
    """

    actions: Float[Tensor, "b a e"]
    mask: Bool[Tensor, " a"]

    def put(self, x: Float[Tensor, "b a e"]) -> Float[Tensor, "b a e"]:
        """Actions in which the decided ones stand as they are."""
        return torch.where(self.mask[:, None], self.actions, x)


def decided(leftover: Leftover, max_delay: int) -> Decided:
    """What of a leftover is certain to be executed, as far as the policy has learnt to go on from it."""
    if leftover.delay > max_delay:
        _tell_of_training(leftover.delay, max_delay)
    step = torch.arange(leftover.actions.shape[1], device=leftover.actions.device)
    return Decided(leftover.actions, step < min(leftover.delay, max_delay))


@functools.cache  # once for each
def tell_of_horizon(delay: int, horizon: int, enough: int) -> None:
    """Warn of a delay beyond the execution horizon, which is all that LeRobot hands over of a leftover."""
    logger.warning(
        "real-time chunking: %d actions will be executed before the new chunk arrives, but it is held to %d "
        "of them, and will jump: set --inference.rtc.execution_horizon=%d or more",
        delay,
        horizon,
        enough,
    )


@functools.cache
def _tell_of_training(delay: int, max_delay: int) -> None:
    logger.warning(
        "real-time chunking: %d actions will be executed before the new chunk arrives, but the policy has "
        "learnt to go on from %d of them, and may jump: train with --policy.rtc_training_max_delay=%d or "
        "more, or find out what is slow with `lerobot-pi0 latency`",
        delay,
        max_delay,
        delay,
    )
