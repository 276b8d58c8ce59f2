"""Flow matching: time runs from 1 (noise) to 0 (actions); said once, here (Lipman et al., 2023; π0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Solver = Literal["euler", "ab2"]  # as π0 was published; Adams–Bashforth of second order
# velocity(actions (b, a, e), time (b,)) -> (b, a, e)
type Velocity = Callable[[Float[Tensor, "b a e"], Float[Tensor, " b"]], Float[Tensor, "b a e"]]


def sample_time(uniform: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Training times in (0.001, 1] of uniform numbers: Beta(1.5, 1) · 0.999 + 0.001 (π0, appendix B)."""
    return uniform ** (1 / 1.5) * 0.999 + 0.001  # the inverse of Beta(1.5, 1)'s distribution function


def interpolate(
    actions: Float[Tensor, "b a e"], noise: Float[Tensor, "b a e"], time: Float[Tensor, "b ..."]
) -> tuple[Float[Tensor, "b a e"], Float[Tensor, "b a e"]]:
    """Point and velocity at `time`, one per sample or action, on the straight path from actions to noise."""
    t = time.reshape(len(time), -1, 1)
    return t * noise + (1 - t) * actions, noise - actions


def embed_time(time: Float[Tensor, "*b"], dim: int) -> Float[Tensor, "*b dim"]:
    """Sines, then cosines, of `time` at dim/2 periods in geometric progression from 4e-3 to 4, in float32.

    One unit in the last place of `time` turns the fastest sinusoid by 1.4e-4 rad: compare with a tolerance.
    """
    fraction = torch.linspace(0.0, 1.0, dim // 2, dtype=torch.float32, device=time.device)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    angle = time.float()[..., None] * (1.0 / period * 2 * math.pi)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def step_times(num_steps: int) -> list[float]:
    """Times at which a sampler evaluates the velocity: 1 and down, in equal steps summed in float32."""
    times = [torch.tensor(1.0, dtype=torch.float32)]
    step = torch.tensor(-1.0 / num_steps, dtype=torch.float32)
    for _ in range(num_steps - 1):
        times.append(times[-1] + step)
    return [time.item() for time in times]


def integrate(
    velocity: Callable[[Tensor, Any], Tensor],
    noise: Float[Tensor, "b a e"],
    num_steps: int,
    prepared: Iterable[Any] | None = None,
    solver: Solver = "euler",
) -> Float[Tensor, "b a e"]:
    """Actions at time 0 from noise at time 1, by steps along `velocity(actions, time)`: Euler's, or those of
    second order. `velocity` may take what was `prepared` of each step instead of its time."""
    if prepared is None:
        prepared = (noise.new_full((len(noise),), time) for time in step_times(num_steps))
    x, before = noise, None
    for step in prepared:
        v = velocity(x, step)
        x = torch.sub(x, v if before is None else torch.lerp(before, v, 1.5), alpha=1 / num_steps)
        before = v if solver == "ab2" else None
    return x
