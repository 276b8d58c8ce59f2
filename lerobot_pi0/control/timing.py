"""Which latency a chunk of actions hides: the one place that knows the rule.

A chunk has H actions, of which one is sent each 1/fps seconds; the next chunk takes `latency` seconds, which
are d = ⌈latency · fps⌉ control steps.

    sync    the loop waits for the policy: it stalls for the latency, once in n_action_steps
    rtc     the policy runs beside the loop from when `queue_threshold` actions are left: no stall while
            d ≤ queue_threshold and d ≤ H/2. Beyond that `lerobot-rollout` still drops the first d actions of
            a chunk, and does not move at all once d ≥ H; `lerobot-pi0 rollout` drops those that were sent
            meanwhile, which are at most what was left
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["sync", "rtc"]


@dataclass(frozen=True)
class Timing:
    """How a control loop runs with a latency."""

    latency: float  # seconds
    fps: float
    delay: int  # control steps that pass while a chunk is computed
    stall: float  # seconds without an action, once per chunk; infinite when no action is ever sent
    actions: int  # sent of each chunk
    rate: float  # actions per second

    @property
    def effect(self) -> str:
        """What the latency does to the robot."""
        if not self.actions:
            return "all of a chunk's actions are late when it comes, and the robot would never move"
        if not self.stall:
            return "no stalls"
        return (
            f"the robot stands still for {_seconds(self.stall)} every {self.actions} actions "
            f"({self.rate:.1f} actions per second of {self.fps:g})"
        )

    def __str__(self) -> str:
        steps = f"{self.delay} control step{'s'[: self.delay != 1]}"
        return f"a chunk takes {_seconds(self.latency)}, {steps} at {self.fps:g} fps: {self.effect}"


@dataclass(frozen=True)
class Suggestion:
    """How to run a policy with a latency, and how fast it could be run so without stalls."""

    kind: Kind
    timing: Timing
    flags: list[str]  # of `lerobot-rollout`
    highest_fps: float

    def __str__(self) -> str:
        text = f"{' '.join(self.flags)} ({self.timing.effect})"
        if self.timing.stall:
            text += f". Without stalls this machine holds {self.highest_fps:.3g} fps at most"
        return text


def sync_timing(latency: float, fps: float, n_action_steps: int) -> Timing:
    """The loop with the policy in it, which sends `n_action_steps` of each chunk."""
    waits = latency * fps > 1
    return Timing(
        latency,
        fps,
        delay=math.ceil(latency * fps),
        stall=latency if waits else 0.0,
        actions=n_action_steps,
        # Of the wait one control step would have passed anyway.
        rate=n_action_steps / (n_action_steps / fps + latency - 1 / fps) if waits else fps,
    )


class RtcTiming(Protocol):
    """A rule for the loop with the policy beside it."""

    def __call__(self, latency: float, fps: float, chunk_size: int, queue_threshold: int) -> Timing: ...


def rtc_timing(latency: float, fps: float, chunk_size: int, queue_threshold: int) -> Timing:
    """The loop with the policy beside it, in real-time chunking as `lerobot-pi0 rollout` corrects it."""
    delay = math.ceil(latency * fps)
    # When the policy begins. Of more than half, what is left alternates around half: as much as is sent of
    # one chunk is missing from the next.
    left = min(max(queue_threshold, 0), chunk_size // 2)
    if delay <= left:
        return Timing(latency, fps, delay, stall=0.0, actions=chunk_size - delay, rate=fps)
    stall, actions = latency - left / fps, chunk_size - left
    return Timing(latency, fps, delay, stall, actions, rate=actions / (actions / fps + stall))


def lerobot_rtc_timing(latency: float, fps: float, chunk_size: int, queue_threshold: int) -> Timing:
    """The loop with the policy beside it, in real-time chunking as `lerobot-rollout` has it."""
    delay = math.ceil(latency * fps)
    arrive = max(chunk_size - delay, 0)
    if not arrive:
        return Timing(latency, fps, delay, stall=math.inf, actions=0, rate=0.0)
    left = min(max(queue_threshold, 0), arrive)  # when the policy begins
    if delay <= left:
        return Timing(latency, fps, delay, stall=0.0, actions=arrive, rate=fps)
    stall = latency - left / fps
    return Timing(latency, fps, delay, stall, actions=arrive, rate=arrive / (arrive / fps + stall))


def suggest(
    fps: float,
    chunk_size: int,
    n_action_steps: int,
    latency: float,
    guided_latency: float | None,
    rule: RtcTiming = rtc_timing,
) -> Suggestion:
    """The way to run that sends the most actions per second, sync where both do.

    `guided_latency`: of a chunk in real-time chunking; None for a policy without, or a latency of a whole
    chunk, which none goes on from. Half a chunk as `queue_threshold` hides all that any threshold hides.
    """
    kept = sync_timing(latency, fps, n_action_steps)
    n_action_steps = chunk_size if kept.stall else n_action_steps
    half = chunk_size // 2
    sync = sync_timing(latency, fps, n_action_steps)
    rtc = None if guided_latency is None else rule(guided_latency, fps, chunk_size, half)
    highest = max(1 / latency, half / guided_latency if guided_latency else 0.0)
    if rtc is None or rtc.delay >= chunk_size or sync.rate >= rtc.rate:
        flags = ["--inference.type=sync", f"--policy.n_action_steps={n_action_steps}"]
        return Suggestion("sync", sync, flags, highest)
    flags = [
        "--inference.type=rtc",
        f"--inference.queue_threshold={half}",
        f"--inference.rtc.execution_horizon={execution_horizon(rtc.delay, half)}",
    ]
    return Suggestion("rtc", rtc, flags, highest)


def execution_horizon(delay: int, queue_threshold: int) -> int:
    """How many actions of the old chunk guide the new one: those that are executed meanwhile and as many
    again, at least LeRobot's 10, and never more than are left."""
    return min(queue_threshold, max(2 * delay, 10))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"
