"""Timing of a control loop, measured: rate, periods and stalls, from the times at which actions were sent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERRUN = 1.5  # control steps: a longer period was too long
STALL = 2.0  # control steps: in a period as long an action is missing


@dataclass(frozen=True)
class LoopTiming:
    """Times are in seconds. A stall's length is what its period has beyond a control step."""

    actions: int
    wanted: float  # actions per second
    seconds: float  # from the first to the last, without the pauses between episodes
    rate: float  # actions per second
    periods: dict[str, float]  # p50, p95, p99, max
    overruns: float  # share of the periods
    stalls: int
    stalled: float  # of all of them
    longest: float
    waits: int | None = None  # stalls in which the loop waited for the policy; None: not known

    def __str__(self) -> str:
        if self.actions < 2:
            return f"{self.actions} action was sent"
        text = (
            f"{self.actions} actions in {self.seconds:.1f} s: {self.rate:.1f} per second of {self.wanted:g}"
        )
        if not self.stalls:
            return f"{text}, no stalls"
        return (
            f"{text}, {self.stalls} stall{'s'[: self.stalls != 1]} of {self.stalled:.2f} s in all, the "
            f"longest {self.longest:.2f} s"
        )

    @property
    def causes(self) -> str:
        """What the stalls waited for, in words."""
        if self.waits is None:
            return "what the stalls waited for is not known"
        return (
            f"in {self.waits} of the stalls the loop waited for the policy, in {self.stalls - self.waits} "
            "for the robot, its cameras or the computer"
        )


def loop_timing(
    episodes: Sequence[Sequence[float]], fps: float, waits: Sequence[Sequence[float]] | None = None
) -> LoopTiming:
    """Of the times of actions, episode by episode: what lies between two episodes is no stall.

    `waits`: of each action, how long the loop waited for the policy since the one before.
    """
    times = [np.asarray(episode, dtype=float) for episode in episodes]
    periods = np.concatenate([np.diff(episode) for episode in times]) if times else np.empty(0)
    stalled = periods >= STALL / fps
    stalls = periods[stalled] - 1 / fps
    waited = None
    if waits is not None:
        flat = [np.asarray(episode, dtype=float)[1:] for episode in waits]
        # Most of what is missing.
        waited = int((np.concatenate(flat)[stalled] > stalls / 2).sum()) if flat else 0
    seconds = float(periods.sum())
    return LoopTiming(
        actions=sum(map(len, times)),
        wanted=fps,
        seconds=seconds,
        rate=len(periods) / seconds if seconds else math.nan,
        periods=spread(periods, 50, 95, 99),
        overruns=float((periods > OVERRUN / fps).mean()) if len(periods) else 0.0,
        stalls=len(stalls),
        stalled=float(stalls.sum()),
        longest=float(stalls.max(initial=0.0)),
        waits=waited,
    )


def spread(values: Sequence[float] | np.ndarray, *percents: int) -> dict[str, float]:
    """Percentiles (p50, …) and the largest; nothing of nothing."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return {}
    found = {f"p{percent}": float(np.percentile(array, percent)) for percent in percents}
    return found | {"max": float(array.max())}
