"""The flow-matching loss of a batch, and figures of it by joint and by part of the chunk.

Shapes as in `model/`: b batch, n = k·b with k (noise, time) draws of an observation in a row, a actions of a
chunk, e their padded size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lerobot_pi0.model import Network, Observation
from lerobot_pi0.model.flow import sample_time
from lerobot_pi0.training.randomness import normal, uniform

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Streams of random numbers (see `augmentation` for the others).
NOISE, TIME, DELAY = 0, 1, 4
_PARTS = 5  # of a chunk, whose losses are logged


def flow_matching_loss(
    network: Network,
    observation: Observation,
    actions: Float[Tensor, "b a e"],
    keys: Int[Tensor, " n"],
    max_delay: int = 0,
    train_prefix: bool = True,
) -> tuple[Float[Tensor, "b a e"], Float[Tensor, "b a"]]:
    """Squared error of the velocity, the mean over an observation's draws, and a mask of the actions that it
    is of.

    `keys` are those of `randomness.sample_keys`: they determine noise, time and simulated delays. With
    `max_delay` each draw has an action prefix of up to that many committed actions, which have time 0 and no
    loss (training-time real-time chunking). `train_prefix=False` computes the prefix without a graph.
    """
    noise, time = normal(keys, tuple(actions.shape[1:]), NOISE), sample_time(uniform(keys, (), TIME))
    learnt = None
    if max_delay:
        delays = sample_delays(uniform(keys, (), DELAY), max_delay)
        time, learnt = action_times(time, delays, actions.shape[1])
    # Precision has one owner, the network: an autocast around it would round what it keeps in float32.
    with torch.autocast(actions.device.type, enabled=False):
        prefix = None
        if not train_prefix:
            with torch.no_grad():
                prefix = network.prefix(observation)
        losses = network.loss(observation, actions, noise, time, prefix)
    losses = losses.unflatten(0, (len(actions), -1))
    if learnt is None:
        losses = losses.mean(1)
        return losses, torch.ones_like(losses[..., 0])
    learnt = learnt.unflatten(0, (len(actions), -1)).to(losses.dtype)
    losses = (losses * learnt[..., None]).sum(1) / learnt.sum(1).clamp(min=1)[..., None]
    return losses, learnt.amax(1)


def loss_per_sample(losses: Float[Tensor, "b a e"], valid: Float[Tensor, "b a"]) -> Float[Tensor, " b"]:
    """The mean over the padded action's dimensions, as in openpi, and over a sample's valid actions."""
    return (losses.mean(-1) * valid).sum(1) / valid.sum(1).clamp(min=1)


def sample_delays(uniform: Float[Tensor, " n"], max_delay: int) -> Int[Tensor, " n"]:
    """Simulated delays, uniform over 0 … `max_delay`, of uniform random numbers in [0, 1)."""
    return (uniform * (max_delay + 1)).long().clamp(max=max_delay)


def action_times(
    time: Float[Tensor, " n"], delays: Int[Tensor, " n"], chunk_size: int
) -> tuple[Float[Tensor, "n a"], Bool[Tensor, "n a"]]:
    """Training times of each action, 0 for those before the delay; and which actions are to be learnt."""
    learnt = torch.arange(chunk_size, device=time.device) >= delays[:, None]
    return time[:, None] * learnt, learnt


def loss_figures(
    losses: Float[Tensor, "b a e"], valid: Float[Tensor, "b a"], joints: Sequence[str]
) -> dict[str, float]:
    """Loss by joint and by part of the chunk, as numbers to log. Waits for the device."""
    losses = losses.detach()[..., : len(joints)]
    sums, counts = (losses * valid[..., None]).sum(0), valid.sum(0)[:, None]
    by_joint = sums.sum(0) / counts.sum().clamp(min=1)
    parts = list(zip(sums.chunk(_PARTS), counts.chunk(_PARTS), strict=True))
    by_part = [part.mean(1).sum() / count.sum().clamp(min=1) for part, count in parts]
    ends = torch.tensor([0, *(len(part) for part, _ in parts)]).cumsum(0).tolist()
    names = [*joints, *(f"steps_{a}-{b - 1}" for a, b in itertools.pairwise(ends))]
    values = torch.cat((by_joint, torch.stack(by_part))).tolist()
    return {f"loss/{name}": value for name, value in zip(names, values, strict=True)}
